import numpy as np
import pytest
import torch

from client_app.node import Node
from fedtune_strategies.blocks.find import find_blocks
from fedtune_strategies.config.node import parse_node
from fedtune_strategies.errors import ConfigError, DataError, ProtocolError
from fedtune_strategies.fedavg.messages import ArraysTask
from fedtune_strategies.fedcybgd.messages import BlockReply, BlockTask
from fedtune_strategies.fedkseed.messages import SeedReply, SeedTask
from fedtune_strategies.fedkseed.packing import pack
from fedtune_strategies.language.examples import batches
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import fingerprint


@pytest.fixture
def node(settings, data_files):
    return Node(settings, {"name": "node-0", "data": str(data_files["node-0"])}, 1)


@pytest.fixture
def block_node(settings, data_files):
    settings |= {"method.name": "fedcybgd"}
    return Node(settings, {"name": "node-0", "data": str(data_files["node-0"])}, 1)


def ask(node, message):
    return protocol.decode(*node.handle(message.kind, protocol.encode(message)))


BLOCKS = 4
NONE = np.empty(0, dtype=np.int32)
UNIT = 2.0**-24


def block_task(*fields, committed=0):
    return BlockTask(*fields, dropped=torch.empty(0, dtype=torch.int64), committed=committed)


def seed_task(units=0, *, round=1, since=0, count=64, levels=NONE, odds=NONE):
    change = np.broadcast_to(np.int32(units), count)
    packed = pack(levels) if levels.size else torch.empty(0, dtype=torch.uint8)
    return SeedTask(round, since, pack(change), UNIT, packed, torch.tensor(odds, dtype=torch.int16), 1e-3, 1e-3, np.inf)


@pytest.mark.parametrize(
    ("config", "words"),
    [({}, "'data' is missing"), ({"data": 3}, "'data' is 3"), ({"data": "x", "name": 7}, "'name' is 7")],
)
def test_a_bad_node_config_names_the_key(config, words):
    with pytest.raises(ConfigError, match=words):
        parse_node(config)


def test_flowers_own_keys_are_left_alone():
    assert parse_node({"data": "x", "partition-id": 0}) == parse_node({"data": "x"})


def test_without_a_name_a_node_is_named_by_its_id(settings, data_files):
    node = Node(settings, {"data": str(data_files["node-0"])}, -1)
    assert node.name == "node-ffffffffffffffff"


def test_an_empty_data_file(settings, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        Node(settings, {"data": str(tmp_path / "empty.jsonl")}, 1)


def test_a_node_that_is_greeted_alone_loads_no_weights(settings, data_files, node):
    reply = ask(node, protocol.Hello(protocol.PROTOCOL_VERSION, node.base_fingerprint))
    assert (reply.num_examples, reply.fingerprint) == (len(node.examples), node.base_fingerprint)
    assert "language" not in vars(node)
    assert isinstance(ask(node, seed_task()), SeedReply) and "language" in vars(node)
    assert fingerprint(node.base) == reply.fingerprint


def test_one_task_twice_has_one_answer(node):
    task = seed_task(np.arange(64) * 500)
    first, _, second = ask(node, task), ask(node, seed_task()), ask(node, task)
    assert torch.equal(first.scalars, second.scalars) and first.fingerprint == second.fingerprint


def test_theta_is_where_the_node_starts(node):
    moved, base = ask(node, seed_task(2**14)), ask(node, seed_task())
    assert moved.fingerprint != base.fingerprint
    assert base.fingerprint == node.base_fingerprint


@pytest.mark.parametrize(
    "task",
    [
        seed_task(count=63),
        seed_task(levels=np.zeros(3, dtype=np.int32), odds=[1]),
        seed_task(levels=np.zeros(64, dtype=np.int32), odds=[-1]),
        seed_task(levels=np.full(64, 5, dtype=np.int32), odds=[1, 2]),
        protocol.Ack("n", 1),
    ],
)
def test_a_task_that_does_not_fit_is_refused_and_the_node_stays(node, task):
    failure = ask(node, task)
    assert isinstance(failure, protocol.Failure) and failure.exit_code == ProtocolError.exit_code, failure
    assert isinstance(ask(node, seed_task()), SeedReply)


@pytest.mark.parametrize(
    "task",
    [
        block_task(1, 0, torch.zeros(2, dtype=torch.int64), {}, {}, 1e-3),
        block_task(1, 99, torch.zeros(BLOCKS, dtype=torch.int64), {}, {}, 1e-3),
        block_task(1, 0, torch.zeros(BLOCKS, dtype=torch.int64), {"foreign": torch.zeros(2)}, {}, 1e-3),
        block_task(1, 0, torch.zeros(BLOCKS, dtype=torch.int64), {}, {"foreign:int8": torch.zeros(2)}, 1e-3),
    ],
)
def test_a_turn_that_does_not_fit_is_refused_and_the_node_stays(block_node, task):
    failure = ask(block_node, task)
    assert isinstance(failure, protocol.Failure) and failure.exit_code == ProtocolError.exit_code, failure
    right = block_task(1, 0, torch.zeros(BLOCKS, dtype=torch.int64), {}, {}, 1e-3)
    assert isinstance(ask(block_node, right), BlockReply)


@pytest.mark.parametrize("beta1", [0.9, 0.5])
def test_a_turn_is_adamw_on_one_block(settings, data_files, beta1):
    settings |= {"method.name": "fedcybgd", "fedcybgd.rest": "none", "train.beta1": beta1}
    node = Node(settings, {"name": "node-0", "data": str(data_files["node-0"])}, 1)
    reply = ask(node, block_task(1, 1, torch.zeros(BLOCKS, dtype=torch.int64), {}, {}, 1e-3))
    model = node.language.model
    names = find_blocks(model)[1].parameters
    parameters = [model.get_parameter(name).requires_grad_() for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(beta1, 0.999), weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in parameters]
    for batch in batches(node.examples, 2, 3, (0, 1, "node-0")):
        optimizer.zero_grad()
        response_loss(model, batch).backward()
        optimizer.step()
    for name, old, new in zip(names, before, parameters, strict=True):
        torch.testing.assert_close(reply.delta[name], new.detach() - old, rtol=1e-3, atol=1e-6)


def test_a_block_of_wrong_shape_is_a_failure_not_a_crash(block_node):
    name = find_blocks(block_node.language.model)[0].parameters[0]
    task = block_task(1, 0, torch.ones(BLOCKS, dtype=torch.int64), {name: torch.zeros(2)}, {}, 1e-3)
    assert isinstance(ask(block_node, task), protocol.Failure)
    right = block_task(1, 0, torch.zeros(BLOCKS, dtype=torch.int64), {}, {}, 1e-3)
    assert isinstance(ask(block_node, right), BlockReply)


def test_a_node_without_the_versions_that_a_turn_counts_on_says_so(block_node):
    task = block_task(3, 0, torch.tensor([0, 1, 0, 0]), {}, {}, 1e-3)
    assert isinstance(ask(block_node, task), protocol.StateMissing)


def test_a_node_whose_exact_block_was_replaced_in_a_turn_that_was_lost_says_so(block_node):
    zero, one = torch.zeros(BLOCKS, dtype=torch.int64), torch.tensor([1, 0, 0, 0])
    assert isinstance(ask(block_node, block_task(1, 0, zero, {}, {}, 1e-3)), BlockReply)
    assert isinstance(ask(block_node, block_task(2, 1, one, {}, {}, 1e-3, committed=1)), BlockReply)
    assert isinstance(ask(block_node, block_task(3, 0, one, {}, {}, 1e-3, committed=1)), protocol.StateMissing)


def test_a_task_of_another_method_is_refused(node, block_node):
    for asked, foreign in ((block_node, seed_task()), (node, ArraysTask(1, {}, 1e-3))):
        assert ask(asked, foreign).exit_code == ProtocolError.exit_code


def test_a_change_counts_from_the_theta_that_the_node_holds(node):
    full = ask(node, seed_task(700, round=3))
    ask(node, seed_task(500, round=2))
    changed = ask(node, seed_task(200, round=3, since=1))
    assert torch.equal(changed.scalars, full.scalars) and changed.fingerprint == full.fingerprint
    assert torch.equal(ask(node, seed_task(200, round=3, since=1)).scalars, full.scalars), "asked twice"


def test_a_node_that_does_not_hold_theta_says_so_and_takes_it_in_full(node):
    assert isinstance(ask(node, seed_task(200, round=3, since=1)), protocol.StateMissing)
    assert isinstance(ask(node, seed_task(700, round=3)), SeedReply)
