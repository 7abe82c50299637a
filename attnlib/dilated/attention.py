"""LongNet's dilated attention, exact in output and gradients, on strided views: nothing is gathered or scattered.

Its definition (module `definition`) comes to *one* softmax over the multiset union of the keys that its branches show:
dense attention with the bias log(number of branches in which i sees j). Two things follow. The kept rows of all
segments, and of heads that start at different rows, are a strided view of the tensors, which a flash kernel takes like
any other. And each branch's gradients are those of the kernel's own backward pass, called with the *merged* output and
log-sum-exp: nothing is differentiated through the mixing, only these two are saved. Tensors are `[B, H, N, D]`.

`torch.ops.attnlib.dilated` and `.dilated_backward` are the same two passes as operators that PyTorch's compiler knows.
Their results are contiguous, as a compiler has to know; outside of one none is called, and a kernel's layout stays."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from attnlib.calling import cast, checked, differentiable, folding, refuse_causal, refuse_unlike
from attnlib.core import Machine, Shape
from attnlib.dilated import views
from attnlib.dilated.definition import branches_of, dilated_reach, dilated_reference
from attnlib.dilated.kernels import Kernel, at_once, chosen, kernel_called, takes_all, workspace_of
from attnlib.dilated.law import dilated_law, refusal
from attnlib.dilated.merging import add, join, merge, pack, total
from attnlib.dilated.packing import Packing, packing_of
from attnlib.dilated.views import Branches, View
from attnlib.laws import Phases, Variant

INPUTS = "Tensor q, Tensor k, Tensor v"
HOW = "SymInt[] segment_lengths, SymInt[] dilation_rates, bool causal, str head_offsets, str kernel"
if known := getattr(torch.ops.attnlib, "library", None):
    known._destroy()  # of this module before it was loaded again
LIBRARY = torch.ops.attnlib.library = torch.library.Library("attnlib", "DEF")
LIBRARY.define(f"dilated({INPUTS}, {HOW}) -> (Tensor, Tensor)")
LIBRARY.define(f"dilated_backward(Tensor do, {INPUTS}, Tensor o, Tensor lse, {HOW}) -> (Tensor, Tensor, Tensor)")
DILATED_FORWARD, DILATED_BACKWARD = torch.ops.attnlib.dilated.default, torch.ops.attnlib.dilated_backward.default


def in_rows(x: Tensor) -> Tensor:
    """x in rows of D numbers that do not overlap, as all kernels want: itself, or a copy, as of o.sum()'s gradient."""
    if x.is_contiguous():  # told at once, and the usual case
        return x
    apart = all(stride >= x.shape[-1] for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    return x if apart and x.stride(-1) == 1 else x.contiguous()


@lru_cache(256)
def planned(
    sizes: torch.Size, dtype: torch.dtype, device: torch.device,
    widths: Sequence[int], rates: Sequence[int], causal: bool, head_offsets: str, kernel: str,
    whole: bool, repeat: bool,
) -> tuple[Kernel, Packing | None, list[View], list[View]]:  # fmt: skip
    """The kernel to call, how rows are packed if they are, and the views without and with a batch folded into the
    heads, none where it may not be. kernel: its name, or "" by default; whole: whether that may be one call for all
    that is packed; repeat: see `chosen`. Raises UserError as that does."""
    branches = branches_of(widths, rates, head_offsets)
    batch, heads, seq_len, head_dim = sizes
    shape = Shape(batch, heads, seq_len, head_dim, str(dtype).removeprefix("torch."), causal)
    can_fold = views.can_fold_batch_into_heads(batch, heads, rates, head_offsets)
    folded = views.all_views(1, batch * heads, seq_len, branches, head_offsets) if can_fold else []
    calls = views.all_views(batch, heads, seq_len, branches, head_offsets)
    machine = Machine.of(device)
    packing = packing_of(shape, branches, head_offsets, machine)
    if packing and whole and takes_all(kernel, packing, shape, machine):
        return at_once(packing, device), packing.whole, calls, folded
    return chosen(kernel or None, shape, machine, repeat), packing, calls, folded


def plan_for(q: Tensor, widths: Sequence[int], rates: Sequence[int], *how: Any) -> tuple[Any, ...]:
    """`planned` for tensors like q, with results that repeat where PyTorch is told that they must."""
    repeat = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return planned(q.shape, q.dtype, q.device, tuple(widths), tuple(rates), *how, repeat)


def in_views(tensors: Sequence[Tensor], calls: list[View], folded: list[View]) -> tuple[list[View], list[Tensor]]:
    """The views to go through, and tensors `[B, H, N, D]`, their batch folded into the heads if all of them allow."""
    if folded and all(x.stride(0) == x.stride(1) * x.shape[1] for x in tensors):
        return folded, [x.flatten(0, 1).unsqueeze(0) for x in tensors]
    return calls, list(tensors)


def dilated_forward(
    q: Tensor, k: Tensor, v: Tensor,
    widths: Sequence[int], rates: Sequence[int], causal: bool, head_offsets: str, kernel_name: str, whole: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and its log-sum-exp; see `planned`. Raises UserError as that does, and for tensors that are not alike."""
    refuse_unlike(q, k, v)
    kernel, packing, *calls = plan_for(q, widths, rates, causal, head_offsets, kernel_name, whole)
    inputs = [in_rows(x) for x in (q, k, v)]
    if packing:
        return join(packing, [kernel.forward(*rows, causal) for rows in pack(packing, inputs)], inputs[0])
    (first, *others), inputs = in_views(inputs, *calls)
    part, part_lse = kernel.forward(*(first.of(x) for x in inputs), causal)
    lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    at = lse.view(inputs[0].shape[:3])
    first.of(at).copy_(part_lse)
    o = views.scatter_into_zeros(part, first, inputs[0])
    del part, part_lse
    for view in others:
        merge(view.of(o), view.of(at), *kernel.forward(*(view.of(x) for x in inputs), causal))
    return unfolded(o, q), lse


def dilated_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    widths: Sequence[int], rates: Sequence[int], causal: bool, head_offsets: str, kernel_name: str, whole: bool = False,
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv, by the kernel's own backward pass with the merged o and lse. Raises what `dilated_forward` does."""
    refuse_unlike(q, k, v, do, o)
    kernel, packing, *calls = plan_for(q, widths, rates, causal, head_offsets, kernel_name, whole)
    inputs, lse = [in_rows(x) for x in (do, q, k, v, o)], lse.contiguous()
    if packing:
        parts = [kernel.backward(*rows, causal) for rows in pack(packing, inputs, lse)]
        return total(packing, parts, inputs[1:4])
    (first, *others), inputs = in_views(inputs, *calls)
    inputs.append(lse.view(inputs[0].shape[:3]))
    grads = list(kernel.backward(*(first.of(x) for x in inputs), causal))
    for at in range(len(grads)):  # one after the other, each part gone before the next is laid out
        grads[at] = views.scatter_into_zeros(grads[at], first, inputs[1])
    for view in others:
        add([view.of(grad) for grad in grads], kernel.backward(*(view.of(x) for x in inputs), causal))
    return [unfolded(grad, q) for grad in grads]


def unfolded(x: Tensor, like: Tensor) -> Tensor:
    """x with batch and heads apart, as `like` has them."""
    return x if x.shape == like.shape else x.squeeze(0).unflatten(0, like.shape[:2])


def below_autograd(known: Callable[..., Any]) -> Callable[..., Any]:
    """An operator without its autograd function, as torch.library's own do it."""

    def call(*given: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return known(*given)

    return call


def outside_transforms(apply: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's autograd function, which torch.func does not see through: it is refused there, in one line."""

    def call(*given: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError("torch.func.grad takes `dilated` outside of torch.compile, and not its operator")
        return apply(*given)

    return call


def contiguous(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with contiguous results."""
    return lambda *given: tuple(x.contiguous() for x in function(*given))


ATTENTION = differentiable("dilated attention", dilated_forward, dilated_backward)
KNOWN = differentiable("dilated attention", below_autograd(DILATED_FORWARD), below_autograd(DILATED_BACKWARD))
for known, function, apply in (
    (DILATED_FORWARD, dilated_forward, KNOWN.apply),
    (DILATED_BACKWARD, dilated_backward, KNOWN.gradients.apply),
):
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(known, contiguous(function), key)
    LIBRARY.impl(known, outside_transforms(apply), "Autograd")
    torch.library.register_vmap(known, folding(known), lib=LIBRARY)


@torch.library.register_fake(DILATED_FORWARD, lib=LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    refuse_unlike(q, k, v)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake(DILATED_BACKWARD, lib=LIBRARY)
def _(do: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(q.shape) for _ in range(3))


def traced(*tensors: Any) -> bool:
    """Whether somebody looks on who wants to see operators: a compiler, a tracer, a dispatch mode, a wrapper tensor."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    return any(type(x) is not Tensor and is_traceable_wrapper_subclass(x) for x in tensors)


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
    kernel: which one of kernels.KERNELS runs underneath; by default the first that takes such inputs, or, where neither
        a compiler nor a CUDA graph looks on, FlashAttention-2, if one call of it does for three of a short sequence.
        Under torch.use_deterministic_algorithms those are left out whose bits vary.

    Saved for the backward pass are the output and one float32 per row and head. A query that no branch keeps gives 0,
    with gradient 0. float64 is computed by dilated_reference. Raises UserError as that does, and for a kernel that
    cannot run there; there is no second derivative but in float64."""
    refuse_causal(causal)
    underneath, looked_on = "" if kernel is None else kernel_called(kernel).name, traced(q, k, v)
    q, k, v = cast(q, k, v) if looked_on else checked(q, k, v, causal)
    if q.dtype == torch.float64 and kernel is None:
        return dilated_reference(
            q, k, v,
            segment_lengths=segment_lengths, dilation_rates=dilation_rates, causal=causal, head_offsets=head_offsets,
        )  # fmt: skip
    if looked_on:
        return DILATED_FORWARD(q, k, v, [*segment_lengths], [*dilation_rates], causal, head_offsets, underneath)[0]
    branches = branches_of(segment_lengths, dilation_rates, head_offsets)
    widths, rates = zip(*branches, strict=True)
    # what one call for all keeps must not lie in the memory of a graph
    whole = q.is_cuda and not torch.cuda.is_current_stream_capturing()
    return ATTENTION.apply(q, k, v, widths, rates, causal, head_offsets, underneath, whole)[0]


def dilated_flops(per_pair: int, branches: Branches, head_offsets: str, shape: Shape, machine: Machine) -> int:
    """Floating-point operations, `per_pair` for each number of D and each pair of kept rows of a segment and head."""
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
