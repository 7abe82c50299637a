"""What joins parts of attention in place, each in about one pass over the data: by Triton on a GPU, plainly elsewhere.

o, part and gradients are `[b, h, n, D]` of any strides with D contiguous, a log-sum-exp is `[b, h, n]` in float32.
Two attentions over different keys are one over all of them if each output weighs as much as its softmax denominator
(Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

TILE_ROWS = 32  # with D = 128 in a half type 8 KiB of each operand


def merge(o: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Bring `part` with its log-sum-exp into the output and log-sum-exp of the same rows, in place. A row whose
    log-sum-exp is minus infinity has seen nothing yet."""
    if o.is_cuda:
        from attnlib.dilated._triton import merge_tiles

        (grid, sizes), tensors = tile_grid(o), (o, lse, part, part_lse)
        with torch.cuda.device_of(o):
            merge_tiles[grid](*tensors, *(stride for x in tensors for stride in x.stride()[:3]), *sizes)
    else:
        weight = torch.sigmoid(part_lse - lse)
        o.lerp_(part, weight.to(o.dtype).unsqueeze(-1))  # nothing is rounded where both are equal
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


def tile_grid(like: Tensor) -> tuple[tuple[int], tuple[int, ...]]:
    """The number of tiles of TILE_ROWS rows of `like`, and what each of Triton's kernels is told about them."""
    b, h, n, width = like.shape
    blocks = -(-n // TILE_ROWS)
    return (b * h * blocks,), (h, n, blocks, width, 1 << (width - 1).bit_length(), TILE_ROWS)


def join_tiles(targets: Sequence[Tensor], sources: Sequence[Tensor], **constants: bool) -> None:
    """Add or copy several tensors of one size in one pass, each with strides of its own."""
    from attnlib.dilated._triton import into_tiles

    grid, sizes = tile_grid(targets[0])
    strides = [tuple(x.stride()[:3] for x in tensors) for tensors in (targets, sources)]
    with torch.cuda.device_of(targets[0]):
        into_tiles[grid](tuple(targets), tuple(sources), *strides, *sizes, **constants)
