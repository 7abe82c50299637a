"""Processes that share a sequence, started by torchrun, and what chapter 6 measures in them."""

import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist

from attnlib import parallel
from attnlib.core import PHASES, Machine, Shape, UserError, dense_reach
from attnlib.dilated.attention import dilated
from attnlib.dilated.definition import dilated_reach
from attnlib.laws import Phases, Variant, evaluate, useful_flops
from attnlib.memory.allocator import account
from attnlib.parallel.branches import plan
from attnlib.parallel.law import branches_sent, ring_sent, ulysses_sent
from attnlib.parallel.layout import Place
from attnlib.parallel.ring import keys_and_values
from attnlib.rows import shape_of
from attnlib.timing.clock import CACHE_BYTES, CYCLES_PER_MS
from attnlib.timing.sweep import Job, Row
from report.accuracy import ERRORS, Task, compared, draw_inputs
from report.skipping import NotMeasured

PROJECT = Path(__file__).parent.parent
EXACT = [*ERRORS, "rank", "forward_sent_bytes", "backward_sent_bytes", "seq_len", "ranks"]
RANK_MEMORY = ["rank", "ranks", "saved_bytes", "forward_peak_bytes", "backward_peak_bytes", "seq_len"]
MESSAGES = ["message_bytes", "there_ms", "back_ms", "both_ways_ms"]
BESIDE = ["kernel_ms", "exchange_ms", "together_ms", "seq_len"]
SHARED_TIMES = ["seq_len", "ranks", "ms", "single_ms"]
PAPER_SMALL = ((16, 1), (32, 2), (64, 4), (128, 6), (256, 12))  # the paper's setting, scaled down
SEGMENTS_AND_RATES = {"segment_lengths": (2048, 4096, 8192, 16384, 32768), "dilation_rates": (1, 2, 4, 6, 12)}


def together(script, ranks: int, *arguments, timeout_s: float = 500.0, options=("--standalone",)):
    """Run a script in `ranks` processes by torchrun. Raises UserError, in one line, when one of them failed or they took
    too long; then all of them are ended."""
    how = [*options, "--nproc-per-node", str(ranks), str(script), *map(str, arguments)]
    paths = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "torch.distributed.run", *how]
    process = subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)
    try:
        said = process.communicate(timeout=timeout_s)[1]
    except BaseException as error:
        process.terminate()  # torchrun ends the others before itself
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise UserError(f"{ranks} ranks were not done after {timeout_s:g} s") from None
        raise
    if process.returncode:
        root = re.search(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", said, re.S)
        errors = re.findall(r"^\[rank\d+\]: (\w*(?:Error|Exception)\b.*)", said, re.M)
        who = f"rank {root[1]} of {ranks} ended with exit code {root[2]}" if root else f"{ranks} ranks failed"
        raise UserError(": ".join([who, *errors[:1]]))


def rows_by(what: str, ranks: int, device: str, cases: list) -> list[Row]:
    """The rows of one of the functions below, run in `ranks` processes for each of the cases."""
    with tempfile.TemporaryDirectory() as folder:
        together(__file__, ranks, what, device, json.dumps(cases), Path(folder, "rows"))
        return json.loads(Path(folder, "rows").read_text())


def shared_job(what: str, ranks: int, device: str, cases: list) -> Job:
    """All cases of one kind, as a job."""
    return Job(f"{what} {ranks} {device}", rows_by, (what, ranks, device, cases), here=True)


def gpus(run) -> int:
    """How many GPUs there are to measure on; in a replay, which asks nobody, none."""
    return 0 if run.replay or run.machine.is_cpu else torch.cuda.device_count()


def needs_two(run, there: int):
    """Raise NotMeasured where something is to be measured and there are fewer than two GPUs."""
    if not run.replay and there < 2:
        raise NotMeasured("This needs two GPUs that a link joins: not measured on this device yet.")


def sent_by_law(row) -> tuple[int, int]:
    """Bytes that the rank of a row sends in the forward and in the backward pass, by the law of its scheme."""
    shape, scheme = shape_of(row), row["variant"]
    layout = parallel.shards(shape.seq_len, row["ranks"], scheme != "dilated" and shape.causal)
    if scheme == "ulysses":
        law = ulysses_sent(layout, row["rank"])
    elif scheme == "ring":
        law = ring_sent(Place.of(layout, row["rank"], shape.causal))
    else:
        shared = plan(tuple(x[0] for x in layout), row["rank"], shape.heads, PAPER_SMALL, "modulo", shape.causal)[1]
        law = branches_sent(shared)
    return tuple(sum(evaluate(nbytes, shape, Machine("cpu")) for nbytes in terms.values()) for terms in law.values())


def memory_sizes(count: int, dtype: str) -> list[dict]:
    """Random shapes of a rank, of an even number of rows."""
    pick = random.Random(6)
    draw = lambda: (pick.choice((1, 2)), pick.randint(1, 4), 2 * pick.randint(4, 300), 8 * pick.randint(1, 8))  # noqa: E731
    return [Shape(*draw(), dtype, pick.random() < 0.5).columns() for _ in range(count)]


def rates(run) -> tuple[float, float]:
    """Operations per second of one GPU on the longest causal sequence measured, and bytes per second of the link; NaN
    where they were not measured."""
    if not (run.has("times") and run.path("times").exists()):
        return math.nan, math.nan
    times, link = (pd.read_csv(run.path(name)) for name in ("times", "link"))
    row = times[(times["scheme"] == "ring") & times["causal"] & (times["phase"] == "forward_backward")].iloc[-1]
    flops = sum(useful_flops(shape_of(row), phase) for phase in PHASES)
    best = link.iloc[-1]
    return flops / row["single_ms"] * 1e3, best["message_bytes"] / best["both_ways_ms"] * 1e3


class Found(torch.autograd.Function):
    """Results that were computed elsewhere, as a function of q, k, v."""

    @staticmethod
    def forward(ctx, q, k, v, o, *grads):
        ctx.grads = grads
        return o

    @staticmethod
    def backward(ctx, do):
        return *ctx.grads, *[None] * 4


def attention_of(scheme: str, shape: Shape, link, kernel: str | None = None, options=None):
    """`(q, k, v) -> o` of a rank, and the layout: zigzag where that is of use."""
    layout = parallel.shards(shape.seq_len, link.ranks, scheme != "dilated" and shape.causal)
    how = {"layout": layout, "link": link, "causal": shape.causal, "kernel": kernel, **(options or {})}
    return partial(getattr(parallel, f"{scheme}_attention"), **how), layout


def exact(link, device, scheme, sizes, options) -> list[Row]:
    """Of a scheme at a shape the errors of the whole, and what each rank sent in each phase."""
    shape = Shape(**sizes)
    fn, layout = attention_of(scheme, shape, link, options=options)
    ((qkv, do),) = draw_inputs(Task(dense_reach, shape, torch.device(device), 1))
    mine = [parallel.shard_of(x.detach(), layout, link.rank).requires_grad_() for x in qkv]
    o = fn(*mine)
    sent = link.sent.total()
    grads = torch.autograd.grad(o, mine, parallel.shard_of(do, layout, link.rank))
    parts, mine = [None] * link.ranks, [x.detach().cpu() for x in (o, *grads)]
    dist.all_gather_object(parts, (mine, sent, link.sent.total() - sent), group=link.group)
    whole = [parallel.whole_of(some, layout) for some in zip(*(part[0] for part in parts), strict=True)]
    reach = partial(dilated_reach, **options) if options else dense_reach
    variant = Variant(scheme, lambda *qkv, causal: Found.apply(*qkv, *whole), None, Phases(0, 0), reach=reach)
    row = compared(variant, shape, "cpu", 1) | {"ranks": link.ranks}
    sent = [{"rank": at, "forward_sent_bytes": a, "backward_sent_bytes": b} for at, (_, a, b) in enumerate(parts)]
    return [row | one for one in sent]


def rank_memory(link, device, sizes, kernel) -> list[Row]:
    """What the allocator saw on each rank; the shape is that of a rank."""
    shape, parts = Shape(**sizes), [None] * link.ranks
    layout = parallel.shards(link.ranks * shape.seq_len, link.ranks, True)
    fn = lambda *qkv, causal: parallel.ring_attention(*qkv, layout, link, causal=causal, kernel=kernel)  # noqa: E731
    for _ in range(2):  # the first makes the workspaces
        variant = Variant("ring", fn, None, Phases(0, 0))
        seen = account(variant, *shape.inputs(device), causal=shape.causal, backward=True)
    dist.all_gather_object(parts, seen, group=link.group)
    return [{**sizes, "kernel": kernel, "ranks": link.ranks, "rank": at} | one for at, one in enumerate(parts)]


def slowest_ms(fn, link, passes: int = 20, wait_ms: float = 2.0) -> float:
    """The median over passes of the slowest rank's time on its device's clock. They begin at once: each waits until the
    host has launched all of it, and then for the others."""
    token, marks = torch.zeros(1, device="cuda"), []
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    for turn in range(passes + 3):
        flush.zero_()
        torch.cuda._sleep(int(wait_ms * CYCLES_PER_MS))
        dist.all_reduce(token, group=link.group)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        marks += [(start, end)] if turn >= 3 else []
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) for start, end in marks], device="cuda")
    dist.all_reduce(times, dist.ReduceOp.MAX, group=link.group)
    return float(np.median(times.tolist()))


class Silent(parallel.Link):
    """A link on which nothing is sent and whatever lies in memory comes at once: what a scheme computes, alone."""

    def begin(self, what, name, give, take):
        """Nothing."""
        return lambda: take[1]

    def all_to_all(self, what, given, sizes):
        """Nothing."""
        return [given[0].new_empty(size) for size in sizes]


class Fused(torch.nn.Module):
    """PyTorch's fused attention by one of its kernels, as its context parallelism wants it: a module."""

    def __init__(self, kernel: str):
        super().__init__()
        names = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION"}
        self.backend = getattr(torch.nn.attention.SDPBackend, names[kernel])

    def forward(self, q, k, v, causal):
        """o."""
        with torch.nn.attention.sdpa_kernel(self.backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def context_parallel(shape: Shape, link, kernel: str, rotation: str):
    """PyTorch's own, `(q, k, v) -> o` of a rank, in zigzag where causal: its functional calls, which its context manager
    gave way to. rotation: "allgather" or "alltoall". Raises UserError without GPUs."""
    if dist.get_backend(link.group) != "nccl":
        raise UserError("PyTorch's context parallelism knows no kernel for the CPU: it needs GPUs")
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import _attention as theirs
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = DeviceMesh.from_group(link.group, "cuda")
    balancer = theirs._HeadTailLoadBalancer(shape.seq_len, link.ranks, "cuda") if shape.causal else None
    # called for what it also sets, for all calls that follow: whether rows are balanced
    theirs._context_parallel_shard(mesh, [torch.empty(shape.seq_len, device="cuda")], [0], balancer)
    theirs._enable_context_parallel_dispatcher()
    theirs.set_rotate_method(rotation)
    how = theirs._ContextParallel(2, theirs._ContextParallel.AttentionType.SDPA)
    return partial(parallelize_module(Fused(kernel), mesh, how), causal=shape.causal)


def exchanges(own, place: Place, link, backward: bool):
    """What a ring sends in its forward pass, or in both, and nothing else."""
    for _ in range(1 + backward):
        for _ in keys_and_values(own, place, link):
            pass
    for step in range(1, len(place.members) * backward):
        source, target = place.partners(step)
        found, home = (place.seen(*ends) or (0, 0) for ends in ((place.at, source), (target, place.at)))
        give, take = ([x[:, :, : seen[1]].clone() for x in own] for seen in (found, home))
        link.begin("gradients", 1, (place.members[source], give), (place.members[target], take))()


def shared_times(link, device, scheme, kernel, sizes) -> list[Row]:
    """A scheme at a total length in a forward pass and in both: its time, that of its kernels and merges alone, of a
    ring's exchanges alone, and of one GPU that has the whole length for itself."""
    shape, options = Shape(**sizes), SEGMENTS_AND_RATES if scheme == "dilated" else {}
    theirs = scheme.startswith("context_parallel")
    fn, layout = attention_of("ring" if theirs else scheme, shape, link, kernel, options)
    silent, _ = attention_of("ring" if theirs else scheme, shape, Silent(link.group), kernel, options)
    fn = context_parallel(shape, link, kernel, scheme.split()[1]) if theirs else fn
    local, place = replace(shape, seq_len=sum(map(len, layout[link.rank]))), Place.of(layout, link.rank, shape.causal)
    dense = {"segment_lengths": (shape.seq_len,), "dilation_rates": (1,)}
    whole = partial(dilated, **(options or dense), causal=shape.causal, kernel=kernel)

    def ms(call, of: Shape, backward: bool) -> float:
        inputs = of.inputs(device, link.rank)
        do = torch.randn_like(inputs[0])
        run_once = lambda: torch.autograd.grad(call(*inputs), inputs, do) if backward else call(*inputs)  # noqa: E731
        return slowest_ms(run_once, link)

    rows = []
    for backward in (False, True):
        found = {"ms": ms(fn, local, backward), "single_ms": ms(whole, shape, backward)}
        found |= {} if theirs else {"alone_ms": ms(silent, local, backward)}
        if scheme == "ring":
            own = [x.detach() for x in local.inputs(device)[1:]]
            found["exchange_ms"] = slowest_ms(partial(exchanges, own, place, link, backward), link)
        phase = "forward_backward" if backward else "forward"
        rows.append({"scheme": scheme, "kernel": kernel, **sizes, "ranks": link.ranks, "phase": phase, **found})
    return rows


def messages(link, device, nbytes) -> list[Row]:
    """A message of one size from rank 0 to 1, from 1 to 0, and both at once."""
    x, y = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))

    def ms(*senders) -> float:
        give, take = ([x] if link.rank in senders else []), ([y] if 1 - link.rank in senders else [])
        return slowest_ms(lambda: link.begin("message", 0, (1 - link.rank, give), (1 - link.rank, take))(), link)

    return [{"message_bytes": nbytes, "there_ms": ms(0), "back_ms": ms(1), "both_ways_ms": ms(0, 1)}]


def beside(link, device, kernel, sizes) -> list[Row]:
    """A kernel alone, an exchange of its keys and values alone, and the kernel while they are exchanged."""
    shape = Shape(**sizes)
    inputs = [x.detach() for x in shape.inputs(device)]
    fn = partial(dilated, segment_lengths=(shape.seq_len,), dilation_rates=(1,), causal=shape.causal, kernel=kernel)
    room = [torch.empty_like(x) for x in inputs[1:]]
    begin = partial(link.begin, "keys and values", 0, (1 - link.rank, inputs[1:]), (1 - link.rank, room))

    def together_ms():
        wait = begin()
        fn(*inputs)
        wait()

    calls = {"kernel_ms": lambda: fn(*inputs), "exchange_ms": lambda: begin()(), "together_ms": together_ms}
    return [{"kernel": kernel, **sizes, **{what: slowest_ms(call, link) for what, call in calls.items()}}]


if __name__ == "__main__":
    what, device, cases, path = sys.argv[1:]
    link, rows = parallel.connect(device, 120.0), []
    device = device if device == "cpu" else f"cuda:{torch.cuda.current_device()}"
    for case in json.loads(cases):
        link.sent.clear()
        rows += globals()[what](link, device, **case)
    if link.rank == 0:
        Path(path).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
