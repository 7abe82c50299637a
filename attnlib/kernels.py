"""Flash kernels as pairs of plain functions: forward with its log-sum-exp, backward from an output and a log-sum-exp.

What torch.autograd hides is needed by name where attention is put together from parts. Tensors are `[b, h, n, D]`, any
strides with D contiguous; a log-sum-exp is `[b, h, n]` in float32. Nothing random: dropout is 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch

from attnlib import sdpa
from attnlib import sdpa_laws as laws
from attnlib.core import AttnError, Shape
from attnlib.merging import packed
from attnlib.views import MOST

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """forward: `(q, k, v, causal) -> (o, lse)`. backward: `(do, q, k, v, o, lse, causal) -> (dq, dk, dv)`.

    needs: `(shape, device) -> None`, or the reason why it cannot run there. The rest is its memory, where it is known:
    forward_bytes and backward_bytes, formulas for what it takes beyond its results; copies, how many tensors backward
    copies where rows are not contiguous.
    """

    name: str
    forward: Callable
    backward: Callable
    needs: Callable
    forward_bytes: sympy.Expr | None = None
    backward_bytes: sympy.Expr | None = None
    copies: int = 0


def _cpu_forward(q, k, v, causal):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _cpu_backward(do, q, k, v, o, lse, causal):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse.contiguous(), 0.0, causal)


def _flash_forward(q, k, v, causal):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def _flash_backward(do, q, k, v, o, lse, causal):
    # it takes do and o contiguous as [b, n, h, D], and copies them slowly if not: whole heads in segments are, as a
    # batch of one head
    b, h = q.shape[:2]
    whole = b * h <= MOST and all(x.transpose(0, 1).is_contiguous() for x in (do, q, k, v, o))
    if whole:
        do, q, k, v, o, lse = (x.transpose(0, 1).flatten(0, 1).unsqueeze(1) for x in (do, q, k, v, o, lse))
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a generator that dropout 0 never asks
    lengths = None, None, q.shape[2], k.shape[2]
    do, o = packed(do, o)
    grads = aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse.contiguous(), *lengths, 0.0, causal, seed, seed[:0]
    )
    return [x.squeeze(1).unflatten(0, (h, b)).transpose(0, 1) for x in grads] if whole else grads


def _cudnn_forward(q, k, v, causal):
    if q.shape[2] == 1:  # cuDNN refuses a single row
        return _flash_forward(q, k, v, causal)
    o, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)[:2]
    return o, lse.reshape(o.shape[:3])


def _cudnn_backward(do, q, k, v, o, lse, causal):
    if q.shape[2] == 1:
        return _flash_backward(do, q, k, v, o, lse, causal)
    seed = torch.zeros(2, dtype=torch.int64, device=q.device)
    lengths = None, None, q.shape[2], k.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse.contiguous().unsqueeze(-1), seed[0], seed[1], None, *lengths, 0.0, causal
    )


def _efficient_forward(q, k, v, causal):
    o, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)[:2]
    return o, lse[..., : q.shape[2]]


def _efficient_backward(do, q, k, v, o, lse, causal):
    padded = torch.nn.functional.pad(lse.contiguous(), (0, -lse.shape[-1] % 32), value=float("inf"))
    seed = torch.zeros(2, dtype=torch.int64)
    return aten._scaled_dot_product_efficient_attention_backward(
        do, q, k, v, None, o, padded, seed[0], seed[1], 0.0, [True, True, True, False], causal
    )[:3]


def _fa4_forward(q, k, v, causal):
    from flash_attn.cute.interface import _flash_attn_fwd

    o, lse = _flash_attn_fwd(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, return_lse=True)[:2]
    return o.transpose(1, 2), lse


def _fa4_backward(do, q, k, v, o, lse, causal):
    from flash_attn.cute.interface import _flash_attn_bwd

    rows = (x.transpose(1, 2) for x in (q, k, v, o, do))
    return tuple(x.transpose(1, 2) for x in _flash_attn_bwd(*rows, lse.contiguous(), causal=causal)[:3])


def _needs_cpu(shape, device):
    return None if torch.device(device).type == "cpu" else "PyTorch's CPU kernel runs on the CPU alone"


def _needs_efficient(shape, device):
    half = "half types have better kernels than the efficient one" if shape.dtype != "float32" else None
    return sdpa.needs_efficient(shape, device) or half


def _needs_flash(shape, device):
    unpadded = "FlashAttention-2 takes head_dim in multiples of 8" if shape.head_dim % 8 else None
    return (
        sdpa.only_cuda(shape, device, sdpa.HALF, (8, 0), "FlashAttention-2")
        or sdpa.needs_flash(shape, device)
        or unpadded
    )


# 16 and 24 bytes: the state of a random generator that dropout 0 never asks
KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("cpu", _cpu_forward, _cpu_backward, _needs_cpu, laws.TILES, laws.TILES_BACKWARD, 1),
        Kernel("fa4", _fa4_forward, _fa4_backward, sdpa.needs_fa4, sympy.Integer(0), sum(laws.FA4_TAKES.values())),
        Kernel(
            "cudnn",
            _cudnn_forward,
            _cudnn_backward,
            sdpa.needs_cudnn,
            laws.ENGINE + 16,
            sum(laws.CUDNN_BACKWARD.values()) + 16,
        ),
        Kernel(
            "flash",
            _flash_forward,
            _flash_backward,
            _needs_flash,
            laws.PARTIAL + 24,
            sum(laws.FLASH_TAKES.values()) + 16,
            2,
        ),
        Kernel("efficient", _efficient_forward, _efficient_backward, _needs_efficient),
    )
}


def chosen(name: str | None, shape: Shape, device) -> Kernel:
    """The kernel called `name`, or the first of KERNELS that takes such a shape on the device.

    Raises AttnError for an unknown name, or with the reason why a kernel asked for cannot run there.
    """
    if name is None:
        able = [kernel for kernel in KERNELS.values() if not kernel.needs(shape, device)]
        if not able:
            raise AttnError(f"no flash kernel takes {shape.dtype} with head_dim {shape.head_dim} on {device}")
        return able[0]
    if not isinstance(name, str) or name not in KERNELS:
        raise AttnError(f"kernel must be one of {', '.join(KERNELS)}, not {name!r}")
    if reason := KERNELS[name].needs(shape, device):
        raise AttnError(reason)
    return KERNELS[name]
