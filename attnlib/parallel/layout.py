"""Who holds which positions of a sequence that several processes share, and which of them see each other."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlib.core import UserError

Layout = tuple[tuple[range, ...], ...]  # of each rank the runs of positions that it holds, in their order


def shards(seq_len: int, ranks: int, zigzag: bool = False) -> Layout:
    """Which of `seq_len` positions each of `ranks` holds: a run of them, or with `zigzag` one from the front and its
    mirror image from the back, so that under a causal mask all have as much to do. Runs differ by one position at most,
    the longer ones first. Raises UserError where a run would be empty."""
    pieces = ranks * (1 + zigzag)
    if not 1 <= pieces <= seq_len:
        raise UserError(f"{seq_len} positions cannot be cut into {pieces} runs, for {ranks} ranks")
    ends = itertools.accumulate((seq_len // pieces + (at < seq_len % pieces) for at in range(pieces)), initial=0)
    runs = [range(*ends) for ends in itertools.pairwise(ends)]
    return tuple((runs[rank], runs[-1 - rank]) if zigzag else (runs[rank],) for rank in range(ranks))


def shard_of(whole: Tensor, layout: Layout, rank: int) -> Tensor:
    """The rows of `whole` `[…, N, D]` that a rank holds, `[…, n, D]`."""
    return torch.cat([whole[..., run.start : run.stop, :] for run in layout[rank]], -2)


def whole_of(parts: Sequence[Tensor], layout: Layout) -> Tensor:
    """The whole `[…, N, D]` of what each rank holds, `[…, n, D]`, in order of rank."""
    found = {}
    for part, runs in zip(parts, layout, strict=True):
        rows = part.split_with_sizes([len(run) for run in runs], -2)
        found |= {run.start: piece for run, piece in zip(runs, rows, strict=True)}
    return torch.cat([found[start] for start in sorted(found)], -2)


@dataclass(frozen=True)
class Place:
    """A rank's place in a ring of those that attend to each other's rows."""

    at: int  # which of the members it is
    members: tuple[int, ...]  # ranks of the group, in order of position
    rows: tuple[tuple[int, ...], ...]  # of each member, how many rows in each of its runs: one, or two in zigzag
    causal: bool
    name: int = 0  # tells the messages of several rings apart

    @property
    def steps(self) -> range:
        """The exchanges: in step i each takes from the member i places before it and gives to the one i after."""
        return range(1, len(self.members))

    def before(self, step: int) -> int:
        """The member from whom keys and values come in a step."""
        return (self.at - step) % len(self.members)

    def after(self, step: int) -> int:
        """The member to whom they go."""
        return (self.at + step) % len(self.members)

    def seen(self, mine: int, theirs: int) -> tuple[int, int] | None:
        """Queries from which on, and keys up to which, see each other, all of those: or None where none do."""
        first, last = 0, sum(self.rows[theirs])
        if self.causal and theirs < mine and len(self.rows[theirs]) > 1:
            last = self.rows[theirs][0]
        if self.causal and theirs > mine:
            if len(self.rows[mine]) == 1:
                return None
            first = self.rows[mine][0]
        return first, last


def place_of(layout: Layout, rank: int, causal: bool) -> Place:
    """The place of a rank in the ring of all that share a sequence."""
    rows = tuple(tuple(len(run) for run in runs) for runs in layout)
    return Place(rank, tuple(range(len(layout))), rows, causal)
