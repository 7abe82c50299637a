"""FlashAttention-2 written out in plain PyTorch, to be read: attention by tiles, without an N×N matrix.

Only one tile of the scores exists at a time. Forward keeps the output and, for each query, the log-sum-exp of its
scores; backward computes each tile again from them. The arithmetic is float32 whatever the inputs are. Tensors are
`[B, H, N, D]`, rows of them `[B, H, block_q, D]`.
Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2; the recurrence is that of Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax".
"""

import torch
from sympy import Min, Piecewise, ceiling

from attnlib.core import B, D, H, Law, N, Phases, Variant, c, h
from attnlib.naive import LINEAR, ROWS

BLOCK = 1024  # queries and keys in a tile: enough for an operation on it to be worth its launch


def blocks(seq_len, block):
    """The slices that cut a sequence into blocks."""
    return [slice(start, min(start + block, seq_len)) for start in range(0, seq_len, block)]


def keys_of(rows, seq_len, block, causal):
    """The blocks of keys that the queries `rows` see."""
    return blocks(rows.stop if causal else seq_len, block)


def scores_of(q, k, rows, columns, causal):
    """QKᵀ/√D of one tile `[B, H, block_q, block_k]`, minus infinity where a key lies after its query if causal."""
    scores = (q @ k.transpose(-2, -1)).mul_(q.shape[-1] ** -0.5)
    if causal and columns.stop - 1 > rows.start:
        queries = torch.arange(rows.start, rows.stop, device=q.device)
        keys = torch.arange(columns.start, columns.stop, device=q.device)
        scores.masked_fill_(keys > queries[:, None], float("-inf"))
    return scores


def take_in(q, k, v, largest, total, weighted, where):
    """Bring one tile into what is known of its queries: the largest score so far, the sum of exp(score − largest), and
    the sum of those exponentials times v. When a larger score comes, what was summed fades by exp(old − new)."""
    scores = scores_of(q, k, *where)
    new = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
    exp, fade = scores.sub_(new).exp_(), largest.sub_(new).exp_()
    total.mul_(fade).add_(exp.sum(dim=-1, keepdim=True))
    weighted.mul_(fade).add_(exp @ v)
    largest.copy_(new)


def forward_rows(q, k, v, rows, causal, block_k):
    """Output and log-sum-exp of the queries `rows`, over all the keys they see."""
    q = q[:, :, rows].float()
    largest = q.new_full((*q.shape[:-1], 1), float("-inf"))
    total, weighted = torch.zeros_like(largest), torch.zeros_like(q)
    for columns in keys_of(rows, k.shape[-2], block_k, causal):
        where = rows, columns, causal
        take_in(q, k[:, :, columns].float(), v[:, :, columns].float(), largest, total, weighted, where)
    return weighted.div_(total), largest.add_(total.log_())


def backward_tile(q, k, v, lse, delta, do, dq, dk, dv, where):
    """Add one tile's share to the gradients: P = exp(S − lse), dV += PᵀdO, dS = P ∘ (dOVᵀ − delta), dQ += dS K, …"""
    weights = scores_of(q, k, *where).sub_(lse).exp_()
    dv.add_(weights.transpose(-2, -1) @ do)
    ds = (do @ v.transpose(-2, -1)).sub_(delta).mul_(weights).mul_(q.shape[-1] ** -0.5)
    dq.add_(ds @ k)
    dk.add_(ds.transpose(-2, -1) @ q)


def backward_rows(q, k, v, o, lse, do, dq, dk, dv, rows, causal, block_k):
    """Add to the gradients what comes from the queries `rows`."""
    q, do = q[:, :, rows].float(), do[:, :, rows].float()
    delta = (do * o[:, :, rows]).sum(dim=-1, keepdim=True)  # rowsum(dO ∘ O) is rowsum(dP ∘ P)
    for columns in keys_of(rows, k.shape[-2], block_k, causal):
        tile = k[:, :, columns].float(), v[:, :, columns].float(), lse[:, :, rows], delta, do
        grads = dq[:, :, rows], dk[:, :, columns], dv[:, :, columns]
        backward_tile(q, *tile, *grads, (rows, columns, causal))
        del tile


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, block_q, block_k):
        o, lse = torch.empty_like(q), q.new_empty((*q.shape[:-1], 1), dtype=torch.float32)
        for rows in blocks(q.shape[-2], block_q):
            o[:, :, rows], lse[:, :, rows] = forward_rows(q, k, v, rows, causal, block_k)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.tiling = block_q, block_k, causal
        return o

    @staticmethod
    def backward(ctx, do):
        (q, k, v, o, lse), (block_q, block_k, causal) = ctx.saved_tensors, ctx.tiling
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
        for rows in blocks(q.shape[-2], block_q):
            backward_rows(q, k, v, o, lse, do, *grads, rows, causal, block_k)
        return *(grad.to(q.dtype) for grad in grads), None, None, None


def tiled(q, k, v, *, causal=False, block_q=BLOCK, block_k=BLOCK):
    """o `[B, H, N, D]`; memory grows with N, not with its square. block_q, block_k: queries and keys in a tile."""
    return _Tiled.apply(q, k, v, causal, block_q, block_k)


SIDE = Min(N, BLOCK)  # of the largest tile
TILE = 4 * B * H * SIDE**2
BLOCK_ROWS = 4 * B * H * SIDE * D  # rows of q, k, v or o in float32
SUMS = 4 * B * H * SIDE  # one float32 for each of those rows
TILE_MASK = c * Piecewise((16 * SIDE + SIDE**2, N > 1), (0, True))  # positions as int64, one bool per pair
SAVED = {"output": LINEAR, "log-sum-exp": ROWS}
FORWARD = {
    **SAVED,
    "rows of q, k, v in float32": 3 * h * BLOCK_ROWS,
    "largest score and sum": 2 * SUMS,
    "weighted sum of v": BLOCK_ROWS,
    "tile": TILE,
}
BACKWARD = {**SAVED, "upstream gradient": LINEAR, "dq, dk, dv in float32": 3 * 4 * B * H * N * D}
BACKWARD_TILE = {**BACKWARD, "rows of q, k, v, dO in float32": 4 * h * BLOCK_ROWS, "delta": SUMS, "tile": TILE}
FULL = ceiling(N / BLOCK) - 1  # whole blocks before the last; with a mask, row block i sees key blocks 0 to i
PAIRS = (1 - c) * N**2 + c * (BLOCK**2 * FULL * (FULL + 1) / 2 + (N - FULL * BLOCK) * N)

TILED = Variant(
    name="tiled",
    fn=tiled,
    flops=Phases(4 * B * H * D * PAIRS, 10 * B * H * D * PAIRS),
    law=Law(
        saved=SAVED,
        forward_peak={
            "weighted sum": {**FORWARD, "new largest and fading": SUMS, "product with v": BLOCK_ROWS},
            "masking": {**FORWARD, "positions and mask": TILE_MASK},
        },
        backward_peak={
            "dq, dk of a tile": {**BACKWARD_TILE, "gradient of the tile": TILE, "product": BLOCK_ROWS},
            "masking": {**BACKWARD_TILE, "positions and mask": TILE_MASK},
            "gradients in the half type": {**BACKWARD, "dq, dk, dv": 3 * h * LINEAR},
        },
    ),
)
