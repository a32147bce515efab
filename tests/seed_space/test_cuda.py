"""The Triton kernels against the reference: on a GPU where there is one, otherwise in Triton's interpreter."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from fedtune_strategies.seed_space import cuda, make_pool, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = 0xFEDC_BA98_7654_3210


def same(name, n, start, *arguments):
    weight = torch.randn(n, device=DEVICE)
    expected, found = torch.empty_like(weight), torch.empty_like(weight)
    getattr(reference, name)(expected, weight, *arguments, KEY, "layer.weight", *start)
    getattr(cuda, name)(found, weight, *arguments, KEY, "layer.weight", *start)
    return torch.equal(expected, found)


@pytest.mark.parametrize("n", [1, 500])
@pytest.mark.parametrize(("columns", "block"), [(16, 32), (128, 128), (256, 4096)])
def test_walsh_has_the_bits_of_the_reference(n, columns, block):
    theta = torch.randn(columns, device=DEVICE)
    for start in (0, 3 * max(128, columns)):
        assert same("walsh_rebuild", n, (columns, block, start), theta)
        for moves in ([(1, 0.3)], [(columns - 1, 0.3), (2, -1e-3)], [(0, 1.0), (3, 0.1), (3, -0.7)]):
            assert same("walsh_add", n, (columns, block, start), moves)


@pytest.mark.parametrize(("columns", "block"), [(512, 512), (1024, 4096)])
def test_a_transform_too_large_for_one_program_has_the_bits_of_the_reference(columns, block, monkeypatch):
    monkeypatch.setattr(cuda, "LARGEST", 256)
    theta = torch.randn(columns, device=DEVICE)
    for n, start in ((1, 0), (5000, 0), (3000, 3 * columns)):
        assert same("walsh_rebuild", n, (columns, block, start), theta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["walsh", "gaussian"])
def test_16_bits_are_rounded_once_and_by_the_kernel_itself(kind, dtype, monkeypatch):
    monkeypatch.setattr("fedtune_strategies.seed_space.pool.kernels", lambda device: cuda)
    pool, theta = make_pool(kind, KEY, 128), torch.zeros(128, device=DEVICE)
    theta[:3] = torch.tensor([0.01, -0.02, 0.03])
    base = torch.randn(300, device=DEVICE).to(dtype)
    moves = [(3, 0.1), (100, -0.02), (7, 0.005)]
    assert torch.equal(pool.rebuild("w", base, theta), pool.rebuild("w", base.float(), theta).to(dtype))
    assert torch.equal(pool.move("w", base, moves), pool.move("w", base.float(), moves).to(dtype))
    assert torch.equal(pool.move("w", base, moves[:1]), pool.move("w", base.float(), moves[:1]).to(dtype))


@pytest.mark.parametrize("n", [1, 1200])
def test_gaussian_has_the_bits_of_the_reference(n):
    seeds, factors = torch.tensor([1, 2**32 - 1, 7], device=DEVICE), torch.randn(3, device=DEVICE)
    assert same("gaussian_rebuild", n, (0,), seeds, factors)
    assert same("gaussian_rebuild", n, (4444,), seeds, factors)
