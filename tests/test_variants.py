"""Every variant against the float64 oracle: output and all three gradients."""

import math

import pytest
import torch

from attnlib import VARIANTS, variant
from attnlib.accuracy import RESULTS, draw, errors, results
from attnlib.core import DTYPES, AttnError, Shape, dense_reach, oracle

SHAPES = [(1, 1, 1, 1), (2, 1, 2, 3), (1, 2, 63, 1), (2, 3, 111, 17), (1, 1, 1000, 64), (3, 1, 1, 8), (2, 3, 111, 32)]


def reference(q, k, v, causal):
    """The same maths in the same dtype, as plainly as it can be written."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    bias = dense_reach(q.shape[-2], causal).log().to(q)
    return torch.softmax(scores + bias, dim=-1) @ v


class FromOutput(torch.autograd.Function):
    """The same maths with the other way to write its backward, dS = P ∘ (dP − rowsum(dO ∘ O)), which flash kernels use:
    both sides of the difference are rounded, and where they are equal, as for a single key, only rounding is left."""

    @staticmethod
    def forward(ctx, q, k, v, causal):
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = torch.softmax(scores + dense_reach(q.shape[-2], causal).log().to(q), dim=-1)
        ctx.save_for_backward(q, k, v, weights, weights @ v)
        return weights @ v

    @staticmethod
    def backward(ctx, do):
        q, k, v, weights, o = ctx.saved_tensors
        ds = weights * (do @ v.transpose(-2, -1) - (do * o).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        return ds @ k, ds.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ do, None


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
    reach = VARIANTS[name].reach(shape.seq_len, causal).to(device)
    draws = min(50, max(1, 40_000 // math.prod(size)))
    squares = {"exact": [0.0] * 4, "plain": [0.0] * 4, "other": [0.0] * 4, "found": [0.0] * 4}
    for seed in range(draws):
        qkv, do = draw(shape, device, seed)
        exact = results(lambda q, k, v: oracle(q, k, v, reach), [x.double() for x in qkv], do)
        plain = results(lambda q, k, v: reference(q, k, v, causal), qkv, do)
        other = results(lambda q, k, v: FromOutput.apply(q, k, v, causal), qkv, do)
        found = results(lambda q, k, v: VARIANTS[name].fn(q, k, v, causal=causal), qkv, do)
        for i, want in enumerate(exact):
            squares["exact"][i] += want.norm().item() ** 2
            for way, got in (("plain", plain), ("other", other), ("found", found)):
                squares[way][i] += (got[i] - want).norm().item() ** 2
    rounding = torch.finfo(DTYPES[dtype]).eps / 2
    for what, size2, plain2, other2, found2 in zip(RESULTS, *squares.values(), strict=True):
        assert found2 <= max(4 * plain2, 4 * other2, rounding**2 * size2), what


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
    shape = Shape(1, 2, 40, 8, "bfloat16", True)
    found = errors(VARIANTS["naive"], shape)
    assert set(found) == set(RESULTS) and all(0 < error < 0.02 for error in found.values())
    assert all(error < 1e-6 for error in errors(VARIANTS["naive"], Shape(1, 2, 40, 8)).values())
