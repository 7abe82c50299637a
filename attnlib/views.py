"""Which rows each branch of dilated attention takes, as strided views that a flash kernel accepts.

A kernel goes through two axes, batch and heads, beside the rows. Segments are folded into one of them; heads that keep
different rows lie a constant step apart, so that few views hold all heads. Nothing here touches data.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

HEAD_OFFSETS = ("modulo", "grouped")
MOST = 2**15  # along a kernel's axis: a CUDA grid has room for 65,535 blocks in its second and third direction


def offset(head: int, heads: int, rate: int, head_offsets: str) -> int:
    """The first row that a head keeps: j mod r in the paper ("modulo"), j // ⌈H/r⌉ in torchscale ("grouped")."""
    return head % rate if head_offsets == "modulo" else head // -(-heads // rate)


def fits_one_batch(batch: int, heads: int, rates, head_offsets: str) -> bool:
    """Whether a batch of several can be taken for one of more heads: where the offsets of all heads go on in step."""
    in_step = head_offsets == "modulo" and all(heads % rate == 0 for rate in rates)
    return in_step and batch > 1 and batch * heads <= MOST


def segments(seq_len: int, width: int) -> list[tuple[int, int, int]]:
    """`(start, count, width)`: the whole segments, at most MOST at once, and the shorter one at the end, if any."""
    whole, rest = divmod(seq_len, width)
    found = [(at * width, min(MOST, whole - at), width) for at in range(0, whole, MOST)]
    return found + [(whole * width, 1, rest)] * (rest > 0)


@dataclass(frozen=True)
class View:
    """Rows that one call of a kernel takes, of any tensor `[B, H, N, …]`, as a strided view `[b, h, n, …]`.

    size: `(b, h, n)`; start and each of the three steps: how far along B, H and N.
    """

    size: tuple[int, int, int]
    start: tuple[int, int, int]
    steps: tuple[tuple[int, int, int], ...]

    def strides(self, strides: tuple[int, ...]) -> list[int]:
        """The view's strides along b, h and n, and how far it starts, for a tensor of these strides."""
        batch, heads, rows = strides[:3]
        return [b * batch + h * heads + n * rows for b, h, n in (*self.steps, self.start)]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The view of x."""
        *strides, start = self.strides(x.stride())
        return x.as_strided((*self.size, *x.shape[3:]), (*strides, *x.stride()[3:]), x.storage_offset() + start)


def head_runs(heads: int, rate: int, head_offsets: str) -> list[list[int]]:
    """All heads in as few runs as there can be, each with a constant step, whose offsets are equal or rise by one."""
    offsets = [offset(head, heads, rate, head_offsets) for head in range(heads)]
    equal = [[head for head in range(heads) if offsets[head] == one] for one in dict.fromkeys(offsets)]
    rising = list(itertools.zip_longest(*equal))
    rising = [[head for head in run if head is not None] for run in rising]
    return min(equal, rising, key=len)


def views(batch: int, heads: int, seq_len: int, width: int, rate: int, head_offsets: str) -> Iterator[View]:
    """The views that make up one branch: every kept row of every head in exactly one of them."""
    for start, count, length in segments(seq_len, width):
        for run in head_runs(heads, rate, head_offsets):
            kept = {head: -(-(length - offset(head, heads, rate, head_offsets)) // rate) for head in run}
            for rows, group in itertools.groupby(run, kept.get):
                group = list(group)
                if rows < 1:
                    continue
                first = offset(group[0], heads, rate, head_offsets)
                second = group[1] if len(group) > 1 else group[0]
                along_heads = (0, second - group[0], offset(second, heads, rate, head_offsets) - first)
                axes = [(count, (0, 0, length)), (batch, (1, 0, 0)), (len(group), along_heads)]
                yield from folded(axes, (0, group[0], start + first), rows, rate)


@lru_cache(64)
def all_views(batch: int, heads: int, seq_len: int, branches: tuple, head_offsets: str) -> list[View]:
    """The views of all branches `(w, r)`, those of the lowest rate first: their results are most of the whole."""
    ordered = sorted(branches, key=lambda branch: branch[1])
    return [view for w, r in ordered for view in views(batch, heads, seq_len, w, r, head_offsets)]


def folded(axes: list[tuple], start: tuple, rows: int, rate: int) -> Iterator[View]:
    """Views over three axes `(size, step)`, of which a kernel takes two: where all are longer than one, the shortest is
    gone through. Segments stay first, so that what a kernel lays out as `[b, n, h, D]` is the whole tensor's layout."""
    long = [axis for axis in axes if axis[0] > 1]
    looped = min(long) if len(long) == 3 else (1, (0, 0, 0))
    inner = [axis for axis in long if axis is not looped]
    inner += [(1, (0, 0, 0))] * (2 - len(inner))
    sizes, steps = zip(*inner, strict=True)
    for turn in range(looped[0]):
        here = tuple(a + turn * b for a, b in zip(start, looped[1], strict=True))
        yield View((*sizes, rows), here, (*steps, (0, 0, rate if rows > 1 else 1)))


def adopted(part: torch.Tensor, view: View, like: torch.Tensor) -> torch.Tensor | None:
    """`part` as the whole tensor of which it would be the `view`, if its memory is laid out so; else None."""
    if part.numel() != like.numel():
        return None
    found = {}
    for stride, step, size in zip(part.stride(), view.steps, view.size, strict=False):
        if size > 1 and sum(step) == max(step) == 1:
            found[step.index(1)] = stride
    strides = [found.get(axis, 0 if like.shape[axis] == 1 else None) for axis in range(3)]
    if None in strides:
        return None
    pairs = zip(view.strides(strides), part.stride(), view.size, strict=False)
    if any(ours != theirs for ours, theirs, size in pairs if size > 1):
        return None
    return part.as_strided(like.shape, (*strides, *part.stride()[3:]), part.storage_offset())


def spread(part: torch.Tensor, view: View, like: torch.Tensor) -> torch.Tensor:
    """A tensor like `like` that holds `part` in its `view`, and 0 elsewhere; without a copy where that can be."""
    whole = adopted(part, view, like)
    if whole is None:
        whole = torch.zeros_like(like)
        view.of(whole).copy_(part)
    return whole
