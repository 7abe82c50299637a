"""What joins parts of attention in place, each in about one pass over the data: by Triton on a GPU, plainly elsewhere.

o, part and gradients are `[b, h, n, D]` of any strides with D contiguous, a log-sum-exp is `[b, h, n]` in float32.
Two attentions over different keys are one over all of them if each output weighs as much as its softmax denominator
(Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3.1).
"""

import importlib.util

import torch

ROWS = 32  # of a tile: with D = 128 in a half type 8 KiB of each operand


def merge(o, lse, part, part_lse):
    """Bring `part` with its log-sum-exp into the output and log-sum-exp of the same rows, in place.

    A row whose log-sum-exp is minus infinity has seen nothing yet.
    """
    if o.is_cuda:
        return tiles(_merge_tiles, o, (o, lse, part, part_lse))
    weight = torch.sigmoid(part_lse - lse)
    o.lerp_(part, weight.to(o.dtype).unsqueeze(-1))  # nothing is rounded where both are equal
    torch.logaddexp(lse, part_lse, out=lse)


def add(total, part):
    """Add `part` to `total` in place."""
    if total.is_cuda:
        return tiles(_into_tiles, total, (total, part), ADD=True)
    total.add_(part)


def packed(x):
    """x, in memory as `[b, n, h, D]`: itself if it is so, else a copy."""
    if x.transpose(1, 2).is_contiguous():
        return x
    rows = x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    tiles(_into_tiles, x, (rows, x), ADD=False)
    return rows


def tiles(kernel, like, tensors, **constants):
    """Run a Triton kernel over tiles of ROWS rows of `like`, given its tensors and their strides along b, h and n."""
    b, h, n, width = like.shape
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    blocks = triton.cdiv(n, ROWS)
    kernel[(b * h * blocks,)](*tensors, *strides, h, n, blocks, width, triton.next_power_of_2(width), ROWS, **constants)


if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def _place(heads, rows, blocks, ROWS: tl.constexpr):
        """This program's b, h and rows, and which of the rows there are."""
        program = tl.program_id(0)
        n = (program % blocks) * ROWS + tl.arange(0, ROWS)
        h = (program // blocks) % heads
        return (program // (blocks * heads)).to(tl.int64), h.to(tl.int64), n.to(tl.int64), n < rows

    @triton.jit
    def _merge_tiles(
        o, lse, part, part_lse, ob, oh, on, lb, lh, ln, pb, ph, pn, qb, qh, qn,
        heads, rows, blocks, D, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        b, h, n, inside = _place(heads, rows, blocks, ROWS)
        d = tl.arange(0, WIDTH)
        cells = inside[:, None] & (d < D)[None, :]
        lse += b * lb + h * lh + n * ln
        old = tl.load(lse, inside, 0.0)
        new = tl.load(part_lse + b * qb + h * qh + n * qn, inside, 0.0)
        weight = 1 / (1 + tl.exp(old - new))
        o += (b * ob + h * oh + n * on)[:, None] + d[None, :]
        mine = tl.load(o, cells, 0.0).to(tl.float32)
        theirs = tl.load(part + (b * pb + h * ph + n * pn)[:, None] + d[None, :], cells, 0.0).to(tl.float32)
        tl.store(o, mine + (theirs - mine) * weight[:, None], cells)
        tl.store(lse, tl.maximum(old, new) + tl.log(1 + tl.exp(-tl.abs(old - new))), inside)

    @triton.jit
    def _into_tiles(
        target, source, ob, oh, on, pb, ph, pn,
        heads, rows, blocks, D, WIDTH: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
    ):  # fmt: skip
        b, h, n, inside = _place(heads, rows, blocks, ROWS)
        d = tl.arange(0, WIDTH)
        cells = inside[:, None] & (d < D)[None, :]
        target += (b * ob + h * oh + n * on)[:, None] + d[None, :]
        values = tl.load(source + (b * pb + h * ph + n * pn)[:, None] + d[None, :], cells, 0.0).to(tl.float32)
        if ADD:
            values += tl.load(target, cells, 0.0).to(tl.float32)
        tl.store(target, values, cells)
