import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.config import Config, as_toml, defaults, keys, parse
from fedtune_strategies.errors import ConfigError

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def flatten(table, prefix=""):
    flat = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def test_pyproject_holds_exactly_these_keys_and_defaults():
    table = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    assert flatten(table) == defaults()


def test_rendered_toml_reads_back_as_the_defaults():
    assert flatten(tomllib.loads(as_toml())) == defaults()


def test_defaults_are_valid_and_give_the_default_config():
    assert parse(defaults()) == parse({}) == Config()


def test_every_key_is_documented():
    assert all(key.help.endswith(".") and key.accepted for key in keys())


def test_values_reach_their_field():
    config = parse({"train.seq-length": 77, "train.lr": 1})
    assert config.train.seq_length == 77
    assert config.fedkseed.lr == 1.0 and isinstance(config.fedkseed.lr, float)


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
        ({"fedcybgd.train-embeddings": 1}, ["'fedcybgd.train-embeddings'", "true or false"]),
        ({"strategy.min-replies": 3, "strategy.min-nodes": 2}, ["'strategy.min-replies'", "'strategy.min-nodes'"]),
        ({"fedkseed.pro-mean": "faithful", "fedkseed.pro-temperature": 0.5}, ["'fedkseed.pro-temperature'"]),
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
