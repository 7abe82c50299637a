"""Attention over a sequence that several ranks share: against the oracle, its bytes and memory against their laws.

This file is also the script that torchrun starts: all cases are computed in four processes, the ranks of a
case being the first of them."""

import itertools
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from attnlib import parallel
from attnlib.core import Machine, Shape, UserError, dense_reach
from attnlib.dilated.definition import dilated_reach
from attnlib.dilated.kernels import KERNELS
from attnlib.laws import ACCOUNTS, Phases, Variant, evaluate
from attnlib.memory.allocator import observe
from attnlib.parallel.layout import Place
from attnlib.parallel.shared import plan
from notebooks.rank_laws import branches_sent, ring_law, ring_sent, ulysses_sent
from notebooks.ranks import SCHEMES, Found, together
from report.accuracy import RESULTS, Task, compared, draw_inputs

PAPER = ((16, 32, 64, 128, 256), (1, 2, 4, 6, 12))  # the paper's own, smaller: 6 and 12 do not divide
UNSEEN = ((7, 50), (2, 3))  # some queries see nothing
MIXED = ((50, 7), (3, 1))
PARTLY = ((4, 3), (2, 3))  # of 16 positions whole segments of one branch fill a rank, of the other a part of it
DRAWS = 2


class Case(NamedTuple):
    """What is computed, and how."""

    scheme: str
    ranks: int
    shape: Shape
    zigzag: bool = False
    branches: tuple = ()
    kernel: str | None = None
    strided: bool = False

    @property
    def layout(self):
        return parallel.shards(self.shape.seq_len, self.ranks, self.zigzag)

    @property
    def options(self):
        return dict(zip(("segment_lengths", "dilation_rates"), self.branches, strict=False)) | {"kernel": self.kernel}

    def attention(self, link):
        fn = SCHEMES[self.scheme]
        return partial(fn, layout=self.layout, link=link, causal=self.shape.causal, **self.options)

    def sent(self, rank):
        """By the law, `{phase: {what: bytes}}`."""
        heads, causal = self.shape.heads, self.shape.causal
        if self.scheme == "ulysses":
            law = ulysses_sent(self.layout, rank)
        elif self.scheme == "ring":
            law = ring_sent(Place.of(self.layout, rank, causal))
        else:
            branches = tuple(zip(*self.branches, strict=True))
            law = branches_sent(plan(tuple(x[0] for x in self.layout), rank, heads, branches, "modulo", causal)[1])
        sent = {phase: {x: evaluate(n, self.shape) for x, n in terms.items()} for phase, terms in law.items()}
        return {phase: {x: n for x, n in terms.items() if n} for phase, terms in sent.items()}


def cases(device):
    """All of them, in an order that is the same for all processes."""
    found, masks = [], (False, True)
    if device == "cpu":
        for ranks, causal, dtype in itertools.product((1, 2, 3, 4), masks, ("float32", "bfloat16")):
            for batch, zigzag in itertools.product((1, 2), masks):
                found.append(Case("ring", ranks, Shape(batch, 3, 101, 8, dtype, causal), zigzag))
            found.append(Case("ulysses", ranks, Shape(1, 12, 61, 8, dtype, causal), causal))
            for branches in (PAPER, UNSEEN, MIXED):
                found.append(Case("dilated", ranks, Shape(1, 3, 301, 8, dtype, causal), False, branches))
            found.append(Case("dilated", ranks, Shape(1, 3, 16, 8, dtype, causal), False, PARTLY))
        few = Shape(1, 2, 8, 4, causal=True)
        return [
            *found,
            Case("ring", 4, few, True),
            Case("ring", 3, Shape(2, 4, 50, 8, causal=True), True, strided=True),
        ]
    for causal, n, name in itertools.product(masks, (1000, 1001), ("cudnn", "flash", "fa4")):
        shape, kernel = Shape(1, 4, n, 64, "bfloat16", causal), KERNELS[name]
        if not kernel.needs(shape, Machine.of(device)):
            found += [Case("ring", 2, shape, zigzag, kernel=name) for zigzag in masks]
            found += [Case("ulysses", 2, shape, causal, kernel=name), Case("dilated", 2, shape, False, PAPER, name)]
    return found


def memory_cases(device):
    """Ten random shapes of equal runs, `(ranks, shape, kernel)`; the shape is that of a rank."""
    pick, found = random.Random(3), []
    for _ in range(10):
        b, h, n, d = pick.choice((1, 2)), pick.randint(1, 4), 2 * pick.randint(4, 300), 8 * pick.randint(1, 4)
        causal, on_cpu = pick.random() < 0.6, device == "cpu"
        ranks = pick.choice((1, 2, 3, 4)) if on_cpu else 2
        found.append(
            (ranks, Shape(b, h, n, d, "float32" if on_cpu else "bfloat16", causal), "cpu" if on_cpu else "cudnn")
        )
    return found


def computed(case, link, device):
    """For each draw this rank's RESULTS, and of the last one what was sent in each phase."""
    found, sent = [], {}
    for qkv, do in draw_inputs(Task(dense_reach, case.shape, torch.device("cpu"), DRAWS)):  # the same on all devices
        link.sent.clear()
        *mine, do = (parallel.shard_of(x.detach(), case.layout, link.rank).to(device) for x in (*qkv, do))
        if case.strided:
            *mine, do = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (*mine, do))
        mine = [x.requires_grad_() for x in mine]
        o = case.attention(link)(*mine)
        sent["forward"] = {what: n for what, n in link.sent.items() if n}
        grads = torch.autograd.grad(o, mine, do)
        rest = {what: n - sent["forward"].get(what, 0) for what, n in link.sent.items()}
        sent["backward"] = {what: n for what, n in rest.items() if n}
        found.append([x.detach().cpu() for x in (o, *grads)])
    return found, sent


def held(ranks, shape, kernel, link, device):
    """What the allocator saw."""
    layout = parallel.shards(ranks * shape.seq_len, ranks, True)
    fn = lambda *qkv, causal: parallel.ring_attention(*qkv, layout, link, causal=causal, kernel=kernel)  # noqa: E731
    variant = Variant("ring", fn, None, Phases(0, 0))
    for _ in range(2):  # the first makes the workspaces
        seen = observe(variant, *shape.inputs(device), causal=shape.causal, backward=True)
    return seen.requested


def process(folder, device):
    """One of the processes."""
    link = parallel.connect(device, 60.0)
    torch.set_num_threads(1)
    groups = {ranks: dist.new_group(range(ranks)) for ranks in range(1, link.ranks + 1)}
    of = lambda ranks: parallel.Link(groups[ranks])  # noqa: E731
    found = [computed(case, of(case.ranks), device) if link.rank < case.ranks else None for case in cases(device)]
    memory = [held(*one, of(one[0]), device) if link.rank < one[0] else None for one in memory_cases(device)]
    torch.save((found, memory), Path(folder) / f"{link.rank}.pt")
    dist.barrier()


def check(device, folder):
    """All that was computed: errors against the oracle, bytes against the laws; the names of those that are wrong."""
    ranks = sorted(Path(folder).glob("*.pt"))
    results, memory = zip(*(torch.load(path) for path in ranks), strict=True)
    wrong = []
    for at, case in enumerate(cases(device)):
        parts = [found[at] for found in results[: case.ranks]]
        draws = iter(
            [
                [parallel.whole_of(x, case.layout) for x in zip(*draw, strict=True)]
                for draw in zip(*(one[0] for one in parts), strict=True)
            ]
        )
        reach = (
            partial(dilated_reach, **{x: y for x, y in case.options.items() if x != "kernel"})
            if case.branches
            else dense_reach
        )
        variant = Variant(
            str(case),
            lambda *qkv, causal, draws=draws: Found.apply(*qkv, *next(draws)),
            None,
            Phases(0, 0),
            reach=reach,
        )
        errors = compared(variant, case.shape, "cpu", DRAWS)
        wrong += [f"{case} {what}: {x:.2f}" for what in RESULTS if not (x := errors[f"{what}_of_reference"]) <= 2]
        for rank, (_, sent) in enumerate(parts):
            if sent != (law := case.sent(rank)):
                wrong.append(f"{case} rank {rank}: sent {sent}, law {law}")
    for at, (count, shape, kernel) in enumerate(memory_cases(device)):
        for rank in range(count):
            law = ring_law(count, rank, shape.causal, KERNELS[kernel].workspace)
            told = {account: law.bytes(account, shape, device) for account in ACCOUNTS}
            if told != memory[rank][at]:
                wrong.append(f"memory of rank {rank} of {count}, {shape}: {memory[rank][at]}, law {told}")
    return wrong


def test_equals_the_oracle_and_its_laws(tmp_path):
    """Output and gradients within twice the error of the same maths in the same dtype; what each rank sent in each
    phase, and what it saved and held, to the byte."""
    together(__file__, 4, "process", tmp_path, "cpu")
    assert check("cpu", tmp_path) == []


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_the_oracle_and_their_laws(tmp_path):
    together(__file__, 2, "process", tmp_path, "cuda")
    assert check("cuda", tmp_path) == []


def test_a_rank_that_dies_ends_the_others_with_one_line():
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"^rank 1 of 2 ended with exit code -9[^\n]*$"):
        together(__file__, 2, "die")
    assert time.monotonic() - begun < 60  # starting them takes most of it


def dying():
    """Rank 1 is killed while rank 0 waits for it."""
    import os
    import signal

    link, x = parallel.connect("cpu"), torch.randn(1, 2, 8, 4)
    if link.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    parallel.ring_attention(x, x, x, parallel.shards(16, 2), link)


def test_ranks_that_disagree_are_told():
    with pytest.raises(UserError, match=r"^rank \d of 2 [^\n]*ranks call with different arguments[^\n]*$"):
        together(__file__, 2, "differ")


def differing():
    """Rank 1 has another type."""
    link = parallel.connect("cpu")
    x = torch.randn(1, 2, 8, 4, dtype=(torch.float32, torch.bfloat16)[link.rank])
    parallel.ring_attention(x, x, x, parallel.shards(16, 2), link)


@pytest.mark.ci
def test_two_hosts(tmp_path):
    """The same by two torchruns that find each other on loopback, as on two hosts, two processes each."""
    port = random.randint(20000, 30000)
    where = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--nnodes=2", "--local-addr=127.0.0.1")
    with ThreadPoolExecutor(2) as hosts:
        calls = [hosts.submit(together, __file__, 2, "process", tmp_path, "cpu", options=where) for _ in range(2)]
        for call in calls:
            call.result()
    assert len([*tmp_path.glob("*.pt")]) == 4 and check("cpu", tmp_path) == []


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize(("seq_len", "ranks"), [(8, 4), (37, 3), (100, 1), (101, 7)])
def test_shards_hold_every_position_once(seq_len, ranks, zigzag):
    layout = parallel.shards(seq_len, ranks, zigzag)
    held = [at for runs in layout for run in runs for at in run]
    assert sorted(held) == [*range(seq_len)]
    sizes = [len(run) for runs in layout for run in runs]
    assert max(sizes) - min(sizes) <= 1
    whole = torch.randn(2, seq_len, 3)
    parts = [parallel.shard_of(whole, layout, rank) for rank in range(ranks)]
    assert torch.equal(parallel.whole_of(parts, layout), whole)


def test_zigzag_shares_a_causal_mask_equally():
    """Pairs of each rank, where runs are equally long."""
    layout = parallel.shards(64, 4, True)
    assert len({sum(at + 1 for run in runs for at in run) for runs in layout}) == 1


@pytest.mark.parametrize(
    ("scheme", "layout", "heads", "message"),
    [
        ("ring", parallel.shards(32, 2), 2, "by the layout 2 ranks hold 16, 16 rows; rank 0 of 2 has 8"),
        ("ring", parallel.shards(24, 3), 2, "3 ranks hold"),
        ("ulysses", parallel.shards(16, 2), 3, "2 ranks cannot share 3 heads equally"),
        ("dilated", parallel.shards(16, 2, True), 2, "without zigzag"),
    ],
)
def test_what_cannot_be_gets_one_line(scheme, layout, heads, message):
    options = {"segment_lengths": (4,), "dilation_rates": (1,)} if scheme == "dilated" else {}
    with pytest.raises(UserError, match=f"{re.escape(message)}[^\n]*$"):
        link = SimpleNamespace(rank=0, ranks=2, agree=lambda *how: None)
        SCHEMES[scheme](*Shape(1, heads, 8, 4).inputs(), layout, link, **options)


def test_more_runs_than_positions_are_refused():
    with pytest.raises(UserError, match="^7 positions cannot be cut into 8 runs for 4 ranks$"):
        parallel.shards(7, 4, True)


if __name__ == "__main__":
    script, *given = sys.argv[1:]
    {"die": dying, "differ": differing, "process": process}[script](*given)
