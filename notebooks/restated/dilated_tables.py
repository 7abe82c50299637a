"""What notebook 04 asks for and makes of the answers: the published points, their tables, and who sees whom."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from attnlib.core import Device, Shape
from attnlib.laws import Variant, evaluate
from attnlib.rows import POINT, SIZES
from report.anatomy import short_name
from report.stored import published_rows
from report.tables import NO_FIGURE, digits, mask, table

CONFIG = ["segment_lengths", "dilation_rates"]


def label(segment_lengths: Iterable[int], dilation_rates: Iterable[int]) -> str:
    """A configuration in few characters: "w 256, 512 · r 1, 2"."""
    return f"w {', '.join(map(str, segment_lengths))} · r {', '.join(map(str, dilation_rates))}"


def report_004() -> pd.DataFrame:
    """The tables of published report 004, its configurations as numbers and, as `variant`, by their `label`."""
    rows = published_rows("004_gtx1080_dilated")
    rows = rows.assign(**{one: [tuple(map(int, text.split())) for text in rows[one]] for one in CONFIG})
    return rows.assign(variant=[label(*config) for config in rows[CONFIG].itertuples(index=False)])


def published_points(dtype: str, longest: int, make: Callable[..., Variant]) -> list[tuple[Variant, Shape]]:
    """Report 004's points up to a length, in its order, each once, with `make(segment_lengths, dilation_rates)`."""
    rows = report_004().query("seq_len <= @longest").drop_duplicates(["variant", *SIZES[:4]])
    shapes = [Shape(*sizes, dtype) for sizes in rows[[*SIZES[:4]]].itertuples(index=False)]
    return [(make(*config), shape) for config, shape in zip(rows[CONFIG].to_numpy(), shapes, strict=True)]


def growths(rows: pd.DataFrame, column: str, axis: str) -> list[float]:
    """The local exponents of `column` in `axis`, from each of the sorted rows to the next."""
    return [float(one) for one in np.diff(np.log(rows[column])) / np.diff(np.log(rows[axis]))]


def along(both: pd.DataFrame, name: str, axis: str):
    """004's scaling tables, along one axis: times, the factor to the first, and the local exponent in that axis."""
    rows = both[both["table"] == name].sort_values(axis)
    frame = pd.DataFrame({"N" if axis == "seq_len" else axis: rows[axis]})
    for which, after in (("ours", ""), ("theirs", ", 004")):
        ms = rows[f"forward_ms_{which}"].tolist()
        slopes = [f"{one:.2f}" for one in growths(rows, f"forward_ms_{which}", axis)]
        frame[f"ms{after}"] = [digits(t) for t in ms]
        frame[f"factor{after}"] = [f"{t / ms[0]:.1f}" for t in ms]
        frame[f"exponent{after}"] = [NO_FIGURE, *slopes]
    return table(frame.assign(**{"KiB per token": rows["kib_per_token"].map(digits)}))


def with_counts(rows: pd.DataFrame, points: Sequence[tuple[Variant, Shape]], machine: Device = "cpu") -> pd.DataFrame:
    """The rows of those points that were measured, with `operations` and `kib_per_token` (forward, inputs included)."""
    asked = pd.DataFrame([{"variant": variant.name, **shape.columns()} for variant, shape in points])
    operations = [evaluate(variant.flops.forward, shape, machine) for variant, shape in points]
    rows = rows.merge(asked.assign(operations=operations, held=[shape.input_bytes for _, shape in points]), on=[*POINT])
    held = rows["forward_peak_bytes"] + rows.pop("held")
    return rows.assign(kib_per_token=held / rows["batch"] / rows["seq_len"] / 1024)


def gains(rows: pd.DataFrame, bases: Mapping[str, str]) -> pd.DataFrame:
    """`seq_len, variant, ms`, of both passes, or the status where there is none; `gain`, the speed-up over the variant
    that `bases` has for it, at that length; `promised`, by the operations; `kept`, what was reached of that."""
    rows = rows.sort_values("seq_len", kind="stable").reset_index(drop=True)
    known = rows.set_index(["variant", "seq_len"])[["forward_backward_ms", "operations"]]
    dense = known.reindex(zip(rows["variant"].map(bases), rows["seq_len"], strict=True)).reset_index(drop=True)
    gain = dense["forward_backward_ms"] / rows["forward_backward_ms"]
    promised = dense["operations"] / rows["operations"]
    ms = rows["forward_backward_ms"].astype(object).where(rows["forward_backward_ms"].notna(), rows["status"])
    return rows[["seq_len", "variant"]].assign(ms=ms, gain=gain, promised=promised, kept=gain / promised)


def shares(heats: pd.DataFrame, kernels: Mapping[str, str], baseline: str) -> pd.DataFrame:
    """For each race and kernel: the rate of `dilated_<kernel>`; of the kernel dense at the longest and at the shortest
    length, `dense_tflop_s` and `short_tflop_s`; its share of each; `gain`, how many times as fast as the baseline."""
    found = []
    for names, group in heats.groupby(["head_dim", "causal", "phase"], sort=False):
        copying = group[group["variant"] == baseline].iloc[0]
        for kernel, dense in kernels.items():
            for mine in group[group["variant"] == f"dilated_{kernel}"].itertuples():
                rates = group[group["variant"] == dense].sort_values("seq_len")["tflop_s"]
                row = dict(zip(("head_dim", "causal", "phase"), names, strict=True)) | {"kernel": kernel}
                row |= {"tflop_s": mine.tflop_s, "dense_tflop_s": rates.iloc[-1], "short_tflop_s": rates.iloc[0]}
                row |= {"share": mine.tflop_s / rates.iloc[-1], "short_share": mine.tflop_s / rates.iloc[0]}
                found.append(row | {"gain": copying["ms"] / mine.ms, "baseline_tflop_s": copying["tflop_s"]})
    return pd.DataFrame(found)


def rates(found: pd.DataFrame):
    """A table of `shares`: rates, in brackets how the dilated one compares."""
    columns = {
        "same kernel, dense": ("dense_tflop_s", "share", "{:.0%}"),
        "dense, short rows": ("short_tflop_s", "short_share", "{:.0%}"),
        "torchscale": ("baseline_tflop_s", "gain", "{:.1f}×"),
    }
    cells = {
        title: [f"{digits(rate)}\N{NO-BREAK SPACE}({form.format(x)})" for rate, x in found[[one, other]].to_numpy()]
        for title, (one, other, form) in columns.items()
    }
    rows = found.assign(mask=mask(found), dilated=found["tflop_s"].map(digits), **cells)
    names = [name for name in ("mask", "phase", "kernel") if rows[name].nunique() > 1 or name == "phase"]
    return table(rows.rename(columns={"head_dim": "D"})[["D", *names, "dilated", *columns]])


def by_kind(profiled: pd.DataFrame, on_cpu: bool) -> pd.DataFrame:
    """Milliseconds of each profiled pass, `variant, seq_len, phase`: of the `kernel underneath`, of what `packs` and
    `joins` (and adds), of `other` work, and of `gaps`, the pass less the sum of its kernels."""
    joining = dict.fromkeys(("merge_tiles", "into_tiles", "join_rows", "total_rows"), "joins") | {"pack_rows": "packs"}
    kinds = profiled["kernel"].map(short_name).map(joining)
    flash = profiled["kernel"].str.contains("scaled_dot_product|flash|fmha|cudnn|dot_do_o|convert_dq")
    kinds = kinds.mask(kinds.isna() & flash, "kernel underneath")
    if on_cpu:
        merging = ["lerp_", "logaddexp", "sigmoid", "sub", "add_", "copy_", "to"]
        kinds = kinds.where(~profiled["op"].isin(merging), "joins")
    passes = ["variant", "seq_len", "phase"]
    spent = profiled.assign(kind=kinds.fillna("other")).groupby([*passes, "kind"], sort=False)["ms"].sum()
    spent = spent.unstack(fill_value=0.0)
    whole = profiled.groupby(passes)["pass_ms"].first()
    return spent.assign(gaps=(whole - spent.sum(axis=1)).clip(lower=0))


def distances(seen: torch.Tensor) -> tuple[list[int], list[float]]:
    """For `[H, N, N]` or `[N, N]`: distances 1, 2, 4, …, and the share of pairs seen from there to twice as far."""
    seen = (seen > 0).double().reshape(-1, *seen.shape[-2:]).mean(0)
    n = seen.shape[-1]
    sums = [float(seen.diagonal(d).sum() + seen.diagonal(-d).sum()) for d in range(1, n)]
    starts = [2**k for k in range(int(math.log2(n - 1)) + 1)]
    ranges = [range(start, min(2 * start, n)) for start in starts]
    return starts, [sum(sums[d - 1] for d in one) / sum(2 * (n - d) for d in one) for one in ranges]
