"""PyTorch's fused attention kernels, each pinned so that it errs rather than falls back, and FlashAttention-4.

They keep no N×N matrix: the output and one log-sum-exp per row (or, the math backend, the weights). Tensors are
`[B, H, N, D]`. Sources: Dao 2023, "FlashAttention-2", sections 3.1 and 3.2; Rabe and Staats 2021 and xFormers (the
efficient kernel); PyTorch's scaled_dot_product_attention, in aten/src/ATen/native/transformers."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnlib.calling import cast
from attnlib.core import Machine, UserError
from attnlib.laws import MATMUL, Law, Phases, Variant
from attnlib.variants import sdpa_laws as known

aten = torch.ops.aten


def pinned(backend: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """o `[B, H, N, D]`, by one of SDPBackend's kernels. Raises UserError where that refuses."""
    try:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        sizes = f"q {tuple(q.shape)} {q.dtype} on {q.device.type} with k {tuple(k.shape)} {k.dtype}"
        apart = "" if all(x.stride(-1) == 1 for x in (q, k, v)) else "; their last axis must be contiguous"
        raise UserError(f"PyTorch's {backend} kernel refuses {sizes}{apart}") from None


def sdpa_default(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """o `[B, H, N, D]`, by whichever kernel PyTorch picks."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def fa4(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """o `[B, H, N, D]`, by the package flash-attn-4 (FlashAttention-4). Raises UserError where it is not installed."""
    rows = (x.transpose(1, 2) for x in cast(q, k, v))
    return known.fa4_interface().flash_attn_func(*rows, causal=causal)[0].transpose(1, 2)


def traced_flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, machine: Machine) -> Tensor:
    """sdpa_flash as its operator on the machine: FlashAttention-2 wants D in multiples of 8, and PyTorch pads."""
    if machine.is_cpu:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)[0]
    q8, k8, v8 = (F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x for x in (q, k, v))
    o = aten._scaled_dot_product_flash_attention(q8, k8, v8, 0.0, causal, scale=q.shape[-1] ** -0.5)[0]
    return o[..., : q.shape[-1]]


def traced_cuda(kernel: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, machine: Machine) -> Tensor:
    """sdpa_efficient or sdpa_cudnn as its operator on CUDA."""
    return getattr(aten, f"_scaled_dot_product_{kernel}_attention")(q, k, v, None, True, 0.0, causal)[0]


FLASH_FLOPS = Phases(2 * MATMUL, 5 * MATMUL)  # backward computes QKᵀ again


def _fused(kernel: str, law: Law, needs: Callable, traced: Callable, gpu_product: str = "") -> Variant:
    name, fn = f"sdpa_{kernel}", partial(pinned, f"{kernel.upper()}_ATTENTION")
    return Variant(name, fn, law, FLASH_FLOPS, needs=needs, traced=traced, gpu_product=gpu_product)


# unfused: half types are computed in float32, and the weights are kept
SDPA_MATH = Variant("sdpa_math", partial(pinned, "MATH"), known.MATH_LAW, Phases(2 * MATMUL, 4 * MATMUL))
# the memory-efficient kernel, on CUDA
SDPA_EFFICIENT = _fused(
    "efficient", known.EFFICIENT_LAW, known.needs_efficient, partial(traced_cuda, "efficient"), gpu_product="three_tf32"
)
# FlashAttention-2 on CUDA, PyTorch's own flash kernel on the CPU
SDPA_FLASH = _fused("flash", known.FLASH_LAW, known.needs_flash, traced_flash)
# cuDNN's fused kernel, on CUDA
SDPA_CUDNN = _fused("cudnn", known.CUDNN_LAW, known.needs_cudnn, partial(traced_cuda, "cudnn"))
SDPA_DEFAULT = Variant("sdpa_default", sdpa_default, None, FLASH_FLOPS, gpu_product="three_tf32")
FA4 = Variant("fa4", fa4, known.FA4_LAW, FLASH_FLOPS, needs=known.needs_fa4, ledgered=False)
