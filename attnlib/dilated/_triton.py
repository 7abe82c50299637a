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


@triton.jit(do_not_specialize=["heads", "rows", "blocks"])
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


@triton.jit(do_not_specialize=["heads", "rows", "blocks"])
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


@triton.jit
def spot(block, b, h, n):
    """Which of rows n a packed block keeps of head h, and where; see packing.Block and packing.Packing."""
    start, length, count, rate = (block[0] - 3) // 2, (block[1] - 3) // 2, (block[2] - 3) // 2, (block[3] - 3) // 2
    step, period, first, last = (block[4] - 3) // 2, (block[5] - 3) // 2, (block[6] - 3) // 2, (block[7] - 3) // 2
    members, rows, base = (block[8] - 3) // 2, (block[9] - 3) // 2, (block[10] - 3) // 2
    head, own = h.to(tl.int32), (h.to(tl.int32) // step) % period
    member = head // (step * period) * (step * (last - first)) + head % (step * period) - step * first
    segment, at = (n.to(tl.int32) - start) // length, (n.to(tl.int32) - start) % length - own
    kept = (n >= start) & (segment < count) & (at >= 0) & (at % rate == 0) & (own >= first) & (own < last)
    return kept, (base + ((b.to(tl.int32) * count + segment) * members + member) * rows + at // rate).to(tl.int64)


@triton.jit(do_not_specialize=["total", "heads", "rows", "blocks"])
def pack_rows(
    tensors, at, packed, lse, packed_lse, total, told,
    heads, rows, blocks, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b, h, n, d, inside, cells = place(heads, rows, blocks, D, WIDTH, ROWS)
    for i in tl.static_range(len(tensors)):
        values = tl.load(tensors[i] + (b * at[i][0] + h * at[i][1] + n * at[i][2])[:, None] + d[None, :], cells)
        for j in tl.static_range(len(told)):
            kept, row = spot(told[j], b, h, n)
            tl.store(packed + (row + i * total)[:, None] * D + d[None, :], values, cells & kept[:, None])
    if lse is not None:
        values = tl.load(lse + (b * heads + h) * rows + n, inside)
        for j in tl.static_range(len(told)):
            kept, row = spot(told[j], b, h, n)
            tl.store(packed_lse + row, values, inside & kept)


@triton.jit(do_not_specialize=["heads", "rows", "blocks"])
def join_rows(
    o, lse, at, parts, part_lses, told,
    heads, rows, blocks, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b, h, n, d, inside, cells = place(heads, rows, blocks, D, WIDTH, ROWS)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    for j in tl.static_range(len(told)):
        kept, row = spot(told[j], b, h, n)
        highest = tl.maximum(highest, tl.load(part_lses[j] + row, inside & kept, float("-inf")))
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights, mixed = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for j in tl.static_range(len(told)):
        kept, row = spot(told[j], b, h, n)
        weight = tl.exp(tl.load(part_lses[j] + row, inside & kept, float("-inf")) - highest)
        part = tl.load(parts[j] + row[:, None] * D + d[None, :], cells & kept[:, None], 0.0).to(tl.float32)
        weights += weight
        mixed += weight[:, None] * part
    mixed /= tl.where(weights == 0, 1.0, weights)[:, None]
    tl.store(o + (b * at[0][0] + h * at[0][1] + n * at[0][2])[:, None] + d[None, :], mixed, cells)
    tl.store(lse + (b * heads + h) * rows + n, highest + tl.log(weights), inside)


@triton.jit(do_not_specialize=["heads", "rows", "blocks"])
def total_rows(
    totals, at, parts, told,
    heads, rows, blocks, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b, h, n, d, inside, cells = place(heads, rows, blocks, D, WIDTH, ROWS)
    for i in tl.static_range(len(totals)):
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for j in tl.static_range(len(told)):
            kept, row = spot(told[j], b, h, n)
            part = tl.load(parts[i][j] + row[:, None] * D + d[None, :], cells & kept[:, None], 0.0)
            total += part.to(tl.float32)
        tl.store(totals[i] + (b * at[i][0] + h * at[i][1] + n * at[i][2])[:, None] + d[None, :], total, cells)
