"""The typed messages between a strategy and a node, family by family, and their bytes."""

from fedtune_strategies.protocol.messages.arrays import ArraysReply, ArraysTask
from fedtune_strategies.protocol.messages.blocks import BlockReply, BlockTask, Kept
from fedtune_strategies.protocol.messages.greeting import (
    PROTOCOL_VERSION,
    Hello,
    HelloReply,
    ModelManifest,
    ModelPiece,
    ModelWanted,
)
from fedtune_strategies.protocol.messages.seeds import SeedReply, SeedTask
from fedtune_strategies.protocol.messages.trouble import Failure, Lacking
from fedtune_strategies.protocol.messages.wire import Message, decode, encode

__all__ = [
    "PROTOCOL_VERSION",
    "ArraysReply",
    "ArraysTask",
    "BlockReply",
    "BlockTask",
    "Failure",
    "Hello",
    "HelloReply",
    "Kept",
    "Lacking",
    "Message",
    "ModelManifest",
    "ModelPiece",
    "ModelWanted",
    "SeedReply",
    "SeedTask",
    "decode",
    "encode",
]
