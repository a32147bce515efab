import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.config import Config
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.installed import own_methods
from fedtune_strategies.method import load_method
from fedtune_strategies.run_config import app_defaults, as_toml, defaults, from_flower, keys, parse

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def flatten(table, prefix=""):
    flat = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def test_pyproject_holds_exactly_the_keys_of_all_methods():
    table = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    assert flatten(table) == app_defaults()


@pytest.mark.parametrize("method", own_methods())
def test_rendered_toml_reads_back_as_the_defaults(method):
    assert flatten(tomllib.loads(as_toml(defaults(method)))) == defaults(method)


@pytest.mark.parametrize("method", own_methods())
def test_defaults_are_valid_and_give_the_default_config(method):
    config = parse({"method.name": method})
    assert parse(defaults(method)) == config and type(config) is load_method(method).config


@pytest.mark.parametrize("method", own_methods())
def test_every_key_is_documented(method):
    assert all(key.help.endswith(".") and key.accepted for key in keys(method))


@pytest.mark.parametrize("method", own_methods())
def test_what_flower_fills_in_for_all_methods_is_the_methods_default(method):
    assert parse(from_flower(app_defaults() | {"method.name": method})) == parse({"method.name": method})


def test_a_user_of_one_method_sees_its_keys_alone():
    names = {method: set(defaults(method)) for method in own_methods()}
    assert not any(key.startswith(("fedcybgd.", "lora.")) for key in names["fedkseed"])
    assert "strategy.aggregation" not in names["fedcybgd"] and "train.beta1" not in names["fedzo"]


def test_values_reach_their_field():
    config = parse({"train.seq-length": 77, "train.lr": 1})
    assert config.train.seq_length == 77
    assert config.train.lr == 1.0 and isinstance(config.train.lr, float)


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"train.seqlength": 3}, ["unknown key 'train.seqlength'", "'train.seq-length'"]),
        ({"nonsense": 3}, ["unknown key 'nonsense'", "fedtune config"]),
        ({"train.seq-length": "long"}, ["'train.seq-length'", "'long'", "whole number", "at least 8"]),
        ({"train.seq-length": 7}, ["'train.seq-length'", "at least 8"]),
        ({"train.seq-length": True}, ["'train.seq-length'", "whole number"]),
        ({"train.lr": 0.0}, ["'train.lr'", "above 0"]),
        ({"train.lr": float("nan")}, ["'train.lr'", "number"]),
        ({"train.lr": float("inf")}, ["'train.lr'", "number"]),
        ({"method.name": "fedprox"}, ["'method.name'", "'fedprox'", "'fedcybgd'"]),
        ({"method.name": "fedcybgd", "fedcybgd.train-embeddings": 1}, ["'fedcybgd.train-embeddings'", "true or false"]),
        ({"strategy.min-replies": 3, "strategy.min-nodes": 2}, ["'strategy.min-replies'", "'strategy.min-nodes'"]),
        (
            {"method.name": "fedcybgd", "strategy.aggregation": "krum"},
            ["'fedcybgd' does not read 'strategy.aggregation' here", "fedkseed", "nearest key that it reads"],
        ),
        ({"fedkseed.pro-mean": "faithful"}, ["'fedkseed' does not read 'fedkseed.pro-mean'", "fedkseed-pro"]),
        ({"method.name": "fedavg", "fedkseed.seeds": 4}, ["'fedavg' does not read 'fedkseed.seeds'"]),
    ],
)
def test_a_bad_value_is_one_line_with_key_and_accepted_values(flat, words):
    with pytest.raises(ConfigError) as caught:
        parse(flat)
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words)


@given(
    st.dictionaries(
        st.sampled_from([key.name for key in keys()]) | st.text(max_size=20),
        st.one_of(
            st.integers(),
            st.floats(),
            st.booleans(),
            st.text(max_size=10),
            st.none(),
            st.lists(st.integers(), max_size=2),
        ),
        max_size=6,
    )
)
def test_any_mapping_is_parsed_or_refused_by_one_line(flat):
    try:
        assert isinstance(parse(flat), Config)
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"stream.listen": "9093"}, "must be host:port"),
        ({"stream.listen": "0.0.0.0:9093"}, "set 'stream.address'"),
        ({"stream.listen": "localhost:9093", "stream.address": "x y"}, "'stream.address' is 'x y'"),
        ({"stream.address": "localhost:9093"}, "set that too"),
        ({"stream.listen": "off", "stream.address": "localhost:9093"}, "set that too"),
    ],
)
def test_streams_are_where_nodes_can_find_them(keys, words):
    with pytest.raises(ConfigError, match=words):
        parse(keys)
    parse({"stream.listen": "0.0.0.0:9093", "stream.address": "my.server:9093"})
