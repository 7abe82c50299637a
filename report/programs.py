"""Programs that the published reports measured, restated in a few lines and with the same tensors alive, to be run.

Tensors are `[B, H, N, D]`. Report 002's softmax and 004's `DilatedAttention` (its repository, see report.audit, commit
8b036b95) are read from text and code; autocast and the stack of blocks are what reports recommend in words."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnlib.core import DTYPES, PHASES, Shape
from attnlib.laws import LINEAR, ROWS, SCORES, SCORES32, Law, Variant, evaluate
from attnlib.memory.allocator import account
from attnlib.rows import shape_of
from attnlib.timing.clock import FEWEST, estimate, time_passes
from attnlib.timing.measure import fitting, statistics
from attnlib.timing.sweep import Job, point_name
from attnlib.variants.block import block_inputs, transformer_block
from attnlib.variants.naive import MASK, NAIVE, NAIVE_CUSTOM, scaled_scores
from report.dilated_tables import report_004
from report.tables import NO_FIGURE, digits

FORWARD_ONLY = ["batch", "heads", "seq_len", "head_dim", "forward_ms", "forward_ms_count", "forward_peak_bytes"]


def by_amax(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Report 002's softmax by hand. It differs from attnlib's `naive_custom` in one word: `amax` for `max().values`.
    The gradient of amax compares its input with its result, and so keeps the scores; that of max keeps positions."""
    scores = scaled_scores(q, k, causal)
    exp = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return exp / exp.sum(dim=-1, keepdim=True) @ v


_EACH = {"row maxima": ROWS, "row sums": ROWS, "mask": MASK}
_KEPT = {"scores": SCORES32, "exp": SCORES32, "weights": SCORES32, "output": LINEAR, **_EACH}
# chapter 2's ledger of naive_custom at that moment, with the scores in place of the positions
_DIVISION = {"scores": SCORES32, "exp, two gradients, three steps of the row sums": 6 * SCORES32, **_EACH}
_DIVISION |= {"output, upstream gradient, dv": 3 * LINEAR}
BY_AMAX_LAW = Law(_KEPT, {"weights @ v": _KEPT}, {"gradient of the division": _DIVISION})
BY_AMAX = replace(NAIVE_CUSTOM, name="by_amax", fn=by_amax, law=BY_AMAX_LAW, traffic=None)


def autocast(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, half: torch.dtype) -> Tensor:
    """`naive` on float32 inputs under autocast: products in the half type, the softmax in float32."""
    with torch.autocast(q.device.type, half):
        return NAIVE.fn(q, k, v, causal=causal)


def autocast_variant(half: str) -> Variant:
    """`autocast` as a Variant, for shapes in float32; it has no law."""
    return replace(
        NAIVE, name=f"naive_autocast_{half}", fn=partial(autocast, half=DTYPES[half]), law=None, traffic=None
    )


def stack(x: Tensor, *weights: Tensor, causal: bool = False, depth: int, recompute: bool) -> Tensor:
    """`depth` blocks with plain attention, one after the other, each with the same weights; with `recompute` only what
    enters a block is kept, and the block runs again when backward needs it."""
    block = partial(transformer_block, NAIVE.fn, causal=causal)
    for _ in range(depth):
        x = (
            checkpoint(block, x, *weights, use_reentrant=False, preserve_rng_state=False)
            if recompute
            else block(x, *weights)
        )
    return x


def stack_variant(depth: int, recompute: bool) -> Variant:
    """`stack` as a Variant; what it keeps is told by that of one block."""
    name = f"{depth} blocks{' recomputed' * recompute}"
    fn = partial(stack, depth=depth, recompute=recompute)
    return replace(NAIVE, name=name, fn=fn, inputs=block_inputs, inner=NAIVE, law=None, traffic=None, ledgered=False)


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
    """A forward pass without gradients, as 004 measured: its peak, above the inputs, and its time."""
    small = variant.inputs(replace(shape, batch=1), device)
    variant.fn(*small, causal=shape.causal)
    inputs = variant.inputs(shape, device)
    row = {"program": variant.name, **shape.columns()}  # no point of a sweep, which has a backward pass
    row |= {"forward_peak_bytes": account(variant, *inputs, causal=shape.causal, backward=False)["forward_peak_bytes"]}
    fn = partial(variant.fn, *inputs, causal=shape.causal)
    seconds, launch_ms = estimate(fn, device, budget_s)
    return row | statistics("forward", time_passes(fn, device, fitting(seconds, budget_s), launch_ms))


def forward_jobs(points: Sequence[tuple[Variant, Shape]], device: str, budget_s: float) -> list[Job]:
    """`forward_only` of each `(variant, shape)`, as jobs."""
    return [Job(point_name(*one), forward_only, (*one, device, budget_s)) for one in points]


def variant_004(segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> Variant:
    """`program_004` as a Variant of a forward pass, called by its branches."""
    config = {"segment_lengths": tuple(segment_lengths), "dilation_rates": tuple(dilation_rates)}
    name = "004 " + " ".join(f"{w}/{r}" for w, r in zip(*config.values(), strict=True))
    return replace(NAIVE, name=name, fn=partial(program_004, **config), law=None, traffic=None, ledgered=False)


def points_004(longest: int, dtype: str) -> list[tuple[Variant, Shape]]:
    """004's program at the points of its tables up to a length, each once."""
    found = {}
    for row in report_004().query("seq_len <= @longest").itertuples():
        one = variant_004(row.segment_lengths, row.dilation_rates)
        shape = Shape(row.batch, row.heads, row.seq_len, row.head_dim, dtype)
        found.setdefault((one.name, shape), (one, shape))
    return list(found.values())


def beside_program_004(rows: pd.DataFrame) -> pd.DataFrame:
    """Report 004's tables with the rows of its program joined to them, columns `_theirs` and `_ours`; `tensors` and
    `tensors_theirs`, the peak with the inputs in tensors of the size of Q, of which a published one has two bytes."""
    sized = [shape_of(row).input_bytes / 3 for row in rows.to_dict("records")]
    rows = rows.assign(tensors=rows["forward_peak_bytes"] / sized + 3)
    rows["kib_per_token"] = rows["tensors"] * sized / rows["batch"] / rows["seq_len"] / 1024
    tables = report_004()
    configs = tables[["segment_lengths", "dilation_rates"]].itertuples(index=False)
    tables = tables.assign(program=[variant_004(*config).name for config in configs])
    one = 2 * tables[["batch", "heads", "seq_len", "head_dim"]].prod(axis=1)
    tables["tensors_theirs"] = tables["memory_mib"] * 2**20 / one
    return tables.merge(rows, on=["program", "batch", "heads", "seq_len", "head_dim"], suffixes=("_theirs", "_ours"))


def table_001(beside: pd.DataFrame) -> pd.DataFrame:
    """Report 001's table: means, deviations and memory as measured, and in brackets as published."""
    sized = [Shape(row.batch, 1, row.seq_len, row.head_dim) for row in beside.itertuples()]
    inputs, matrix = ([evaluate(term, shape) for shape in sized] for term in (3 * LINEAR, SCORES))
    columns = {"d_model": beside["head_dim"], "seq_len": beside["seq_len"]}
    for phase in PHASES:
        measured = beside[[f"{phase}_ms_mean", f"{phase}_ms_std", f"{phase}_ms_count"]].to_numpy()
        here = [NO_FIGURE if few < FEWEST else f"{digits(mean)} ± {digits(off)}" for mean, off, few in measured]
        there = beside[[f"{phase}_ms_theirs", f"{phase}_ms_std_theirs"]].to_numpy()
        columns[f"{phase} ms"] = [f"{one} ({mean} ± {off})" for one, (mean, off) in zip(here, there, strict=True)]
    held = {"forward": beside["saved_bytes"] + inputs, "backward": beside["backward_peak_bytes"] + inputs}
    for title, nbytes, printed in (
        *((f"{phase} MB", held[phase], f"{phase}_memory_mb") for phase in PHASES),
        ("matrix MB", matrix, "attention_matrix_mb"),
    ):
        columns[title] = [f"{one / 1e6:.1f} ({other})" for one, other in zip(nbytes, beside[printed], strict=True)]
    return pd.DataFrame(columns)


def scaling_factor(megabytes: Sequence[float]) -> float:
    """How report 000 comes to its "memory scaling factor": the mean of the growth ratios of a column, over four."""
    ratios = [b / a for a, b in zip(megabytes, megabytes[1:], strict=False)]
    return math.fsum(ratios) / len(ratios) / 4


def zeros(inputs: Callable[..., tuple[Tensor, ...]], *where: Any) -> tuple[Tensor, ...]:
    """What `inputs(shape, device, seed)` makes, all zero."""
    return tuple(torch.zeros_like(x).requires_grad_() for x in inputs(*where))


def of_zeros(variant: Variant) -> Variant:
    """A variant whose inputs are all zero, called so."""
    return replace(variant, name=f"{variant.name} of zeros", inputs=partial(zeros, variant.inputs))
