"""What two GPUs take to share a sequence, for chapter 6: the link, each scheme, its kernels and its exchanges alone."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist

from attnlib.core import PHASES, Machine, Shape, UserError
from attnlib.dilated.attention import dilated, dilated_variant
from attnlib.laws import ACCOUNTS, evaluate, useful_flops
from attnlib.parallel.layout import Place
from attnlib.parallel.link import Link
from attnlib.parallel.ring import keys_and_values
from attnlib.rows import shape_of
from attnlib.timing.clock import CACHE_BYTES, CYCLES_PER_MS
from attnlib.timing.sweep import Row
from notebooks.ranks import SEGMENTS_AND_RATES, attention_of, sent_by_law
from report.tables import size

MESSAGES = ["message_bytes", "there_ms", "back_ms", "both_ways_ms"]
BESIDE = ["kernel_ms", "exchange_ms", "together_ms", "seq_len"]
SHARED_TIMES = ["seq_len", "ranks", "ms", "single_ms"]


def measured_rates(run) -> tuple[float, float]:
    """Operations per second of one GPU on the longest causal sequence measured, and bytes per second of the link; NaN
    where they were not measured."""
    if not (run.has("times") and run.path("times").exists()):
        return math.nan, math.nan
    times, link = (pd.read_csv(run.path(name)) for name in ("times", "link"))
    row = times[(times["scheme"] == "ring") & times["causal"] & (times["phase"] == "forward_backward")].iloc[-1]
    flops = sum(useful_flops(shape_of(row), phase) for phase in PHASES)
    best = link.iloc[-1]
    return flops / row["single_ms"] * 1e3, best["message_bytes"] / best["both_ways_ms"] * 1e3


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


class Silent(Link):
    """A link on which nothing is sent and whatever lies in memory comes at once: what a scheme computes, alone."""

    def begin(self, what, name, give, take):
        """Nothing."""
        return lambda: take[1]


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
    """PyTorch's own, `(q, k, v) -> o` of a rank, in zigzag where causal, by the functional calls to which its context
    manager gave way. rotation: "allgather" or "alltoall". Raises UserError without GPUs."""
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
        found |= {} if theirs or scheme == "ulysses" else {"alone_ms": ms(silent, local, backward)}
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


def kernel_and_exchange(link, device, kernel, sizes) -> list[Row]:
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


def million(run, parts: Mapping[int, Shape], fullest: Mapping[int, int], gpu: Machine) -> pd.DataFrame:
    """What 2²⁰ tokens need by scheme and number of GPUs, computed. parts: `{GPUs: what each holds}`; fullest: bytes of
    the fullest of them in a ring, beside its inputs."""
    (kernel_rate, link_rate), rows = measured_rates(run), []
    sparse = dilated_variant("dilated", *SEGMENTS_AND_RATES.values(), kernel="cudnn")
    for count, scheme in product(parts, ("ring", "dilated")):
        part = parts[count]
        held = max(sparse.law.bytes(a, part, gpu) for a in ACCOUNTS) if scheme == "dilated" else fullest[count]
        whole = {**part.columns(), "seq_len": 2**20, "variant": scheme, "ranks": count, "rank": 0}
        sends = sum(sent_by_law(whole, tuple(zip(*SEGMENTS_AND_RATES.values(), strict=True))))
        flops = [evaluate(f, part, gpu) for f in (sparse.flops.forward, sparse.flops.backward)]
        dense = [useful_flops(Shape(1, 16, 2**20, 128, "bfloat16", True), phase) / count for phase in PHASES]
        seconds = sum(flops if scheme == "dilated" else dense) / kernel_rate
        rows.append([scheme, count, size(held), size(sends), seconds, sends / link_rate])
    columns = ["scheme", "GPUs", "memory", "sent", "computing, s", "sending, s"]
    frame = pd.DataFrame(rows, columns=columns).dropna(axis=1, how="all")
    return frame.sort_values("scheme", ascending=False, kind="stable")
