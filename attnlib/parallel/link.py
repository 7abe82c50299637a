"""A process group as attention uses it: messages between two, an exchange among all, and a count of what was sent."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE_S = 25.0  # after which a rank that hears nothing gives up


class Transfer:
    """Messages on their way; they hold what they send until they have arrived."""

    def __init__(self, works: list[dist.Work], sent: Sequence[Tensor], received: list[Tensor]) -> None:
        self.works, self.sent, self.received = works, sent, received

    def wait(self) -> list[Tensor]:
        """What has come in; on a GPU its stream waits for it, not the host."""
        for work in self.works:
            work.wait()
        received, self.works, self.sent, self.received = self.received, [], (), []
        return received


class Link:
    """A process group, by default the whole world, and the bytes that this rank sent through it, `{what: bytes}`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group or dist.group.WORLD
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.sent = Counter[str]()

    def exchange(
        self, what: str, name: int,
        give: tuple[int, Sequence[Tensor]] | None, take: tuple[int, Sequence[Tensor]] | None,
    ) -> Transfer:  # fmt: skip
        """Begin to send tensors to a rank and to fill others from a rank, `(rank, contiguous tensors)`; nothing waits.
        name: of this exchange, on both sides, among those between the same two that are under way."""
        operations = []
        for function, pairs in ((dist.isend, give), (dist.irecv, take)):
            peer, tensors = pairs or (0, ())
            for at, x in enumerate(tensors):
                tag = 2 * name + at
                operations.append(dist.P2POp(function, x, group=self.group, tag=tag, group_peer=peer))
        self.sent[what] += sum(x.nbytes for x in give[1]) if give else 0
        works = dist.batch_isend_irecv(operations) if operations else []
        return Transfer(works, give[1] if give else (), [*take[1]] if take else [])

    def all_to_all(self, what: str, given: Sequence[Tensor], taken: Sequence[int]) -> list[Tensor]:
        """Send to each rank its tensor, and return of each rank the one for this one, flat, of `taken` elements."""
        self.sent[what] += sum(x.nbytes for rank, x in enumerate(given) if rank != self.rank)
        flat, counts = torch.cat([x.flatten() for x in given]), [x.numel() for x in given]
        received = flat.new_empty(sum(taken))
        dist.all_to_all_single(received, flat, [*taken], counts, group=self.group)
        return list(received.split_with_sizes([*taken]))


def connect(device: str = "cpu", patience_s: float = PATIENCE_S) -> Link:
    """Join the processes that torchrun, or `processes.Ranks`, has started: by gloo on "cpu", by NCCL on "cuda", where
    a process takes the GPU of its LOCAL_RANK. patience_s: how long a rank waits for one that says nothing."""
    import os

    backend, at = ("gloo", None) if device == "cpu" else ("nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    if at:
        torch.cuda.set_device(at)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=patience_s), device_id=at)
    return Link()
