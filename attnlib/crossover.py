"""Which of two variants is faster, and how sure we are: runs that alternate, ratios, and their confidence intervals."""

import random
import time

import numpy as np
import pandas as pd
import torch

from attnlib.core import Shape, Variant

BATCHES, DRAWS = 5, 2000
L2_BYTES = 256 * 2**20  # what is overwritten before each pass, more than any cache holds, as triton's do_bench does


def passes(variant: Variant, shape: Shape, device: str, phase: str, seed: int):
    """A function that runs one forward pass, or one backward pass of a forward pass done before."""
    q, k, v = shape.inputs(device, seed)
    if phase == "forward":
        return lambda: variant.fn(q, k, v, causal=shape.causal)
    o = variant.fn(q, k, v, causal=shape.causal)
    do = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)


def milliseconds(functions, rounds: int, device: str) -> np.ndarray:
    """`[rounds, len(functions)]`: each call's time, the functions taking turns in an order drawn for each round."""
    times, order = np.zeros((rounds, len(functions))), list(range(len(functions)))
    flush = None if device == "cpu" else torch.empty(L2_BYTES, dtype=torch.int8, device=device)
    marks = []
    for turn in range(rounds):
        random.Random(turn).shuffle(order)
        for which in order:
            if device == "cpu":
                begun = time.perf_counter_ns()
                functions[which]()
                times[turn, which] = (time.perf_counter_ns() - begun) / 1e6
            else:
                flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                functions[which]()
                end.record()
                marks.append((turn, which, start, end))
    if device != "cpu":
        torch.cuda.synchronize(device)
    for turn, which, start, end in marks:
        times[turn, which] = start.elapsed_time(end)
    return times


def duel(first: Variant, second: Variant, shape: Shape, device: str, phase: str, budget_s: float = 1.0) -> dict:
    """How many times as long `first` takes as `second` at `shape` in `phase`, "forward" or "backward".

    Columns: the shape's, `phase, first, second, first_ms, second_ms` (medians), `ratio` (median of the ratios of calls
    made in the same round), `low` and `high` (its 95 % confidence interval), `rounds`. The interval is a bootstrap over
    BATCHES batches, each with inputs of its own, and over the rounds within them, so that it holds for another run and
    not for this one alone (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13).
    """
    ratios, medians = [], []
    for seed in range(BATCHES):
        functions = [passes(variant, shape, device, phase, seed) for variant in (first, second)]
        begun = time.perf_counter()
        milliseconds(functions, 3, device)  # warm-up, and an estimate
        one = (time.perf_counter() - begun) / 3
        times = milliseconds(functions, int(min(50, max(5, budget_s / BATCHES / one))), device)
        ratios.append(times[:, 0] / times[:, 1])
        medians.append(np.median(times, axis=0))
    low, high = interval(ratios)
    first_ms, second_ms = np.median(medians, axis=0)
    return {
        **shape.columns(),
        **{"phase": phase, "first": first.name, "second": second.name, "first_ms": first_ms, "second_ms": second_ms},
        **{"ratio": float(np.median(np.concatenate(ratios))), "low": low, "high": high},
        "rounds": sum(map(len, ratios)),
    }


def interval(batches: list[np.ndarray], seed: int = 0) -> tuple[float, float]:
    """The 95 % confidence interval of the median over batches: batches drawn with replacement, then within each."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(DRAWS):
        picked = [batches[i] for i in draw.integers(len(batches), size=len(batches))]
        found.append(np.median(np.concatenate([draw.choice(batch, size=len(batch)) for batch in picked])))
    return tuple(float(x) for x in np.quantile(found, [0.025, 0.975]))


def wins_from(rows: pd.DataFrame) -> int | None:
    """The smallest N from which on `second` is faster at every length of `rows`, the whole interval above one."""
    ordered = rows.sort_values("seq_len", ascending=False)
    won = ordered[(ordered["low"] > 1).cummin()]
    return int(won["seq_len"].min()) if len(won) else None
