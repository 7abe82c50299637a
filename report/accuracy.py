"""How far a variant's output and gradients lie from the float64 oracle, and from the same maths in the same dtype."""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlib.calling import ordinary
from attnlib.core import DTYPES, Shape, oracle
from attnlib.laws import Variant

RESULTS = ("o", "dq", "dk", "dv")
ERRORS = [f"{result}_{what}" for result in RESULTS for what in ("error", "of_reference")]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Task(NamedTuple):
    """What is to be computed: variants that share it share the oracle and the references."""

    reach: Callable[[Shape], Tensor]  # a variant's, see laws.Variant
    shape: Shape
    device: torch.device
    draws: int  # of the inputs; with few numbers a single draw's luck says nothing


def draw_inputs(task: Task) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """For each draw q, k, v and an upstream gradient, all `[B, H, N, D]` of the shape's dtype."""
    for seed in range(task.draws):
        generator = torch.Generator(task.device).manual_seed(seed + 99)
        qkv = task.shape.inputs(task.device, seed)
        yield qkv, torch.randn(qkv[0].shape, generator=generator, device=task.device).to(qkv[0].dtype)


def results_of(fn: Attention, qkv: tuple[Tensor, ...], do: Tensor) -> list[Tensor]:
    """Output and gradients of `fn(q, k, v)`, in float64 on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    o = fn(*leaves)
    return [x.detach().double().cpu() for x in (o, *torch.autograd.grad(o, leaves, do.to(o.dtype)))]


def three_tf32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 as three products of tensor cores, which take 10 bits of mantissa: each operand is split into a
    large and a small part, and small times small is left out (CUTLASS, OpMultiplyAddFastF32)."""

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        large = (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)  # towards zero
        small = (x - large).contiguous().view(torch.int32) + 0x1000  # to the nearest
        return large, (small & ~0x1FFF).view(torch.float32)

    (large_a, small_a), (large_b, small_b) = split(a), split(b)
    return large_a @ small_b + small_a @ large_b + large_a @ large_b


def in_order_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, each sum added up term by term from the first on, as a kernel of plain multiply-adds does that
    goes through keys, or queries, in order. Under a causal mask dK and dV begin with their largest terms, and every
    later addition rounds the whole: about twice the error of a product that splits its sums."""
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=a.dtype, device=a.device)
    for at in range(a.shape[-1]):
        total.addcmul_(a[..., at : at + 1], b[..., at : at + 1, :])
    return total


PRODUCTS = {"three_tf32": three_tf32_matmul, "in_order": in_order_matmul}


class _Plain(torch.autograd.Function):
    """The same maths in the same dtype, plainly: `product` multiplies matrices, `bias` is 0 where a query sees a key,
    else minus infinity. With `recompute` its backward pass is that of flash kernels: the weights again from a float32
    log-sum-exp, and dS = P ∘ (dP − rowsum(dO ∘ O)); else P is kept and the sum is rowsum(dP ∘ P)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, product: Callable, recompute: bool) -> Tensor:
        scores = product(q, k.mT) * q.shape[-1] ** -0.5 + bias.to(q)
        weights = torch.softmax(scores, dim=-1).nan_to_num()  # a query that sees nothing
        o = product(weights, v)
        if recompute:
            shifted = scores.float() - torch.logsumexp(scores.float(), dim=-1, keepdim=True)
            weights = shifted.exp().nan_to_num().to(q.dtype)
        ctx.save_for_backward(q, k, v, weights, o)
        ctx.how = product, recompute
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, weights, o), (product, recompute) = ctx.saved_tensors, ctx.how
        dp = product(do, v.mT)
        sums = (do * o if recompute else dp * weights).sum(-1, keepdim=True)
        ds = weights * (dp - sums) * q.shape[-1] ** -0.5
        return product(ds, k), product(ds.mT, q), product(weights.mT, do), None, None, None


def squares(tensors: list[list[Tensor]]) -> list[float]:
    """Squared norms of RESULTS, summed over the draws."""
    return [sum(x.norm().item() ** 2 for x in draws) for draws in zip(*tensors, strict=True)]


def sizes(exact: list[Tensor], qkv: tuple[Tensor, ...], do: Tensor, reach: Tensor) -> list[Tensor]:
    """The numbers whose rounding no arithmetic escapes, for each of RESULTS: dq and dk are differences of P ∘ dP and
    P ∘ rowsum(dO ∘ O), each times k or q; where a query sees one key, nothing is left of them but rounding."""
    q, k, v, do = (x.detach().double() for x in (*qkv, do))
    weights = oracle(q, k, torch.eye(q.shape[-2], device=q.device), reach)
    dp = weights * (do @ v.mT) * q.shape[-1] ** -0.5
    parts = dp, weights * dp.sum(-1, keepdim=True)
    return [exact[0], torch.cat([part @ k for part in parts]), torch.cat([part.mT @ q for part in parts]), exact[3]]


@lru_cache(4)
def exact_results(task: Task) -> tuple[list[list[Tensor]], list[float], list[float]]:
    """The oracle's RESULTS for each draw, and the `squares` of them and of their `sizes`."""
    reach, found, numbers = task.reach(task.shape).to(task.device), [], []
    for qkv, do in draw_inputs(task):
        found.append(results_of(partial(oracle, reach=reach), tuple(x.double() for x in qkv), do))
        numbers.append(sizes(found[-1], qkv, do, reach))
    return found, squares(found), squares(numbers)


def error_squares(task: Task, fn: Attention) -> list[float]:
    """Squared norms, summed over the draws, of the difference of `fn` from the oracle, for each of RESULTS."""
    pairs = zip((results_of(fn, *drawn) for drawn in draw_inputs(task)), exact_results(task)[0], strict=True)
    return squares([[got - want for got, want in zip(*pair, strict=True)] for pair in pairs])


@lru_cache(16)
def reference_squares(task: Task, product: Callable[[Tensor, Tensor], Tensor]) -> list[list[float]]:
    """`error_squares` of `_Plain`, weights kept, and computed again. A key seen m times stands there m times."""
    reach = task.reach(task.shape).to(task.device)
    copies = range(max(1, int(reach.max())))
    bias = torch.cat([torch.where(reach > copy, 0.0, -math.inf) for copy in copies], dim=-1)

    def attention(q: Tensor, k: Tensor, v: Tensor, recompute: bool) -> Tensor:
        return _Plain.apply(q, *(x.repeat(1, 1, len(copies), 1) for x in (k, v)), bias, product, recompute)

    return [error_squares(task, partial(attention, recompute=again)) for again in (False, True)]


@ordinary()
def compared(variant: Variant, shape: Shape, device: str | torch.device, draws: int = 2) -> dict:
    """For each of RESULTS the relative error `<result>_error` (Frobenius norm of the difference from the oracle over
    the oracle's), and `<result>_of_reference`, that over the least accurate reference's, or half of what rounding its
    `sizes` once would cost, whichever is larger; the budget is two. Of a block the attention inside is compared."""
    inside, device = variant.inner or variant, torch.device(device)
    task = Task(inside.reach, shape, device, draws)
    references2 = reference_squares(task, torch.matmul)
    if inside.gpu_product and shape.dtype == "float32" and device.type != "cpu":
        references2 = references2 + reference_squares(task, PRODUCTS[inside.gpu_product])
    found2 = error_squares(task, partial(inside.fn, causal=shape.causal))
    rounding = torch.finfo(DTYPES[shape.dtype]).eps / 2
    row: dict[str, Any] = {"variant": variant.name, **shape.columns()}
    columns = zip(RESULTS, found2, *exact_results(task)[1:], *references2, strict=True)
    for result, error2, exact2, size2, *reference2 in columns:
        allowed2 = max(size2 * (rounding / 2) ** 2, *reference2)
        row[f"{result}_error"] = math.sqrt(error2 / exact2) if exact2 else 0.0
        row[f"{result}_of_reference"] = math.sqrt(error2 / allowed2) if error2 else 0.0
    return row
