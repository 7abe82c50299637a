"""What notebook 04 asks for and makes of the answers: the published points, their tables, and who sees whom."""

import math

import pandas as pd
import torch

from attnlib import dilated
from attnlib.core import AttnError, Shape, Variant
from attnlib.crossover import work
from attnlib.flash_tables import mask
from attnlib.measure import POINT
from attnlib.sparse import BLOCK
from attnlib.stored import published
from attnlib.tables import NO_FIGURE, digits, size, table

PUBLISHED = "004_gtx1080_dilated"
FIGURES = [
    "seq_len",
    "forward_ms",
    "backward_ms",
    "forward_backward_ms",
    "saved_bytes",
    "forward_peak_bytes",
    "backward_peak_bytes",
]


def lists(text: str) -> tuple[int, ...]:
    """ "1 2 4" as numbers."""
    return tuple(int(word) for word in text.split())


def label(segment_lengths, dilation_rates) -> str:
    """A configuration in few characters: "w 256, 512 · r 1, 2"."""
    return f"w {', '.join(map(str, segment_lengths))} · r {', '.join(map(str, dilation_rates))}"


def published_points(dtype: str, longest: int, kernel: str) -> list[tuple[Variant, Shape]]:
    """The points of published report 004 up to a length, in its order, each once: dilated attention over a kernel."""
    rows = published(PUBLISHED)
    rows = rows[rows["seq_len"] <= longest]
    found = {}
    for row in rows.itertuples():
        config = lists(row.segment_lengths), lists(row.dilation_rates)
        shape = Shape(row.batch, row.heads, row.seq_len, row.head_dim, dtype)
        found[(*config, shape)] = (dilated.variant(label(*config), *config, kernel=kernel), shape)
    return list(found.values())


def beside_published(rows: pd.DataFrame) -> pd.DataFrame:
    """Report 004's tables with the rows measured here joined to them: columns `_theirs` and `_ours`."""
    theirs = published(PUBLISHED)
    configs = zip(theirs["segment_lengths"], theirs["dilation_rates"], strict=True)
    theirs["variant"] = [label(lists(w), lists(r)) for w, r in configs]
    keys = ["variant", "batch", "heads", "seq_len", "head_dim"]
    return theirs.merge(rows, on=keys, suffixes=("_theirs", "_ours"))


def quick(both: pd.DataFrame):
    """004's first table: time, peak memory, tokens per second, KiB per token."""
    rows, found = both[both["table"] == "quick"], []
    for row in rows.itertuples():
        tokens = row.batch * row.seq_len
        names = {"seq_len": row.seq_len, "batch": row.batch}
        names |= {"ms": digits(row.forward_ms_ours), "ms, 004": digits(row.forward_ms_theirs)}
        names |= {"MiB": digits(row.kib_per_token * tokens / 1024), "MiB, 004": digits(row.memory_mib)}
        names |= {"KiB per token": digits(row.kib_per_token)}
        names |= {"tokens per s": f"{1e3 * tokens / row.forward_ms_ours:,.0f}"}
        found.append(names | {"tokens per s, 004": f"{1e3 * tokens / row.forward_ms_theirs:,.0f}"})
    return table(pd.DataFrame(found))


def along(both: pd.DataFrame, name: str, axis: str):
    """004's scaling tables, along one axis: times, the factor to the first, and the local exponent in that axis."""
    rows, found = both[both["table"] == name].sort_values(axis), []
    for which in ("ours", "theirs"):
        values = rows[f"forward_ms_{which}"].tolist()
        sizes = rows[axis].tolist()
        slopes = [NO_FIGURE]
        for at in range(1, len(sizes)):
            slopes.append(f"{math.log(values[at] / values[at - 1]) / math.log(sizes[at] / sizes[at - 1]):.2f}")
        found.append(
            {"ms": [digits(x) for x in values], "factor": [f"{x / values[0]:.1f}" for x in values], "exponent": slopes}
        )
    frame = pd.DataFrame({axis: rows[axis]})
    for which, columns in zip(("", ", 004"), found, strict=True):
        for column, cells in columns.items():
            frame[f"{column}{which}"] = cells
    return table(frame.assign(**{"KiB per token": rows["kib_per_token"].map(digits)}))


def segments(both: pd.DataFrame):
    """004's three configurations: time beside operations, as multiples of the first."""
    rows, found = both[both["table"] == "segments"], []
    first = rows.iloc[0]
    for row in rows.itertuples():
        found.append(
            {
                "configuration": row.variant,
                "batch": row.batch,
                "seq_len": row.seq_len,
                "ms": digits(row.forward_ms_ours),
                "operations": f"{row.operations / first['operations']:.2f}×",
                "time": f"{row.forward_ms_ours / first['forward_ms_ours']:.2f}×",
                "time, 004": f"{row.forward_ms_theirs / first['forward_ms_theirs']:.2f}×",
            }
        )
    return table(pd.DataFrame(found))


def with_counts(rows: pd.DataFrame, points: list[tuple[Variant, Shape]], kind: str) -> pd.DataFrame:
    """Rows measured at `points`, in their order, with `operations` and `kib_per_token` (forward, inputs included), and
    the laws' bytes on a device of that `kind`. Raises AttnError where they are others."""
    found = rows.reset_index(drop=True)
    asked = [[variant.name, *shape.columns().values()] for variant, shape in points]
    if found[POINT].to_numpy().tolist() != asked:
        raise AttnError("the rows are not those of the points asked for, in their order: measure again")
    found["operations"] = [work(variant, shape, "forward") for variant, shape in points]
    held = found["forward_peak_bytes"] + [shape.input_bytes for _, shape in points]
    found["kib_per_token"] = held / found["batch"] / found["seq_len"] / 1024
    for account in ("saved", "forward_peak", "backward_peak"):
        laws = [v.law.bytes(account, s, kind) if v.law else math.nan for v, s in points]
        found[f"{account}_law_bytes"] = laws
    return found


def bytes_per_token(rows: pd.DataFrame):
    """What a forward pass saves and, behind the stroke, the most that a backward pass holds, per token."""
    rows = rows[rows["status"] == "ok"]
    both = zip(rows["saved_bytes"], rows["backward_peak_bytes"], rows["seq_len"], strict=True)
    rows = rows.assign(cell=[f"{digits(saved / n)} / {digits(peak / n)}" for saved, peak, n in both])
    return table(rows.pivot(index="seq_len", columns="variant", values="cell").reset_index().rename_axis(columns=None))


def spread(rows: pd.DataFrame, column: str) -> float:
    """The largest over the smallest `column` per token, of the variant where that is most."""
    per_token = (rows[column] / rows["seq_len"]).groupby(rows["variant"])
    return float((per_token.max() / per_token.min()).max())


def lengths(rows: pd.DataFrame):
    """Time and memory per token by length."""
    found = []
    for row in rows.itertuples():
        peak = row.forward_peak_bytes if math.isnan(row.backward_peak_bytes) else row.backward_peak_bytes
        names = {"N": f"{row.seq_len:,}", "status": f"{row.status} {row.phase}".strip()}
        names |= {"forward, ns per token": digits(row.forward_ns), "and backward": row.both_ns}
        names |= {"saved, bytes per token": digits(row.saved_bytes / row.seq_len)}
        found.append(names | {"peak, bytes per token": digits(peak / row.seq_len), "peak": size(peak)})
    return table(pd.DataFrame(found), {"and backward": lambda x: NO_FIGURE if math.isnan(x) else digits(x)})


def gains(rows: pd.DataFrame, base: str) -> pd.DataFrame:
    """`seq_len, variant, ms`, forward and backward; `gain`, the speed-up over `base` at that length; `promised`, by the
    operations; `kept`, what was reached of that. Where a point has no time, its status stands for `ms`."""
    found = []
    for n, group in rows.groupby("seq_len"):
        dense = group.set_index("variant").loc[base]
        for row in group.itertuples():
            gain = dense["forward_backward_ms"] / row.forward_backward_ms
            promised = dense["operations"] / row.operations
            ms = row.status if math.isnan(row.forward_backward_ms) else row.forward_backward_ms
            figures = {"ms": ms, "gain": gain, "promised": promised, "kept": gain / promised}
            found.append({"seq_len": n, "variant": row.variant} | figures)
    return pd.DataFrame(found)


def remedies(gained: pd.DataFrame):
    """The rows of `gains` as a table."""
    shown = gained.assign(ms=[ms if isinstance(ms, str) else digits(ms) for ms in gained["ms"]])
    for column, form in {"gain": "{:.2f}×", "promised": "{:.2f}×", "kept": "{:.0%}"}.items():
        shown[column] = ["" if math.isnan(x) else form.format(x) for x in gained[column]]
    return table(shown.rename(columns={"gain": "faster", "kept": "kept of the promise"}))


def between(cell: pd.DataFrame) -> str:
    """The lengths that the runs of one crossover found, rounded: "7,700 to 9,200", or one if they agree."""
    found = sorted(cell["seq_len"])
    ends = [f"{float(f'{n:.2g}'):,.0f}" if math.isfinite(n) else "beyond those tried" for n in (found[0], found[-1])]
    return " to ".join(dict.fromkeys(ends))


def window_like(seen: torch.Tensor) -> torch.Tensor:
    """`[N, N]`: a sliding window in which a query sees about as many keys as it does, on average, in `seen`."""
    n, keys = seen.shape[-1], round((seen > 0).double().sum(-1).mean().item())
    at = torch.arange(n)
    return ((at[:, None] - at).abs() <= keys // 2).double()


def shares(heats: pd.DataFrame, kernels: dict[str, str], baseline: str) -> pd.DataFrame:
    """For each race and kernel: the rate of `dilated_<kernel>`; of the same kernel dense at the longest and at the
    shortest length raced, `dense_tflop_s` and `short_tflop_s`; its `share` of each; and `gain`, how many times as fast
    as the baseline it is."""
    found = []
    for names, group in heats.groupby(["head_dim", "causal", "phase"], sort=False):
        copying = group[group["variant"] == baseline].iloc[0]
        for kernel, dense in kernels.items():
            mine = group[group["variant"] == f"dilated_{kernel}"]
            if mine.empty:
                continue
            rates = group[group["variant"] == dense].sort_values("seq_len")["tflop_s"]
            row = dict(zip(("head_dim", "causal", "phase"), names, strict=True)) | {"kernel": kernel}
            row |= {"tflop_s": mine["tflop_s"].iloc[0], "dense_tflop_s": rates.iloc[-1], "short_tflop_s": rates.iloc[0]}
            row |= {"gain": copying["ms"] / mine["ms"].iloc[0], "baseline_tflop_s": copying["tflop_s"]}
            found.append(row)
    frame = pd.DataFrame(found)
    return frame.assign(
        share=frame["tflop_s"] / frame["dense_tflop_s"], short_share=frame["tflop_s"] / frame["short_tflop_s"]
    )


def span(values) -> str:
    """The smallest and the largest of some shares: "80% to 96%", or one if they agree."""
    return " to ".join(dict.fromkeys(f"{value:.0%}" for value in (min(values), max(values))))


def raced(found: pd.DataFrame):
    """`shares` as a table."""
    rows = found.assign(mask=mask(found), dilated=found["tflop_s"].map(digits))
    for title, rate, share in (
        ("dense", "dense_tflop_s", "share"),
        ("dense, short rows", "short_tflop_s", "short_share"),
    ):
        rows[title] = [f"{digits(r)}\N{NO-BREAK SPACE}({s:.0%})" for r, s in zip(rows[rate], rows[share], strict=True)]
    rates = zip(rows["baseline_tflop_s"], rows["gain"], strict=True)
    rows["torchscale"] = [f"{digits(rate)}\N{NO-BREAK SPACE}({gain:.1f}×)" for rate, gain in rates]
    titles = ["head_dim", "mask", "phase", "kernel", "dilated", "dense", "dense, short rows", "torchscale"]
    return table(rows[titles])


def audited(rows: pd.DataFrame):
    """public.audit as a table: how far each definition lies from the paper's."""
    frame = rows.assign(mask=mask(rows))
    for what in ("o", "dq", "dk", "dv"):
        frame[what] = [digits(x) if x > 1e-9 else "equal" for x in rows[f"{what}_off"]]
    frame["rows of 0"] = [f"{x:.0%}" for x in rows["zero_rows"]]
    leaks = zip(rows["causal"], rows["leak"], strict=True)
    frame["sees the future"] = [NO_FIGURE if not causal else "yes" if leak > 1e-9 else "no" for causal, leak in leaks]
    return table(frame[["definition", "mask", "o", "dq", "dk", "dv", "rows of 0", "sees the future"]])


def blocks_held(seen: torch.Tensor) -> float:
    """The share of FlexAttention's blocks of `[N, N]` in which at least one pair is seen."""
    return seen.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).any(-1).any(1).double().mean().item()


def distances(seen: torch.Tensor) -> tuple[list[int], list[float]]:
    """For `[H, N, N]` or `[N, N]`: distances 1, 2, 4, …, and the share of pairs seen from there to twice as far."""
    seen = (seen > 0).double()
    seen = seen.mean(0) if seen.dim() == 3 else seen
    n = seen.shape[-1]
    sums = [float(seen.diagonal(d).sum() + seen.diagonal(-d).sum()) for d in range(1, n)]
    starts, found = [2**k for k in range(int(math.log2(n - 1)) + 1)], []
    for start in starts:
        span = range(start, min(2 * start, n))
        found.append(sum(sums[d - 1] for d in span) / sum(2 * (n - d) for d in span))
    return starts, found
