"""Every variant against the float64 oracle: output and all three gradients."""

import math

import pytest
import torch

from attnlib import VARIANTS, variant
from attnlib.accuracy import RESULTS, compared, three_tf32
from attnlib.core import DTYPES, AttnError, Shape, oracle

SHAPES = [(1, 1, 1, 1), (2, 1, 2, 3), (1, 2, 63, 1), (2, 3, 111, 17), (1, 1, 1000, 64), (3, 1, 1, 8), (2, 3, 111, 32)]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_equals_the_oracle(name, dtype, causal, size, device):
    """The error is at most twice that of the same maths in the same dtype, or one rounding of the exact result.

    Errors are pooled over draws: with a handful of numbers, whose rounding is luckier in one draw says nothing.
    """
    shape = Shape(*size, dtype, causal)
    if reason := VARIANTS[name].needs(shape, device):
        pytest.skip(reason)
    found = compared(VARIANTS[name], shape, device, draws=min(50, max(1, 40_000 // math.prod(size))))
    for what in RESULTS:
        assert found[f"{what}_of_reference"] <= 2, what


def test_oracle_gives_zero_where_nothing_is_seen():
    q, k, v = Shape(1, 1, 4, 2).inputs()
    reach = torch.zeros(4, 4)
    reach[1:] = 1
    o = oracle(q, k, v, reach)
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert (o[:, :, 0] == 0).all() and (grads[0][:, :, 0] == 0).all()
    assert all(torch.isfinite(x).all() for x in (o, *grads))


@pytest.mark.parametrize(
    "size", [(0, 1, 1, 1), (1, -1, 1, 1), (1, 1, 2.5, 1), (1, 1, 1, "8"), (True, 1, 1, 1), (1, 1, 1, 1, "float8")]
)
def test_shape_refuses_nonsense(size):
    with pytest.raises(AttnError):
        Shape(*size)


def test_unknown_variant_is_refused():
    with pytest.raises(AttnError, match="naive_custom"):
        variant("flash9")


def test_errors_are_relative_to_the_oracle():
    for dtype, limit in (("bfloat16", 0.02), ("float32", 1e-6)):
        found = compared(VARIANTS["naive"], Shape(1, 2, 40, 8, dtype, True), "cpu")
        assert all(0 < found[f"{what}_error"] < limit for what in RESULTS)


def test_three_products_of_tensor_cores_lose_two_bits_and_no_more():
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    exact = a.double() @ b.double()
    lost = [((product - exact).norm() / exact.norm()).item() for product in (a @ b, three_tf32(a, b))]
    assert lost[0] < lost[1] < 8 * lost[0] and lost[1] < 2**-21
