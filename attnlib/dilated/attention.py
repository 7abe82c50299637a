"""LongNet's dilated attention, exact in output and gradients, on strided views: nothing is gathered or scattered.

Branch (w, r) cuts the sequence into segments of w positions. Of each, head j keeps the rows s_j, s_j + r, s_j + 2r, …
and attends within them; the branches are mixed, for each query and head, by their softmax denominators. That is *one*
softmax over the multiset union of the keys: dense attention with the bias log(number of branches in which i sees j).

Two things follow. The kept rows of all segments, and of heads that start at different rows, are a strided view of the
tensors as they are, which a flash kernel takes like any other. And each branch's gradients are those of the kernel's
own backward pass, called with the *merged* output and log-sum-exp: nothing is differentiated through the mixing, and
only these two are saved. Tensors are `[B, H, N, D]`.
Source: Ding et al. 2023, "LongNet: Scaling Transformers to 1,000,000,000 Tokens", sections 2.2 and 2.3."""

import math
import operator
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnlib.core import Machine, Shape, UserError
from attnlib.dilated import views
from attnlib.dilated.kernels import Kernel, chosen, kernel_called, workspace_of
from attnlib.dilated.law import dilated_law, refusal
from attnlib.dilated.merging import add, merge
from attnlib.dilated.views import Branches, View
from attnlib.laws import Phases, Variant
from attnlib.variants.tiled import check_inputs, one_line


def integers(name: str, values: Any) -> tuple[int, ...]:
    """`values` as positive integers. Raises UserError, in one line, if they are none, or have no order."""
    try:
        given = None if isinstance(values, (str, bytes, set, frozenset, dict)) else list(values)
        found = tuple(operator.index(x) for x in given)
    except (TypeError, RuntimeError):  # the latter from a tensor without data
        raise UserError(f"{name} must be a list of positive integers, not {one_line(values)}") from None
    if bad := [x for x, n in zip(given, found, strict=True) if isinstance(x, bool) or n < 1]:
        raise UserError(f"{name} must be positive integers, not {one_line(bad[0])}")
    return found


def branches_of(segment_lengths: Any, dilation_rates: Any, head_offsets: Any) -> Branches:
    """The branches `(w, r)` in the order given. Raises UserError, in one line, for lists that are empty, unequal or not
    of positive integers, a rate above its segment, or another head_offsets."""
    widths, rates = integers("segment_lengths", segment_lengths), integers("dilation_rates", dilation_rates)
    if not widths or len(widths) != len(rates):
        raise UserError("segment_lengths and dilation_rates must be lists of the same length, and not empty")
    branches = tuple(zip(widths, rates, strict=True))
    for width, rate in branches:
        if rate > width:
            raise UserError(f"a dilation rate of {rate} exceeds its segment of {width}")
    if not isinstance(head_offsets, str) or head_offsets not in views.HEAD_OFFSETS:
        raise UserError(f"head_offsets must be one of {', '.join(views.HEAD_OFFSETS)}, not {one_line(head_offsets)}")
    return branches


def in_rows(x: Tensor) -> Tensor:
    """x in rows of D numbers that do not overlap, as all kernels want: itself, or a copy, as of o.sum()'s gradient."""
    apart = all(stride >= x.shape[-1] for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    return x if apart and x.stride(-1) == 1 else x.contiguous()


def dilated_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    segment_lengths: Iterable[int], dilation_rates: Iterable[int], causal: bool = False, head_offsets: str = "modulo",
) -> Tensor:  # fmt: skip
    """o `[B, H, N, D]`, as the paper defines it, one segment of one head at a time: to be read, on any device. Its
    parameters are those of `dilated`. Raises UserError for what `check_inputs` and `branches_of` refuse."""
    check_inputs(q, k, v, causal)
    branches = branches_of(segment_lengths, dilation_rates, head_offsets)
    (heads, seq_len), parts = q.shape[1:3], []
    for width, rate in branches:
        o, lse = torch.zeros_like(v), torch.full_like(q[..., 0], -math.inf, dtype=torch.float32)
        for head in range(heads):
            for start in range(0, seq_len, width):
                first = start + views.offset(head, heads, rate, head_offsets)
                kept = torch.arange(first, max(first, min(start + width, seq_len)), min(rate, seq_len), device=q.device)
                q_kept, k_kept, v_kept = (x[:, head, kept] for x in (q, k, v))
                scores = (q_kept @ k_kept.mT * q.shape[-1] ** -0.5).float()
                if causal:
                    scores = scores + torch.full_like(scores, -math.inf).triu(1)
                where = torch.arange(q.shape[0], device=q.device)[:, None], torch.tensor(head, device=q.device), kept
                o = o.index_put(where, torch.softmax(scores, -1).to(v.dtype) @ v_kept)
                lse = lse.index_put(where, torch.logsumexp(scores, -1))
        parts.append((o, lse))
    o, lse = (torch.stack(part) for part in zip(*parts, strict=True))
    seen = lse.amax(0) > -math.inf
    weights = torch.softmax(torch.where(seen, lse, 0.0), dim=0) * seen
    return (weights.to(v.dtype).unsqueeze(-1) * o).sum(0)


class _Dilated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: list[View], causal: bool, kernel: Kernel) -> Tensor:
        first, *others = calls
        part, part_lse = kernel.forward(*(first.of(x) for x in (q, k, v)), causal)
        lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)
        first.of(lse).copy_(part_lse)
        o = views.scatter_into_zeros(part, first, q)
        del part, part_lse
        for view in others:
            merge(view.of(o), view.of(lse), *kernel.forward(*(view.of(x) for x in (q, k, v)), causal))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.how = calls, causal, kernel
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return *_Gradients.apply(do, *ctx.saved_tensors, *ctx.how), None, None, None


class _Gradients(torch.autograd.Function):
    """A function of its own, so that a second derivative raises instead of being silently wrong."""

    @staticmethod
    def forward(ctx: Any, do: Tensor, *saved_and_how: Any) -> tuple[Tensor, ...]:
        *saved, (first, *others), causal, kernel = saved_and_how  # saved: q, k, v, o, lse
        inputs = in_rows(do), *saved
        grads = list(kernel.backward(*(first.of(x) for x in inputs), causal))
        for at in range(len(grads)):  # one after the other, each part gone before the next is laid out
            grads[at] = views.scatter_into_zeros(grads[at], first, saved[0])
        for view in others:
            add([view.of(grad) for grad in grads], kernel.backward(*(view.of(x) for x in inputs), causal))
        return tuple(grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise UserError("dilated attention has no second derivative")


def dilated(
    q: Tensor, k: Tensor, v: Tensor, *,
    segment_lengths: Iterable[int], dilation_rates: Iterable[int], causal: bool = False, head_offsets: str = "modulo",
    kernel: str | None = None,
) -> Tensor:  # fmt: skip
    """o `[B, H, N, D]`: what dilated_reference computes, by flash kernels on strided views, exact in its gradients too.

    q, k, v: `[B, H, N, D]` of one shape, dtype and device; they are copied where they do not lie in rows of D numbers.
    segment_lengths: w of each branch; the last segment is shorter where w does not divide N, one beyond N is all of it.
    dilation_rates: r of each branch, from 1 to its w: of each segment a head keeps every r-th row.
    causal: whether a query sees no key after itself.
    head_offsets: the first row of a segment that head j keeps, j mod r ("modulo", the paper) or j // ⌈H/r⌉ ("grouped").
    kernel: which one of kernels.KERNELS runs underneath; by default the first that takes such inputs.

    Saved for the backward pass are the output and one float32 per row and head. A query that no branch keeps gives 0,
    with gradient 0. Raises UserError as dilated_reference does, and for a kernel that cannot run there."""
    check_inputs(q, k, v, causal)
    branches = branches_of(segment_lengths, dilation_rates, head_offsets)
    batch, heads, seq_len, head_dim = q.shape
    shape = Shape(batch, heads, seq_len, head_dim, str(q.dtype).removeprefix("torch."), causal)
    underneath = chosen(kernel, shape, q.device)
    q, k, v = (in_rows(x) for x in (q, k, v))
    fold = views.can_fold_batch_into_heads(batch, heads, [r for _, r in branches], head_offsets)
    if fold := fold and all(x.stride(0) == x.stride(1) * x.shape[1] for x in (q, k, v)):
        q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
    o = _Dilated.apply(q, k, v, views.all_views(*q.shape[:3], branches, head_offsets), causal, underneath)
    return o.squeeze(0).unflatten(0, (batch, heads)) if fold else o


def dilated_reach(
    shape: Shape, *, segment_lengths: Iterable[int], dilation_rates: Iterable[int], head_offsets: str = "modulo"
) -> Tensor:
    """`[H, N, N]`: in how many branches query i sees key j."""
    heads, at = shape.heads, torch.arange(shape.seq_len)
    counts = torch.zeros(heads, shape.seq_len, shape.seq_len, dtype=torch.float64)
    for width, rate in zip(segment_lengths, dilation_rates, strict=True):
        together = (at[:, None] // width) == (at // width)
        for head in range(heads):
            after = at % width - views.offset(head, heads, rate, head_offsets)
            kept = (after >= 0) & (after % rate == 0)
            counts[head] += together & kept[:, None] & kept
    return counts.tril() if shape.causal else counts


def dilated_flops(per_pair: int, branches: Branches, head_offsets: str, shape: Shape, machine: Machine) -> int:
    """Floating-point operations, `per_pair` for each number of D and each pair of a query and a key that a branch
    computes: of each segment and head, its kept rows squared."""
    calls = views.all_views(shape.batch, shape.heads, shape.seq_len, branches, head_offsets)
    sizes = (view.size for view in calls)
    return per_pair * shape.head_dim * sum(b * h * (n * (n + 1) // 2 if shape.causal else n**2) for b, h, n in sizes)


def dilated_variant(
    name: str, segment_lengths: Iterable[int], dilation_rates: Iterable[int],
    head_offsets: str = "modulo", kernel: str | None = None,
) -> Variant:  # fmt: skip
    """Dilated attention of these branches as a Variant called `name`; it has no law on a kernel whose memory is not
    known. Raises UserError for what is no configuration."""
    branches = branches_of(segment_lengths, dilation_rates, head_offsets)
    widths, rates = zip(*branches, strict=True)
    config: dict[str, Any] = {"segment_lengths": widths, "dilation_rates": rates, "head_offsets": head_offsets}
    fn, reach = partial(dilated, kernel=kernel, **config), partial(dilated_reach, **config)
    known = kernel is None or kernel_called(kernel).workspace
    law = dilated_law(branches, head_offsets, partial(workspace_of, kernel)) if known else None
    flops = Phases(*(partial(dilated_flops, per_pair, branches, head_offsets) for per_pair in (4, 10)))
    needs = partial(refusal, partial(chosen, kernel))
    return Variant(name, fn, law, flops, reach=reach, needs=needs, ledgered=False, gpu_product="three_tf32")


# the paper's own setting (section 3.1)
DILATED = dilated_variant("dilated", (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
