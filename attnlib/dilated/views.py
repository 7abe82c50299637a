"""Which rows each branch of dilated attention takes, as strided views that a flash kernel accepts.

A kernel goes through two axes, batch and heads, beside the rows. Segments are folded into one of them; heads that keep
different rows lie a constant step apart, so that few views hold all heads. Nothing here touches data."""

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

Branches = tuple[tuple[int, int], ...]  # the segment length w and the dilation rate r of each
HEAD_OFFSETS = ("modulo", "grouped")
MAX_GRID_AXIS = 2**15  # along a kernel's axis: a CUDA grid has room for 65,535 blocks in its second and third direction


def offset(head: int, heads: int, rate: int, head_offsets: str) -> int:
    """The first row that a head keeps: j mod r in the paper ("modulo"), j // ⌈H/r⌉ in torchscale ("grouped")."""
    return head % rate if head_offsets == "modulo" else head // -(-heads // rate)


def can_fold_batch_into_heads(batch: int, heads: int, rates: Iterable[int], head_offsets: str) -> bool:
    """Whether a batch of several can be taken for one of more heads: where the offsets of all heads go on in step."""
    in_step = head_offsets == "modulo" and all(heads % rate == 0 for rate in rates)
    return in_step and batch > 1 and batch * heads <= MAX_GRID_AXIS


def segments(seq_len: int, width: int) -> list[tuple[int, int, int]]:
    """`(start, count, width)`: the whole segments, at most MAX_GRID_AXIS at once, and the rest at the end, if any."""
    whole, rest = divmod(seq_len, width)
    found = [(at * width, min(MAX_GRID_AXIS, whole - at), width) for at in range(0, whole, MAX_GRID_AXIS)]
    return found + [(whole * width, 1, rest)] * (rest > 0)


@dataclass(frozen=True)
class View:
    """Rows that one call of a kernel takes, of any tensor `[B, H, N, …]`, as a strided view `[b, h, n, …]`."""

    size: tuple[int, int, int]  # b, h, n
    start: tuple[int, int, int]  # of its first row, how far along B, H and N
    steps: tuple[tuple[int, int, int], ...]  # from one to the next along b, h and n, how far along B, H and N

    def strides(self, strides: Sequence[int]) -> list[int]:
        """The view's strides along b, h and n, and how far it starts, for a tensor of these strides."""
        return [sum(map(operator.mul, step, strides)) for step in (*self.steps, self.start)]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The view of x."""
        *strides, start = self.strides(x.stride())
        return x.as_strided((*self.size, *x.shape[3:]), (*strides, *x.stride()[3:]), x.storage_offset() + start)


def head_runs(offsets: list[int]) -> list[list[int]]:
    """All heads in as few runs as there can be, each with a constant step, whose offsets are equal or rise by one."""
    equal = [[head for head, own in enumerate(offsets) if own == one] for one in dict.fromkeys(offsets)]
    rising = [[head for head in run if head is not None] for run in itertools.zip_longest(*equal)]
    return min(equal, rising, key=len)


def branch_views(batch: int, heads: int, seq_len: int, width: int, rate: int, head_offsets: str) -> Iterator[View]:
    """The views that make up one branch: every kept row of every head in exactly one of them."""
    offsets = [offset(head, heads, rate, head_offsets) for head in range(heads)]
    for (start, count, length), run in itertools.product(segments(seq_len, width), head_runs(offsets)):
        kept = {head: max(0, -(-(length - offsets[head]) // rate)) for head in run}  # how many rows of a segment
        for rows, members in itertools.groupby((head for head in run if kept[head]), kept.get):
            first, *others = members
            second = others[0] if others else first
            along_heads = (0, second - first, offsets[second] - offsets[first])
            axes = [(count, (0, 0, length)), (batch, (1, 0, 0)), (1 + len(others), along_heads)]
            yield from folded(axes, (0, first, start + offsets[first]), rows, rate)


@lru_cache(64)
def all_views(batch: int, heads: int, seq_len: int, branches: Branches, head_offsets: str) -> list[View]:
    """The views of all branches `(w, r)`, those of the lowest rate first: their results are most of the whole."""
    ordered = sorted(branches, key=operator.itemgetter(1))
    return [view for branch in ordered for view in branch_views(batch, heads, seq_len, *branch, head_offsets)]


def folded(axes: list[tuple], start: tuple, rows: int, rate: int) -> Iterator[View]:
    """Views over three axes `(size, step)`, of which a kernel takes two: where all are longer than one, the shortest is
    gone through. Segments stay first, so that what a kernel lays out as `[b, n, h, D]` is the whole tensor's layout."""
    single = (1, (0, 0, 0))
    long = [axis for axis in axes if axis[0] > 1]
    looped = min(long) if len(long) == 3 else single
    sizes, steps = zip(*([axis for axis in long if axis is not looped] + [single] * 2)[:2], strict=True)
    for turn in range(looped[0]):
        here = tuple(a + turn * b for a, b in zip(start, looped[1], strict=True))
        yield View((*sizes, rows), here, (*steps, (0, 0, rate if rows > 1 else 1)))


def adopted(part: torch.Tensor, view: View, like: torch.Tensor) -> torch.Tensor | None:
    """`part` as the whole tensor of which it would be the `view`, if its memory is laid out so; else None."""
    axes = [axis for axis in zip(part.stride(), view.steps, view.size, strict=False) if axis[2] > 1]
    found = {step.index(1): stride for stride, step, _ in axes if sum(step) == max(step) == 1}
    strides = [found.get(axis, 0 if like.shape[axis] == 1 else None) for axis in range(3)]
    if part.numel() != like.numel() or None in strides:
        return None
    pairs = zip(view.strides(strides), part.stride(), view.size, strict=False)
    if any(ours != theirs for ours, theirs, size in pairs if size > 1):
        return None
    return part.as_strided(like.shape, (*strides, *part.stride()[3:]), part.storage_offset())


def scatter_into_zeros(part: torch.Tensor, view: View, like: torch.Tensor) -> torch.Tensor:
    """A tensor like `like` that holds `part` in its `view`, and 0 elsewhere; without a copy where that can be."""
    if (whole := adopted(part, view, like)) is None:
        whole = torch.zeros_like(like)
        view.of(whole).copy_(part)
    return whole
