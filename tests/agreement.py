"""Can the clock be trusted? Compares this project's times with the reference timers, and one sweep with another.

`python tests/agreement.py timers --device cuda` times plain attention on attnlib's device clock and by the reference in
turn (Triton's do_bench on CUDA, torch.utils.benchmark on the CPU), where it takes 0.1 ms or more, and writes
data/<device>/timer_agreement.csv; with `--check`, as `make bench` calls it, it writes nothing, and exits 1 if the
timers disagree by more than LIMIT in the median.
`python tests/agreement.py repeat --device cuda` runs the sweep of 01_naive_sweep.csv again and writes the pairs to
data/<device>/repeat_agreement.csv.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from attnlib import family, variant
from attnlib.core import Shape
from attnlib.rows import POINT, TIMED, shape_of
from attnlib.timing.clock import estimate, fitting, time_passes
from attnlib.timing.machine import describe, resolve
from attnlib.timing.sweep import collect, point_jobs
from attnlib.timing.worker import Worker
from report import stored
from report.race import passes
from report.run import profile
from report.stored import write

LIMIT = {"cuda": 0.03, "cpu": 0.05}
LENGTHS = {"cuda": (256, 512, 1024, 2048, 4096, 8192), "cpu": (256, 512, 1024)}
SHORTEST_MS = 0.1  # of what is compared: below, do_bench's figure is partly the host's, which launches behind it


def reference_ms(fn: Callable, device: str, budget_s: float) -> float:
    """The median time of `fn` by the reference timer, called as its documentation shows."""
    if device != "cpu":
        from triton.testing import do_bench

        return do_bench(fn, rep=1e3 * budget_s, return_mode="median")
    from torch.utils.benchmark import Timer

    timer = Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=budget_s).median * 1e3


def attnlib_ms(fn: Callable, device: str, budget_s: float) -> float:
    """The median time of `fn` on this project's device clock, as a sweep has it."""
    seconds, launch_ms = estimate(fn, device, budget_s)
    return median(time_passes(fn, device, fitting(seconds, budget_s), launch_ms))


def timers(device: str, budget_s: float = 0.1, rounds: int = 10) -> pd.DataFrame:
    """Both timers in turn on forward and backward of plain attention, batch 8 (CPU: 4), d_model 64, float32.

    Columns: `variant, seq_len, phase, attnlib_ms, reference_ms` (each the median over `rounds`) and their `ratio`; only
    of what takes SHORTEST_MS or more by the reference."""
    kind, found = torch.device(device).type, []
    for seq_len in LENGTHS[kind]:
        for name, one in family("plain").items():
            for phase in ("forward", "backward"):
                fn = passes(one, Shape(4 if kind == "cpu" else 8, 1, seq_len, 64), device, phase, 0)
                if reference_ms(fn, device, budget_s) < SHORTEST_MS:
                    continue
                clocks = (attnlib_ms, reference_ms)
                times: dict[Callable, list[float]] = {clock: [] for clock in clocks}
                for turn in range(rounds):  # whoever goes first changes from round to round
                    for clock in clocks[:: 1 - 2 * (turn % 2)]:
                        times[clock].append(clock(fn, device, budget_s))
                mine, theirs = (median(all_rounds) for all_rounds in times.values())
                found.append((name, seq_len, phase, mine, theirs, mine / theirs))
    frame = pd.DataFrame(found, columns=["variant", "seq_len", "phase", "attnlib_ms", "reference_ms", "ratio"])
    return frame[frame["reference_ms"] >= SHORTEST_MS]


def repeat(device: str) -> pd.DataFrame:
    """The sweep of 01_naive_sweep.csv (reference_ms) once more (attnlib_ms) with their ratio, by point and phase."""
    with Worker() as worker:
        machine = worker.call(describe, device)
        first = stored.load(machine.slug, "01_naive_sweep")
        points = [(variant(row["variant"]), shape_of(row)) for row in first.to_dict("records")]
        path = stored.ROOT / "build" / machine.slug / "repeat.csv"
        full = profile("full")
        collect(point_jobs(points, device, full.budget_s, full.patience_s), path, machine, worker=worker)
    second, pairs = pd.read_csv(path), []
    for phase in TIMED:
        both = first[[*POINT]].assign(phase=phase, attnlib_ms=second[f"{phase}_ms"])
        pairs.append(both.assign(reference_ms=first[f"{phase}_ms"]).dropna(subset=["attnlib_ms", "reference_ms"]))
    return pd.concat(pairs).assign(ratio=lambda both: both["attnlib_ms"] / both["reference_ms"])


def main() -> int:
    """The command line; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("timers", "repeat"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--check", action="store_true", help="compare, write nothing, and exit 1 if they disagree")
    options = parser.parse_args()
    device = resolve(options.device)
    frame = timers(device) if options.what == "timers" else repeat(device)
    off = (frame[frame["reference_ms"] >= SHORTEST_MS]["ratio"] - 1).abs()
    print(f"{options.what}: {len(off)} pairs, median |ratio - 1| {off.median():.2%}, p90 {off.quantile(0.9):.2%}")
    if options.check:
        return int(off.median() > LIMIT[torch.device(device).type])
    machine = describe(device)
    path = stored.ROOT / "data" / machine.slug / f"{options.what.rstrip('s')}_agreement.csv"
    write(path, frame.assign(machine=machine.machine).to_csv(index=False, float_format="%.6g"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
