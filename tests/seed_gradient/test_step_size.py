import pytest

from fedtune_strategies.seed_gradient import default_step


@pytest.mark.parametrize(
    ("parameters", "seeds", "best"),
    [(260_032, 16384, 0.01), (2_097_408, 16384, 0.01), (134_515_008, 16384, 0.0025), (260_032, 1024, 0.02),
     (260_032, 262_144, 0.005), (134_515_008, 1024, 0.005), (134_515_008, 131_072, 0.001)],
)  # fmt: skip
def test_the_default_is_near_the_best_step_that_searches_found(parameters, seeds, best):
    assert best / 1.6 < default_step(parameters, seeds) < best * 1.6
