"""Programs that the published reports measured, restated in a few lines and with the same tensors alive, to be run.

Tensors are `[B, H, N, D]`. Report 002's softmax is read from its text, autocast and the stack of blocks from advice."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from pandas.io.formats.style import Styler
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnlib.core import DTYPES, PHASES, Shape
from attnlib.laws import LINEAR, ROWS, SCORES, SCORES32, Law, Variant, evaluate
from attnlib.timing.clock import FEWEST
from attnlib.variants.naive import MASK, NAIVE, NAIVE_CUSTOM, scaled_scores
from notebooks.block import block_inputs, transformer_block
from report.stored import published_rows
from report.tables import NO_FIGURE, digits, table


def by_amax(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Report 002's softmax by hand. It differs from attnlib's `naive_custom` in one word: `amax` for `max().values`.
    The gradient of amax compares its input with its result, and so keeps the scores; that of max keeps positions."""
    scores = scaled_scores(q, k, causal)
    exp = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return exp / exp.sum(dim=-1, keepdim=True) @ v


_EACH = {"row maxima": ROWS, "row sums": ROWS, "mask": MASK}
_KEPT = {"scores": SCORES32, "exp": SCORES32, "weights": SCORES32, "output": LINEAR, **_EACH}
# chapter 2's ledger of naive_custom at that moment, with the scores in place of the positions
_DIVISION = {"scores": SCORES32, "exp, a gradient, four steps of the row sums": 6 * SCORES32, **_EACH}
_DIVISION |= {"output, upstream gradient, dv": 3 * LINEAR}
BY_AMAX_LAW = Law(_KEPT, {"weights @ v": _KEPT}, {"gradient of the division": _DIVISION})
BY_AMAX = replace(NAIVE_CUSTOM, name="by_amax", fn=by_amax, law=BY_AMAX_LAW, traffic=None)


def autocast(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, half: torch.dtype) -> Tensor:
    """`naive` on float32 inputs under autocast: products in the half type, the softmax in float32."""
    with torch.autocast(q.device.type, half):
        return NAIVE.fn(q, k, v, causal=causal)


def autocast_variant(half: str) -> Variant:
    """`autocast` as a Variant, for shapes in float32; it has no law."""
    fn = partial(autocast, half=DTYPES[half])
    return replace(NAIVE, name=f"naive_autocast_{half}", fn=fn, law=None, traffic=None)


def stack(x: Tensor, *weights: Tensor, causal: bool = False, depth: int, recompute: bool) -> Tensor:
    """`depth` blocks with plain attention, one after the other, each with the same weights; with `recompute` only what
    enters a block is kept, and the block runs again when backward needs it."""
    block = partial(transformer_block, NAIVE.fn, causal=causal)
    if recompute:
        block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    for _ in range(depth):
        x = block(x, *weights)
    return x


def stack_variant(depth: int, recompute: bool) -> Variant:
    """`stack` as a Variant; what it keeps is told by that of one block."""
    name = f"{depth} blocks{' recomputed' * recompute}"
    fn = partial(stack, depth=depth, recompute=recompute)
    return replace(NAIVE, name=name, fn=fn, inputs=block_inputs, inner=NAIVE, law=None, traffic=None, ledgered=False)


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
    held = {"forward MB": beside["saved_bytes"] + inputs, "backward MB": beside["backward_peak_bytes"] + inputs}
    printed = [f"{phase}_memory_mb" for phase in PHASES] + ["attention_matrix_mb"]
    for (title, nbytes), column in zip((held | {"matrix MB": matrix}).items(), printed, strict=True):
        columns[title] = [f"{one / 1e6:.1f} ({other})" for one, other in zip(nbytes, beside[column], strict=True)]
    return pd.DataFrame(columns)


def grid_table(rows: pd.DataFrame) -> Styler:
    """The points of reports 000 and 002 that one of `rows` has: what 000's program and 002's took, there and here."""

    def pair(row: pd.Series) -> str:
        if row["status"] != "ok":
            return str(row["status"])
        few = min(row.get(f"{phase}_ms_count", FEWEST) for phase in PHASES) < FEWEST
        told = " / ".join(digits(row[f"{phase}_ms"]) for phase in PHASES)
        return f"({told})" if few else told

    keys, columns = ["head_dim", "seq_len"], {}
    for report, program in (("000_gtx1080", "naive_custom"), ("002_a800", "by_amax")):
        here = rows[rows["variant"] == program]
        for whose, those in ((report[:3], published_rows(f"{report}_naive_sweep")), ("here", here)):
            columns[f"{program}, {whose}"] = those.set_index(keys).apply(pair, axis=1)
    frame = pd.DataFrame(columns)[lambda every: every.filter(like="here").notna().any(axis=1)].fillna(NO_FIGURE)
    return table(frame.reset_index().rename(columns={"head_dim": "d_model"}).sort_values(["d_model", "seq_len"]))


def stack_table(depths: Iterable[int], held: Mapping[tuple[int, bool], pd.Series]) -> Styler:
    """Memory and time of stacks by depth, everything kept and with recomputation, of the rows of `(depth, again)`."""
    lines = []
    for depth in depths:
        pair, line = [held.get((depth, again)) for again in (False, True)], {"blocks": str(depth)}
        for title, column, unit in (("saved", "saved", 2**20), ("peak", "backward_peak", 2**20), ("ms", "", 1)):
            for again, one in zip(("", ", recomputed"), pair, strict=True):
                known = one is not None and (column or one["forward_backward_ms_count"] >= FEWEST)
                value = one[f"{column}_bytes" if column else "forward_backward_ms"] / unit if known else math.nan
                line[f"{title}{again}"] = digits(value)
        lines.append(line)
    return table(pd.DataFrame(lines))


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
