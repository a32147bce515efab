"""The ClientApp: a thin messenger between Flower and the resident worker. It imports no torch."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.worker_client import WorkerSpec, ask_worker
from fedtune_strategies.protocol.records import for_flower, from_record, offer_in, to_record

app = ClientApp()


@app.train()
@app.query()
def forward(message: Message, context: Context) -> Message:
    """Hand a task to the worker and its answer to Flower."""
    kind, payload = from_record(message.content)
    spec = WorkerSpec(dict(context.run_config), dict(context.node_config), context.node_id)
    reply = ask_worker(spec, kind, payload, timeout=message.metadata.ttl, offer=offer_in(message.content))
    return Message(for_flower(to_record(*reply)), reply_to=message)
