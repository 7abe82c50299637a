"""The Triton kernels of merging, in a module of their own that is imported when they first run.

A program takes ROWS rows of one batch entry and head, [ROWS, WIDTH] numbers of which `inside` and d < D are there."""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def place(heads, rows, blocks, D, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """This program's b, h, rows n and numbers d of a row, which rows there are, and which numbers."""
    program = tl.program_id(0)
    n = (program % blocks) * ROWS + tl.arange(0, ROWS)
    h = (program // blocks) % heads
    d = tl.arange(0, WIDTH)
    cells = (n < rows)[:, None] & (d < D)[None, :]
    return (program // (blocks * heads)).to(tl.int64), h.to(tl.int64), n.to(tl.int64), d, n < rows, cells


@triton.jit
def merge_tiles(
    o, lse, part, part_lse, ob, oh, on, lb, lh, ln, pb, ph, pn, qb, qh, qn,
    heads, rows, blocks, D, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b, h, n, d, inside, cells = place(heads, rows, blocks, D, WIDTH, ROWS)
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
def into_tiles(
    targets, sources, to, at,
    heads, rows, blocks, D, WIDTH: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    b, h, n, d, inside, cells = place(heads, rows, blocks, D, WIDTH, ROWS)
    for i in tl.static_range(len(targets)):
        target = targets[i] + (b * to[i][0] + h * to[i][1] + n * to[i][2])[:, None] + d[None, :]
        values = sources[i] + (b * at[i][0] + h * at[i][1] + n * at[i][2])[:, None] + d[None, :]
        values = tl.load(values, cells, 0.0).to(tl.float32)
        if ADD:
            values += tl.load(target, cells, 0.0).to(tl.float32)
        tl.store(target, values, cells)
