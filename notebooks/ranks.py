"""Processes that share a sequence, started by torchrun, and what chapter 6 measures in them."""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

from attnlib.core import Machine, Shape, UserError, dense_reach
from attnlib.dilated.definition import dilated_reach
from attnlib.laws import Phases, Variant, evaluate
from attnlib.memory.allocator import account
from attnlib.parallel.layout import Place, shard_of, shards, whole_of
from attnlib.parallel.link import connect
from attnlib.parallel.ring import ring_attention
from attnlib.parallel.shared import dilated_attention, plan
from attnlib.rows import shape_of
from attnlib.timing.sweep import Job, Row
from notebooks.rank_laws import branches_sent, ring_sent, ulysses_sent
from notebooks.restated.ulysses import ulysses_attention
from report.accuracy import ERRORS, Task, compared, draw_inputs

PROJECT = Path(__file__).parent.parent
EXACT = [*ERRORS, "rank", "forward_sent_bytes", "backward_sent_bytes", "seq_len", "ranks"]
RANK_MEMORY = ["rank", "ranks", "saved_bytes", "forward_peak_bytes", "backward_peak_bytes", "seq_len"]
SCHEMES = {"ring": ring_attention, "ulysses": ulysses_attention, "dilated": dilated_attention}
PAPER_SMALL = ((16, 1), (32, 2), (64, 4), (128, 6), (256, 12))  # the paper's setting, scaled down
SEGMENTS_AND_RATES = {"segment_lengths": (2048, 4096, 8192, 16384, 32768), "dilation_rates": (1, 2, 4, 6, 12)}


def together(script, ranks: int, *arguments, timeout_s: float = 500.0, options=("--standalone",)):
    """Run a script in `ranks` processes by torchrun. Raises UserError, in one line, when one failed or they took too
    long; then all of them are ended."""
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
        errors = re.findall(r"^\[rank(\d+)\]: ([\w.]*(?:Error|Exception)\b.*)", said, re.M)
        errors = [text for rank, text in sorted(errors, key=lambda one: bool(root) and one[0] != root[1])]
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


def sent_by_law(row, branches=PAPER_SMALL) -> tuple[int, int]:
    """Bytes that the rank of a row sends in the forward and in the backward pass, by the law of its scheme."""
    shape, scheme = shape_of(row), row["variant"]
    layout = shards(shape.seq_len, row["ranks"], scheme != "dilated" and shape.causal)
    if scheme == "ulysses":
        law = ulysses_sent(layout, row["rank"])
    elif scheme == "ring":
        law = ring_sent(Place.of(layout, row["rank"], shape.causal))
    else:
        shared = plan(tuple(x[0] for x in layout), row["rank"], shape.heads, branches, "modulo", shape.causal)[1]
        law = branches_sent(shared)
    return tuple(sum(evaluate(nbytes, shape, Machine("cpu")) for nbytes in terms.values()) for terms in law.values())


def memory_sizes(count: int, dtype: str) -> list[dict]:
    """Random shapes of a rank, of an even number of rows."""
    pick = random.Random(6)
    sizes = [[pick.randint(1, most) for most in (2, 4, 300, 8)] for _ in range(count)]
    return [Shape(b, h, 8 + 2 * n, 8 * d, dtype, pick.random() < 0.5).columns() for b, h, n, d in sizes]


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
    layout = shards(shape.seq_len, link.ranks, scheme != "dilated" and shape.causal)
    how = {"layout": layout, "link": link, "causal": shape.causal, "kernel": kernel, **(options or {})}
    return partial(SCHEMES[scheme], **how), layout


def exact(link, device, scheme, sizes, options) -> list[Row]:
    """Of a scheme at a shape the errors of the whole, and what each rank sent in each phase."""
    shape = Shape(**sizes)
    fn, layout = attention_of(scheme, shape, link, options=options)
    ((qkv, do),) = draw_inputs(Task(dense_reach, shape, torch.device("cpu"), 1))  # the same on all devices
    *mine, do = (shard_of(x.detach(), layout, link.rank).to(device) for x in (*qkv, do))
    mine = [x.requires_grad_() for x in mine]
    o = fn(*mine)
    sent = link.sent.total()
    grads = torch.autograd.grad(o, mine, do)
    parts, mine = [None] * link.ranks, [x.detach().cpu() for x in (o, *grads)]
    dist.all_gather_object(parts, (mine, sent, link.sent.total() - sent), group=link.group)
    whole = [whole_of(some, layout) for some in zip(*(part[0] for part in parts), strict=True)]
    reach = partial(dilated_reach, **options) if options else dense_reach
    variant = Variant(scheme, lambda *qkv, causal: Found.apply(*qkv, *whole), None, Phases(0, 0), reach=reach)
    row = compared(variant, shape, "cpu", 1) | {"ranks": link.ranks}
    sent = [{"rank": at, "forward_sent_bytes": a, "backward_sent_bytes": b} for at, (_, a, b) in enumerate(parts)]
    return [row | one for one in sent]


def rank_memory(link, device, sizes, kernel) -> list[Row]:
    """What the allocator saw on each rank; the shape is that of a rank."""
    shape, parts = Shape(**sizes), [None] * link.ranks
    layout = shards(link.ranks * shape.seq_len, link.ranks, True)
    fn = lambda *qkv, causal: ring_attention(*qkv, layout, link, causal=causal, kernel=kernel)  # noqa: E731
    for _ in range(2):  # the first makes the workspaces
        variant = Variant("ring", fn, None, Phases(0, 0))
        seen = account(variant, *shape.inputs(device), causal=shape.causal, backward=True)
    dist.all_gather_object(parts, seen, group=link.group)
    return [{**sizes, "kernel": kernel, "ranks": link.ranks, "rank": at} | one for at, one in enumerate(parts)]


if __name__ == "__main__":
    what, device, cases, path = sys.argv[1:]
    function = globals().get(what) or getattr(import_module("notebooks.two_gpus"), what)
    link, rows = connect(device, 120.0), []
    device = device if device == "cpu" else f"cuda:{torch.cuda.current_device()}"
    for case in json.loads(cases):
        link.sent.clear()
        rows += function(link, device, **case)
    if link.rank == 0:
        Path(path).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
