"""Flash kernels as pairs of plain functions: forward with its log-sum-exp, backward from an output and a log-sum-exp.

What torch.autograd hides is needed by name where attention is put together from parts. Tensors are `[b, h, n, D]`, any
strides with D contiguous; a log-sum-exp is `[b, h, n]` in float32. Nothing random: dropout is 0."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnlib.core import HALF, Device, Machine, Shape, UserError, needs_cuda
from attnlib.dilated.law import Workspace
from attnlib.dilated.merging import packed
from attnlib.dilated.packing import Packing
from attnlib.dilated.views import MAX_GRID_AXIS
from attnlib.laws import N, evaluate
from attnlib.variants import sdpa_laws as known

aten = torch.ops.aten
Tensors = Sequence[Tensor]
AT_ONCE_BYTES = 48 * 2**20  # of float32 for dq: beyond that, other kernels' speed and the memory of each are worth more


@dataclass(frozen=True)
class Kernel:
    """A flash kernel that can be called on parts of attention."""

    name: str  # by which `dilated` is asked for it
    forward: Callable[..., Tensors]  # (q, k, v, causal) -> o, lse
    backward: Callable[..., Tensors]  # (do, q, k, v, o, lse, causal) -> dq, dk, dv
    needs: Callable[[Shape, Machine], str | None]  # (shape, machine) -> None, or the reason why it cannot run there
    workspace: Workspace | None  # its memory, None where that is not known on views
    repeats: bool = True  # whether its backward pass gives the same bits again where PyTorch is told to


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensors:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def cpu_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool) -> Tensors:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse.contiguous(), 0.0, causal)


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensors:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def flash_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool) -> Tensors:
    # it copies do and o slowly unless contiguous as [b, n, h, D]: whole heads in segments are, as a batch of one head
    b, h = q.shape[:2]
    whole = b * h <= MAX_GRID_AXIS and all(x.transpose(0, 1).is_contiguous() for x in (do, q, k, v, o))
    if whole:
        do, q, k, v, o, lse = (x.transpose(0, 1).flatten(0, 1).unsqueeze(1) for x in (do, q, k, v, o, lse))
    do, o = packed(do, o)
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a random generator that dropout 0 never asks
    saved, lengths = (q, k, v, o, lse.contiguous()), (None, None, q.shape[2], k.shape[2])
    grads = aten._scaled_dot_product_flash_attention_backward(do, *saved, *lengths, 0.0, causal, seed, seed[:0])
    return [x.squeeze(1).unflatten(0, (h, b)).transpose(0, 1) for x in grads] if whole else grads


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensors:
    if 1 in (q.shape[2], k.shape[2]):  # cuDNN refuses a single row
        return flash_forward(q, k, v, causal)
    # what torch's fused call comes to in the end
    o, lse = aten._cudnn_attention_forward(q, k, v, None, None, None, q.shape[2], k.shape[2], True, 0.0, causal)[:2]
    return o, lse.reshape(o.shape[:3])


def cudnn_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool) -> Tensors:
    if 1 in (q.shape[2], k.shape[2]):
        return flash_backward(do, q, k, v, o, lse, causal)
    saved, lengths = (q, k, v, o, lse.contiguous().unsqueeze(-1)), (None, None, q.shape[2], k.shape[2])
    seed = offset = lse  # never asked either
    return aten._cudnn_attention_backward(do, *saved, seed, offset, None, *lengths, 0.0, causal)


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensors:
    o, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)[:2]
    return o, lse[..., : q.shape[2]]


def efficient_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool) -> Tensors:
    padded = torch.nn.functional.pad(lse.contiguous(), (0, -lse.shape[-1] % 32), value=float("inf"))
    how = *torch.zeros(2, dtype=torch.int64), 0.0, [True, True, True, False], causal
    return aten._scaled_dot_product_efficient_attention_backward(do, q, k, v, None, o, padded, *how)[:3]


def fa4_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensors:
    rows = (x.transpose(1, 2) for x in (q, k, v))
    o, lse = known.fa4_interface()._flash_attn_fwd(*rows, causal=causal, return_lse=True)[:2]
    return o.transpose(1, 2), lse


def fa4_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool) -> Tensors:
    rows = (x.transpose(1, 2) for x in (q, k, v, o, do))
    grads = known.fa4_interface()._flash_attn_bwd(*rows, lse.contiguous(), causal=causal)[:3]
    return [x.transpose(1, 2) for x in grads]


def needs_cpu(shape: Shape, machine: Device) -> str | None:
    """It runs on the CPU alone."""
    return None if Machine.of(machine).is_cpu else "PyTorch's CPU kernel runs on the CPU alone"


def needs_efficient_alone(shape: Shape, machine: Device) -> str | None:
    """needs_efficient, and that no other kernel is better."""
    better = shape.dtype != "float32" and Machine.of(machine).capability >= (8, 0)
    reason = "half types have better kernels than the efficient one" if better else None
    return known.needs_efficient(shape, machine) or reason


def needs_flash_unpadded(shape: Shape, machine: Device) -> str | None:
    """needs_flash, on CUDA, without PyTorch's padding of D."""
    padded = "FlashAttention-2 takes head_dim in multiples of 8" if shape.head_dim % 8 else None
    return needs_cuda(shape, machine, HALF, (8, 0), "FlashAttention-2") or known.needs_flash(shape, machine) or padded


# 16 and 24 bytes: the state of that generator
FLASH_WORKSPACE = Workspace(known.PARTIAL + 24, sum(known.FLASH_TAKES.values()) + 16, copies=2)
CUDNN_WORKSPACE = Workspace(known.ENGINE + 16, sum(known.CUDNN_TAKES.values()), one_row=FLASH_WORKSPACE)
ALL_KERNELS = (
    Kernel("cpu", cpu_forward, cpu_backward, needs_cpu, Workspace(known.TILES, known.TILES_BACKWARD, copies=1)),
    Kernel("fa4", fa4_forward, fa4_backward, known.needs_fa4, Workspace(0, sum(known.FA4_TAKES.values())), False),
    Kernel("cudnn", cudnn_forward, cudnn_backward, known.needs_cudnn, CUDNN_WORKSPACE, False),
    Kernel("flash", flash_forward, flash_backward, needs_flash_unpadded, FLASH_WORKSPACE),
    Kernel("efficient", efficient_forward, efficient_backward, needs_efficient_alone, None),
)
KERNELS = {kernel.name: kernel for kernel in ALL_KERNELS}


def kernel_called(name: Any) -> Kernel:
    """One of KERNELS. Raises UserError for an unknown name."""
    if not isinstance(name, str) or name not in KERNELS:
        raise UserError(f"kernel must be one of {', '.join(KERNELS)}, not {name!r}")
    return KERNELS[name]


def chosen(name: str | None, shape: Shape, machine: Device, repeat: bool = False) -> Kernel:
    """The kernel called `name`, or the first of KERNELS that takes such a shape on the machine, and, where results are
    to `repeat`, has the same bits each time. Raises UserError for an unknown name, or with the reason why a kernel
    asked for cannot run there."""
    machine = Machine.of(machine)
    asked = [*KERNELS.values()] if name is None else [kernel_called(name)]
    varying = "under deterministic algorithms there is no {}: its backward pass does not repeat its bits"
    reasons = [x.needs(shape, machine) or (varying.format(x.name) if repeat > x.repeats else None) for x in asked]
    if None in reasons:
        return asked[reasons.index(None)]
    nothing = f"no flash kernel takes {shape.dtype} with head_dim {shape.head_dim} on {machine.kind}"
    raise UserError(nothing if name is None else reasons[0])


def takes_all(name: str | None, packing: Packing | None, shape: Shape, machine: Machine) -> bool:
    """Whether by default, without a `name`, FlashAttention-2 takes all that is packed at once: where that saves two
    calls or more, and is neither so long that the kernel's own speed decides nor in so many segments that they cost
    more memory than they hold."""
    if name or not packing or len(packing.groups) < 3 or KERNELS["flash"].needs(shape, machine):
        return False
    whole = replace(shape, batch=1, heads=1, seq_len=sum(packing.sizes))
    return evaluate(whole_workspace(sum(many for many, _ in packing.groups)).backward, whole, machine) <= AT_ONCE_BYTES


def whole_workspace(many: int) -> Workspace:
    """What `at_once` takes for so many segments: of each, the accumulator of dq has 128 rows more."""
    return Workspace(24, 4 * (N + 128 * many) * (known.D32 + 1) + 16, at_once=True)


@cache  # and never let go of, as another stream may still read them
def ends_of(groups: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Where each segment of packed rows ends, in int32, behind a 0."""
    lengths = (rows for many, rows in groups for _ in range(many))
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def at_once(packing: Packing, device: torch.device) -> Kernel:
    """FlashAttention-2 in one call for all segments, however long each is, of packed rows `[1, 1, T, D]`."""
    ends, longest = ends_of(packing.groups, device), max(rows for _, rows in packing.groups)
    how = ends, ends, longest, longest, 0.0
    rows_of = lambda *tensors: (x.view(-1, 1, x.shape[-1]) for x in tensors)  # noqa: E731

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensors:
        o, lse = aten._flash_attention_forward(*rows_of(q, k, v), *how, causal, False)[:2]
        return o.view(q.shape), lse.view(q.shape[:3])

    def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool) -> Tensors:
        seed = torch.empty(2, dtype=torch.uint64, device=device)
        grads = aten._flash_attention_backward(*rows_of(do, q, k, v, o), lse[0], *how, causal, seed, seed[:0])
        return [x.view(q.shape) for x in grads]

    return replace(KERNELS["flash"], forward=forward, backward=backward)


def workspace_of(name: str | None, shape: Shape, machine: Machine, packing: Packing | None = None) -> Workspace:
    """The memory of the kernel called `name`, wherever that may run, or of the one `chosen` for such a shape, or for
    rows that are packed so. Raises UserError where there is none, or where its memory on views is not known."""
    kernel = KERNELS[name] if name else chosen(None, shape, machine)
    if packing and takes_all(name, packing, shape, machine):
        return whole_workspace(sum(many for many, _ in packing.groups))
    if kernel.workspace is None:
        raise UserError(f"the memory of the {kernel.name} kernel on views is not known")
    return kernel.workspace
