"""The messages that every method shares, and how any message becomes bytes. A method's own stand in its folder."""

from fedtune_strategies.protocol.handshake import (
    PROTOCOL_VERSION,
    Hello,
    HelloReply,
    ModelChunk,
    ModelManifest,
    ModelRequest,
)
from fedtune_strategies.protocol.reply import TrainReply
from fedtune_strategies.protocol.status import Ack, Failure, StateMissing
from fedtune_strategies.protocol.wire import Message, decode, encode, register

__all__ = [
    "PROTOCOL_VERSION",
    "Ack",
    "Failure",
    "Hello",
    "HelloReply",
    "Message",
    "ModelChunk",
    "ModelManifest",
    "ModelRequest",
    "StateMissing",
    "TrainReply",
    "decode",
    "encode",
    "register",
]
