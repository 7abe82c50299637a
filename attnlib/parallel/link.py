"""A process group as attention uses it: messages between two ranks, and a count of what was sent."""

import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnlib.core import UserError

Ends = tuple[int, Sequence[Tensor]]  # a rank of the group, and contiguous tensors for it, or from it


class Link:
    """A process group, by default all there are, and the bytes that this rank sent through it, `{what: bytes}`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group or dist.group.WORLD
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.sent, self.agreed = Counter[str](), set[tuple]()

    def agree(self, *how: Hashable) -> None:
        """Raise UserError on every rank unless all say the same; they are asked once for each `how`."""
        if how not in self.agreed:
            said: list[Any] = [None] * self.ranks
            dist.all_gather_object(said, how, group=self.group)
            if unlike := [f"rank {at} with {one}" for at, one in enumerate(said) if one != said[0]]:
                raise UserError(f"ranks call with different arguments: rank 0 with {said[0]}, {unlike[0]}")
            self.agreed.add(how)

    def begin(self, what: str, name: int, give: Ends, take: Ends) -> Callable[[], Sequence[Tensor]]:
        """Begin to send tensors and to fill others. Returns what waits for both (on a GPU its stream, not the host),
        returns those filled, and holds all of them. name: of messages between the same two that are under way."""
        sides = ((dist.isend, *give), (dist.irecv, *take))
        ends = [(way, x, peer, 2 * name + at) for way, peer, tensors in sides for at, x in enumerate(tensors)]
        both = [dist.P2POp(way, x, group=self.group, tag=tag, group_peer=peer) for way, x, peer, tag in ends]
        self.sent[what] += sum(x.nbytes for x in give[1])
        works = dist.batch_isend_irecv(both) if both else []

        def wait(held: Ends = give) -> Sequence[Tensor]:
            for work in works:
                work.wait()
            return take[1]

        return wait


def connect(device: str, patience_s: float = 25.0) -> Link:
    """Join the processes that torchrun has started: by gloo on "cpu", by NCCL on "cuda", each on the GPU of its
    LOCAL_RANK. patience_s: how long a rank waits for another that says nothing."""
    gpu = None if device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if gpu:
        torch.cuda.set_device(gpu)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=patience_s), device_id=gpu)
    return Link()
