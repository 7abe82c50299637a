"""Can the clock be trusted? Compares this project's times with the reference timers, and one sweep with another.

`python tests/agreement.py timers --device cuda` times every variant by attnlib and by the reference in turn (Triton's
do_bench on CUDA, torch.utils.benchmark on the CPU) and writes data/<device>/timer_agreement.csv.
`python tests/agreement.py repeat --device cuda` runs the sweep of 01_naive_sweep.csv again and writes the pairs to
data/<device>/repeat_agreement.csv.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from attnlib import NAIVE, results, stored
from attnlib import device as dev
from attnlib.core import Shape
from attnlib.measure import PHASES, POINT
from attnlib.sweep import Worker, sweep


def reference_ms(fn, device: str, budget_s: float) -> float:
    """The median time of `fn` by the reference timer, called as its documentation shows."""
    if device == "cpu":
        timer = torch.utils.benchmark.Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=budget_s).median * 1e3
    from triton.testing import do_bench

    return do_bench(fn, rep=1e3 * budget_s, return_mode="median")


def timers(device: str, lengths, budget_s: float = 0.1, rounds: int = 10) -> pd.DataFrame:
    """Both timers in turn on forward and backward of each variant, batch 8 (CPU: 4), d_model 64, float32.

    Columns: `variant, seq_len, phase, attnlib_ms, reference_ms` (each the median over `rounds`) and their `ratio`.
    """
    found = []
    for seq_len in lengths:
        for name, variant in NAIVE.items():
            q, k, v = Shape(4 if device == "cpu" else 8, 1, seq_len, 64).inputs(device)
            o = variant.fn(q, k, v, causal=False)
            do = torch.randn_like(o)
            steps = {
                "forward": lambda: variant.fn(q, k, v, causal=False),  # noqa: B023
                "backward": lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True),  # noqa: B023
            }
            for phase, fn in steps.items():
                clocks = {
                    "attnlib": lambda: dev.median(dev.time_passes(fn, device, budget_s)),  # noqa: B023
                    "reference": lambda: reference_ms(fn, device, budget_s),  # noqa: B023
                }
                times = {clock: [] for clock in clocks}
                for turn in range(rounds):  # whoever goes first changes from round to round
                    for clock in list(clocks)[:: 1 - 2 * (turn % 2)]:
                        times[clock].append(clocks[clock]())
                mine, theirs = (dev.median(all_rounds) for all_rounds in times.values())
                found.append((name, seq_len, phase, mine, theirs, mine / theirs))
    return pd.DataFrame(found, columns=["variant", "seq_len", "phase", "attnlib_ms", "reference_ms", "ratio"])


def disagreement(ratios: pd.Series) -> float:
    """The median of |ratio − 1|."""
    return float((ratios - 1).abs().median())


def repeat(device: str) -> pd.DataFrame:
    """The sweep of 01_naive_sweep.csv (reference_ms) once more (attnlib_ms) with their ratio, by point and phase."""
    with Worker() as worker:
        machine = worker.call(dev.describe, device)
        first = stored.load(machine["slug"], "01_naive_sweep")
        points = [(NAIVE[row.variant], Shape(*row[2:7], causal=bool(row.causal))) for row in first[POINT].itertuples()]
        path = stored.ROOT / "build" / machine["slug"] / "repeat.csv"
        sweep(points, path, machine, device=device, worker=worker, budget_s=results.profile("full").budget_s)
    second = pd.read_csv(path)
    pairs = []
    for phase in PHASES:
        both = first[POINT].assign(phase=phase, attnlib_ms=second[f"{phase}_ms"], reference_ms=first[f"{phase}_ms"])
        pairs.append(both.dropna(subset=["attnlib_ms", "reference_ms"]))
    return pd.concat(pairs).assign(ratio=lambda both: both["attnlib_ms"] / both["reference_ms"])


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("timers", "repeat"))
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = dev.resolve(options.device)
    if options.what == "timers":
        frame = timers(device, (256, 512, 1024) if device == "cpu" else (256, 512, 1024, 2048, 4096, 8192))
    else:
        frame = repeat(device)
    machine = dev.describe(device)
    path = stored.ROOT / "data" / machine["slug"] / f"{options.what.rstrip('s')}_agreement.csv"
    results.write(path, frame.assign(machine=machine["machine"]).to_csv(index=False, float_format="%.6g"))
    off = (frame[frame["reference_ms"] >= 0.1]["ratio"] - 1).abs()
    print(f"{path.name}: {len(off)} pairs, median |ratio - 1| {off.median():.2%}, p90 {off.quantile(0.9):.2%}")


if __name__ == "__main__":
    main()
