"""Dilated attention over a sequence that several ranks share: ranks that share a segment exchange the rows it keeps."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlib.calling import differentiable
from attnlib.core import UserError
from attnlib.dilated.attention import dilated_backward, dilated_forward
from attnlib.dilated.definition import branches_of
from attnlib.dilated.kernels import Kernel
from attnlib.dilated.merging import add, merge
from attnlib.dilated.views import Branches, offset
from attnlib.parallel.layout import Layout, Place
from attnlib.parallel.link import Link
from attnlib.parallel.ring import rank_inputs, ring_backward, ring_forward


class Shared(NamedTuple):
    """A segment that several ranks share, for heads of which each keeps as many rows."""

    place: Place
    heads: list[int]
    kept: list[range]  # of each head, which of this rank's rows

    def where(self, x: Tensor) -> tuple[Any, ...]:
        """The kept rows, as an index into x `[B, H, n, …]`."""
        like, ahead = self.kept[0], [rows.start - self.kept[0].start for rows in self.kept]
        heads, first = (torch.tensor(ints, device=x.device)[:, None] for ints in (self.heads, ahead))
        return slice(None), heads, first + torch.arange(like.start, like.stop, like.step, device=x.device)


def kept_in(run: range, start: int, stop: int, rate: int) -> range:
    """Of the positions start, start + rate, … below `stop` those that lie in a run, counted from its first."""
    first = start + -(-max(0, run.start - start) // rate) * rate - run.start
    return range(first, max(first, min(run.stop, stop) - run.start), rate)


@lru_cache(64)
def plan(
    runs: tuple[range, ...], rank: int, heads: int, branches: Branches, head_offsets: str, causal: bool
) -> tuple[dict[tuple[int, int], Branches], list[Shared]]:
    """Stretches of a rank's rows that hold whole segments, with their branches, and segments shared, in one order."""
    mine, seq_len, shared, name = runs[rank], runs[-1].stop, list[Shared](), 0
    alone: dict[tuple[int, int], Branches] = {}
    for width, rate in branches:
        start, stop = -(-mine.start // width) * width, mine.stop if mine.stop == seq_len else mine.stop // width * width
        if start < stop:
            stretch = start - mine.start, stop - mine.start
            alone[stretch] = (*alone.get(stretch, ()), (width, rate))
        for start in sorted({run.start // width * width for run in runs if run.start % width}):
            alike: dict[tuple[int, ...], dict[int, range]] = {}  # of heads of which each rank keeps as many rows, mine
            for head in range(heads):
                own, stop = start + offset(head, heads, rate, head_offsets), min(start + width, seq_len)
                kept = [kept_in(run, own, stop, rate) for run in runs]
                alike.setdefault(tuple(map(len, kept)), {})[head] = kept[rank]
            for name, (counts, of_heads) in enumerate(alike.items(), name + 1):  # noqa: B020
                there = tuple(one for one, count in enumerate(counts) if count)
                if rank in there:
                    place = Place(there.index(rank), there, tuple((counts[one],) for one in there), causal, name)
                    shared.append(Shared(place, [*of_heads], [*of_heads.values()]))
    return alone, shared


def collected(
    nothing: Callable, inputs: Sequence[Tensor], alone: Callable, ring: Callable, put: Callable,
    runs: tuple[range, ...], link: Link, kernel: Kernel, *how: Any,
) -> Sequence[Tensor]:  # fmt: skip
    """What `alone` finds on stretches and `ring` on shared segments of the inputs, `put` into `nothing`."""
    (stretches, shared), (_, head_offsets, causal) = plan(runs, link.rank, inputs[0].shape[1], *how), how

    def found(start: int, stop: int) -> Sequence[Tensor]:
        rows, branches = (x[:, :, start:stop] for x in inputs), zip(*stretches[start, stop], strict=True)
        return alone(*rows, *branches, causal, head_offsets, kernel.name * (stop - start > 1))  # cuDNN refuses one row

    whole = 0, inputs[0].shape[2]
    total = found(*whole) if whole in stretches else nothing()
    for start, stop in (ends for ends in stretches if ends != whole):
        put([x[:, :, start:stop] for x in total], found(start, stop))
    for one in shared:
        at = one.where(inputs[0])
        rows = [x[at] for x in total]
        put(rows, ring(*(x[at] for x in inputs), one.place, link, kernel))
        for x, joined_rows in zip(total, rows, strict=True):
            x[at] = joined_rows
    return total


def shared_forward(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Sequence[Tensor]:
    """o and its log-sum-exp, of a rank."""
    lowest = torch.finfo(torch.float32).min / 2  # below any log-sum-exp, but two infinite ones would have no difference
    nothing = lambda: (torch.zeros_like(q), q.new_full(q.shape[:3], lowest, dtype=torch.float32))  # noqa: E731
    put = lambda all, part: merge(all[0], all[1], part[0], part[1].clamp(min=lowest))  # noqa: E731
    return collected(nothing, (q, k, v), dilated_forward, ring_forward, put, *how)


def shared_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *how: Any) -> Sequence[Tensor]:
    """dq, dk, dv, of a rank, with the merged o and log-sum-exp."""
    nothing = lambda: [torch.zeros_like(x) for x in (q, k, v)]  # noqa: E731
    return collected(nothing, (do, q, k, v, o, lse), dilated_backward, ring_backward, add, *how)


SHARED = differentiable("dilated attention", shared_forward, shared_backward)


def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, link: Link, *,
    segment_lengths: Iterable[int], dilation_rates: Iterable[int], causal: bool = False, head_offsets: str = "modulo",
    kernel: str | None = None,
) -> Tensor:  # fmt: skip
    """What `dilated` computes, called as `ring.ring_attention`, on a layout without zigzag: of a segment that lies in a
    rank's rows nothing is exchanged, of another the rows that its heads keep. Raises UserError as both do."""
    branches = branches_of(segment_lengths, dilation_rates, head_offsets)
    *inputs, flash = rank_inputs(q, k, v, layout, link, causal, kernel, branches, head_offsets)
    runs, *mirrored = zip(*layout, strict=True)
    if mirrored:
        raise UserError("dilated_attention wants neighbouring positions on a rank: shards without zigzag")
    return SHARED.apply(*inputs, runs, link, flash, branches, head_offsets, causal)[0]
