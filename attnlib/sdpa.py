"""PyTorch's fused attention kernels, each pinned so that it errs rather than falls back, and FlashAttention's packages.

They keep no N×N matrix: the output and one log-sum-exp per row (or, the math backend, the weights). Their laws hold
each kernel's workspace as a named term. Tensors are `[B, H, N, D]`.
Sources: Dao 2023, "FlashAttention-2", sections 3.1 and 3.2; PyTorch's scaled_dot_product_attention, in
aten/src/ATen/native/transformers; the names of kernels and buffers are PyTorch's.
"""

import importlib.util
import math

import numpy as np
import sympy
import torch
import torch.nn.functional as F
from sympy import And, Max, Min, Mod, Piecewise, ceiling
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnlib.core import AttnError, B, D, H, Law, N, Phases, Variant, c, e, g, h, m, needs_dtype, older_than, t
from attnlib.naive import LINEAR, MATMUL, ROWS, SCORES32

aten = torch.ops.aten
LINEAR32 = 4 * B * H * N * D
COPIED = Piecewise((1, And(H > 1, N > 1)), (0, True))  # whether [B, H, N, D] is not contiguous as [B, N, H, D]
PAD = Piecewise((0, sympy.Eq(Mod(D, 8), 0)), (1, True))  # whether FlashAttention-2 needs its inputs padded


def up(size, multiple):
    """`size` rounded up to a multiple."""
    return multiple * ceiling(size / multiple)


def pinned(backend, q, k, v, causal):
    """Scaled dot-product attention by one backend of PyTorch. Raises AttnError where that backend refuses."""
    try:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        size = f"{tuple(q.shape)} {q.dtype} on {q.device.type}"
        raise AttnError(f"PyTorch's {backend.name} kernel refuses q {size} with k {tuple(k.shape)} {k.dtype}") from None


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
    """o `[B, H, N, D]`, by the package flash-attn (FlashAttention-2)."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal).transpose(1, 2)


def fa4(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, by the package flash-attn-4 (FlashAttention-4)."""
    from flash_attn.cute import flash_attn_func

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
    """cuDNN's kernel takes half types, D in multiples of 8 up to 128, and more than one key."""
    wide = shape.head_dim % 8 or shape.head_dim > 128
    refused = "cuDNN's kernel takes head_dim in multiples of 8 up to 128" if wide else None
    single = "cuDNN's kernel takes more than one key" if shape.seq_len == 1 else None
    return only_cuda(shape, device, HALF, (8, 0), "cuDNN's kernel") or refused or single


def needs_fa2(shape, device):
    """The package flash-attn has to be there."""
    if not importlib.util.find_spec("flash_attn") or not importlib.util.find_spec("flash_attn_2_cuda"):
        return "needs the package flash-attn: pip install flash-attn --no-build-isolation"
    return needs_flash(shape, device)


def needs_fa4(shape, device):
    """The package flash-attn-4 has to be there; on Hopper it takes half types and D in multiples of 8 up to 256."""
    if not importlib.util.find_spec("flash_attn") or not importlib.util.find_spec("flash_attn.cute"):
        return "needs the package flash-attn-4: pip install --pre flash-attn-4"
    wide = "FlashAttention-4 takes head_dim in multiples of 8 up to 256" if shape.head_dim % 8 else None
    return only_cuda(shape, device, HALF, (9, 0), "FlashAttention-4") or wide


def _splits(tiles: int, seq_len: int, head_dim: int, units: int) -> int:
    """Into how many parts FlashAttention-2 cuts the keys of each row: more than one where the rows alone leave
    multiprocessors idle (num_splits_heuristic in flash_api.cpp, in its float32 arithmetic)."""
    blocks = math.ceil(seq_len / (256 if head_dim <= 64 else 128 if head_dim <= 128 else 64))
    if np.float32(tiles) >= np.float32(0.8) * np.float32(2 * units):
        return 1
    counts = [
        n for n in range(1, min(128, 2 * units, blocks) + 1) if n == 1 or -(-blocks // n) != -(-blocks // (n - 1))
    ]
    waves = [np.float32(tiles * n) / np.float32(2 * units) for n in counts]
    filled = [wave / np.ceil(wave) for wave in waves]
    return next(n for n, share in zip(counts, filled, strict=True) if float(share) >= 0.85 * float(max(filled)))


class Splits(sympy.Function):
    """`_splits` as a term of a formula."""

    _imp_ = staticmethod(_splits)


SEED = {"state of the random generator": 24 * g}
D8, NR = up(D, 8), up(N, 128)
DR = Piecewise((up(D8, 32), D8 <= 128), (up(D8, 64), True))
PADDED = B * H * N * D8 * e
SPLITS = Splits(B * H * ceiling(N / 64), N, D8, m)
PARTIAL = g * Piecewise((4 * SPLITS * B * H * N * (1 + DR), SPLITS > 1), (0, True))
# the CPU's kernel gives each thread its tiles: rows of queries by rows of keys (cpu/FlashAttentionKernel.cpp)
QS, KS = Min(N, Piecewise((256, N >= 768), (64, N >= 192), (32, True))), Min(N, 512)
TILES = (1 - g) * (4 * t * (QS * KS + 2 * QS + QS * D) + h * 2 * t * QS * KS)
TILES_BACKWARD = (1 - g) * (8 * t * QS * KS + h * 4 * t * QS * KS + 4 * QS)
OUTPUT = g * PADDED + (1 - g) * LINEAR
FLASH_SAVED = {"output": OUTPUT, "log-sum-exp": ROWS, **SEED, "padded q, k, v": 3 * g * PAD * PADDED}
FLASH_BACKWARD = {
    "contiguous copies of output and gradient": COPIED * (1 + g) * OUTPUT,
    "dq in float32": g * 4 * B * H * NR * DR,
    "row sums of dO ∘ O": g * 4 * B * H * NR,
    "tiles of the threads": TILES_BACKWARD,
}
FUSED = Phases(2 * MATMUL, 5 * MATMUL)  # backward computes QKᵀ again

FLASH = Variant(
    name="sdpa_flash",
    fn=sdpa_flash,
    traced=traced_flash,
    needs=needs_flash,
    flops=FUSED,
    law=Law(
        saved=FLASH_SAVED,
        forward_peak={"kernel": {**FLASH_SAVED, "partial results": PARTIAL, "tiles of the threads": TILES}},
        backward_peak={
            "kernel": {
                **FLASH_SAVED,
                "upstream gradient": LINEAR,
                "its padding": g * PAD * PADDED,
                "dq, dk, dv": 3 * OUTPUT,
                **FLASH_BACKWARD,
            }
        },
        hidden={
            "_scaled_dot_product_flash_attention": PARTIAL,
            "_scaled_dot_product_flash_attention_for_cpu": TILES,
            "_scaled_dot_product_flash_attention_backward": sum(FLASH_BACKWARD.values()),
            "_scaled_dot_product_flash_attention_for_cpu_backward": sum(FLASH_BACKWARD.values()),
        },
    ),
)


def accumulators(rows, columns):
    """Floats of the efficient backward kernel's dq, a header and a tile for each `rows` queries and `columns` of D."""
    return ceiling(N / rows) * ceiling(D / columns) * (4 + rows * columns)


# dk and dv stay in registers up to D = 128; beyond, each of `parts` groups of keys has accumulators for both
PARTS = Max(1, Min(200 // (B * H), Piecewise((1, And(B * H >= 256, N <= 128)), (ceiling(N / 64), True))))
BEYOND = accumulators(128, 64) + h * 2 * PARTS * 64 * up(D, 128)
FLOATS = Piecewise(
    (accumulators(64, 64), D <= 64),
    (h * accumulators(128, 128) + (1 - h) * accumulators(128, 64), D <= 128),
    (BEYOND, True),
)
ACCUMULATORS = 4 * B * H * up(FLOATS, 4)
ROW_SUMS = (1 - h) * (LINEAR32 + ROWS + COPIED * ROWS)  # float32: dO ∘ O, its sums, and their copy in another order
WIDE = h * Piecewise((LINEAR32, D > 128), (0, True))
EFFICIENT_SAVED = {"output": LINEAR, "log-sum-exp, padded": 4 * B * H * up(N, 32)}
EFFICIENT_BACKWARD = {**EFFICIENT_SAVED, "upstream gradient": LINEAR, "dq, dk, dv": 3 * LINEAR}

EFFICIENT = Variant(
    name="sdpa_efficient",
    fn=sdpa_efficient,
    traced=traced_efficient,
    needs=needs_efficient,
    flops=FUSED,
    law=Law(
        saved=EFFICIENT_SAVED,
        forward_peak={"kernel": {**EFFICIENT_SAVED, "output in float32": WIDE}},
        backward_peak={
            "kernel": {**EFFICIENT_BACKWARD, "row sums of dO ∘ O": ROWS, "accumulators": ACCUMULATORS},
            "rowsum(dO ∘ O)": {**EFFICIENT_BACKWARD, "dO ∘ O and its row sums": ROW_SUMS},
        },
        hidden={
            "_scaled_dot_product_efficient_attention": WIDE,
            "_scaled_dot_product_efficient_attention_backward": Max(ROWS + ACCUMULATORS, ROW_SUMS),
        },
    ),
)

ENGINE = 256 * g  # bytes that cuDNN 9.19's engine asks for at every shape
CUDNN_SAVED = {"output": LINEAR, "log-sum-exp": ROWS, "state of the random generator": 16 * g}
CUDNN_BACKWARD = {"dq in float32": LINEAR32, "row sums of dO ∘ O": ROWS, "cuDNN's engine": ENGINE}

CUDNN = Variant(
    name="sdpa_cudnn",
    fn=sdpa_cudnn,
    traced=traced_cudnn,
    needs=needs_cudnn,
    flops=FUSED,
    law=Law(
        saved=CUDNN_SAVED,
        forward_peak={"kernel": {**CUDNN_SAVED, "cuDNN's engine": ENGINE}},
        backward_peak={
            "kernel": {**CUDNN_SAVED, "upstream gradient": LINEAR, "dq, dk, dv": 3 * LINEAR, **CUDNN_BACKWARD}
        },
        hidden={
            "_scaled_dot_product_cudnn_attention": ENGINE,
            "_scaled_dot_product_cudnn_attention_backward": sum(CUDNN_BACKWARD.values()),
        },
    ),
)

SAFE = B * H * N**2 + B * H * N + 4  # _safe_softmax looks for rows without a key: a bool per pair, one per row, a zero
SCALED = {"scaled q": LINEAR32, "scaled k": LINEAR32}
MATH_BASE = {**SCALED, "q, k, v in float32": 3 * h * LINEAR32, "mask": 4 * c * N**2}
MATH_BACKWARD = {**SCALED, "output": LINEAR, "upstream gradient": LINEAR, "dv": LINEAR32}

MATH = Variant(
    name="sdpa_math",
    fn=sdpa_math,
    needs=needs_dtype,
    flops=Phases(2 * MATMUL, 4 * MATMUL),
    law=Law(
        saved={**SCALED, "v in float32": h * LINEAR32, "weights": SCORES32, "output": LINEAR},
        forward_peak={
            "softmax": {**MATH_BASE, "scores": SCORES32, "weights": SCORES32, "rows without a key": SAFE},
            "weights @ v": {
                **MATH_BASE,
                "weights": SCORES32,
                "weights in the half type": h * SCORES32 / 2,
                "output in float32": h * LINEAR32,
                "output": LINEAR,
            },
        },
        backward_peak={
            "softmax's backward": {
                **MATH_BACKWARD,
                "weights": SCORES32,
                "gradient of the weights": SCORES32,
                "gradient of the scores": SCORES32,
                "workspace of the softmax's backward kernel": g * SCORES32,
            },
            "gradient of weights @ v": {
                **MATH_BACKWARD,
                "v and upstream gradient in float32": 2 * h * LINEAR32,
                "weights": SCORES32,
                "gradient of the weights": SCORES32,
            },
            "gradient of q @ kᵀ": {**MATH_BACKWARD, "gradient of the scores": SCORES32, "dq, dk": 2 * LINEAR32},
        },
        hidden={"_safe_softmax": SAFE},
    ),
)

DEFAULT = Variant(name="sdpa_default", fn=sdpa_default, law=None, flops=FUSED)

FA2 = Variant(name="fa2", fn=fa2, law=None, flops=FUSED, needs=needs_fa2, ledgered=False)

# the tiles of its backward on Hopper (_tile_size_bwd_sm90 in flash_attn/cute/interface.py)
NM = up(N, Piecewise((128, D <= 64), (64, D <= 96), (80 - 16 * c, D <= 128), (64, True)))
FA4_SAVED = {"output": LINEAR, "log-sum-exp": ROWS}

FA4 = Variant(
    name="fa4",
    fn=fa4,
    needs=needs_fa4,
    flops=FUSED,
    ledgered=False,
    law=Law(
        saved=FA4_SAVED,
        forward_peak={"kernel": FA4_SAVED},
        backward_peak={
            "kernel": {
                **FA4_SAVED,
                "upstream gradient": LINEAR,
                "dq, dk, dv": 3 * LINEAR,
                "dq in float32": 4 * B * H * NM * Piecewise((up(D, 32), D <= 128), (up(D, 64), True)),
                "row sums and log-sum-exp, padded": 8 * B * H * NM,
            }
        },
    ),
)
