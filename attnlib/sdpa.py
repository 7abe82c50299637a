"""PyTorch's fused attention kernels, each pinned so that it errs rather than falls back, and FlashAttention's packages.

They keep no N×N matrix: the output and one log-sum-exp per row (or, the math backend, the weights). Their laws hold
each kernel's workspace as a named term. Tensors are `[B, H, N, D]`.
Sources: Dao 2023, "FlashAttention-2", sections 3.1 and 3.2; PyTorch's scaled_dot_product_attention, in
aten/src/ATen/native/transformers; the names of kernels and buffers are PyTorch's.
"""

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnlib import sdpa_laws as laws
from attnlib.core import AttnError, Phases, Variant, older_than
from attnlib.naive import MATMUL

aten = torch.ops.aten
NO_FA2 = "needs the package flash-attn: pip install flash-attn --no-build-isolation"
NO_FA4 = "needs the package flash-attn-4: pip install --pre flash-attn-4"
# FlashAttention-4 compiles its kernels when they are first called: keep them on disk, for the next process
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def pinned(backend, q, k, v, causal):
    """Scaled dot-product attention by one backend of PyTorch. Raises AttnError where that backend refuses."""
    try:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        sizes = f"q {tuple(q.shape)} {q.dtype} on {q.device.type} with k {tuple(k.shape)} {k.dtype}"
        apart = "" if all(x.stride(-1) == 1 for x in (q, k, v)) else "; their last axis must be contiguous"
        raise AttnError(f"PyTorch's {backend.name} kernel refuses {sizes}{apart}") from None


def sdpa_math(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, unfused: half types are computed in float32, and the weights are kept."""
    return pinned(SDPBackend.MATH, q, k, v, causal)


def sdpa_efficient(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, by the memory-efficient kernel (Rabe and Staats 2021; xFormers), on CUDA."""
    return pinned(SDPBackend.EFFICIENT_ATTENTION, q, k, v, causal)


def sdpa_flash(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, by FlashAttention-2 on CUDA, by PyTorch's own flash kernel on the CPU."""
    return pinned(SDPBackend.FLASH_ATTENTION, q, k, v, causal)


def sdpa_cudnn(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, by cuDNN's fused kernel, on CUDA."""
    return pinned(SDPBackend.CUDNN_ATTENTION, q, k, v, causal)


def sdpa_default(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, by whichever kernel PyTorch picks."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def fa2(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, by the package flash-attn (FlashAttention-2). Raises AttnError where it is not installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        raise AttnError(NO_FA2) from None

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal).transpose(1, 2)


def fa4(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, by the package flash-attn-4 (FlashAttention-4). Raises AttnError where it is not installed."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        raise AttnError(NO_FA4) from None

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)[0].transpose(1, 2)


def traced_flash(q, k, v, *, causal, device):
    """sdpa_flash as its operator on `device`: FlashAttention-2 wants D in multiples of 8, and PyTorch pads."""
    if device == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)[0]
    q8, k8, v8 = (F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x for x in (q, k, v))
    o = aten._scaled_dot_product_flash_attention(q8, k8, v8, 0.0, causal, scale=q.shape[-1] ** -0.5)[0]
    return o[..., : q.shape[-1]]


def traced_efficient(q, k, v, *, causal, device):
    """sdpa_efficient as its operator on CUDA."""
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)[0]


def traced_cudnn(q, k, v, *, causal, device):
    """sdpa_cudnn as its operator on CUDA."""
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)[0]


def only_cuda(shape, device, dtypes, capability, kernel) -> str | None:
    """Why `kernel` cannot run there, by device, compute capability and dtype, or None."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"{kernel} needs a CUDA GPU"
    if older_than(capability, device):
        return f"{kernel} needs compute capability {capability[0]}.{capability[1]}"
    return None if shape.dtype in dtypes else f"{kernel} takes {' and '.join(dtypes)}, not {shape.dtype}"


HALF = ("bfloat16", "float16")


def needs_flash(shape, device):
    """FlashAttention-2 takes half types and D up to 256; the CPU's kernel takes everything."""
    if torch.device(device).type == "cpu":
        return None
    wide = "FlashAttention-2 takes head_dim up to 256" if shape.head_dim > 256 else None
    return only_cuda(shape, device, HALF, (8, 0), "FlashAttention-2") or wide


def needs_efficient(shape, device):
    """The memory-efficient kernel wants rows of D elements aligned to 16 bytes."""
    step = 16 // shape.element_size
    odd = f"the efficient kernel takes head_dim in multiples of {step}" if shape.head_dim % step else None
    return only_cuda(shape, device, ("float32", *HALF), (5, 0), "the efficient kernel") or odd


def needs_cudnn(shape, device):
    """cuDNN's kernel takes half types, D in multiples of 8 up to 128 (on Hopper 256), and more than one key."""
    gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    widest = 256 if not gpu or torch.cuda.get_device_capability(device) == (9, 0) else 128
    wide = shape.head_dim % 8 or shape.head_dim > widest
    refused = f"cuDNN's kernel takes head_dim in multiples of 8 up to {widest}" if wide else None
    single = "cuDNN's kernel takes more than one key" if shape.seq_len == 1 else None
    return only_cuda(shape, device, HALF, (8, 0), "cuDNN's kernel") or refused or single


def needs_fa2(shape, device):
    """The package flash-attn has to be there."""
    if not importlib.util.find_spec("flash_attn") or not importlib.util.find_spec("flash_attn_2_cuda"):
        return NO_FA2
    return only_cuda(shape, device, HALF, (8, 0), "FlashAttention-2") or needs_flash(shape, device)


def needs_fa4(shape, device):
    """The package flash-attn-4 has to be there; on Hopper it takes half types and D in multiples of 8 up to 256."""
    if not importlib.util.find_spec("flash_attn") or not importlib.util.find_spec("flash_attn.cute"):
        return NO_FA4
    wide = (
        "FlashAttention-4 takes head_dim in multiples of 8 up to 256"
        if shape.head_dim % 8 or shape.head_dim > 256
        else None
    )
    return only_cuda(shape, device, HALF, (9, 0), "FlashAttention-4") or wide


FUSED = Phases(2 * MATMUL, 5 * MATMUL)  # backward computes QKᵀ again

MATH = Variant(name="sdpa_math", fn=sdpa_math, flops=Phases(2 * MATMUL, 4 * MATMUL), law=laws.MATH)
EFFICIENT = Variant(
    name="sdpa_efficient",
    fn=sdpa_efficient,
    traced=traced_efficient,
    needs=needs_efficient,
    flops=FUSED,
    law=laws.EFFICIENT,
)
FLASH = Variant(name="sdpa_flash", fn=sdpa_flash, traced=traced_flash, needs=needs_flash, flops=FUSED, law=laws.FLASH)
CUDNN = Variant(name="sdpa_cudnn", fn=sdpa_cudnn, traced=traced_cudnn, needs=needs_cudnn, flops=FUSED, law=laws.CUDNN)
DEFAULT = Variant(name="sdpa_default", fn=sdpa_default, law=None, flops=FUSED)
FA2 = Variant(name="fa2", fn=fa2, law=None, flops=FUSED, needs=needs_fa2, ledgered=False)
FA4 = Variant(name="fa4", fn=fa4, needs=needs_fa4, flops=FUSED, ledgered=False, law=laws.FA4)
