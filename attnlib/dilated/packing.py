"""Short sequences: the kept rows of all branches side by side, so that few calls of a kernel take all of them.

Where attention itself takes microseconds, a call costs what the host needs to start all its parts, and copying is
cheap: one kernel packs the kept rows, a flash kernel goes once through all segments of as many rows, whatever their
branch and head, or at once through all there are (`kernels.at_once`), and one kernel joins what belongs to one row
(module `merging`)."""

import itertools
import operator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from attnlib.core import Machine, Shape
from attnlib.dilated.views import MAX_GRID_AXIS, Branches, all_views, offset, segments

Told = tuple[tuple[int, ...], ...]
MAX_BYTES = 64 * 2**20  # of one tensor's packed rows: beyond that, copies take longer than what they save
MAX_BLOCKS = 16  # the kernels go through all of them, unrolled


class Block(NamedTuple):
    """Equally long segments of one branch, of those heads that keep equally many of their rows: packed as
    `[B, many, members, rows]`, beginning `base` rows into the tensor for segments of as many rows."""

    start: int  # the first row of the first segment
    length: int
    many: int
    rate: int
    step: int  # head j starts with row (j // step) % period of a segment …
    period: int
    first: int  # … and is one of the members if that is from first to last
    last: int
    members: int
    rows: int
    base: int = 0


@dataclass(frozen=True)
class Packing:
    """Which rows lie where."""

    groups: tuple[tuple[int, int], ...]  # how many segments of how many kept rows a call of the kernel takes
    at: tuple[int, ...]  # of each block, its group
    blocks: tuple[Block, ...]

    @cached_property
    def sizes(self) -> list[int]:
        """The rows of each group."""
        return [segments * rows for segments, rows in self.groups]

    @cached_property
    def in_groups(self) -> Told:
        """The blocks for Triton's kernels, each in the tensor of its group. No number is 1 or a multiple of 16, for
        each of which, and for each pattern of them, Triton would compile a kernel of its own."""
        return tuple(tuple(2 * number + 3 for number in block) for block in self.blocks)

    @cached_property
    def whole(self) -> "Packing":
        """The same rows as one group of one segment: all in one tensor."""
        ends = [0, *itertools.accumulate(self.sizes)]
        moved = tuple(x._replace(base=x.base + ends[at]) for x, at in zip(self.blocks, self.at, strict=True))
        return Packing(((1, ends[-1]),), (0,) * len(moved), moved)


def blocks_of(heads: int, seq_len: int, branches: Branches, head_offsets: str) -> list[Block]:
    """All blocks, those of the most rows first."""
    found = []
    for width, rate in branches:
        # of all rates from which on a head keeps one row at most, the first, so that kernels see no large number
        rate = min(rate, max(heads, seq_len))
        step, period = (1, rate) if head_offsets == "modulo" else (-(-heads // rate), heads)
        offsets = [offset(head, heads, rate, head_offsets) for head in range(heads)]
        for start, count, length in segments(seq_len, width):
            more = (length - 1) % rate + 1  # heads that start before it keep a row more than the others
            for first, last, rows in ((0, more, -(-length // rate)), (more, rate, length // rate)):
                members = sum(first <= own < last for own in offsets)
                if members and rows:
                    found.append(Block(start, length, count, rate, step, period, first, last, members, rows))
    return sorted(found, key=operator.attrgetter("rows"), reverse=True)


@lru_cache(64)
def packing_of(shape: Shape, branches: Branches, head_offsets: str, machine: Machine) -> Packing | None:
    """How to pack the branches, or None where it does not pay: on a CPU, which is busy with attention itself, for long
    sequences, and where it saves no calls."""
    sizes = shape.batch, shape.heads, shape.seq_len
    blocks = blocks_of(*sizes[1:], branches, head_offsets)
    rows = shape.batch * sum(block.many * block.members * block.rows for block in blocks)
    too_much = rows * shape.head_dim * shape.element_size > MAX_BYTES
    if machine.is_cpu or too_much or len(blocks) > MAX_BLOCKS:
        return None
    groups: list[tuple[int, int]] = []
    at, placed = list[int](), list[Block]()
    for rows, alike in itertools.groupby(blocks, operator.attrgetter("rows")):
        many = 0
        for block in alike:
            at.append(len(groups))
            placed.append(block._replace(base=many * rows))
            many += shape.batch * block.many * block.members
        groups.append((many, rows))
    too_many = max(many for many, _ in groups) > MAX_GRID_AXIS
    if too_many or len(groups) + 1 >= len(all_views(*sizes, branches, head_offsets)):
        return None
    return Packing(tuple(groups), tuple(at), tuple(placed))
