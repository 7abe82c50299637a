"""What is known of the fused kernels before they run: the inputs each takes, and the law of its memory, workspace too.

Read off PyTorch's sources (in aten/src/ATen/native: transformers, cudnn/MHA.cpp, cpu/FlashAttentionKernel.cpp) and
flash-attn-4's (flash_attn/cute/interface.py), and held against the allocator. The names of buffers are theirs.

On a CPU with matrix units for bfloat16 (AMX) they are those of float32 alone: in bfloat16 the flash kernel also packs K
and V, from N = 64 on 2 (2 BHND + t min(N, 512) D) bytes where N and D are even, and in both half types the library
underneath takes scratchpads for the products of the backward pass."""

import importlib
import math
import os
from types import ModuleType

import numpy as np
import sympy
from sympy import And, Max, Min, Mod, Piecewise, ceiling

from attnlib.core import HALF, Device, Machine, Shape, UserError, needs_cuda
from attnlib.laws import LINEAR, LINEAR32, ROWS, SCORES32, B, D, H, Law, N, Terms, c, e, g, h, m, round_up, t

NO_FA4 = "needs the package flash-attn-4: pip install --pre flash-attn-4"


def needs_flash(shape: Shape, machine: Device) -> str | None:
    """FlashAttention-2 takes half types and D up to 256; the CPU's kernel takes everything."""
    wide = "FlashAttention-2 takes head_dim up to 256" if shape.head_dim > 256 else None
    refused = needs_cuda(shape, machine, HALF, (8, 0), "FlashAttention-2") or wide
    return None if Machine.of(machine).is_cpu else refused


def needs_efficient(shape: Shape, machine: Device) -> str | None:
    """The memory-efficient kernel wants rows of D elements aligned to 16 bytes."""
    step = 16 // shape.element_size
    odd = f"the efficient kernel takes head_dim in multiples of {step}" if shape.head_dim % step else None
    return needs_cuda(shape, machine, ("float32", *HALF), (5, 0), "the efficient kernel") or odd


def needs_cudnn(shape: Shape, machine: Device) -> str | None:
    """cuDNN's kernel takes half types, D in multiples of 8 up to 128 (on Hopper 256), and more than one key."""
    widest = 256 if Machine.of(machine).capability == (9, 0) else 128
    wide = shape.head_dim % 8 or shape.head_dim > widest
    refused = f"cuDNN's kernel takes head_dim in multiples of 8 up to {widest}" if wide else None
    single = "cuDNN's kernel takes more than one key" if shape.seq_len == 1 else None
    return needs_cuda(shape, machine, HALF, (8, 0), "cuDNN's kernel") or refused or single


def needs_fa4(shape: Shape, machine: Device) -> str | None:
    """The package flash-attn-4 has to be there; on Hopper it takes half types and D in multiples of 8 up to 256."""
    missing = None if "flash-attn-4" in Machine.of(machine).packages else NO_FA4
    wide = shape.head_dim % 8 or shape.head_dim > 256
    refused = "FlashAttention-4 takes head_dim in multiples of 8 up to 256" if wide else None
    return needs_cuda(shape, machine, HALF, (9, 0), "FlashAttention-4") or missing or refused


def fa4_interface() -> ModuleType:
    """The functions of flash-attn-4. Raises UserError where it is not installed."""
    # it compiles its kernels when they are first called: keep them on disk, for the next process
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except ImportError:
        raise UserError(NO_FA4) from None


def fused_law(operators: tuple, saved: dict, forward: dict, moments: dict, padding: Terms = None) -> Law:
    """The law of a fused kernel, which takes `forward` for itself, and one of the `moments` in its backward pass, where
    the upstream gradient may need `padding`. PyTorch's `operators` hide what they take from a ledger."""
    backward = {**saved, "upstream gradient": LINEAR, **(padding or {}), "dq, dk, dv": 3 * saved["output"]}
    most = Max(*(sum(terms.values()) for terms in moments.values()))
    return Law(
        saved=saved,
        forward_peak={"kernel": {**saved, **forward}},
        backward_peak={moment: {**backward, **terms} for moment, terms in moments.items()},
        hidden={name: sum(forward.values()) for name in operators} | {f"{name}_backward": most for name in operators},
    )


class Splits(sympy.Function):
    """Into how many parts FlashAttention-2 cuts the keys of each row: more than one where the rows alone leave
    multiprocessors idle (num_splits_heuristic in flash_api.cpp, in its float32 arithmetic)."""

    @staticmethod
    def _imp_(tiles: int, seq_len: int, head_dim: int, units: int) -> int:
        blocks = math.ceil(seq_len / (256 if head_dim <= 64 else 128 if head_dim <= 128 else 64))
        if np.float32(tiles) >= np.float32(0.8) * np.float32(2 * units):
            return 1
        counts = {-(-blocks // n): n for n in range(min(128, 2 * units, blocks), 0, -1)}  # the fewest parts of a size
        waves = {n: np.float32(tiles * n) / np.float32(2 * units) for n in sorted(counts.values())}
        filled = {n: float(wave / np.ceil(wave)) for n, wave in waves.items()}
        return next(n for n, share in filled.items() if share >= 0.85 * max(filled.values()))


COPIED = Piecewise((1, And(H > 1, N > 1)), (0, True))  # whether [B, H, N, D] is not contiguous as [B, N, H, D]
D8, ROWS128 = round_up(D, 8), 4 * g * B * H * round_up(N, 128)
D32 = Piecewise((round_up(D8, 32), D8 <= 128), (round_up(D8, 64), True))
PADDED = B * H * N * D8 * e
PADDING = g * Piecewise((0, sympy.Eq(Mod(D, 8), 0)), (PADDED, True))  # FlashAttention-2 wants D in multiples of 8
SPLITS = Splits(B * H * ceiling(N / 64), N, D8, m)
PARTIAL = g * Piecewise((4 * SPLITS * B * H * N * (1 + D32), SPLITS > 1), (0, True))
# the CPU's kernel gives each thread its tiles: rows of queries by rows of keys (cpu/FlashAttentionKernel.cpp)
QS, KS = Min(N, Piecewise((256, N >= 768), (64, N >= 192), (32, True))), Min(N, 512)
TILES = (1 - g) * (4 * t * (QS * KS + 2 * QS + QS * D) + h * 2 * t * QS * KS)
TILES_BACKWARD = (1 - g) * (8 * t * QS * KS + h * 4 * t * QS * KS + 4 * QS)
OUTPUT = g * PADDED + (1 - g) * LINEAR
FLASH_TAKES = {"dq in float32": ROWS128 * D32, "row sums of dO ∘ O": ROWS128, "tiles of the threads": TILES_BACKWARD}
FLASH_SEED = {"state of the random generator": 24 * g}


def flash_law(parts: sympy.Expr | int) -> Law:
    """The law of FlashAttention-2, on a CPU of PyTorch's flash kernel, with so many accumulators of dq."""
    takes = {**FLASH_TAKES, "dq in float32": parts * FLASH_TAKES["dq in float32"]}
    return fused_law(
        ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        saved={"output": OUTPUT, "log-sum-exp": ROWS, **FLASH_SEED, "padded q, k, v": 3 * PADDING},
        forward={"partial results": PARTIAL, "tiles of the threads": TILES},
        moments={"kernel": {"contiguous copies of output and gradient": COPIED * (1 + g) * OUTPUT, **takes}},
        padding={"its padding": PADDING},
    )


FLASH_LAW = flash_law(1)


def accumulators(rows: int, columns: int) -> sympy.Expr:
    """Floats of the efficient backward kernel's dq, a header and a tile for each `rows` queries and `columns` of D."""
    return ceiling(N / rows) * ceiling(D / columns) * (4 + rows * columns)


# dk and dv stay in registers up to D = 128; beyond, each of PARTS groups of keys has accumulators for both
PARTS = Max(1, Min(200 // (B * H), Piecewise((1, And(B * H >= 256, N <= 128)), (ceiling(N / 64), True))))
ROW_SUMS = (1 - h) * (LINEAR32 + ROWS + COPIED * ROWS)  # float32: dO ∘ O, its sums, and their copy in another order


def efficient_law(parts: sympy.Expr | int) -> Law:
    """The law of the efficient kernel, of which so many groups of keys have accumulators beyond D = 128."""
    floats = Piecewise(
        (accumulators(64, 64), D <= 64),
        (h * accumulators(128, 128) + (1 - h) * accumulators(128, 64), D <= 128),
        (accumulators(128, 64) + h * 2 * parts * 64 * round_up(D, 128), True),
    )
    return fused_law(
        ("_scaled_dot_product_efficient_attention",),
        saved={"output": LINEAR, "log-sum-exp, padded": 4 * B * H * round_up(N, 32)},
        forward={"output in float32": h * Piecewise((LINEAR32, D > 128), (0, True))},
        moments={
            "kernel": {"row sums of dO ∘ O": ROWS, "accumulators": 4 * B * H * round_up(floats, 4)},
            "rowsum(dO ∘ O)": {"dO ∘ O and its row sums": ROW_SUMS},
        },
    )


EFFICIENT_LAW = efficient_law(PARTS)
# under torch.use_deterministic_algorithms, of the kernels that take other memory then: FlashAttention-2 adds to dq in
# as many accumulators as there are multiprocessors for each head (flash_api.cpp), the efficient kernel has one group
REPEATABLE_LAWS = {"sdpa_flash": flash_law(g * ceiling(m / (B * H)) + 1 - g), "sdpa_efficient": efficient_law(1)}

ENGINE = 256 * g  # bytes that cuDNN 9.19's engine asks for at every shape
CUDNN_TAKES = {"dq in float32": LINEAR32, "row sums of dO ∘ O": ROWS, "cuDNN's engine": ENGINE}
CUDNN_SAVED = {"output": LINEAR, "log-sum-exp": ROWS, "state of the random generator": 16 * g}
CUDNN_LAW = fused_law(
    ("_scaled_dot_product_cudnn_attention",), CUDNN_SAVED, {"cuDNN's engine": ENGINE}, {"kernel": CUDNN_TAKES}
)

# the tiles of its backward on Hopper (_tile_size_bwd_sm90 in flash_attn/cute/interface.py)
NM = round_up(N, Piecewise((128, D <= 64), (64, D <= 96), (80 - 16 * c, D <= 128), (64, True)))
FA4_TAKES = {"dq in float32": 4 * B * H * NM * D32, "row sums and log-sum-exp, padded": 8 * B * H * NM}
FA4_LAW = fused_law((), {"output": LINEAR, "log-sum-exp": ROWS}, {}, {"kernel": FA4_TAKES})

SAFE = B * H * N**2 + B * H * N + 4  # _safe_softmax looks for rows without a key: a bool per pair, one per row, a zero
SCALED = {"scaled q": LINEAR32, "scaled k": LINEAR32}
WEIGHTS = {"weights": SCORES32, "gradient of the weights": SCORES32}
MATH_FORWARD = {**SCALED, "q, k, v in float32": 3 * h * LINEAR32, "mask": 4 * c * N**2}
MATH_OUTPUT = {"weights in the half type": h * SCORES32 / 2, "output in float32": h * LINEAR32, "output": LINEAR}
MATH_BACKWARD = {**SCALED, "output": LINEAR, "upstream gradient": LINEAR, "dv": LINEAR32}
MATH_SOFTMAX = {"gradient of the scores": SCORES32, "workspace of the softmax's backward kernel": g * SCORES32}
MATH_CAST = {"v and upstream gradient in float32": 2 * h * LINEAR32}
MATH_LAW = Law(
    saved={**SCALED, "v in float32": h * LINEAR32, "weights": SCORES32, "output": LINEAR},
    forward_peak={
        "softmax": {**MATH_FORWARD, "scores": SCORES32, "weights": SCORES32, "rows without a key": SAFE},
        "weights @ v": {**MATH_FORWARD, "weights": SCORES32, **MATH_OUTPUT},
    },
    backward_peak={
        "softmax's backward": {**MATH_BACKWARD, **WEIGHTS, **MATH_SOFTMAX},
        "gradient of weights @ v": {**MATH_BACKWARD, **MATH_CAST, **WEIGHTS},
        "gradient of q @ kᵀ": {**MATH_BACKWARD, "gradient of the scores": SCORES32, "dq, dk": 2 * LINEAR32},
    },
    hidden={"_safe_softmax": SAFE},
)
