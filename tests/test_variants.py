"""Every variant against the float64 oracle: output and all three gradients."""

import math

import pytest
import torch

from attnlib import FAMILIES, VARIANTS
from attnlib.core import DTYPES, Shape
from notebooks.block import in_block
from report.accuracy import RESULTS, compared, in_order_matmul, three_tf32_matmul

SHAPES = [(1, 1, 1, 1), (2, 1, 2, 3), (1, 2, 63, 1), (2, 3, 111, 17), (1, 1, 1000, 64), (3, 1, 1, 8), (2, 3, 111, 32)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_every_variant_equals_the_oracle(dtype, causal, size, device):
    """The error is at most twice that of the same maths in the same dtype, or one rounding of the exact result.

    Errors are pooled over draws: with a handful of numbers, whose rounding is luckier in one draw says nothing. All
    variants of a shape are held against one oracle, computed once.
    """
    shape, wrong = Shape(*size, dtype, causal), {}
    known = [variant for name, variant in VARIANTS.items() if name not in FAMILIES["compiled"]]  # see test_compiled
    able = [variant for variant in known if not variant.needs(shape, device)]
    assert {variant.name for variant in able} >= {*FAMILIES["plain"], "tiled"}
    for variant in able:
        found = compared(variant, shape, device, draws=min(50, max(1, 40_000 // math.prod(size))))
        wrong |= {f"{variant.name} {what}": x for what in RESULTS if not (x := found[f"{what}_of_reference"]) <= 2}
    assert not wrong


def test_errors_are_relative_to_the_oracle():
    for dtype, limit in (("bfloat16", 0.02), ("float32", 1e-6)):
        found = compared(VARIANTS["naive"], Shape(1, 2, 40, 8, dtype, True), "cpu")
        assert all(0 < found[f"{what}_error"] < limit for what in RESULTS)


def test_of_a_block_the_attention_inside_is_compared():
    """A block takes a hidden state and weights, which no oracle of attention knows."""
    shape = Shape(1, 2, 40, 8)
    assert compared(in_block(VARIANTS["naive"]), shape, "cpu") == compared(VARIANTS["naive"], shape, "cpu")


def test_three_products_of_tensor_cores_lose_two_bits_and_no_more():
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    exact = a.double() @ b.double()
    lost = [((product - exact).norm() / exact.norm()).item() for product in (a @ b, three_tf32_matmul(a, b))]
    assert lost[0] < lost[1] < 8 * lost[0] and lost[1] < 2**-21


def test_sums_in_order_lose_most_where_the_largest_term_comes_first():
    """As those of dV under a causal mask: query i gives its first key about 1 / (i + 1) of its weight."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(8, 1000, generator=generator) / torch.arange(1.0, 1001.0)
    do = torch.randn(1000, 64, generator=generator)
    exact = weights.double() @ do.double()
    forth, back = ((in_order_matmul(*pair) - exact).norm() for pair in ((weights, do), (weights.flip(1), do.flip(0))))
    assert (in_order_matmul(weights, do) - weights @ do).norm() < 1e-6 * exact.norm() and forth > 2 * back
