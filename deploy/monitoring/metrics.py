"""Reports as Prometheus metrics. The ledger is the source: a restarted server counts on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fedtune_strategies.errors import ConfigError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_STATES = ("running", "finished", "failed", "stopped", "unreadable")
_NODE_STATES = ("working", "present", "silent", "lost", "refused")

# Name, kind, help, and where the value stands in a report; None is left out. Names and units as Prometheus wants them.
_RUN: list[tuple[str, str, str, tuple[str, str]]] = [
    ("fedtune_rounds", "counter", "Rounds committed.", ("run", "round")),
    ("fedtune_rounds_planned", "gauge", "Rounds of the run.", ("run", "rounds")),
    ("fedtune_restarts", "counter", "Times the run was resumed.", ("run", "restarts")),
    ("fedtune_seconds_left", "gauge", "Estimated seconds to the end.", ("run", "seconds_left")),
    ("fedtune_updated_timestamp_seconds", "gauge", "Time of the newest record.", ("run", "updated")),
    ("fedtune_train_loss", "gauge", "Training loss of the newest round, nats a token.", ("rounds", "train_loss")),
    ("fedtune_eval_loss", "gauge", "Newest held-out loss, nats a token.", ("evaluations", "loss")),
    ("fedtune_eval_rouge_l", "gauge", "Newest Rouge-L, 0 to 1.", ("evaluations", "rouge_l")),
    ("fedtune_nodes", "gauge", "Nodes that ever took part.", ("totals", "nodes")),
    ("fedtune_nodes_alive", "gauge", "Nodes that work now or answered when last asked.", ("totals", "nodes_alive")),
    ("fedtune_replies", "counter", "Accepted replies.", ("totals", "replies")),
    ("fedtune_replies_refused", "counter", "Refused replies and nodes.", ("totals", "refused")),
]
_NODE: list[tuple[str, str, str, str]] = [
    ("fedtune_node_replies", "counter", "Accepted replies.", "replies"),
    ("fedtune_node_replies_refused", "counter", "Refused replies.", "refused"),
    ("fedtune_node_compute_seconds", "counter", "Seconds that the node worked on tasks.", "seconds"),
    ("fedtune_node_train_loss", "gauge", "Training loss of the newest reply, nats a token.", "loss"),
    ("fedtune_node_peak_memory_bytes", "gauge", "Peak memory of the node's worker.", "peak_memory"),
    ("fedtune_node_last_seen_timestamp_seconds", "gauge", "When the node was last heard of.", "last_seen"),
]

_WORKER: list[tuple[str, str, str, str]] = [
    ("fedtune_worker_tasks", "counter", "Tasks answered since the worker was started.", "tasks"),
    ("fedtune_worker_failures", "counter", "Tasks that could not be done.", "failures"),
    ("fedtune_worker_busy_seconds", "counter", "Seconds spent on tasks.", "seconds"),
    ("fedtune_worker_last_task_seconds", "gauge", "How long the newest task took.", "last_seconds"),
    ("fedtune_worker_last_task_timestamp_seconds", "gauge", "When the newest task was done.", "last_time"),
    ("fedtune_worker_start_timestamp_seconds", "gauge", "When the worker was started.", "started"),
    ("fedtune_worker_peak_memory_bytes", "gauge", "Peak memory of the worker.", "peak_memory"),
]


def run_metrics(reports: Iterable[dict[str, Any]]) -> bytes:
    """Render reports in Prometheus' text format."""
    reports = list(reports)
    return _rendered(lambda: _families(reports))


def worker_metrics(facts: dict[str, Any] | None) -> bytes:
    """Render a node's own facts, see `client_app.stats`; without them that no worker runs."""
    return _rendered(lambda: _worker_families(facts))


def _worker_families(facts: dict[str, Any] | None) -> Iterator[Any]:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    yield GaugeMetricFamily("fedtune_worker_up", "1 while a worker holds model and data.", int(facts is not None))
    if facts is None:
        return
    classes = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
    for name, kind, help, key in _WORKER:
        yield classes[kind](name, help, facts[key])
    payload = CounterMetricFamily("fedtune_worker_payload_bytes", "Payload of tasks and answers.", labels=["direction"])
    for way in ("up", "down"):
        payload.add_metric([way], facts[f"bytes_{way}"])
    yield payload


def _rendered(families: Callable[[], Iterator[Any]]) -> bytes:
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.registry import Collector
    except ImportError:
        raise ConfigError("metrics need a library: pip install prometheus-client.") from None

    class Reports(Collector):
        def collect(self) -> Iterator[Any]:
            return families()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Reports())
    return generate_latest(registry)


def _families(reports: list[dict[str, Any]]) -> Iterator[Any]:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    classes = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}

    def family(name: str, kind: str, help: str, labels: tuple[str, ...], samples: Iterable[tuple[Any, ...]]) -> Any:
        made = classes[kind](name, help, labels=("run", *labels))
        for *values, sample in samples:
            if sample is not None:
                made.add_metric(values, sample)
        return made

    runs = [(report["run"]["name"], report) for report in reports]
    nodes = [(run, node) for run, report in runs for node in report["nodes"]]
    yield family(
        "fedtune_run_info", "gauge", "What runs.", ("method", "model", "version"),
        ((run, *(r["run"][key] for key in ("method", "model", "version")), 1) for run, r in runs),
    )  # fmt: skip
    yield family(
        "fedtune_run_state", "gauge", "1 for the state of the run.", ("state",),
        ((run, state, int(r["run"]["state"] == state)) for run, r in runs for state in _STATES),
    )  # fmt: skip
    for name, kind, help, place in _RUN:
        yield family(name, kind, help, (), ((run, _value(report, *place)) for run, report in runs))
    yield family(
        "fedtune_payload_bytes", "counter", "Payload on the wire, without Flower's envelope.", ("direction",),
        ((run, way, r["totals"][f"bytes_{way}"]) for run, r in runs for way in ("up", "down")),
    )  # fmt: skip
    yield family(
        "fedtune_phase_seconds", "counter", "Seconds of the server by phase of a round.", ("phase",),
        ((run, phase, seconds) for run, r in runs for phase, seconds in r["totals"]["seconds"].items()),
    )  # fmt: skip
    yield family(
        "fedtune_node_state", "gauge", "1 for the state of the node.", ("node", "state"),
        ((run, node["name"], state, int(node["state"] == state)) for run, node in nodes for state in _NODE_STATES),
    )  # fmt: skip
    yield family(
        "fedtune_node_payload_bytes", "counter", "Payload of its accepted replies and tasks.", ("node", "direction"),
        ((run, node["name"], way, node[f"bytes_{way}"]) for run, node in nodes for way in ("up", "down")),
    )  # fmt: skip
    for name, kind, help, key in _NODE:
        yield family(name, kind, help, ("node",), ((run, node["name"], node[key]) for run, node in nodes))


def _value(report: dict[str, Any], part: str, key: str) -> float | None:
    """Return a fact of a report, of a series the newest that there is."""
    points = report[part] if isinstance(report[part], list) else [report[part]]
    return next((point[key] for point in reversed(points) if point[key] is not None), None)
