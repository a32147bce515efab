"""The base model over the wire: chunks, cache, and whole runs of nodes that hold nothing."""

import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fedtune_strategies.admission
from client_app.node import Node
from fedtune_strategies.errors import ConfigError, NodesError, ProtocolError, ResourceError
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.folders import MARK
from fedtune_strategies.model_transfer import CHUNK_BYTES, ModelCache, ModelSource, as_bytes, read_manifest
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.testing import InMemoryGrid
from server_app.run import execute
from tests.federations import final_state, run


@pytest.fixture
def folder(tmp_path):
    """Something like a model folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(1000))
    (folder / "modeling.py").write_text("import os")
    return folder


def receive(cache, source, stop_after=10**6):
    """Let a cache take what it wants from a source; return the folder, or the last wish."""
    step = cache.start("n", "some/model", source.manifest)
    while isinstance(step, protocol.ModelRequest) and stop_after:
        chunk = source.answer(step)
        step = cache.take("n", chunk.chunk, as_bytes(chunk.data))
        stop_after -= 1
    return step


def test_a_model_arrives_whole_and_without_code(folder, tmp_path):
    got = receive(ModelCache(tmp_path / "cache", 10**6), ModelSource(folder, chunk_bytes=300))
    assert sorted(path.name for path in got.iterdir()) == [MARK, "config.json", "model.safetensors"]
    assert (got / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert ModelCache(tmp_path / "cache", 10**6).find("some/model") == got


def test_after_a_restart_only_what_is_missing_is_wanted(folder, tmp_path):
    source = ModelSource(folder, chunk_bytes=300)
    assert len(read_manifest(source.manifest)) == 5
    wish = receive(ModelCache(tmp_path / "cache", 10**6), source, stop_after=3)
    assert wish.chunk == 3
    again = ModelCache(tmp_path / "cache", 10**6)
    assert again.find("some/model") is None
    assert again.start("n", "some/model", source.manifest).chunk == 3
    # What was spoilt on disk meanwhile is wanted again.
    partial = next((tmp_path / "cache").glob("*.partial"))
    with (partial / "model.safetensors").open("r+b") as file:
        file.write(b"spoilt")
    assert again.start("n", "some/model", source.manifest).chunk == 1
    assert (receive(again, source) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_damaged_or_foreign_chunk_is_refused(folder, tmp_path):
    cache, source = ModelCache(tmp_path / "cache", 10**6), ModelSource(folder)
    with pytest.raises(ProtocolError, match="unasked"):
        cache.take("n", 0, b"")
    cache.start("n", "some/model", source.manifest)
    with pytest.raises(ProtocolError, match="not what the server's list says"):
        cache.take("n", 1, b"something else")
    with pytest.raises(ProtocolError, match="of 2 chunks"):
        source.answer(protocol.ModelRequest("n", 2))


def listed(*chunks, sha256="0" * 64):
    """A manifest of (file, start, size)."""
    return json.dumps(
        [dict(zip(("file", "start", "size"), chunk, strict=True)) | {"sha256": sha256} for chunk in chunks]
    )


@pytest.mark.parametrize(
    "file", ["../../etc/passwd.json", "/etc/passwd.json", "run.py", "weights.bin", ".json", "a/b.json", "x.json\n"]
)
def test_a_manifest_cannot_name_other_files(file, tmp_path):
    manifest = listed((file, 0, 1))
    with pytest.raises(ProtocolError, match="damaged list"):
        ModelCache(tmp_path, 10).start("n", "some/model", manifest)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("manifest", ["", "[]", "{}", "[1]", '[{"file": 3}]', '[{"file": "a.json", "start": -1}]'])
def test_a_damaged_manifest(manifest):
    with pytest.raises(ProtocolError, match="damaged list"):
        read_manifest(manifest)


A, B = "a.json", "b.json"


@pytest.mark.parametrize(
    "chunks",
    [
        [(A, 5 * 10**12, 1)],
        [(A, 0, 5), (A, 6, 5)],
        [(A, 0, 5), (A, 4, 5)],
        [(A, 5, 5), (A, 0, 5)],
        [(A, 0, 10**12), (B, 0, -(10**12) + 5)],
        [(A, 0, 0)],
        [(A, 0, 1.5)],
        [(A, 0, True)],
        [(A, 0, CHUNK_BYTES + 1)],
        [(A, 0, 10**400)],
    ],
)
def test_a_list_whose_chunks_do_not_fill_their_files_writes_nothing(chunks, tmp_path):
    with pytest.raises(ProtocolError, match="damaged list"):
        ModelCache(tmp_path, 10**9).start("n", "some/model", listed(*chunks))
    assert list(tmp_path.iterdir()) == []


def test_a_list_of_more_than_the_cache_may_hold_writes_nothing(tmp_path):
    manifest = listed(*((A, i * CHUNK_BYTES, CHUNK_BYTES) for i in range(100)))
    with pytest.raises(ResourceError, match="cache-gb"):
        ModelCache(tmp_path, 99 * CHUNK_BYTES).start("n", "some/model", manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    with pytest.raises(ProtocolError, match="damaged list"):
        read_manifest(listed((A, 0, 1), sha256="../x"))


def test_a_chunk_of_another_size_is_refused_though_its_hash_fits(tmp_path):
    data = bytes(1000)
    cache = ModelCache(tmp_path, 10**6)
    cache.start("n", "some/model", listed((A, 0, 1), sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(ProtocolError, match="not what the server's list says"):
        cache.take("n", 0, data)
    assert not list(tmp_path.rglob(A))


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"w": "../outside.safetensors"}},
        {"weight_map": {"w": "/etc/passwd"}},
        {"weight_map": {"w": 3}},
        {"weight_map": 3},
        [],
    ],
)
def test_an_index_that_names_files_outside_the_model_is_not_kept(folder, tmp_path, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    cache = ModelCache(tmp_path / "cache", 10**6)
    with pytest.raises(ProtocolError, match=r"index\.json of the model names"):
        receive(cache, ModelSource(folder))
    assert cache.find("some/model") is None and not list((tmp_path / "cache").glob("*/"))


def test_a_model_of_several_files_arrives_with_its_index(folder, tmp_path):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model.safetensors"}}')
    assert (receive(ModelCache(tmp_path / "cache", 10**6), ModelSource(folder)) / "model.safetensors").is_file()


def test_a_member_that_asks_for_the_model_without_end_is_refused():
    asked = []

    def greedy(kind, payload):
        asked.append(kind)
        request = protocol.ModelRequest("greedy", -1)
        return request.kind, protocol.encode(request)

    manifest = protocol.ModelManifest("[]")
    fleet = Fleet(InMemoryGrid({1: greedy}), "abcd", poll_interval=0.01, supply=lambda wanted: manifest)
    with pytest.raises(ProtocolError, match="8 times for the same part"):
        fleet.wait_for_nodes(1, 30.0)
    assert len(asked) == 9


def test_a_model_that_the_server_cannot_read_refuses_the_node_alone():
    request = protocol.ModelRequest("n", 0)
    hello = protocol.HelloReply("b", protocol.PROTOCOL_VERSION, 5, "abcd", 1)
    nodes = {1: lambda *_: (request.kind, protocol.encode(request)), 2: lambda *_: (hello.kind, protocol.encode(hello))}

    def supply(wanted):
        raise PermissionError("no")

    fleet = Fleet(InMemoryGrid(nodes), "abcd", poll_interval=0.01, supply=supply)
    fleet.wait_for_nodes(1, 5.0)
    assert list(fleet.nodes) == ["b"]


def test_no_more_of_the_model_is_on_its_way_at_once_than_fits_and_all_nodes_get_it(monkeypatch):
    monkeypatch.setattr(fedtune_strategies.admission, "_PARTS_AT_ONCE", 2)
    sent, most = [], []

    class Slow(InMemoryGrid):
        """Answers when it is looked for replies."""

        def push_messages(self, messages):
            keys = super().push_messages(messages)
            sent.extend(keys)
            return keys

        def pull_messages(self, keys):
            most.append(sum(key in parts for key in keys))
            return super().pull_messages(keys)

    def node(name):
        wants = iter([-1, 0, 1])

        def handle(kind, payload):
            want = next(wants, None)
            reply = protocol.HelloReply(name, protocol.PROTOCOL_VERSION, 5, "abcd", 1)
            reply = reply if want is None else protocol.ModelRequest(name, want)
            return reply.kind, protocol.encode(reply)

        return handle

    def supply(wanted):
        parts.add(f"message-{len(sent) + 1}")
        return protocol.ModelManifest("[]")

    parts = set()
    fleet = Fleet(Slow({i: node(f"n{i}") for i in range(1, 8)}), "abcd", poll_interval=0.001, supply=supply)
    fleet.wait_for_nodes(7, 10.0)
    assert len(parts) == 7 * 3 and max(most) == 2


def test_the_cache_forgets_what_was_unused_longest(tmp_path):
    cache = ModelCache(tmp_path / "cache", 2500)
    found = {}
    for number, name in enumerate(["one", "two", "three"]):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(os.urandom(1000))
        step = cache.start("n", name, ModelSource(folder).manifest)
        found[name] = cache.take("n", step.chunk, (folder / "model.safetensors").read_bytes())
        os.utime(found[name], (number, number))
        if name == "two":
            cache.find("one")
    assert [found[name].is_dir() for name in ("one", "two", "three")] == [True, False, True]
    (tmp_path / "one" / "model.safetensors").write_bytes(bytes(3000))
    with pytest.raises(ResourceError, match="cache-gb"):
        cache.start("n", "one", ModelSource(tmp_path / "one").manifest)


def test_nodes_that_fetch_into_one_cache_at_once_all_end_with_the_model(folder, tmp_path):
    source = ModelSource(folder, chunk_bytes=10)
    at_once = threading.Barrier(4)

    def fetch(_):
        at_once.wait()
        return receive(ModelCache(tmp_path / "cache", 10**6), source)

    with ThreadPoolExecutor(4) as threads:
        (found,) = set(threads.map(fetch, range(4)))
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_nodes_that_share_a_cache_do_not_take_each_others_downloads(tmp_path, monkeypatch):
    sources, files = [], ("config.json", "model.safetensors")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(os.urandom(700))
        sources.append(ModelSource(tmp_path / name))
    a, b, other = (ModelCache(tmp_path / "cache", 2000) for _ in range(3))
    data = [(tmp_path / "one" / file).read_bytes() for file in files]
    assert a.take("n", a.start("n", "one", sources[0].manifest).chunk, data[0]).chunk == 1
    with pytest.raises(ResourceError, match="other nodes fetch"):
        other.start("n", "two", sources[1].manifest)
    assert b.start("n", "one", sources[0].manifest).chunk == 1  # the other half is there
    arrived = [cache.take("n", 1, data[1]) for cache in (a, b)]
    assert arrived[0] == arrived[1] and [(arrived[0] / file).read_bytes() for file in files] == data
    monkeypatch.setattr("fedtune_strategies.model_transfer.ABANDONED", -1.0)
    other.start("n", "two", sources[1].manifest)
    assert not arrived[0].exists()


@pytest.mark.parametrize("method", ["fedkseed", "fedcybgd"])
def test_nodes_without_a_model_take_part_like_others(settings, data_files, method, tmp_path, monkeypatch):
    settings |= {"method.name": method, "num-server-rounds": 2, "eval.answers": 0}
    run(settings, data_files)
    bare = settings | {"run.dir": str(tmp_path / "bare")}
    monkeypatch.setattr(ModelSource.__init__, "__defaults__", (2000,))
    monkeypatch.setattr(fedtune_strategies.admission, "_REFUSED_FOR_S", 0.0)
    cut = iter([True])
    kinds = []

    def node(number, name):
        own = {"name": name, "data": str(data_files[name]), "model": "server", "cache": str(tmp_path / name)}
        live = Node(bare, own, number)

        def handle(kind, payload):
            nonlocal live
            kinds.append(kind)
            if kind == "model-chunk" and protocol.decode(kind, payload).chunk == 3 and next(cut, False):
                live = Node(bare, own, number)
                raise RuntimeError("power cut")
            return live.handle(kind, payload)

        return handle

    grid = InMemoryGrid({number: node(number, name) for number, name in enumerate(data_files, start=1)})
    execute(grid, bare, run_id=1)
    assert final_state(bare) == final_state(settings)
    chunks = len(read_manifest(ModelSource(Path(settings["model.name"]), 2000).manifest))
    assert kinds.count("model-chunk") == 3 * chunks + 1, "one chunk was lost with the power"
    kinds.clear()
    execute(
        InMemoryGrid({number: node(number, name) for number, name in enumerate(data_files, start=1)}),
        bare | {"num-server-rounds": 3},
        run_id=2,
    )
    assert "model-chunk" not in kinds, "a restarted node has the model in its cache"


def test_a_node_of_a_server_without_the_model_to_give(settings, data_files, tmp_path):
    node = Node(settings, {"data": str(data_files["node-0"]), "model": "server", "cache": str(tmp_path / "c")}, 1)
    fleet = Fleet(InMemoryGrid({1: node.handle}), "abcd")
    with pytest.raises(NodesError, match="none to send"):
        fleet.wait_for_nodes(1, 1.0)


def test_a_bad_cache_limit(settings, data_files):
    with pytest.raises(ConfigError, match="cache-gb"):
        Node(settings, {"data": str(data_files["node-0"]), "cache-gb": "much"}, 1)
