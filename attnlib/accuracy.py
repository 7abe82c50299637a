"""How far a variant's output and gradients lie from the float64 oracle."""

import torch

from attnlib.core import DTYPES, Shape, Variant, oracle

RESULTS = ("o", "dq", "dk", "dv")


def results(fn, qkv, do) -> list[torch.Tensor]:
    """Output and gradients of `fn(q, k, v)`, in float64 on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    o = fn(*leaves)
    grads = torch.autograd.grad(o, leaves, do.to(o.dtype))
    return [x.detach().double().cpu() for x in (o, *grads)]


def draw(shape: Shape, device: str, seed: int):
    """q, k, v and an upstream gradient, all `[B, H, N, D]` of the shape's dtype."""
    qkv = shape.inputs(device, seed)
    generator = torch.Generator(device).manual_seed(seed + 99)
    return qkv, torch.randn(qkv[0].shape, generator=generator, device=device).to(DTYPES[shape.dtype])


def errors(variant: Variant, shape: Shape, device: str = "cpu", seed: int = 0) -> dict[str, float]:
    """`{result: error}` for each of RESULTS: the Frobenius norm of its difference from the oracle over the oracle's."""
    qkv, do = draw(shape, device, seed)
    reach = variant.reach(shape.seq_len, shape.causal).to(device)
    exact = results(lambda q, k, v: oracle(q, k, v, reach), [x.double() for x in qkv], do)
    found = results(lambda q, k, v: variant.fn(q, k, v, causal=shape.causal), qkv, do)
    pairs = zip(RESULTS, exact, found, strict=True)
    return {name: ((got - want).norm() / want.norm()).item() for name, want, got in pairs}
