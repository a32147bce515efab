"""Typed messages in and out of Flower's: the place where `messages` and `records` meet."""

from __future__ import annotations

from typing import TypeVar

from flwr.app import Message, MessageType, RecordDict

from fedtune_strategies.errors import NodesError, ProtocolError, error_from_code
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.door import clean, refusing
from fedtune_strategies.protocol.records import from_record, to_record

T = TypeVar("T", bound=protocol.Message)


def task(node_id: int, message: protocol.Message, round: int) -> Message:
    """Address a protocol message to a node.

    Parameters
    ----------
    node_id : int
        Flower's id of the receiver.
    message : protocol.Message
        What to send.
    round : int
        Round, shown in Flower's logs.

    Returns
    -------
    flwr.app.Message
        A training message.
    """
    return address(node_id, message.kind, protocol.encode(message), round)


def address(node_id: int, kind: str, payload: bytes, round: int) -> Message:
    """Address an encoded message to a node; encode once to send the same to many."""
    return Message(to_record(kind, payload), node_id, MessageType.TRAIN, group_id=str(round))


def query(node_id: int, message: protocol.Message, seconds: float) -> Message:
    """Address a question to a node that takes no part yet; it is given up after so many seconds."""
    return Message(to_record(message.kind, protocol.encode(message)), node_id, MessageType.QUERY, ttl=seconds)


def decoded(content: RecordDict, expected: type[T]) -> T:
    """Decode the content of a Flower message.

    Parameters
    ----------
    content : RecordDict
        The content.
    expected : type
        The message type that must come out.

    Returns
    -------
    Message
        The message.

    Raises
    ------
    ProtocolError
        The content is damaged or of another type.
    """
    message = protocol.decode(*from_record(content))
    if not isinstance(message, expected):
        raise ProtocolError(f"received a '{message.kind}' instead of a '{expected.kind}'.")
    return message


def answer(reply: Message) -> protocol.Message:
    """Decode a node's reply.

    Parameters
    ----------
    reply : flwr.app.Message
        What came.

    Returns
    -------
    Message
        The message.

    Raises
    ------
    FedTuneError
        There is none: what the node failed with, or `ProtocolError` for damaged content, `NodesError` for Flower's own
        errors.
    """
    if reply.has_error():
        reason = clean(reply.error.reason or "") or "no reason given"
        raise NodesError(f"did not answer: {reason} (code {reply.error.code}).")
    with refusing():
        message = protocol.decode(*from_record(reply.content))
    if isinstance(message, protocol.Failure):
        raise error_from_code(message.exit_code, message.message)
    return message
