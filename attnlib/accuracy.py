"""How far a variant's output and gradients lie from the float64 oracle, and from the same maths in the same dtype."""

import math
from collections.abc import Callable, Iterator

import torch

from attnlib.core import DTYPES, Shape, Variant, oracle
from attnlib.sweep import Worker

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


def three_tf32(a, b):
    """a @ b in float32 as three products of tensor cores, which take 10 bits of mantissa: each operand is split into a
    large and a small part, and small times small is left out (CUTLASS, OpMultiplyAddFastF32)."""

    def split(x):
        bits = x.contiguous().view(torch.int32)
        large = (bits & ~0x1FFF).view(torch.float32)  # towards zero
        rest = (x - large).contiguous().view(torch.int32)
        return large, ((rest + 0x1000) & ~0x1FFF).view(torch.float32)  # to the nearest

    (large_a, small_a), (large_b, small_b) = split(a), split(b)
    return large_a @ small_b + small_a @ large_b + large_a @ large_b


class Plain(torch.autograd.Function):
    """The same maths in the same dtype, as plainly as it can be written; `product` multiplies matrices, `bias` is 0
    where a query sees a key, else minus infinity.

    With `recompute` its backward pass is that of flash kernels: the weights computed again from a float32 log-sum-exp,
    and dS = P ∘ (dP − rowsum(dO ∘ O)); else P is kept and the sum is rowsum(dP ∘ P).
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, product, recompute):
        scores = product(q, k.mT) * q.shape[-1] ** -0.5 + bias.to(q)
        weights = torch.softmax(scores, dim=-1).nan_to_num()  # a query that sees nothing
        o = product(weights, v)
        if recompute:
            weights = (scores.float() - torch.logsumexp(scores.float(), dim=-1, keepdim=True)).exp()
            weights = weights.nan_to_num().to(q.dtype)
        ctx.save_for_backward(q, k, v, weights, o)
        ctx.how = product, recompute
        return o

    @staticmethod
    def backward(ctx, do):
        (q, k, v, weights, o), (product, recompute) = ctx.saved_tensors, ctx.how
        dp = product(do, v.mT)
        sums = (do * o if recompute else dp * weights).sum(-1, keepdim=True)
        ds = weights * (dp - sums) * q.shape[-1] ** -0.5
        return product(ds, k), product(ds.mT, q), product(weights.mT, do), None, None, None


def references(name: str, shape: Shape, device: str, reach: torch.Tensor) -> dict[str, Callable]:
    """`{way: fn(q, k, v)}`: the ways to do the same maths in the same dtype that the variant `name` is held against.

    One keeps the weights and one computes them again. A key that is seen m times stands there m times. In float32 on a
    GPU the efficient kernel's products are three_tf32, so its reference's are too.
    """
    by_name = name in ("sdpa_efficient", "sdpa_default") or name.startswith("dilated")
    efficient = by_name and shape.dtype == "float32" and device != "cpu"
    products = {"plain": torch.matmul} | ({"three TF32": three_tf32} if efficient else {})
    copies = max(1, int(reach.max()))
    bias = torch.cat([torch.where(reach > copy, 0.0, -math.inf) for copy in range(copies)], dim=-1)

    def attention(q, k, v, *how):
        return Plain.apply(q, k.repeat(1, 1, copies, 1), v.repeat(1, 1, copies, 1), bias, *how)

    return {
        f"{way}{', recomputed' * again}": lambda q, k, v, p=product, r=again: attention(q, k, v, p, r)
        for way, product in products.items()
        for again in (False, True)
    }


def sizes(exact, qkv, do, reach) -> list[torch.Tensor]:
    """The numbers whose rounding no arithmetic escapes, for each of RESULTS: dq and dk are differences of P ∘ dP and
    P ∘ rowsum(dO ∘ O), each times k or q; where a query sees one key, nothing is left of them but rounding."""
    q, k, v, do = (x.detach().double() for x in (*qkv, do))
    weights = oracle(q, k, torch.eye(q.shape[-2], device=q.device), reach)
    dp = weights * (do @ v.mT) * q.shape[-1] ** -0.5
    parts = dp, weights * dp.sum(-1, keepdim=True)
    return [exact[0], torch.cat([part @ k for part in parts]), torch.cat([part.mT @ q for part in parts]), exact[3]]


def squares(variant: Variant, shape: Shape, device: str, draws: int) -> dict[str, list[float]]:
    """Squared norms, summed over draws (with few numbers a single draw's luck says nothing), for each of RESULTS: of
    the oracle's ("exact"), of its `sizes`, and, for the variant ("found") and each of its `references`, of the
    difference from the oracle's."""
    reach = variant.reach(shape).to(device)
    ways = {"found": lambda q, k, v: variant.fn(q, k, v, causal=shape.causal)}
    ways |= references(variant.name, shape, device, reach)
    total2 = {what: [0.0] * len(RESULTS) for what in ("exact", "sizes", *ways)}
    for seed in range(draws):
        qkv, do = draw(shape, device, seed)
        exact = results(lambda q, k, v: oracle(q, k, v, reach), [x.double() for x in qkv], do)
        seen = {"exact": exact, "sizes": sizes(exact, qkv, do, reach)}
        for way, fn in ways.items():
            seen[way] = [got - want for got, want in zip(results(fn, qkv, do), exact, strict=True)]
        for what, tensors in seen.items():
            total2[what] = [total + x.norm().item() ** 2 for total, x in zip(total2[what], tensors, strict=True)]
    return total2


def compared(variant: Variant, shape: Shape, device: str, draws: int = 2) -> dict:
    """For each of RESULTS the relative error `<result>_error` (Frobenius norm of the difference from the oracle over
    the oracle's), and `<result>_of_reference`: that error over that of the least accurate of the `references`, or over
    half of what rounding its `sizes` once would cost, whichever is larger. The budget is two."""
    exact2, size2, found2, *reference2 = squares(variant, shape, device, draws).values()
    row, rounding = {"variant": variant.name, **shape.columns()}, torch.finfo(DTYPES[shape.dtype]).eps / 2
    for at, result in enumerate(RESULTS):
        allowed2 = max(size2[at] * (rounding / 2) ** 2, *(way2[at] for way2 in reference2))
        row[f"{result}_error"] = math.sqrt(found2[at] / exact2[at]) if exact2[at] else 0.0
        row[f"{result}_of_reference"] = math.sqrt(found2[at] / allowed2) if found2[at] else 0.0
    return row


NUMBERS = [f"{result}_{what}" for result in RESULTS for what in ("error", "of_reference")]


def compare(todo: list[tuple[Variant, Shape]], device: str) -> Iterator[dict]:
    """`compared` for each `(variant, shape)` that runs on the device, in a worker."""
    with Worker() as worker:
        for variant, shape in todo:
            if not worker.call(variant.needs, shape, device):
                yield worker.call(compared, variant, shape, device)
