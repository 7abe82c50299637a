"""The memory laws of the fused kernels, down to the workspace that each kernel takes for itself.

Read off PyTorch's sources (in aten/src/ATen/native: transformers, cudnn/MHA.cpp, cpu/FlashAttentionKernel.cpp) and
flash-attn-4's (flash_attn/cute/interface.py), and held against the allocator. The names of buffers are theirs.

On a CPU with matrix units for bfloat16 (AMX) they are those of float32 alone: in bfloat16 the flash kernel also packs K
and V, from N = 64 on 2 (2 BHND + t min(N, 512) D) bytes where N and D are even, and in both half types the library
underneath takes scratchpads for the products of the backward pass.
"""

import math

import numpy as np
import sympy
from sympy import And, Max, Min, Mod, Piecewise, ceiling

from attnlib.core import B, D, H, Law, N, c, e, g, h, m, t
from attnlib.naive import LINEAR, ROWS, SCORES32

LINEAR32 = 4 * B * H * N * D
COPIED = Piecewise((1, And(H > 1, N > 1)), (0, True))  # whether [B, H, N, D] is not contiguous as [B, N, H, D]
PAD = Piecewise((0, sympy.Eq(Mod(D, 8), 0)), (1, True))  # whether FlashAttention-2 needs its inputs padded


def up(size, multiple):
    """`size` rounded up to a multiple."""
    return multiple * ceiling(size / multiple)


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
FLASH_TAKES = {
    "dq in float32": g * 4 * B * H * NR * DR,
    "row sums of dO ∘ O": g * 4 * B * H * NR,
    "tiles of the threads": TILES_BACKWARD,
}
FLASH_BACKWARD = {"contiguous copies of output and gradient": COPIED * (1 + g) * OUTPUT, **FLASH_TAKES}

FLASH = Law(
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
ROWS32 = 4 * B * H * up(N, 32)
EFFICIENT_TAKES = Max(ROWS + ACCUMULATORS, ROW_SUMS)
EFFICIENT_SAVED = {"output": LINEAR, "log-sum-exp, padded": ROWS32}
EFFICIENT_BACKWARD = {**EFFICIENT_SAVED, "upstream gradient": LINEAR, "dq, dk, dv": 3 * LINEAR}

EFFICIENT = Law(
    saved=EFFICIENT_SAVED,
    forward_peak={"kernel": {**EFFICIENT_SAVED, "output in float32": WIDE}},
    backward_peak={
        "kernel": {**EFFICIENT_BACKWARD, "row sums of dO ∘ O": ROWS, "accumulators": ACCUMULATORS},
        "rowsum(dO ∘ O)": {**EFFICIENT_BACKWARD, "dO ∘ O and its row sums": ROW_SUMS},
    },
    hidden={
        "_scaled_dot_product_efficient_attention": WIDE,
        "_scaled_dot_product_efficient_attention_backward": EFFICIENT_TAKES,
    },
)

ENGINE = 256 * g  # bytes that cuDNN 9.19's engine asks for at every shape
CUDNN_SAVED = {"output": LINEAR, "log-sum-exp": ROWS, "state of the random generator": 16 * g}
CUDNN_BACKWARD = {"dq in float32": LINEAR32, "row sums of dO ∘ O": ROWS, "cuDNN's engine": ENGINE}

CUDNN = Law(
    saved=CUDNN_SAVED,
    forward_peak={"kernel": {**CUDNN_SAVED, "cuDNN's engine": ENGINE}},
    backward_peak={"kernel": {**CUDNN_SAVED, "upstream gradient": LINEAR, "dq, dk, dv": 3 * LINEAR, **CUDNN_BACKWARD}},
    hidden={
        "_scaled_dot_product_cudnn_attention": ENGINE,
        "_scaled_dot_product_cudnn_attention_backward": sum(CUDNN_BACKWARD.values()),
    },
)

SAFE = B * H * N**2 + B * H * N + 4  # _safe_softmax looks for rows without a key: a bool per pair, one per row, a zero
SCALED = {"scaled q": LINEAR32, "scaled k": LINEAR32}
MATH_BASE = {**SCALED, "q, k, v in float32": 3 * h * LINEAR32, "mask": 4 * c * N**2}
MATH_BACKWARD = {**SCALED, "output": LINEAR, "upstream gradient": LINEAR, "dv": LINEAR32}

MATH = Law(
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
)

# the tiles of its backward on Hopper (_tile_size_bwd_sm90 in flash_attn/cute/interface.py)
NM = up(N, Piecewise((128, D <= 64), (64, D <= 96), (80 - 16 * c, D <= 128), (64, True)))
FA4_SAVED = {"output": LINEAR, "log-sum-exp": ROWS}
FA4_TAKES = {
    "dq in float32": 4 * B * H * NM * Piecewise((up(D, 32), D <= 128), (up(D, 64), True)),
    "row sums and log-sum-exp, padded": 8 * B * H * NM,
}

FA4 = Law(
    saved=FA4_SAVED,
    forward_peak={"kernel": FA4_SAVED},
    backward_peak={
        "kernel": {
            **FA4_SAVED,
            "upstream gradient": LINEAR,
            "dq, dk, dv": 3 * LINEAR,
            **FA4_TAKES,
        }
    },
)
