"""Dilated attention over a sequence that several processes share: branches whose segments lie within a rank's rows need
nobody else; of wider segments the ranks that share one form a ring, in which only the kept rows go round."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

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
from attnlib.parallel.ring import Ring, kernel_for, rank_inputs


class Shared(NamedTuple):
    """A ring of those that share a segment, for heads of which each member keeps as many rows."""

    place: Place
    heads: tuple[int, ...]
    first: tuple[int, ...]  # of each head, the first row that this rank keeps, counted from its own first
    rate: int

    def of(self, x: Tensor) -> tuple[slice, Tensor, Tensor]:
        """Where the kept rows are in x `[B, H, n, …]`."""
        kept = torch.arange(self.place.rows[self.place.at][0], device=x.device) * self.rate
        rows = torch.tensor(self.first, device=x.device)[:, None] + kept
        return slice(None), torch.tensor(self.heads, device=x.device)[:, None], rows


def kept_of(run: range, start: int, stop: int, own: int, rate: int) -> range:
    """Of a segment from `start` to `stop` of which every rate-th row is kept, from `own` on, those that lie in `run`."""
    first = start + own
    first += -(-max(0, run.start - first) // rate) * rate
    return range(first, max(first, min(run.stop, stop)), rate)


@lru_cache(64)
def plan(
    runs: tuple[range, ...], rank: int, heads: int, branches: Branches, head_offsets: str, causal: bool
) -> tuple[dict[tuple[int, int], list[tuple[int, int]]], list[Shared]]:
    """What a rank does: the rows from … to … of its own that hold whole segments, `{rows: branches}`, and the rings
    that it is in, in an order that is the same for all."""
    mine, seq_len, name = runs[rank], runs[-1].stop, 0
    alone: dict[tuple[int, int], list[tuple[int, int]]] = {}
    rings = []
    for width, rate in branches:
        start, stop = -(-mine.start // width) * width, seq_len if mine.stop == seq_len else mine.stop // width * width
        if start < stop:
            alone.setdefault((start - mine.start, stop - mine.start), []).append((width, rate))
        for cut in sorted({run.start // width * width for run in runs if run.start % width}):
            alike: dict[tuple[int, ...], list[int]] = {}
            kept = [
                [kept_of(run, cut, min(cut + width, seq_len), offset(head, heads, rate, head_offsets), rate) for run in runs]
                for head in range(heads)
            ]
            for head in range(heads):
                alike.setdefault(tuple(map(len, kept[head])), []).append(head)
            for counts, members in alike.items():
                name += 1
                if counts[rank]:
                    there = tuple(one for one, count in enumerate(counts) if count)
                    place = Place(there.index(rank), there, tuple((counts[one],) for one in there), causal, name)
                    first = tuple(kept[head][rank].start - mine.start for head in members)
                    rings.append(Shared(place, tuple(members), first, rate))
    return alone, rings


def shared_forward(
    q: Tensor, k: Tensor, v: Tensor, runs: tuple[range, ...], link: Link, kernel: Kernel,
    branches: Branches, causal: bool, head_offsets: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and its log-sum-exp, of a rank."""
    alone, others = plan(runs, link.rank, q.shape[1], branches, head_offsets, causal)
    begun = [Ring(*(x[one.of(x)] for x in (q, k, v)), one.place, link, kernel) for one in others]
    o, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    for (start, stop), some in alone.items():
        rows = (x[:, :, start:stop] for x in (q, k, v))
        part = dilated_forward(*rows, *zip(*some, strict=True), causal, head_offsets, kernel.name)
        if stop - start == q.shape[2]:
            o, lse = part
        else:
            merge(o[:, :, start:stop], lse[:, :, start:stop], *part)
    for one, ring in zip(others, begun, strict=True):
        rows, rows_lse = o[one.of(o)], lse[one.of(o)]
        merge(rows, rows_lse, *ring.forward())
        o[one.of(o)], lse[one.of(o)] = rows, rows_lse
    return o, lse


def shared_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, runs: tuple[range, ...], link: Link,
    kernel: Kernel, branches: Branches, causal: bool, head_offsets: str,
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv, of a rank."""
    alone, others = plan(runs, link.rank, q.shape[1], branches, head_offsets, causal)
    begun = [Ring(*(x[one.of(x)] for x in (q, k, v)), one.place, link, kernel) for one in others]
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for (start, stop), some in alone.items():
        rows = (x[:, :, start:stop] for x in (do, q, k, v, o, lse))
        parts = dilated_backward(*rows, *zip(*some, strict=True), causal, head_offsets, kernel.name)
        if stop - start == q.shape[2]:
            grads = list(parts)
        else:
            add([x[:, :, start:stop] for x in grads], parts)
    for one, ring in zip(others, begun, strict=True):
        for x, part in zip(grads, ring.backward(*(x[one.of(x)] for x in (do, o, lse))), strict=True):
            x[one.of(x)] += part
    return grads


SHARED = differentiable("dilated attention", shared_forward, shared_backward)


def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, link: Link, *,
    segment_lengths: Iterable[int], dilation_rates: Iterable[int], causal: bool = False, head_offsets: str = "modulo",
    kernel: str | None = None,
) -> Tensor:  # fmt: skip
    """As `ring.ring_attention`, what `dilated` computes; the layout is one of single runs, without zigzag.

    Whole segments within a rank's rows are its own affair. Of a wider one, or one that is cut, its members exchange the
    rows that they keep. Raises UserError as both do."""
    q, k, v = rank_inputs(q, k, v, layout, link, causal)
    branches = branches_of(segment_lengths, dilation_rates, head_offsets)
    if any(len(runs) > 1 for runs in layout):
        raise UserError("dilated attention wants neighbouring rows on a rank: shards without zigzag")
    runs, flash = tuple(runs[0] for runs in layout), kernel_for(q, causal, kernel)
    return SHARED.apply(q, k, v, runs, link, flash, branches, causal, head_offsets)[0]
