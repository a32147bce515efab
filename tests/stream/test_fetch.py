"""The base model over a stream that is cut, to a worker that is ended in the middle of it: the bytes on the wire."""

import threading

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from client_app.node import Node
from client_app.stream import Stream
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.language.base import stored_fingerprint
from fedtune_strategies.model_transfer import ModelSource
from fedtune_strategies.protocol import messages as protocol
from tests.conftest import make_tokenizer
from tests.stream.conftest import StreamingNode, wait_until


class Fetching(StreamingNode):
    """A real node, whose worker ends with the model's twentieth part in its hands; the next one begins again."""

    def __init__(self, make, server):
        super().__init__(1)
        self.make, self.node, self.parts, self.server = make, make(), [], server

    def __call__(self, kind, payload):
        if threading.current_thread() is threading.main_thread():  # by Flower: the stream carries what follows
            wait_until(lambda: self.server.works(1))
        if kind == "model-chunk":
            self.parts.append(protocol.decode(kind, payload).chunk)
            if len(self.parts) == 20:
                ended, self.node = self.stream, self.make()
                self.stream = Stream(self, self.ended.append, lambda: self.step)
                threading.Thread(target=ended.leave, args=(False,)).start()
                raise InterruptedError
        return self.node.handle(kind, payload)


def test_a_model_that_is_interrupted_twice_costs_at_most_a_tenth_more_than_its_bytes(
    streams, settings, data_files, tmp_path
):
    folder, tokenizer = tmp_path / "model", make_tokenizer()
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    ).to(torch.bfloat16).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    source = ModelSource(folder)
    own = {"name": "n", "data": str(data_files["node-0"]), "model": "server", "cache": str(tmp_path / "cache")}
    node = Fetching(lambda: Node(settings, own, 1), streams.server)
    streams.nodes.clear()
    streams.nodes[1] = node
    streams.wire.cut_after = int(0.4 * size)
    fleet = Fleet(streams.grid, "", poll_interval=0.02)
    fleet.know_base(stored_fingerprint(folder, "auto"), source.answer)
    fleet.wait_for_nodes(1, 60.0)
    assert streams.wire.cut_after is None and len(node.parts) > 60, "it was not interrupted"
    assert size < streams.wire.carried + streams.flower.carried < 1.1 * size
