"""The program that published report 004 measured, restated in a few lines, with the same tensors alive, and its costs.

Read from its repository (see notebooks.restated.audit, commit 8b036b95), `DilatedAttention`. Tensors are `[B, H, N, D]`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnlib.core import Machine, Shape
from attnlib.dilated.merging import merge, merge_plainly
from attnlib.laws import Variant
from attnlib.memory.allocator import observe
from attnlib.memory.ledger import Ledger
from attnlib.rows import SIZES, shape_of
from attnlib.timing.clock import FEWEST, alone, estimate, fitting, statistics, time_passes
from attnlib.timing.sweep import Job, point_name
from attnlib.variants.naive import NAIVE
from notebooks.restated.dilated_tables import report_004

PEAKS = ["first_peak_bytes", "peak_bytes"]
FORWARD_ONLY = [*SIZES[:4], "forward_ms", "forward_ms_count", *PEAKS]
JOINS = {"own_ms": merge, "plain_ms": merge_plainly}


@torch.no_grad()
def program_004(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
    segment_lengths: Sequence[int], dilation_rates: Sequence[int],
) -> Tensor:  # fmt: skip
    """The forward pass that 004 measured: each branch has a share of the heads, which are copied before rows are taken
    from the copies; names of one branch live on until the next branch takes them over."""
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    (batch, seq_len, heads, width), count = rows[0].shape, len(segment_lengths)
    out, last = q.new_zeros(batch, seq_len, heads, width), 0
    copies, cut, kept, flat = ([q] * 3 for _ in range(4))
    for index, (segment, rate) in enumerate(zip(segment_lengths, dilation_rates, strict=True)):
        first, last = last, last + heads // count + (index < heads % count)
        for at, x in enumerate(rows):
            copies[at] = x[:, :, first:last].contiguous()
        for at, x in enumerate(copies):
            cut[at] = x.view(batch, -1, segment, last - first, width)
        at_rows = torch.arange(index % rate, segment, rate, device=q.device)
        for at, x in enumerate(cut):
            kept[at] = x[:, :, at_rows] if rate > 1 else x
        for at, x in enumerate(kept):
            flat[at] = x.flatten(0, 1).transpose(1, 2)
        o = F.scaled_dot_product_attention(*flat, is_causal=causal).transpose(1, 2).reshape(kept[0].shape)
        part = out[:, :, first:last].view(batch, -1, segment, last - first, width)
        if rate > 1:
            part[:, :, at_rows] = part[:, :, at_rows] + o
        else:
            part = part + o
        out[:, :, first:last] = part.view(batch, seq_len, last - first, width)
    out = out / count
    return out.transpose(1, 2)


def forward_only(variant: Variant, shape: Shape, device: str, budget_s: float) -> dict[str, Any]:
    """A forward pass without gradients, as 004 measured: its time, and its peak above the inputs, in a GPU's blocks,
    for a first pass, and for one that follows while the output of the pass before is still held."""
    small = variant.inputs(replace(shape, batch=1), device)
    variant.fn(*small, causal=shape.causal)
    del small
    torch.cuda.empty_cache()  # in which blocks tensors come to lie depends on those that are there
    inputs, held = variant.inputs(shape, device), list[Tensor]()
    fn, row = partial(variant.fn, *inputs, causal=shape.causal), {"program": variant.name, **shape.columns()}
    for column in PEAKS:
        seen = observe(variant, *inputs, causal=shape.causal, backward=False)
        row[column] = (seen.allocated or seen.requested)["forward_peak"] + sum(x.nbytes for x in held)
        held = [fn()]
    seconds, launch_ms = estimate(fn, device, budget_s)
    return row | statistics("forward", time_passes(fn, device, max(FEWEST, fitting(seconds, budget_s)), launch_ms))


def forward_jobs(points: Sequence[tuple[Variant, Shape]], device: str, budget_s: float) -> list[Job]:
    """`forward_only` of each `(variant, shape)`, as jobs."""
    return [Job(point_name(*one), forward_only, (*one, device, budget_s)) for one in points]


def variant_004(segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> Variant:
    """`program_004` as a Variant of a forward pass, called by its branches."""
    config = {"segment_lengths": tuple(segment_lengths), "dilation_rates": tuple(dilation_rates)}
    name = "004 " + " ".join(f"{w}/{r}" for w, r in zip(*config.values(), strict=True))
    return replace(NAIVE, name=name, fn=partial(program_004, **config), law=None, traffic=None, ledgered=False)


def standard(n: int) -> Variant:
    """The program with the segments that 004 calls standard."""
    return variant_004((n // 4, n // 2), (1, 2))


def extreme(n: int) -> Variant:
    """The program with 004's extreme dilation."""
    return variant_004((n // 16, n // 8, n // 4, n // 2), (1, 4, 16, 64))


def operations_004(segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> float:
    """What eight heads multiply for each token, up to a factor: each branch has a share of them, the first the odd."""
    count = len(segment_lengths)
    branches = enumerate(zip(segment_lengths, dilation_rates, strict=True))
    return sum(w / r**2 * (8 // count + (at < 8 % count)) for at, (w, r) in branches)


def unfused(fn: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """A program whose fused call is PyTorch's plain one, which writes the scores."""
    with sdpa_kernel(SDPBackend.MATH):
        return fn(q, k, v, causal=causal)


def work_004(variant: Variant, shape: Shape, machine: Machine) -> dict[str, int]:
    """What a forward pass does, from its ledger on tensors without data: operations that start a kernel, floating-point
    operations, and bytes that the former read and write, a fused call its operands alone."""
    with FakeTensorMode():
        inputs = shape.inputs("cpu")
        with Ledger(machine) as book:
            variant.fn(*inputs)
    sums = {what: sum(row[what] for row in book.rows) for what in ("flops", "traffic_bytes")}
    return {"started": len(book.rows), **sums}


def pooled(variant: Variant, shape: Shape, device: str, passes: int) -> dict[str, Any]:
    """Milliseconds of a forward pass on the user's clock, with the pool of the one before, and with an emptied one."""
    fn = partial(variant.fn, *variant.inputs(shape, device), causal=shape.causal)
    times = {"pooled_ms": fn, "anew_ms": lambda: (torch.cuda.empty_cache(), fn())}
    return shape.columns() | {name: median(alone(one, device, passes)) for name, one in times.items()}


def joined(shape: Shape, device: str, passes: int) -> dict[str, Any]:
    """Milliseconds on the user's clock of joining two parts of attention, by attnlib's kernel and by operations."""
    o, part, _ = (x.detach() for x in shape.inputs(device))
    rows = o, torch.randn(o.shape[:3], device=device), part, torch.randn(o.shape[:3], device=device)
    return shape.columns() | {name: median(alone(partial(join, *rows), device, passes)) for name, join in JOINS.items()}


def beside_program_004(rows: pd.DataFrame) -> pd.DataFrame:
    """Report 004's tables with the rows of its program joined to them, columns `_theirs` and `_ours`; `tensors` and
    `tensors_theirs`, the peak with the inputs in tensors of the size of Q, of which a published one has two bytes. Two
    of its tables are of passes that follow others, whose output is held."""
    configs = report_004()[["segment_lengths", "dilation_rates"]].itertuples(index=False)
    tables = report_004().assign(program=[variant_004(*config).name for config in configs])
    both = tables.merge(rows, on=["program", *SIZES[:4]], suffixes=("_theirs", "_ours"))
    sized = [shape_of(row).input_bytes for row in both.assign(dtype=both["dtype_ours"]).to_dict("records")]
    held = both["peak_bytes"].where(both["table"].isin(["quick", "segments"]), both["first_peak_bytes"]) + sized
    both["tensors_theirs"] = both["memory_mib"] * 2**20 / both[[*SIZES[:4]]].prod(axis=1) / 2
    return both.assign(tensors=3 * held / sized, kib_per_token=held / both["batch"] / both["seq_len"] / 1024)
