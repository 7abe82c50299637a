"""Joins parts of attention, in about one pass: in place, by Triton or plainly; from packed rows, on a GPU alone.

o, part and gradients are `[b, h, n, D]` of any strides with D contiguous, a log-sum-exp is `[b, h, n]` in float32.
Two attentions over different keys are one over all of them if each output weighs as much as its softmax denominator
(Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3.1)."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnlib.dilated.packing import Packing

TILE_ROWS = 32  # with D = 128 in a half type 8 KiB of each operand


def launch(kernel: Any, like: Tensor, *given: Any, **constants: bool) -> None:
    """Start a Triton kernel on all rows of `like` `[b, h, n, D]`, in tiles."""
    b, h, n, width = like.shape
    blocks = -(-n // TILE_ROWS)
    with torch.cuda.device_of(like):
        kernel[(b * h * blocks,)](*given, h, n, blocks, width, 1 << (width - 1).bit_length(), TILE_ROWS, **constants)


def strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Those along b, h and n of each."""
    return tuple(x.stride()[:3] for x in tensors)


def merge(o: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Bring `part` and `part_lse` into the same rows of o and lse, in place; lse is -inf where nothing was seen yet."""
    if o.is_cuda:
        from attnlib.dilated._triton import merge_tiles

        tensors = o, lse, part, part_lse
        launch(merge_tiles, o, *tensors, *itertools.chain(*strides(tensors)))
    else:
        merge_plainly(o, lse, part, part_lse)


def merge_plainly(o: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """`merge` by PyTorch's own operations."""
    weight = torch.sigmoid(part_lse - lse)
    o.lerp_(part.to(o.dtype), weight.to(o.dtype).unsqueeze(-1))  # nothing is rounded where both are equal
    torch.logaddexp(lse, part_lse, out=lse)


def add(totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add to each of `totals`, in place, the part of the same place in `parts`; all are of one size."""
    if totals[0].is_cuda:
        return join_tiles(totals, parts, ADD=True)
    for total, part in zip(totals, parts, strict=True):
        total.add_(part)


def packed(*tensors: Tensor) -> list[Tensor]:
    """CUDA tensors of one size, in memory as `[b, n, h, D]`: each itself if it is so, else a copy."""
    b, h, n, width = tensors[0].shape
    rows = [x if x.transpose(1, 2).is_contiguous() else x.new_empty(b, n, h, width).transpose(1, 2) for x in tensors]
    if loose := [(row, x) for row, x in zip(rows, tensors, strict=True) if row is not x]:
        join_tiles(*zip(*loose, strict=True), ADD=False)
    return rows


def join_tiles(targets: Sequence[Tensor], sources: Sequence[Tensor], **constants: bool) -> None:
    """Add or copy several tensors of one size in one pass, each with strides of its own."""
    from attnlib.dilated._triton import into_tiles

    how = tuple(targets), tuple(sources), strides(targets), strides(sources)
    launch(into_tiles, targets[0], *how, **constants)


def by_block(packing: Packing, parts: Sequence[Sequence[Tensor]]) -> tuple[tuple[Tensor, ...], ...]:
    """For each tensor of a part, of each block the one of its group."""
    groups = [[x.contiguous() for x in part] for part in parts]
    return tuple(tuple(group[at] for at in packing.at) for group in zip(*groups, strict=True))


def by_group(packing: Packing, rows: Tensor) -> list[Tensor]:
    """Packed rows `[t, P]` or `[t, P, D]` of t tensors as `[t, b, 1, n]` or `[t, b, 1, n, D]` for each group."""
    parts, (count, _, *width) = rows.split_with_sizes(packing.sizes, 1), rows.shape
    return [x.view(count, many, 1, kept, *width) for x, (many, kept) in zip(parts, packing.groups, strict=True)]


def pack(packing: Packing, tensors: Sequence[Tensor], lse: Tensor | None = None) -> list[tuple[Tensor, ...]]:
    """Of each group the kept rows `[b, 1, n, D]` of every tensor, and `[b, 1, n]` of a log-sum-exp if there is one."""
    from attnlib.dilated._triton import pack_rows

    like, total = tensors[0], sum(packing.sizes)
    rows = like.new_empty(len(tensors), total, like.shape[-1])
    lse_rows = None if lse is None else lse.new_empty(1, total)
    launch(pack_rows, like, tuple(tensors), strides(tensors), rows, lse, lse_rows, total, packing.whole.in_groups)
    groups = [x.unbind() for x in by_group(packing, rows)]
    if lse_rows is None:
        return groups
    return [(*x, one[0]) for x, one in zip(groups, by_group(packing, lse_rows), strict=True)]


def join(packing: Packing, parts: Sequence[Sequence[Tensor]], like: Tensor) -> tuple[Tensor, Tensor]:
    """o, laid out like `like`, and its log-sum-exp, of each group's `(o, lse)`; 0 and -inf where no block keeps it."""
    from attnlib.dilated._triton import join_rows

    o, lse = torch.empty_like(like), like.new_empty(like.shape[:3], dtype=torch.float32)
    launch(join_rows, like, o, lse, strides([o]), *by_block(packing, parts), packing.in_groups)
    return o, lse


def total(packing: Packing, parts: Sequence[Sequence[Tensor]], likes: Sequence[Tensor]) -> list[Tensor]:
    """dq, dk, dv, laid out like `likes`: the sums of each group's, added in float32; 0 where no block keeps a row."""
    from attnlib.dilated._triton import total_rows

    grads = [torch.empty_like(like) for like in likes]
    launch(total_rows, grads[0], tuple(grads), strides(grads), by_block(packing, parts), packing.in_groups)
    return grads
