"""The bytes that a variant really moves through a GPU's memory, from its hardware counters, read by Nsight Compute.

`python -m notebooks.traffic SHAPE DEVICE VARIANT …` is what the profiler runs; `counted` calls it."""

import io
import json
import subprocess
import sys
from collections.abc import Iterable
from itertools import product

import pandas as pd
import torch

from attnlib import VARIANTS, variant
from attnlib.core import PHASES, Machine, Shape
from attnlib.laws import evaluate, useful_flops
from attnlib.rows import shape_of
from attnlib.timing.sweep import Job
from report.run import Run
from report.skipping import NotMeasured
from report.tables import MIB, digits, table

METRICS = ["dram__bytes_read.sum", "dram__bytes_write.sum"]
TRAFFIC = ["seq_len", "head_dim", "dram_bytes", "useful_flops", "kernels"]  # the numbers of a row


def run_once(names: list[str], shape: Shape, device: str):
    """One forward and one backward pass of each variant, a kernel that only waits before each of them."""
    todo = [(one, one.inputs(shape, device)) for one in map(variant, names)]
    upstream = [torch.randn_like(inputs[0]) for _, inputs in todo]
    for profiled in (False, True):  # the first time so that kernels are compiled and workspaces there
        if profiled:
            torch.cuda.profiler.start()
        for (one, inputs), do in zip(todo, upstream, strict=True):
            torch.cuda._sleep(1)
            o = one.fn(*inputs, causal=shape.causal)
            torch.cuda._sleep(1)
            torch.autograd.grad(o, inputs, do)
        torch.cuda.synchronize(device)
    torch.cuda.profiler.stop()


def counted(names: list[str], shape: Shape, device: str, timeout_s: float = 120) -> list[dict]:
    """A row for each variant and phase: the shape's columns, TRAFFIC. Empty without the program ncu, or permission."""
    options = "--clock-control=none --cache-control=none --profile-from-start=off --csv --page=raw --print-units=base"
    target = [sys.executable, "-m", "notebooks.traffic", json.dumps(shape.columns()), device, *names]
    command = ["ncu", *options.split(), f"--metrics={','.join(METRICS)}", *target]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError):  # no ncu, no permission, no end
        return []
    return summed(done.stdout, names, shape)


def summed(text: str, names: list[str], shape: Shape) -> list[dict]:
    """The rows of `counted` from what ncu printed: its counters summed from one waiting kernel to the next."""
    if (start := text.find('"ID"')) < 0:
        return []
    lines = [line for line in text[start:].splitlines() if line.startswith('"')]
    table = pd.read_csv(io.StringIO("\n".join(lines)), dtype=str)
    if not {"Kernel Name", *METRICS} <= set(table) or not (table.loc[:0, METRICS] == "byte").all(axis=None):
        return []
    table = table.iloc[1:]  # the line under the header holds the units
    moved = sum(pd.to_numeric(table[metric].str.replace(",", ""), errors="coerce") for metric in METRICS)
    waiting = table["Kernel Name"].str.contains("spin_kernel")
    places = moved[~waiting].groupby(waiting.cumsum() - 1)
    keys = list(product(names, PHASES))
    if moved.isna().any() or list(places.groups) != list(range(len(keys))):
        return []
    return [
        {"variant": name, **shape.columns(), "phase": phase, "dram_bytes": int(bytes_of_one.sum())}
        | {"useful_flops": useful_flops(shape, phase), "kernels": len(bytes_of_one)}
        for (name, phase), (_, bytes_of_one) in zip(keys, places, strict=True)
    ]


def moved(rows: pd.DataFrame, shape: Shape):
    """A table of rows of `counted`, with the bytes as a multiple of those of inputs and results."""
    least = rows["phase"].map({"forward": 4, "backward": 8}) * (shape.input_bytes // 3)
    figures = {"operations per byte": (rows["useful_flops"] / rows["dram_bytes"]).map(digits)}
    figures |= {"kernels": rows["kernels"].astype(int), "moved MiB": rows["dram_bytes"] / MIB}
    frame = rows[["variant", "phase"]].assign(**figures, **{"of the least": rows["dram_bytes"] / least})
    return table(frame, {"moved MiB": "{:,.0f}", "of the least": "{:.1f}×"})


def traffic_jobs(names: list[str], shape: Shape, device: str) -> list[Job]:
    """`counted` as a job; it starts a process of its own."""
    return [Job(f"{shape} {' '.join(names)}", counted, (names, shape, device), here=True)]


def told(placed: pd.DataFrame, shape: Shape, plain: pd.DataFrame, copy: float, machine: Machine) -> list[str]:
    """What is to be said of counted bytes: how many times the least, and at what share of a copy's rate, in GB/s. placed:
    rows with `dram_bytes, tflop_s, intensity`; plain: of the protocol's rows those of naive without a mask."""
    rows, passes = placed.set_index(["variant", "phase"]), VARIANTS["naive"].traffic.forward
    times = rows["dram_bytes"] / (4 * shape.input_bytes / 3)
    used = rows["tflop_s"] * 1e3 / rows["intensity"] / copy
    paces = [
        evaluate(passes, shape_of(row), machine) / row["forward_ms"] / 1e6 / copy for row in plain.to_dict("records")
    ]
    return [
        f"Forward, `naive` moves {times['naive', 'forward']:.0f} times the bytes of inputs and output, `sdpa_flash` "
        f"{times['sdpa_flash', 'forward']:.1f} times (@tbl-moved).",
        f"At N = {shape.seq_len:,} plain attention moves its bytes at {used['naive', 'forward']:.0%} of a copy's rate "
        f"forward and at {used['naive', 'backward']:.0%} backward.",
        f"Over the whole protocol, forward without a mask, it moves its counted bytes at {min(paces):.0%} to "
        f"{max(paces):.0%} of a copy's rate.",
    ]


def few_passes(plain: pd.DataFrame, at: Iterable[tuple[int, int]]) -> str:
    """Of how many passes the forward times at each (head_dim, seq_len) are, if they are few."""
    counts = [int(plain.set_index(["head_dim", "seq_len"])["forward_ms_count"][one]) for one in at]
    return f" (of {min(counts)} to {max(counts)} passes of `naive`)" if min(counts) < 5 else ""


def softmax_paces(run: Run, dtype: str, copy: float) -> str:
    """What share of a copy's rate the softmax alone reaches, by chapter 5's speeds; nothing before these are taken."""
    try:
        alone = run.of_chapter("05", "speeds", ["work", "ms"]).query("kind == '_softmax(NN)' and not causal")
    except NotMeasured:
        return ""
    alone = alone[alone["dtype"] == dtype].groupby("seq_len")[["work", "ms"]].max().tail(4)
    paces = [f"{work / ms / 1e6 / copy:.0%} at N = {n:,}" for n, (work, ms) in alone.iterrows()]
    told = f"PyTorch's softmax in {dtype} moves its bytes at these shares of a copy's rate (chapter 5)"
    return f"Part of what remains is one kernel. Alone, {told}: {', '.join(paces)}."


if __name__ == "__main__":
    run_once(sys.argv[3:], Shape(**json.loads(sys.argv[1])), sys.argv[2])
