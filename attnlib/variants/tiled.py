"""FlashAttention-2 written out in plain PyTorch, to be read: attention by tiles, without an N×N matrix.

Only one tile of the scores exists at a time. Forward keeps the output and each query's log-sum-exp of its scores, from
which backward computes each tile again, in float32 (or float64). Tensors are `[B, H, N, D]`, rows `[B·H, block_q, D]`.
Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2; the recurrence is that of Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax"."""

# ruff: noqa: E741 (O is the paper's name for the output)

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sympy import Min, Piecewise, ceiling
from torch import Tensor

from attnlib.calling import checked, differentiable, wide
from attnlib.core import UserError
from attnlib.laws import LINEAR, LINEAR32, ROWS, B, D, H, Law, N, Phases, Variant, c, h

TILE = 1024  # queries and keys in a tile: enough for an operation on it to be worth its launch

Where = tuple[int, int, bool]  # a tile's first query, its first key, and whether a mask is causal
Tiles = Iterable[tuple[Any, ...]]  # blocks of keys: the first one's position, and rows of some tensors


def scores_of(q: Tensor, k: Tensor, first_query: int, first_key: int, causal: bool) -> Tensor:
    """QKᵀ/√D of one tile `[B·H, block_q, block_k]`, minus infinity where a key lies after its query if causal."""
    scores = torch.bmm(q, k.mT).mul_(q.shape[-1] ** -0.5)
    if causal and first_key + k.shape[-2] > first_query + 1:
        queries = torch.arange(first_query, first_query + scores.shape[-2], device=scores.device)
        keys = torch.arange(first_key, first_key + scores.shape[-1], device=scores.device)
        scores.masked_fill_(keys > queries[:, None], float("-inf"))
    return scores


def take_in(q: Tensor, k: Tensor, v: Tensor, m: Tensor, ell: Tensor, O: Tensor, where: Where) -> None:
    """Bring one tile into what is known of its queries: m, their largest
    score so far, ell (ℓ), the sum of exp(score − m), O, the sum of those times
    v. When a larger score comes, what was summed fades by exp(old − new)."""
    scores = scores_of(q, k, *where)
    new = torch.maximum(m, scores.amax(dim=-1, keepdim=True))
    exp, fade = scores.sub_(new).exp_(), m.sub_(new).exp_()
    ell.mul_(fade).add_(exp.sum(dim=-1, keepdim=True))
    O.mul_(fade).baddbmm_(exp, v)
    m.copy_(new)


def forward_rows(tiles: Tiles, causal: bool, first_query: int, q: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a block of queries, over those tiles (first_key, k, v) that they see."""
    q = wide(q)
    m = q.new_full((*q.shape[:-1], 1), float("-inf"))
    ell, O = torch.zeros_like(m), torch.zeros_like(q)
    for first_key, k, v in tiles:
        if not causal or first_key < first_query + q.shape[-2]:
            take_in(q, wide(k), wide(v), m, ell, O, (first_query, first_key, causal))
    return O.div_(ell), m.add_(ell.log_())


def add_gradients(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
    do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, where: Where,
) -> None:  # fmt: skip
    """Add one tile's share: P = exp(S − lse), dV += PᵀdO,
    dS = P ∘ (dO Vᵀ − delta)/√D, dQ += dS K, dK += dSᵀQ."""
    weights, scale = scores_of(q, k, *where).sub_(lse).exp_(), q.shape[-1] ** -0.5
    dv.baddbmm_(weights.mT, do)
    ds = torch.bmm(do, v.mT).sub_(delta).mul_(weights)
    dq.baddbmm_(ds, k, alpha=scale)
    dk.baddbmm_(ds.mT, q, alpha=scale)


def backward_rows(
    tiles: Tiles, causal: bool, first_query: int, q: Tensor, o: Tensor, lse: Tensor, do: Tensor, dq: Tensor
) -> None:
    """Add to the gradients what comes from a block of queries, over the tiles (first_key, k, v, dk, dv)."""
    q, do = wide(q), wide(do)
    delta = (do * o).sum(dim=-1, keepdim=True)  # rowsum(dO ∘ O) is rowsum(dP ∘ P)
    for first_key, k, v, dk, dv in tiles:
        if not causal or first_key < first_query + q.shape[-2]:
            add_gradients(q, wide(k), wide(v), lse, delta, do, dq, dk, dv, (first_query, first_key, causal))


def _blocks(size: int, *tensors: Tensor) -> list[tuple[Any, ...]]:
    parts = (x.flatten(0, 1).split(size, dim=-2) for x in tensors)
    return list(zip(range(0, tensors[0].shape[-2], size), *parts, strict=True))


def forward_tiles(q: Tensor, k: Tensor, v: Tensor, causal: bool, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    o = q.new_empty(q.shape)
    lse = q.new_empty((*q.shape[:-1], 1), dtype=torch.promote_types(q.dtype, torch.float32))
    tiles = _blocks(block_k, k, v)
    for first_query, qi, oi, lsei in _blocks(block_q, q, o, lse):
        found = forward_rows(tiles, causal, first_query, qi)
        oi.copy_(found[0]), lsei.copy_(found[1])
        del found
    return o, lse


def backward_tiles(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, block_q: int, block_k: int
) -> Iterator[Tensor]:
    """dq, dk, dv."""
    dq, dk, dv = grads = [x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v)]
    tiles = _blocks(block_k, k, v, dk, dv)
    for rows in _blocks(block_q, q, o, lse, do, dq):
        backward_rows(tiles, causal, *rows)
    return (grad.to(q.dtype) for grad in grads)


TILED_ATTENTION = differentiable("tiled attention", forward_tiles, backward_tiles)


def tiled(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, block_q: int = TILE, block_k: int = TILE) -> Tensor:
    """o `[B, H, N, D]`; memory grows with N, not with its square. block_q, block_k: queries and keys in a tile. Raises
    UserError for a block that is no positive integer, and for what `checked` refuses."""
    q, k, v = checked(q, k, v, causal)
    if not all(type(block) is int and block > 0 for block in (block_q, block_k)):
        raise UserError(f"block_q and block_k must be positive integers, not {block_q!r} and {block_k!r}")
    return TILED_ATTENTION.apply(q, k, v, causal, block_q, block_k)[0]


SIDE = Min(N, TILE)  # of the largest tile
SCORES_TILE = 4 * B * H * SIDE**2
BLOCK_ROWS = 4 * B * H * SIDE * D  # rows of q, k, v or o in float32
SUMS = 4 * B * H * SIDE  # one float32 for each of those rows
TILE_MASK = c * Piecewise((16 * SIDE + SIDE**2, N > 1), (0, True))  # positions as int64, one bool per pair
TILED_SAVED = {"output": LINEAR, "log-sum-exp": ROWS}
TILED_ROWS = {"rows of q, k, v in float32": 3 * h * BLOCK_ROWS, "largest score and sum": 2 * SUMS}
TILED_FORWARD = {**TILED_SAVED, **TILED_ROWS, "weighted sum of v": BLOCK_ROWS, "tile": SCORES_TILE}
TILED_BACKWARD = {**TILED_SAVED, "upstream gradient": LINEAR, "dq, dk, dv in float32": 3 * LINEAR32}
DELTA = {"rows of q, dO in float32": 2 * h * BLOCK_ROWS, "dO ∘ O": BLOCK_ROWS, "delta": SUMS}
BACKWARD_TILE = {"rows of q, k, v, dO in float32": 4 * h * BLOCK_ROWS, "delta": SUMS, "tile": SCORES_TILE}
FULL = ceiling(N / TILE) - 1  # whole blocks before the last; with a mask, row block i sees key blocks 0 to i
TILED_PAIRS = (1 - c) * N**2 + c * (TILE**2 * FULL * (FULL + 1) / 2 + (N - FULL * TILE) * N)

TILED_LAW = Law(
    saved=TILED_SAVED,
    forward_peak={
        "largest score": {**TILED_FORWARD, "largest of the tile, new largest": 2 * SUMS},
        "masking": {**TILED_FORWARD, "positions and mask": TILE_MASK},
    },
    backward_peak={
        "tile": {**TILED_BACKWARD, **BACKWARD_TILE, "gradient of the tile": SCORES_TILE},
        "masking": {**TILED_BACKWARD, **BACKWARD_TILE, "positions and mask": TILE_MASK},
        "rowsum(dO ∘ O)": {**TILED_BACKWARD, **DELTA},
        "gradients in the half type": {**TILED_BACKWARD, "dq, dk, dv": 3 * h * LINEAR},
    },
)
TILED = Variant("tiled", tiled, TILED_LAW, Phases(4 * B * H * D * TILED_PAIRS, 10 * B * H * D * TILED_PAIRS))
