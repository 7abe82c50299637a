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
        tensors = o, lse, part, part_lse
        grid, sizes = tiles(o)
        with torch.cuda.device_of(o):
            _merge_tiles[grid](*tensors, *(stride for x in tensors for stride in x.stride()[:3]), *sizes)
        return
    weight = torch.sigmoid(part_lse - lse)
    o.lerp_(part, weight.to(o.dtype).unsqueeze(-1))  # nothing is rounded where both are equal
    torch.logaddexp(lse, part_lse, out=lse)


def add(totals, parts):
    """Add to each of `totals`, in place, the part of the same place in `parts`; all are of one size."""
    if totals[0].is_cuda:
        return into_tiles(totals, parts, ADD=True)
    for total, part in zip(totals, parts, strict=True):
        total.add_(part)


def packed(*tensors):
    """Tensors of one size, in memory as `[b, n, h, D]`: each itself if it is so, else a copy."""
    b, h, n, width = tensors[0].shape
    rows = [x if x.transpose(1, 2).is_contiguous() else x.new_empty(b, n, h, width).transpose(1, 2) for x in tensors]
    if loose := [(row, x) for row, x in zip(rows, tensors, strict=True) if row is not x]:
        into_tiles(*zip(*loose, strict=True), ADD=False)
    return rows


def tiles(like) -> tuple:
    """The number of tiles of ROWS rows of `like`, and what every kernel below is told about them."""
    b, h, n, width = like.shape
    blocks = triton.cdiv(n, ROWS)
    return (b * h * blocks,), (h, n, blocks, width, triton.next_power_of_2(width), ROWS)


def into_tiles(targets, sources, **constants):
    """Add or copy several tensors of one size in one pass, each with strides of its own."""
    grid, sizes = tiles(targets[0])
    strides = [tuple(x.stride()[:3] for x in tensors) for tensors in (targets, sources)]
    with torch.cuda.device_of(targets[0]):
        _into_tiles[grid](tuple(targets), tuple(sources), *strides, *sizes, **constants)


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
        targets, sources, to, at,
        heads, rows, blocks, D, WIDTH: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
    ):  # fmt: skip
        b, h, n, inside = _place(heads, rows, blocks, ROWS)
        d = tl.arange(0, WIDTH)
        cells = inside[:, None] & (d < D)[None, :]
        for i in tl.static_range(len(targets)):
            target = targets[i] + (b * to[i][0] + h * to[i][1] + n * to[i][2])[:, None] + d[None, :]
            values = sources[i] + (b * at[i][0] + h * at[i][1] + n * at[i][2])[:, None] + d[None, :]
            values = tl.load(values, cells, 0.0).to(tl.float32)
            if ADD:
                values += tl.load(target, cells, 0.0).to(tl.float32)
            tl.store(target, values, cells)
