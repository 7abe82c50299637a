"""Every variant against the float64 oracle: output and all three gradients."""

import math

import pytest
import torch

from attnlib import VARIANTS, variant
from attnlib.core import DTYPES, AttnError, Shape, dense_reach, oracle

SHAPES = [(1, 1, 1, 1), (2, 1, 2, 3), (1, 2, 63, 1), (2, 3, 111, 17), (1, 1, 1000, 64), (3, 1, 1, 8), (2, 3, 111, 32)]


def reference(q, k, v, causal):
    """The same maths in the same dtype, as plainly as it can be written."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    bias = dense_reach(q.shape[-2], causal).log().to(q)
    return torch.softmax(scores + bias, dim=-1) @ v


def results(fn, qkv, do):
    """Output and gradients of `fn`, in float64 on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    o = fn(*leaves)
    grads = torch.autograd.grad(o, leaves, do.to(o.dtype))
    return [x.detach().double().cpu() for x in (o, *grads)]


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
    errors = {"exact": [0.0] * 4, "plain": [0.0] * 4, "other": [0.0] * 4, "found": [0.0] * 4}
    for seed in range(draws):
        qkv = shape.inputs(device, seed)
        do = torch.randn(qkv[0].shape, generator=torch.Generator(device).manual_seed(seed + 99), device=device)
        do = do.to(DTYPES[dtype])
        exact = results(lambda q, k, v: oracle(q, k, v, reach), qkv, do)
        plain = results(lambda q, k, v: reference(q, k, v, causal), qkv, do)
        other = results(lambda q, k, v: FromOutput.apply(q, k, v, causal), qkv, do)
        found = results(lambda q, k, v: VARIANTS[name].fn(q, k, v, causal=causal), qkv, do)
        for i, want in enumerate(exact):
            errors["exact"][i] += want.norm().item() ** 2
            for way, got in (("plain", plain), ("other", other), ("found", found)):
                errors[way][i] += (got[i] - want).norm().item() ** 2
    rounding = torch.finfo(DTYPES[dtype]).eps / 2
    for what, size2, plain2, other2, found2 in zip(("o", "dq", "dk", "dv"), *errors.values(), strict=True):
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
