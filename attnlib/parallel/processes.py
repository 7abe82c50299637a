"""Several processes of this computer that form a group: started, called all at once, and ended all together."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import torch.distributed as dist

from attnlib.parallel.link import PATIENCE_S, Link, connect
from attnlib.timing.worker import Worker, WorkerDied

GRACE_S = 1.0  # in which the others of a group may end as well: one that was killed says more than those it left


def join_group(device: str, patience_s: float, surroundings: dict[str, str]) -> None:
    """In a process: become one of a group, by what torchrun would have put into its environment."""
    os.environ.update(surroundings)
    connect(device, patience_s)


def on_link(function: Callable, ranks: int, arguments: tuple) -> Any:
    """`function(link, *arguments)` with the link of the first `ranks` processes; in the others None."""
    if ranks not in groups:
        groups[ranks] = dist.new_group(range(ranks))  # by all processes
    return function(Link(groups[ranks]), *arguments) if dist.get_rank() < ranks else None


groups: dict[int, Any] = {}  # of this process, by how many ranks share one


class Ranks:
    """`count` processes that are one group, by gloo on "cpu", by NCCL with a GPU each on "cuda"."""

    def __init__(self, count: int, device: str = "cpu", patience_s: float = PATIENCE_S) -> None:
        self.count, self.device, self.patience_s = count, device, patience_s
        self.workers: list[Worker] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.stop()
        self.workers = []

    def call(self, function: Callable, *arguments: Any, ranks: int | None = None, timeout_s: float | None = None) -> list:
        """What `function(link, *arguments)` returns on each of the first `ranks`, all by default, in order of rank.
        Raises WorkerDied, in one line, when one of them failed, after which none is left; UserError as it did."""
        if not self.workers:
            self.start()
        found = self.at_once(on_link, [(function, ranks or self.count, arguments)] * self.count, timeout_s)
        return found[: ranks or self.count]

    def start(self) -> None:
        """Start the processes and let them find each other."""
        self.workers = [Worker() for _ in range(self.count)]
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(self.count)}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # the store is this process's, as torchrun's is its own
        each = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.count)]
        self.at_once(join_group, [(self.device, self.patience_s, one) for one in each], None)

    def at_once(self, function: Callable, arguments: list[tuple], timeout_s: float | None) -> list:
        """`function` in all processes; when one fails, the others are ended."""
        with ThreadPoolExecutor(self.count) as pool:
            calls = [
                pool.submit(worker.call, function, *given, timeout_s=timeout_s)
                for worker, given in zip(self.workers, arguments, strict=True)
            ]
            if any(call.exception() for call in wait(calls, return_when=FIRST_EXCEPTION).done):
                wait(calls, GRACE_S)
                ended = [(str(call.exception()), rank) for rank, call in enumerate(calls) if call.done() and call.exception()]
                for worker in self.workers:
                    if worker.process:
                        worker.process.kill()
                refused = next((c.exception() for c in calls if c.done() and not isinstance(c.exception(), (WorkerDied, type(None)))), None)
                text, rank = min(ended, key=lambda one: not one[0].startswith(("killed", "ended")))
                raise refused or WorkerDied(f"rank {rank} of {self.count}: {text}")
        return [call.result() for call in calls]
