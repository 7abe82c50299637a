"""LongNet's dilated attention, exact in output and gradients, on strided views: nothing is gathered or scattered.

Branch (w, r) cuts the sequence into segments of w positions. Of each, head j keeps the rows s_j, s_j + r, s_j + 2r, …
and attends within them; the branches are mixed, for each query and head, by their softmax denominators. That is *one*
softmax over the multiset union of the keys: dense attention with the bias log(number of branches in which i sees j).

Two things follow. The kept rows of all segments, and of heads that start at different rows, are a strided view of the
tensors as they are, which a flash kernel takes like any other. And since the union is one softmax, each branch's
gradients are those of the flash kernel's own backward pass, called with the *merged* output and log-sum-exp: nothing
has to be differentiated through the mixing. Only these two are saved. Tensors are `[B, H, N, D]`.
Source: Ding et al. 2023, "LongNet: Scaling Transformers to 1,000,000,000 Tokens", sections 2.2 and 2.3.
"""

import math
import operator
from functools import partial

import sympy
import torch

from attnlib.core import DTYPES, AttnError, B, D, H, N, Phases, Shape, Variant, c
from attnlib.device import memory_free
from attnlib.dilated_laws import law
from attnlib.kernels import KERNELS, Kernel, chosen
from attnlib.merging import add, merge
from attnlib.views import HEAD_OFFSETS, View, all_views, fits_one_batch, offset, segments, spread


def one_line(value) -> str:
    """What a value prints as, cut short."""
    return " ".join(repr(value).split())[:80]


def integers(name: str, values) -> tuple[int, ...]:
    """`values` as positive integers. Raises AttnError, in one line, if they are none, or have no order."""
    try:
        if isinstance(values, (str, bytes, set, frozenset, dict)):
            raise TypeError
        given = list(values)
        found = tuple(operator.index(x) for x in given)
    except (TypeError, RuntimeError):  # the latter from a tensor without data
        raise AttnError(f"{name} must be a list of positive integers, not {one_line(values)}") from None
    if bad := [x for x, n in zip(given, found, strict=True) if isinstance(x, bool) or n < 1]:
        raise AttnError(f"{name} must be positive integers, not {one_line(bad[0])}")
    return found


def branches_of(segment_lengths, dilation_rates, head_offsets) -> list[tuple[int, int]]:
    """The branches `(w, r)` in the order given. Raises AttnError, in one line, for what is no configuration."""
    widths, rates = integers("segment_lengths", segment_lengths), integers("dilation_rates", dilation_rates)
    if not widths or len(widths) != len(rates):
        raise AttnError("segment_lengths and dilation_rates must be lists of the same length, and not empty")
    found = list(zip(widths, rates, strict=True))
    if beyond := [(w, r) for w, r in found if r > w]:
        raise AttnError("a dilation rate of {1} exceeds its segment of {0}".format(*beyond[0]))
    if not isinstance(head_offsets, str) or head_offsets not in HEAD_OFFSETS:
        raise AttnError(f"head_offsets must be one of {', '.join(HEAD_OFFSETS)}, not {one_line(head_offsets)}")
    return found


def is_in_rows(x: torch.Tensor) -> bool:
    """Whether x lies in rows of D numbers that do not overlap, which all kernels want."""
    strides = zip(x.stride()[:-1], x.shape, strict=False)
    return x.stride(-1) == 1 and all(stride >= x.shape[-1] for stride, size in strides if size > 1)


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """x in rows: itself, or a copy, as of an expanded gradient that o.sum() gives."""
    return x if is_in_rows(x) else x.contiguous()


def check(q, k, v, causal, segment_lengths, dilation_rates, head_offsets) -> list[tuple[int, int]]:
    """`branches_of`. Raises AttnError, in one line, for what no dilated attention takes or has the memory for."""
    if not all(isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_nested for x in (q, k, v)):
        raise AttnError("q, k and v must be tensors, neither sparse nor nested")
    if len({(x.shape, x.dtype, x.device) for x in (q, k, v)}) > 1:
        raise AttnError("q, k and v must have the same shape, dtype and device")
    if q.dim() != 4 or not all(q.shape):
        raise AttnError(f"q, k and v must be [B, H, N, D] with no size zero, not {list(q.shape)}")
    if q.dtype not in (*DTYPES.values(), torch.float64):
        raise AttnError(f"q, k and v must be floating-point of 16 bits or more, not {q.dtype}")
    if not isinstance(causal, bool):
        raise AttnError(f"causal must be True or False, not {one_line(causal)}")
    branches = branches_of(segment_lengths, dilation_rates, head_offsets)
    copies = sum(not is_in_rows(x) for x in (q, k, v))
    least = (1 + copies) * q.nbytes + 4 * q.numel() // q.shape[-1]  # o and its log-sum-exp, and copies of the inputs
    # to ask a GPU what is free takes as long as a small kernel
    if least > 2**28 and q.device.type in ("cpu", "cuda") and least > memory_free(str(q.device)):
        raise AttnError(f"{least / 2**30:,.1f} GiB are needed at least, and that much is not free")
    return branches


def dilated_reference(q, k, v, *, segment_lengths, dilation_rates, causal=False, head_offsets="modulo"):
    """o `[B, H, N, D]`, as the paper defines it, one segment of one head at a time: to be read, on any device.

    Raises AttnError for lists that are empty, unequal or not of positive integers, a rate above its segment, another
    head_offsets, inputs that differ in shape, dtype or device, or more than memory can hold.
    """
    branches = check(q, k, v, causal, segment_lengths, dilation_rates, head_offsets)
    (heads, seq_len), outputs, denominators = q.shape[1:3], [], []
    for width, rate in branches:
        o, lse = torch.zeros_like(v), torch.full_like(q[..., 0], -math.inf, dtype=torch.float32)
        for head in range(heads):
            for start in range(0, seq_len, width):
                first = start + offset(head, heads, rate, head_offsets)
                kept = torch.arange(first, max(first, min(start + width, seq_len)), min(rate, seq_len), device=q.device)
                q_kept, k_kept, v_kept = (x[:, head, kept] for x in (q, k, v))
                scores = (q_kept @ k_kept.mT * q.shape[-1] ** -0.5).float()
                if causal:
                    scores = scores + torch.full_like(scores, -math.inf).triu(1)
                where = torch.arange(q.shape[0], device=q.device)[:, None], torch.tensor(head, device=q.device), kept
                o = o.index_put(where, torch.softmax(scores, -1).to(v.dtype) @ v_kept)
                lse = lse.index_put(where, torch.logsumexp(scores, -1))
        outputs.append(o)
        denominators.append(lse)
    lse = torch.stack(denominators)
    seen = lse.amax(0) > -math.inf
    weights = torch.softmax(torch.where(seen, lse, 0.0), dim=0) * seen
    return (weights.to(v.dtype).unsqueeze(-1) * torch.stack(outputs)).sum(0)


class _Dilated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, branches: list[View], causal: bool, kernel: Kernel):
        first, *others = branches
        part, part_lse = kernel.forward(*(first.of(x) for x in (q, k, v)), causal)
        lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)
        first.of(lse).copy_(part_lse)
        o = spread(part, first, q)
        del part, part_lse
        for view in others:
            merge(view.of(o), view.of(lse), *kernel.forward(*(view.of(x) for x in (q, k, v)), causal))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.how = branches, causal, kernel
        return o

    @staticmethod
    def backward(ctx, do):
        return *_Gradients.apply(do, *ctx.saved_tensors, *ctx.how), None, None, None


class _Gradients(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused: without it, it would be wrong without a word."""

    @staticmethod
    def forward(ctx, do, q, k, v, o, lse, branches: list[View], causal: bool, kernel: Kernel):
        (first, *others), do = branches, in_rows(do)

        def parts(view):
            return kernel.backward(*(view.of(x) for x in (do, q, k, v, o, lse)), causal)

        grads = list(parts(first))
        for at in range(len(grads)):  # one after the other, each part gone before the next is laid out
            grads[at] = spread(grads[at], first, q)
        for view in others:
            add([view.of(grad) for grad in grads], parts(view))
        return tuple(grads)

    @staticmethod
    def backward(ctx, *_):
        raise AttnError("dilated attention has no second derivative")


def dilated(
    q, k, v, *, segment_lengths, dilation_rates, causal=False, head_offsets="modulo", kernel: str | None = None
):
    """o `[B, H, N, D]`: what dilated_reference computes, by flash kernels on strided views, exact in its gradients too.

    kernel: which one of kernels.KERNELS runs underneath; by default the first that takes such inputs. What is saved for
    the backward pass is the output and one float32 per row and head. A query that no branch keeps gives 0, with
    gradient 0. Raises AttnError as dilated_reference does, for a kernel that cannot run there, and, before anything is
    allocated, where memory cannot suffice.
    """
    pairs = check(q, k, v, causal, segment_lengths, dilation_rates, head_offsets)
    size = Shape(*q.shape, str(q.dtype).removeprefix("torch."), causal)
    underneath = chosen(kernel, size, q.device)
    q, k, v = (in_rows(x) for x in (q, k, v))
    if fold := fits_one_batch(*q.shape[:2], [r for _, r in pairs], head_offsets) and all(
        x.stride(0) == x.stride(1) * x.shape[1] for x in (q, k, v)
    ):
        q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
    o = _Dilated.apply(q, k, v, all_views(*q.shape[:3], tuple(pairs), head_offsets), size.causal, underneath)
    return o.squeeze(0).unflatten(0, (size.batch, size.heads)) if fold else o


def reach(shape: Shape, *, segment_lengths, dilation_rates, head_offsets="modulo") -> torch.Tensor:
    """`[H, N, N]`: in how many branches query i sees key j."""
    heads, at = shape.heads, torch.arange(shape.seq_len)
    counts = torch.zeros(heads, shape.seq_len, shape.seq_len, dtype=torch.float64)
    for width, rate in zip(segment_lengths, dilation_rates, strict=True):
        together = (at[:, None] // width) == (at // width)
        for head in range(heads):
            kept = (at % width - offset(head, heads, rate, head_offsets)) % rate == 0
            kept &= at % width >= offset(head, heads, rate, head_offsets)
            counts[head] += together & kept[:, None] & kept
    return counts.tril() if shape.causal else counts


def _pairs(heads: int, seq_len: int, causal: int, grouped: int, *config: int) -> int:
    """How many pairs of a query and a key all branches compute: of each segment and head, its kept rows squared."""
    half, found = len(config) // 2, 0
    for width, rate in zip(config[:half], config[half:], strict=True):
        for _, count, length in segments(seq_len, width):
            for head in range(heads):
                rows = max(0, -(-(length - offset(head, heads, rate, HEAD_OFFSETS[grouped])) // rate))
                found += count * (rows * (rows + 1) // 2 if causal else rows**2)
    return found


class Pairs(sympy.Function):
    """`_pairs` as a term of a formula."""

    _imp_ = staticmethod(_pairs)


def needs(shape: Shape, device, kernel: str | None = None) -> str | None:
    """The reason why no kernel, or not the one asked for, takes such shapes on the device, or None."""
    try:
        chosen(kernel, shape, device)
    except AttnError as error:
        return str(error)
    return None


def variant(name: str, segment_lengths, dilation_rates, head_offsets="modulo", kernel: str | None = None) -> Variant:
    """Dilated attention of these branches as a Variant called `name`. Raises AttnError for what is no configuration."""
    widths, rates = zip(*branches_of(segment_lengths, dilation_rates, head_offsets), strict=True)
    if kernel is not None and kernel not in KERNELS:
        raise AttnError(f"kernel must be one of {', '.join(KERNELS)}, not {kernel!r}")
    config = {"segment_lengths": widths, "dilation_rates": rates, "head_offsets": head_offsets}
    pairs = Pairs(H, N, c, HEAD_OFFSETS.index(head_offsets), *widths, *rates)
    return Variant(
        name=name,
        fn=partial(dilated, kernel=kernel, **config),
        law=law(widths, rates, head_offsets, kernel),
        flops=Phases(4 * B * D * pairs, 10 * B * D * pairs),
        reach=partial(reach, **config),
        needs=partial(needs, kernel=kernel),
        ledgered=False,
    )


# the paper's own setting (section 3.1)
DILATED = variant("dilated", (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
