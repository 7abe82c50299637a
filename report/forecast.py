"""What a pass will take, from counts and measured speeds: a forecast, where a floor says what it takes at the least.

An operation on N × N matrices goes at the rate at which the same operation, on operands laid out the same way, went at
another length; a flash kernel at that of its own on rows of that length; the rest at the ceilings. Rates between two
lengths lie on a straight line in logarithms."""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import cycle, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from attnlib import FAMILIES, VARIANTS
from attnlib.core import DTYPES, HALF, PHASES, Machine, Shape
from attnlib.dilated.views import all_views
from attnlib.laws import Variant, useful_flops
from attnlib.memory.ledger import Operand, ledger
from attnlib.rows import POINT, shape_of
from attnlib.timing.clock import CACHE_BYTES, typical_ms
from attnlib.timing.sweep import Job, Row
from report.floor import operations, rate_at
from report.race import passes

SPEED = ["seq_len", "head_dim", "work", "ms"]  # the numbers of a row
TIMING = {False: (0.04,), True: (0.06, 0.2)}  # seconds for a speed, on a CPU the quantile too: see `forecasts`
PLAIN = ("naive_custom", "naive", "naive_weights_only", "naive_recompute", "sdpa_math")
QUERY_TILE = 128  # rows of queries that a flash kernel takes for one unit of parallel work


def kind(row: Row, shape: Shape) -> str:
    """An operation of a ledger by its name and the layout of its operands' last two axes: "bmm(ND, DNᵀ)"; in a half
    type those in float32 are marked. Empty for one that neither reads nor makes an N × N matrix, and for what no
    operator shows."""
    names, texts = {shape.head_dim: "D", shape.seq_len: "N"}, list[str]()
    for x in (x for x in tree_leaves(row["call"]) if isinstance(x, Operand)):
        text = "".join(names.get(size, "1") for size in x.shape[-2:])
        turned = len(x.strides) > 1 and x.strides[-1] > x.strides[-2]
        texts.append(text + "ᵀ" * turned + "32" * (x.dtype == torch.float32 != DTYPES[shape.dtype]))
    matrix = shape.batch * shape.heads * shape.seq_len**2 * shape.element_size
    makes_one = row["largest_bytes"] >= matrix > shape.input_bytes // 3
    return f"{row['op']}({', '.join(texts)})" if makes_one or any("NN" in text for text in texts) else ""


def filled(x: Operand, in_place: bool, device: str) -> torch.Tensor:
    """A tensor laid out as the operand was, of random numbers, about one where they are changed `in_place` often."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.strides, strict=True))
    numbers = torch.zeros(length, dtype=x.dtype, device=device)
    if x.dtype.is_floating_point:
        numbers.normal_(*(1, 0.01) if in_place else (0, 1))
    return numbers.as_strided(x.shape, x.strides)


def operation_speeds(shape: Shape, products: bool, device: str) -> list[Row]:
    """The time of each `kind` of operation in plain attention at a shape, or of its `products` alone, called again by
    itself: `kind`, the shape's columns and SPEED; work: its operations if it has any, else its bytes."""
    found: dict[str, Row] = {}
    todo = [ledger(VARIANTS[name], shape, device) for name in PLAIN]
    for row in (row for rows in todo for row in rows if row["call"] and (row["flops"] or not products)):
        if (key := kind(row, shape)) and key not in found:
            fill = partial(filled, in_place=row["op"].endswith("_"), device=device)
            # a GPU's caches are flushed before each; a CPU's hold as little of the next operands as in a pass
            sets = 3 if device == "cpu" and row["largest_bytes"] < CACHE_BYTES else 1
            turns = cycle([tree_map_only(Operand, fill, row["call"]) for _ in range(sets)])
            call = lambda func, args, kwargs: func(*args, **kwargs)  # noqa: E731
            ms = typical_ms(lambda: call(*next(turns)), device, *TIMING[device == "cpu"])  # noqa: B023
            found[key] = {"kind": key, **shape.columns(), "work": row["flops"] or row["traffic_bytes"], "ms": ms}
            del turns
    return [*found.values()]


def pass_speeds(name: str, shape: Shape, device: str) -> list[Row]:
    """As `operation_speeds`, for the two passes of a fused kernel, "forward sdpa_flash"; work: useful operations."""
    return [
        {"kind": f"{phase} {name}", **shape.columns(), "work": useful_flops(shape, phase)}
        | {"ms": typical_ms(passes(VARIANTS[name], shape, device, phase, 0), device, *TIMING[device == "cpu"])}
        for phase in PHASES
    ]


def linear_speed(shape: Shape, device: str) -> Row:
    """As `operation_speeds`, for the projection of a block to q, k and v; work: its operations."""
    width = shape.heads * shape.head_dim
    x, weight = (torch.randn(n, width, device=device).to(DTYPES[shape.dtype]) for n in (shape.seq_len, 3 * width))
    ms = typical_ms(lambda: x @ weight.mT, device, *TIMING[device == "cpu"])
    return {"kind": "linear", **shape.columns(), "work": 6 * shape.seq_len * width**2, "ms": ms}


def speed_jobs(plain: Iterable[tuple[Shape, bool]], fused: Iterable[tuple[str, Shape]], device: str) -> list[Job]:
    """`operation_speeds` of `(shape, products)`, `pass_speeds` of fused kernels by name, and at their lengths
    `linear_speed` of a block of 8 heads of 64."""
    jobs = [
        Job(f"{'products' if few else 'operations'} {one}", operation_speeds, (one, few, device)) for one, few in plain
    ]
    jobs += [Job(f"{name} {one}", pass_speeds, (name, one, device)) for name, one in fused]
    blocks = dict.fromkeys(Shape(1, 8, one.seq_len, 64, one.dtype) for _, one in fused)
    return jobs + [Job(f"linear {one}", linear_speed, (one, device)) for one in blocks]


def what_to_time(machine: Machine, half: str, quick: bool) -> tuple[list[tuple[Shape, bool]], list[tuple[str, Shape]]]:
    """The shapes for `speed_jobs`: of plain attention as chapter 1 has it, at short lengths with many more matrices
    too, and of fused kernels as chapter 3 has them."""
    few = machine.is_cpu
    grid, batch = ((256, 512, 1024, 2048, 4096), 4) if few else ((256, 512, 1024, 2048, 4096, 8192, 16384), 8)
    tokens, width, lengths = (2048, 256, (128, 512, 2048)) if few else (16384, 2048, (512, 2048, 16384))
    grid, lengths, masks = (grid[:2], lengths[::2], (False,)) if quick else (grid, lengths, (False, True))
    types, full = ("float32",) if few else ("float32", half), [(n, batch) for n in grid]
    full += [] if quick else [(256, 64)] if few else [(512, 1024), (2048, 64)]
    plain = [
        (Shape(b, 1, n, 64, t, causal), False)
        for (n, b), t, causal in product(full, types, masks) if not (few and causal and n == grid[-1])
    ]  # fmt: skip
    plain += [(Shape(batch, 1, grid[0], 64, t, causal), False) for t, causal in product(HALF, masks) if few]
    plain += [(Shape(batch, 1, n, d), True) for n, d in product(grid[::2], (16, 32, 128)) if not quick]
    plain += [(Shape(b, 1, n, 128, t), True) for (n, b), t in product(dict.fromkeys(full[::2] + full[-2:]), types[1:])]
    shapes = [
        Shape(tokens // n, width // d, n, d, t, causal) for n, d, t, causal in product(lengths, (64, 128), types, masks)
    ]
    # FlashAttention-4 would compile each of them anew
    names = [name for name in FAMILIES["kernels"] if name not in ("sdpa_math", "tiled", "fa4")]
    return plain, [(name, one) for one in shapes for name in names if not VARIANTS[name].needs(one, machine)]


class Forecast:
    """What a machine's speeds, the rows of `speed_jobs`, say of any pass."""

    def __init__(self, speeds: pd.DataFrame, machine: Machine):
        self.machine = machine
        self.least_ms = float(speeds["ms"].min())  # of an operation called by itself
        self.latency_ms = machine.ceilings["launch_us" if machine.is_cpu else "graph_us"] / 1e3
        fused = speeds["kind"].str.contains("ward ")  # as if their tiles had kept all multiprocessors busy
        busy = [self.share(*one) for one in speeds[["batch", "heads", "seq_len"]].to_numpy()]
        speeds = speeds.assign(work=speeds["work"].where(~fused, speeds["work"] / busy))
        self.known = dict(
            iter(speeds.sort_values(["seq_len", "batch"]).groupby(["kind", "dtype", "causal", "head_dim"]))
        )

    def rate(self, name: str, shape: Shape) -> float:
        """Work per ms of a kind at a length: in the same type, or in the other half type, with such a mask, at the
        nearest head_dim, as far as that was measured; 0 if the kind was not."""
        alike = {shape.dtype, *(HALF if shape.dtype in HALF else ())}
        near = [key for key in self.known if key[0] == name and key[1] in alike]
        if not near:
            return 0.0
        apart = lambda key: (key[1] != shape.dtype, key[2] != shape.causal, abs(math.log(key[3] / shape.head_dim)))  # noqa: E731
        many, lengths, rates = shape.batch * shape.heads, list[float](), list[float]()
        for seq_len, rows in self.known[min(near, key=apart)].groupby("seq_len"):
            counts, each = rows["batch"] * rows["heads"], rows["ms"] / (rows["batch"] * rows["heads"])
            ms = each.iloc[0 if many < counts.iloc[0] else -1] * many
            if counts.iloc[0] <= many <= counts.iloc[-1]:
                ms = np.interp(many, counts, rows["ms"])
            lengths.append(math.log(seq_len))
            rates.append(math.log(rows["work"].iloc[0] / counts.iloc[0] * many / ms))
        return math.exp(np.interp(math.log(shape.seq_len), lengths, rates))

    def share(self, batch: int, heads: int, seq_len: int) -> float:
        """Of the multiprocessors, what a fused kernel's tiles of queries keep busy, the last wave included."""
        tiles = batch * heads * math.ceil(seq_len / QUERY_TILE)
        units = 1 if self.machine.is_cpu else self.machine.multiprocessors
        return tiles / (units * math.ceil(tiles / units))

    def moved(self, nbytes: int, largest: int) -> float:
        """Milliseconds of an operation that moves so many bytes, of tensors of `largest` bytes."""
        return self.latency_ms + nbytes / rate_at(self.machine.ceilings["copy_gb_s"], largest) / 1e6

    def fused(self, name: str, phase: str, shape: Shape) -> float:
        """Milliseconds of a fused kernel: at its rate, on the multiprocessors that its tiles of queries keep busy."""
        rate = self.rate(f"{phase} {name}", shape) * self.share(shape.batch, shape.heads, shape.seq_len)
        return self.latency_ms + useful_flops(shape, phase) / rate if rate else math.nan

    def plain(self, variant: Variant, phase: str, shape: Shape) -> float:
        """Milliseconds of what a ledger can run, operation by operation."""
        total = 0.0
        for row in operations(variant, shape, self.machine):
            if row["phase"] != phase or "(in " in row["op"]:  # a step of the next operation is in its time
                continue
            rate = self.rate(kind(row, shape), shape) if row["call"] else 0.0
            work = row["flops"] or row["traffic_bytes"]
            total += self.latency_ms + work / rate if rate else row["execution_ms"]
        return total

    def dilated(self, variant: Variant, phase: str, shape: Shape) -> float:
        """Milliseconds of dilated attention: its calls of a fused kernel, and passes over what is joined."""
        how: dict[str, Any] = variant.fn.keywords
        branches = tuple(zip(how["segment_lengths"], how["dilation_rates"], strict=True))
        kernel, total = {"cpu": "sdpa_flash", "fa4": "fa4"}.get(how["kernel"], f"sdpa_{how['kernel']}"), 0.0
        for at, view in enumerate(all_views(shape.batch, shape.heads, shape.seq_len, branches, how["head_offsets"])):
            part = Shape(*view.size, shape.head_dim, shape.dtype, shape.causal)
            total += self.fused(kernel, phase, part)
            if at:  # read both and write one, of the output, or of dq, dk and dv
                total += self.moved((1 if phase == "forward" else 3) * part.input_bytes, part.input_bytes // 3)
        return total

    def block(self, variant: Variant, phase: str, shape: Shape) -> float:
        """Milliseconds of a Transformer block: attention, the products of its projections, passes over its rows, each
        kernel of which takes `least_ms` at the least."""
        linear, backward = shape.input_bytes // 3, phase == "backward"
        flops = (2 if backward else 1) * 8 * shape.batch * shape.seq_len * (shape.heads * shape.head_dim) ** 2
        products = flops / (self.rate("linear", shape) or 1e9 * self.machine.ceilings["gemm_tflop_s"][shape.dtype])
        kernels, passes_over = (28, 16) if backward else (8, 6)
        rest = max(kernels * self.least_ms, products + self.moved(passes_over * linear, linear))
        return rest + self.of(variant, phase, shape)

    def of(self, variant: Variant, phase: str, shape: Shape) -> float:
        """Milliseconds of a pass of `variant`; NaN where no ledger runs it and its speed was not measured."""
        if variant.inner:
            return self.block(variant.inner, phase, shape)
        if variant.name.startswith("dilated"):
            return self.dilated(variant, phase, shape)
        if self.rate(f"{phase} {variant.name}", shape):
            return self.fused(variant.name, phase, shape)
        return self.plain(variant, phase, shape) if variant.ledgered else math.nan


def forecasts(rows: pd.DataFrame, variants: Mapping[str, Variant], forecast: Forecast, least_ms: float) -> pd.DataFrame:
    """The passes of a sweep that took at least so long: the point's columns, `phase, ms, forecast_ms` and `off`, by how
    much of it the forecast misses; without what it does not know. ms: the median; on a CPU, whose memory others use,
    the 20th percentile, as of the speeds."""
    found, of = [], "ms_p20" if forecast.machine.is_cpu else "ms"
    for row in rows[rows["variant"].isin([*variants])].to_dict("records"):
        for phase in (phase for phase in PHASES if row[f"{phase}_{of}"] >= least_ms):
            ms = forecast.of(variants[row["variant"]], phase, shape_of(row))
            point = {name: row[name] for name in POINT}
            found.append(point | {"phase": phase, "ms": row[f"{phase}_{of}"], "forecast_ms": ms})
    frame = pd.DataFrame(found, columns=[*POINT, "phase", "ms", "forecast_ms"]).dropna(subset=["forecast_ms"])
    return frame.assign(off=frame["forecast_ms"] / frame["ms"] - 1)
