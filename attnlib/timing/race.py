"""Which of several variants is faster, and how sure we are: runs that take turns, ratios, and confidence intervals.

What is compared alternates, in an order drawn for each round, so that a clock that sags slows all alike. Each batch of
rounds has inputs of its own, in a duel a process of its own as well, since times differ between processes too. The
interval of a ratio is Student's t over the logarithms of the batches' medians: the batches are independent, the rounds
within one are not.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product

import numpy as np
import torch

from attnlib.core import PHASES, Shape, UserError
from attnlib.laws import Variant, useful_flops, work
from attnlib.rows import SIZES
from attnlib.timing.clock import longest_kernel, milliseconds, warm_up
from attnlib.timing.machine import square_product
from attnlib.timing.sweep import Job, Row, point_name

BATCHES = 5
# of the intervals, 99 %: a table of a few dozen shall hold as a whole. Student's t with BATCHES - 1 degrees of freedom
T_99 = 4.604
RATIO = ("ratio", "low", "high")


def passes(variant: Variant, shape: Shape, device: str, phase: str, seed: int) -> Callable:
    """A function that runs one forward pass, or one backward pass of a forward pass done before.

    Raises UserError for a phase that is neither "forward" nor "backward".
    """
    if phase not in PHASES:
        raise UserError(f"phase must be forward or backward, not {phase!r}")
    inputs = variant.inputs(shape, device, seed)
    if phase == "forward":
        return lambda: variant.fn(*inputs, causal=shape.causal)
    o = variant.fn(*inputs, causal=shape.causal)
    do = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, inputs, do, retain_graph=True)


def batch(
    entries: Sequence[tuple[Variant, Shape]], device: str, phase: str, seed: int, budget_s: float, *others: Callable
) -> np.ndarray:
    """`[rounds, contestants]` milliseconds: the functions `others` and `passes` of each `(variant, shape)`, in turns.

    As many rounds as fit in `budget_s` seconds, from 5 to 50. Each call waits twice as long as the host takes to launch
    the slowest of them: the device's time is compared.
    """
    contestants = [*others, *(passes(variant, shape, device, phase, seed) for variant, shape in entries)]
    wait_ms = 2 * warm_up(contestants, device)
    begun = time.perf_counter()
    times = milliseconds(contestants, 2, device, wait_ms)
    rounds = min(50, max(5, int(2 * budget_s / (time.perf_counter() - begun))))
    return np.concatenate([times, milliseconds(contestants, rounds - 2, device, wait_ms)])


def interval(medians: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of one ratio per batch, and the ends of its 99 % confidence interval.

    Exact for batches whose logarithms are normal and independent. Raises UserError for other than BATCHES of them.
    """
    if len(medians) != BATCHES:
        raise UserError(f"an interval is made of {BATCHES} batches, not {len(medians)}")
    logs = np.log(medians)
    middle, reach = float(logs.mean()), T_99 * float(logs.std(ddof=1)) / math.sqrt(BATCHES)
    return math.exp(middle), math.exp(middle - reach), math.exp(middle + reach)


def ratio(times: Sequence[np.ndarray], first: int, second: int) -> dict[str, float]:
    """RATIO: how many times as long contestant `first` takes as `second`, from calls made in the same round."""
    return dict(zip(RATIO, interval([float(np.median(one[:, first] / one[:, second])) for one in times]), strict=True))


def duel_batch(
    first: Variant, second: Variant, shape: Shape, phase: str, run: int, seed: int, device: str, budget_s: float
) -> Row:
    """One batch of a duel: the shape's columns, `phase, first, second`, their median times `first_ms, second_ms`,
    `ratio`, the median of the ratios of calls made in the same round, `rounds`, `run` and `batch_of_run`."""
    times = batch([(first, shape), (second, shape)], device, phase, seed, budget_s)
    first_ms, second_ms = np.median(times, axis=0).tolist()
    row = {**shape.columns(), "phase": phase, "first": first.name, "second": second.name, "first_ms": first_ms}
    row |= {"second_ms": second_ms, "ratio": float(np.median(times[:, 0] / times[:, 1]))}
    return row | {"rounds": len(times), "run": run, "batch_of_run": seed}


def duel_jobs(pairs: Sequence[tuple[Variant, Variant, Shape, str]], device: str, budget_s: float) -> list[Job]:
    """`duel_batch` for each `(first, second, shape, phase)`, in BATCHES processes of each of two runs."""
    jobs = []
    for run, seed, (first, second, shape, phase) in product((1, 2), range(BATCHES), pairs):
        name = f"run {run}, batch {seed}: {first.name} against {point_name(second, shape)} {phase}"
        arguments = (first, second, shape, phase, run, seed, device, budget_s / BATCHES)
        jobs.append(Job(name, duel_batch, arguments, process=(run, seed)))
    return jobs


def duels(rows: Iterable[Row]) -> list[Row]:
    """Duels from the rows of their batches: their columns with the medians over the batches, and RATIO.

    Rows that hold the ends of an interval already stay as they are: their batches were not kept.
    """
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        names = tuple(row[column] for column in (*SIZES, "phase", "first", "second", "run"))
        found.setdefault(names, []).append(row)
    whole = []
    for batches in found.values():
        if "low" in batches[0]:
            whole += batches
            continue
        row = {name: x for name, x in batches[0].items() if name != "batch_of_run"}
        row |= {name: float(np.median([one[name] for one in batches])) for name in ("first_ms", "second_ms")}
        row |= dict(zip(RATIO, interval([one["ratio"] for one in batches]), strict=True))
        whole.append(row | {"rounds": sum(one["rounds"] for one in batches)})
    return whole


def race(shape: Shape, device: str, phase: str, variants: Sequence[Variant], budget_s: float) -> list[Row]:
    """All of `variants` that run there, and a matrix product of the same dtype, in turns; the first is the standard.

    A row each: the shape's columns, `phase, variant, kernel`; `ms`; `gemm_ms`; `share`, its rate of useful operations
    over the product's; `of_default`, how many times as fast as the first it is, with `_low` and `_high`; and, as the
    reference for the clock, `do_bench_ms` on CUDA: triton's do_bench on the same call.
    """
    flops = useful_flops(shape, phase)
    matmul, matmul_flops = square_product(device, shape.dtype)
    able = [variant for variant in variants if not variant.needs(shape, device)]
    entries = [(variant, shape) for variant in able]
    times = [batch(entries, device, phase, seed, budget_s / BATCHES, matmul) for seed in range(BATCHES)]
    gemm_ms, *each_ms = np.median(np.concatenate(times), axis=0).tolist()
    found = []
    for place, (variant, ms) in enumerate(zip(able, each_ms, strict=True), 1):
        call = passes(variant, shape, device, phase, 0)
        row: Row = {**shape.columns(), "phase": phase, "variant": variant.name}
        row |= {"kernel": longest_kernel(call, device)}
        row |= {"ms": ms, "gemm_ms": gemm_ms, "gemm_tflop_s": matmul_flops / gemm_ms / 1e9}
        row |= {"share": flops / ms / (matmul_flops / gemm_ms)}
        won = ratio(times, 1, place)
        row |= {"of_default": won["ratio"], "of_default_low": won["low"], "of_default_high": won["high"]}
        if torch.device(device).type == "cuda":
            from triton.testing import do_bench

            row["do_bench_ms"] = do_bench(call, return_mode="median")  # as its documentation shows
        found.append(row)
    return found


def race_jobs(shapes: Sequence[Shape], device: str, variants: Sequence[Variant], budget_s: float) -> list[Job]:
    """`race` at each shape, forward and backward."""
    names = " ".join(variant.name for variant in variants)
    cells = [(shape, phase) for shape in shapes for phase in PHASES]
    return [Job(f"{phase} {one} {names}", race, (one, device, phase, variants, budget_s)) for one, phase in cells]


def heat(entries: Sequence[tuple[Variant, Shape]], device: str, phase: str, budget_s: float) -> list[Row]:
    """A row for each `(variant, shape)`, all taking turns: the shape's columns, `phase, variant, ms, tflop_s`."""
    times = [batch(entries, device, phase, seed, budget_s / BATCHES) for seed in range(BATCHES)]
    found = []
    for (variant, shape), ms in zip(entries, np.median(np.concatenate(times), axis=0).tolist(), strict=True):
        row = {**shape.columns(), "phase": phase, "variant": variant.name, "ms": ms}
        found.append(row | {"tflop_s": work(variant, shape, phase) / ms / 1e9})
    return found


def heat_jobs(groups: Sequence[Sequence[tuple[Variant, Shape]]], device: str, budget_s: float) -> list[Job]:
    """`heat` of each group, forward and backward."""
    cells = [(group, phase) for group in groups for phase in PHASES]
    names = [f"{phase} {', '.join(point_name(*entry) for entry in group)}" for group, phase in cells]
    return [Job(name, heat, (one, device, phase, budget_s)) for name, (one, phase) in zip(names, cells, strict=True)]
