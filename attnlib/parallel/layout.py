"""Who holds which positions of a sequence that several ranks share, and who sees whom."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnlib.core import UserError

Layout = tuple[tuple[range, ...], ...]  # of each rank the runs of positions that it holds, in their order


def shards(seq_len: int, ranks: int, zigzag: bool = False) -> Layout:
    """Which of `seq_len` positions each rank holds: a run, or with `zigzag`, fair under a causal mask, one at the front
    and its mirror image at the back. The first may be longer, by one. Raises UserError where one would be empty."""
    pieces = ranks * (1 + zigzag)
    if not 1 <= pieces <= seq_len:
        raise UserError(f"{seq_len} positions cannot be cut into {pieces} runs for {ranks} ranks")
    lengths = (seq_len // pieces + (at < seq_len % pieces) for at in range(pieces))
    runs = [range(*ends) for ends in pairwise(accumulate(lengths, initial=0))]
    return tuple((runs[rank], runs[-1 - rank]) if zigzag else (runs[rank],) for rank in range(ranks))


def shard_of(whole: Tensor, layout: Layout, rank: int) -> Tensor:
    """The rows of `whole` `[…, N, D]` that a rank holds, `[…, n, D]`."""
    return torch.cat([whole[..., run.start : run.stop, :] for run in layout[rank]], -2)


def whole_of(parts: Sequence[Tensor], layout: Layout) -> Tensor:
    """The whole `[…, N, D]` of what each rank holds, `[…, n, D]`, in order of rank."""
    rows = [x for part, runs in zip(parts, layout, strict=True) for x in part.split([*map(len, runs)], -2)]
    starts = [run.start for runs in layout for run in runs]
    return torch.cat([rows[at] for at in sorted(range(len(rows)), key=starts.__getitem__)], -2)


class Place(NamedTuple):
    """A rank's place in a ring of those that see each other's rows."""

    at: int  # which of the members it is
    members: tuple[int, ...]  # ranks of the group, in order of position
    runs: tuple[tuple[int, ...], ...]  # of each member, how many rows in each of its runs: one, or two in zigzag
    causal: bool
    name: int = 0  # tells the messages of several rings apart

    @classmethod
    def of(cls, layout: Layout, rank: int, causal: bool) -> "Place":
        """The place of a rank in the ring of all that share a sequence."""
        return cls(rank, tuple(range(len(layout))), tuple(tuple(map(len, runs)) for runs in layout), causal)

    @property
    def half(self) -> int:
        """Where its own rows are cut in two, for the backward pass: all of them if it is alone."""
        mine = self.runs[self.at]
        return sum(mine) if len(self.members) == 1 else mine[0] if len(mine) > 1 else -(-mine[0] // 2)

    def seen(self, mine: int, theirs: int) -> tuple[int, int] | None:
        """From which row on `mine` sees the rows of `theirs`, and up to which of them; None where none does."""
        mirrored, every = len(self.runs[mine]) > 1, (0, sum(self.runs[theirs]))
        if not self.causal or mine == theirs:
            return every
        if theirs < mine:
            return (0, self.runs[theirs][0]) if mirrored else every
        return (self.runs[mine][0], every[1]) if mirrored else None

    def partners(self, step: int) -> tuple[int, int]:
        """The members from whom this one takes keys and values in a step, and to whom it gives."""
        return (self.at - step) % len(self.members), (self.at + step) % len(self.members)

    def widened(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors to be added to, in float32 where more than two roundings would add up."""
        return [x.float() for x in tensors] if len(self.members) > 2 else [*tensors]
