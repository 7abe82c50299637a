"""FlashAttention-2 written out in plain PyTorch, to be read: attention by tiles, without an N×N matrix.

Only one tile of the scores exists at a time. Forward keeps the output and, for each query, the log-sum-exp of its
scores; backward computes each tile again from them. The arithmetic is float32 whatever the inputs are. Tensors are
`[B, H, N, D]`, rows of them `[B, H, block_q, D]`.
Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2; the recurrence is that of Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax".
"""

import torch
from sympy import Min, Piecewise, ceiling

from attnlib.core import AttnError, B, D, H, Law, N, Phases, Variant, c, h
from attnlib.naive import LINEAR, ROWS

BLOCK = 1024  # queries and keys in a tile: enough for an operation on it to be worth its launch


def masked(scores, first_query, first_key):
    """Put minus infinity where a key lies after its query; the tile's first query and key have these positions."""
    queries = torch.arange(first_query, first_query + scores.shape[-2], device=scores.device)
    keys = torch.arange(first_key, first_key + scores.shape[-1], device=scores.device)
    return scores.masked_fill_(keys > queries[:, None], float("-inf"))


def scores_of(q, k, first_query, first_key, causal):
    """QKᵀ/√D of one tile `[B·H, block_q, block_k]`."""
    scores = torch.bmm(q, k.mT).mul_(q.shape[-1] ** -0.5)
    return masked(scores, first_query, first_key) if causal and first_key + k.shape[-2] > first_query + 1 else scores


def take_in(q, k, v, largest, total, weighted, where):
    """Bring one tile into what is known of its queries: the largest score so far, the sum of exp(score − largest), and
    the sum of those exponentials times v. When a larger score comes, what was summed fades by exp(old − new)."""
    scores = scores_of(q, k, *where)
    new = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
    exp, fade = scores.sub_(new).exp_(), largest.sub_(new).exp_()
    total.mul_(fade).add_(exp.sum(dim=-1, keepdim=True))
    weighted.mul_(fade).baddbmm_(exp, v)
    largest.copy_(new)


def forward_rows(q, keys, values, first_query, causal):
    """Output and log-sum-exp of a block of queries, over those blocks of keys and values that they see."""
    q = q.float()
    largest = q.new_full((*q.shape[:-1], 1), float("-inf"))
    total, weighted = torch.zeros_like(largest), torch.zeros_like(q)
    first_key = 0
    for k, v in zip(keys, values, strict=True):
        if not causal or first_key < first_query + q.shape[-2]:
            take_in(q, k.float(), v.float(), largest, total, weighted, (first_query, first_key, causal))
        first_key += k.shape[-2]
    return weighted.div_(total), largest.add_(total.log_())


def add_gradients(q, k, v, lse, delta, do, dq, dk, dv, where):
    """Add one tile's share: P = exp(S − lse), dV += PᵀdO, dS = P ∘ (dO Vᵀ − delta)/√D, dQ += dS K, dK += dSᵀQ."""
    weights, scale = scores_of(q, k, *where).sub_(lse).exp_(), q.shape[-1] ** -0.5
    dv.baddbmm_(weights.mT, do)
    ds = torch.bmm(do, v.mT).sub_(delta).mul_(weights)
    dq.baddbmm_(ds, k, alpha=scale)
    dk.baddbmm_(ds.mT, q, alpha=scale)


def backward_rows(q, o, lse, do, dq, keys, values, first_query, causal):
    """Add to the gradients what comes from a block of queries; keys and values: blocks of (k, dk) and of (v, dv)."""
    q, do = q.float(), do.float()
    delta = (do * o).sum(dim=-1, keepdim=True)  # rowsum(dO ∘ O) is rowsum(dP ∘ P)
    first_key = 0
    for (k, dk), (v, dv) in zip(keys, values, strict=True):
        if not causal or first_key < first_query + q.shape[-2]:
            where = first_query, first_key, causal
            add_gradients(q, k.float(), v.float(), lse, delta, do, dq, dk, dv, where)
        first_key += k.shape[-2]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, block_q, block_k):
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((*q.shape[:-1], 1), dtype=torch.float32, device=q.device)
        rows = (x.flatten(0, 1).split(block_q, dim=-2) for x in (q, o, lse))
        keys, values = (x.flatten(0, 1).split(block_k, dim=-2) for x in (k, v))
        for i, (qi, oi, lsei) in enumerate(zip(*rows, strict=True)):
            found = forward_rows(qi, keys, values, i * block_q, causal)
            oi.copy_(found[0]), lsei.copy_(found[1])
            del found
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.tiling = causal, block_q, block_k
        return o

    @staticmethod
    def backward(ctx, do):
        saved, (causal, block_q, block_k) = ctx.saved_tensors, ctx.tiling
        q, k, v, o, lse, do = (x.flatten(0, 1) for x in (*saved, do))
        dq, dk, dv = grads = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)]
        rows = (x.split(block_q, dim=-2) for x in (q, o, lse, do, dq))
        keys, values = ([x.split(block_k, dim=-2) for x in pair] for pair in ((k, dk), (v, dv)))
        for i, row in enumerate(zip(*rows, strict=True)):
            backward_rows(*row, zip(*keys, strict=True), zip(*values, strict=True), i * block_q, causal)
        return *(grad.to(q.dtype).view(saved[0].shape) for grad in grads), None, None, None


def tiled(q, k, v, *, causal=False, block_q=BLOCK, block_k=BLOCK):
    """o `[B, H, N, D]`; memory grows with N, not with its square. block_q, block_k: queries and keys in a tile.

    Raises AttnError if q, k and v differ in shape, dtype or device, or are no such tensors, causal is no bool, or a
    block is no positive integer.
    """
    if len({(x.shape, x.dtype, x.device) for x in (q, k, v)}) > 1:
        raise AttnError("q, k and v must have the same shape, dtype and device")
    if q.dim() != 4 or not all(q.shape) or not q.is_floating_point():
        raise AttnError(
            f"q, k and v must be floating-point [B, H, N, D] of no size zero, not {q.dtype} {list(q.shape)}"
        )
    if not isinstance(causal, bool):
        raise AttnError(f"causal must be True or False, not {causal!r}")
    if not all(type(block) is int and block > 0 for block in (block_q, block_k)):
        raise AttnError(f"block_q and block_k must be positive integers, not {block_q!r} and {block_k!r}")
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
            "largest score": {**FORWARD, "largest of the tile, new largest": 2 * SUMS},
            "masking": {**FORWARD, "positions and mask": TILE_MASK},
        },
        backward_peak={
            "tile": {**BACKWARD_TILE, "gradient of the tile": TILE},
            "masking": {**BACKWARD_TILE, "positions and mask": TILE_MASK},
            "rowsum(dO ∘ O)": {
                **BACKWARD,
                "rows of q, dO in float32": 2 * h * BLOCK_ROWS,
                "dO ∘ O": BLOCK_ROWS,
                "delta": SUMS,
            },
            "gradients in the half type": {**BACKWARD, "dq, dk, dv": 3 * h * LINEAR},
        },
    ),
)
