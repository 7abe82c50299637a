"""The bytes that a variant really moves through a GPU's memory, from its hardware counters, read by Nsight Compute.

`python -m attnlib.traffic SHAPE DEVICE VARIANT …` is what the profiler runs; `measured` calls it.
"""

import io
import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import torch

from attnlib import VARIANTS
from attnlib.core import Shape, useful_flops

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
PHASES = ("forward", "backward")
TRAFFIC = ["seq_len", "head_dim", "dram_bytes", "useful_flops", "kernels"]  # the numbers of a row


def run(names: list[str], shape: Shape, device: str):
    """One forward and one backward pass of each variant, a kernel that only waits before each of them."""
    inputs = shape.inputs(device)
    do = torch.randn_like(inputs[0])
    for counted in (False, True):  # the first time so that kernels are compiled and workspaces there
        if counted:
            torch.cuda.profiler.start()
        for name in names:
            torch.cuda._sleep(1)
            o = VARIANTS[name].fn(*inputs, causal=shape.causal)
            torch.cuda._sleep(1)
            torch.autograd.grad(o, inputs, do)
        torch.cuda.synchronize(device)
    torch.cuda.profiler.stop()


def measured(names: list[str], shape: Shape, device: str, timeout_s: float = 120) -> list[dict]:
    """A row for each variant and phase: the shape's columns, TRAFFIC. Empty where the counters cannot be read.

    Reading them needs the program ncu and, on many systems, an administrator's permission.
    """
    if not (ncu := shutil.which("ncu")):
        return []
    options = ["--clock-control=none", "--cache-control=none", "--profile-from-start=off"]
    options += ["--csv", "--page=raw", "--print-units=base"]
    target = [sys.executable, "-m", "attnlib.traffic", json.dumps(shape.columns()), device, *names]
    command = [ncu, *options, f"--metrics={','.join(METRICS)}", *target]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=os.environ)
    except subprocess.TimeoutExpired:
        return []
    return summed(done.stdout, names, shape) if done.returncode == 0 else []


def summed(text: str, names: list[str], shape: Shape) -> list[dict]:
    """The rows of `measured` from what ncu printed: its counters summed from one waiting kernel to the next."""
    start = text.find('"ID"')
    if start < 0:
        return []
    lines = [line for line in text[start:].splitlines() if line.startswith('"')]
    table = pd.read_csv(io.StringIO("\n".join(lines)), dtype=str)
    if not {"Kernel Name", *METRICS} <= set(table) or not (table.loc[:0, list(METRICS)] == "byte").all(axis=None):
        return []
    table = table.iloc[1:]  # the line under the header holds the units
    counts = [pd.to_numeric(table[metric].str.replace(",", ""), errors="coerce") for metric in METRICS]
    moved = sum(counts)
    if moved.isna().any():
        return []
    waiting = table["Kernel Name"].str.contains("spin_kernel")
    place = waiting.cumsum() - 1
    sums, kernels = moved[~waiting].groupby(place).sum(), (~waiting).groupby(place).sum()
    if list(sums.index) != list(range(len(PHASES) * len(names))):
        return []
    keys = [(name, phase) for name in names for phase in PHASES]
    return [
        {**{"variant": name, **shape.columns(), "phase": phase, "dram_bytes": int(sums[at])}}
        | {"useful_flops": useful_flops(shape, phase), "kernels": int(kernels[at])}
        for at, (name, phase) in enumerate(keys)
    ]


if __name__ == "__main__":
    run(sys.argv[3:], Shape(**json.loads(sys.argv[1])), sys.argv[2])
