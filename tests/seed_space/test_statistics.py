"""Randomness of the directions; each test fails for a generator whose counters are shifted or reused."""

import itertools

import pytest
import torch

from fedtune_strategies.seed_space import make_pool
from fedtune_strategies.seed_space import philox as philox_module

POOLS = [("walsh", 256), ("walsh", 4096), ("gaussian", None)]
kinds = pytest.mark.parametrize(("kind", "transform"), POOLS)
N = 1 << 16
LIMIT = 5.0  # standard errors: a false alarm once in two million comparisons


def z(kind, transform, *, key=1, name="layer.weight", k=0, n=N, size=256):
    return make_pool(kind, key, size, transform).direction(name, (n,), k)


def correlation(a, b):
    """In standard errors of independent directions."""
    return abs(float(a @ b)) / len(a) ** 0.5


@kinds
def test_marginal_moments(kind, transform):
    for k in (0, 1, 85, 255):
        x = z(kind, transform, k=k).double()
        fourth = 1.0 if kind == "walsh" else 3.0
        assert abs(x.mean()) < LIMIT / N**0.5
        assert abs((x**3).mean()) < LIMIT * 15**0.5 / N**0.5
        if kind == "walsh":
            assert torch.equal(x**2, torch.ones_like(x))
        else:
            assert abs((x**2).mean() - 1) < LIMIT * 2**0.5 / N**0.5
            assert abs((x**4).mean() - fourth) < LIMIT * 96**0.5 / N**0.5


def test_gaussian_distribution_function():
    x = z("gaussian", None, n=1 << 18).double().sort().values
    empirical = (torch.arange(len(x)) + 0.5) / len(x)
    distance = (torch.special.ndtr(x) - empirical).abs().max()
    assert distance < 2.0 / len(x) ** 0.5  # Kolmogorov-Smirnov, p about 7e-4 for one fixed key
    assert x.abs().max() < 5.77


@kinds
def test_seeds_pools_and_tensors_are_uncorrelated(kind, transform):
    variants = [{"k": k} for k in (0, 1, 2, 3, 128, 255)]
    variants += [
        {"key": 2},
        {"key": 1 << 32},
        {"key": (1 << 63) + 1},
        {"name": "layer.bias"},
        {"name": "layer2.weight"},
    ]
    found = [z(kind, transform, **variant) for variant in variants]
    assert max(correlation(a, b) for a, b in itertools.combinations(found, 2)) < LIMIT


@kinds
def test_a_direction_is_uncorrelated_with_itself_shifted(kind, transform):
    x = z(kind, transform)
    for shift in (1, 2, 3, 4, 31, 32, 64, 127, 128, 256, 512, 2048, 4096, 8192, N // 2):
        assert correlation(x[:-shift], x[shift:]) < LIMIT, shift


@kinds
def test_products_of_two_seeds_are_uncorrelated_between_blocks(kind, transform):
    # A walsh pool that reused the seed signs of a block would show here: z_k z_l has the sign of E_k E_l.
    block = transform or 256
    for other in (200, 3 + 16, 3 + 32, 3 + 128):  # the distances at which a wrong shift of seed signs repeats them
        product = z(kind, transform, k=3) * z(kind, transform, k=other)
        signs = (product.view(-1, block) * product[:block]).mean(dim=1)[1:]
        assert abs(float(signs.mean())) < 3 / (N / block - 1) ** 0.5
        if kind == "walsh":  # whose products have one sign a block: no seed sign may be another's in every block
            assert len(product.view(-1, block)[:, 0].unique()) == 2


@kinds
def test_element_signs_are_not_seed_signs(kind, transform):
    # Were both drawn from one stream, element number k of every block would have one and the same sign in z_k.
    for k in (0, 5, 255):
        diagonal = z(kind, transform, k=k).view(-1, transform or 256)[:, k]
        assert abs(float(diagonal.mean())) < 3 / len(diagonal) ** 0.5


def test_walsh_seeds_are_orthogonal_within_a_block():
    pool = make_pool("walsh", 9, 64)
    directions = torch.stack([pool.direction("w", (64 * 3,), k) for k in range(64)])
    for block in directions.view(64, 3, 64).unbind(1):
        assert torch.equal(block @ block.T, 64 * torch.eye(64))


@kinds
def test_second_moment_is_the_identity(kind, transform):
    # E[z z^T] over pools, for neighbours in a short tensor.
    n, pools = 24, 4000
    samples = torch.stack([z(kind, transform, key=key, n=n, k=7) for key in range(pools)]).double()
    moment = samples.T @ samples / pools
    off_diagonal = moment - torch.diag(moment.diag())
    assert off_diagonal.abs().max() < LIMIT / pools**0.5
    assert (moment.diag() - 1).abs().max() < LIMIT * 2**0.5 / pools**0.5


def broken_signs(shift):
    good = philox_module.signs

    def signs(key, words, start, count, device):
        return (
            good(key, words, start % shift, count, device)
            if count <= shift
            else torch.cat([good(key, words, 0, shift, device)] * (count // shift))
        )

    return signs


@pytest.mark.parametrize("period", [128, 4096])
def test_a_generator_that_repeats_is_caught(period, monkeypatch):
    from fedtune_strategies.seed_space import kernels, reference

    monkeypatch.setattr(reference, "signs", broken_signs(period))
    monkeypatch.setattr("fedtune_strategies.seed_space.pool.kernels", lambda device: reference)
    kernels._fast.cache_clear()
    with pytest.raises(AssertionError):
        test_a_direction_is_uncorrelated_with_itself_shifted("walsh", 4096)


def test_a_wrong_bit_shift_is_caught(monkeypatch):
    from fedtune_strategies.seed_space import reference

    def signs(key, words, start, count, device):  # every word shifted by one bit: neighbours across words agree
        numbers = philox_module.philox((torch.arange(0, -(-count // 128)), 0, *words), key, device)
        bits = (numbers[:, :, None] >> (torch.arange(32) // 2)) & 1
        return (1 - 2 * bits).reshape(-1)[:count].float()

    monkeypatch.setattr(reference, "signs", signs)
    monkeypatch.setattr("fedtune_strategies.seed_space.pool.kernels", lambda device: reference)
    with pytest.raises(AssertionError):
        test_a_direction_is_uncorrelated_with_itself_shifted("walsh", 256)


def test_without_seed_signs_blocks_are_caught(monkeypatch):
    from fedtune_strategies.seed_space import reference

    good = philox_module.signs_at
    monkeypatch.setattr(reference, "signs_at", lambda key, words, index: good(key, words, index % 256))
    monkeypatch.setattr("fedtune_strategies.seed_space.pool.kernels", lambda device: reference)
    with pytest.raises(AssertionError):
        test_products_of_two_seeds_are_uncorrelated_between_blocks("walsh", 256)
