"""Hold the laws against what a device does, or ask them what fits."""

import argparse
import io
import sys
from typing import NoReturn

from attnlib import VARIANTS, variant
from attnlib.core import DTYPES, Machine, UserError
from attnlib.memory import check, fit
from attnlib.timing.machine import resolve
from attnlib.timing.room import memory_free
from attnlib.timing.worker import WorkerDied


class OneLineParser(argparse.ArgumentParser):
    """A parser that answers bad input like everything else, by one line instead of the usage and a line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(message)


def run_check(seed: int, count: int, device: str) -> int:
    """Check `count` random sizes, print each mismatch; 0 if there is none, else 1. Raises UserError as `draw` does."""
    from attnlib.timing.sweep import observation_jobs, run_jobs  # which needs a system with file locks

    machine = Machine.of(device)
    todo = check.cases(check.draw(seed, count), machine, VARIANTS)
    booked = [check.compare(*case, machine) for case in todo]
    seen = []
    if not machine.is_cpu:
        jobs = run_jobs(observation_jobs(todo, device, machine), lanes=4, room_bytes=memory_free(device))
        seen = [row for _, rows in jobs for row in rows]
    found = check.mismatches(check.with_observed(booked, seen), VARIANTS, machine)
    wrong, unseen = len({text.split(": ")[0] for text in found}), sum(row[check.SEEN[0]] is None for row in seen)
    sources = "law = ledger" if machine.is_cpu else "law = ledger = allocator"
    lacking = f" ({unseen} had no room on the device: law and ledger alone)" if unseen else ""
    print(*found, f"{sources} for {len(todo) - wrong} of {len(todo)} configurations, to the byte{lacking}", sep="\n")
    return int(wrong > 0)


def main(arguments: list[str] | None = None, program: str = "python -m attnlib") -> int:
    """The command `program`; 0 if all is well, 1 for a mismatch or bad input, which gets one line."""
    parser = OneLineParser(prog=program, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("check", help="hold law against ledger (on CUDA also against the allocator)")
    checks.add_argument("--seed", type=int, required=True, help="of the random shapes")
    checks.add_argument("--count", type=int, default=60, help="of the random shapes, each in all dtypes, causal or not")
    checks.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1")
    fits = commands.add_parser("fit", help="the largest N that fits a memory, and what fills it")
    fits.add_argument("--memory", required=True, help="for tensors, with its unit: 24GiB, 80GB")
    fits.add_argument("--variant", required=True, help=", ".join(VARIANTS))
    for name, default in (("batch", None), ("heads", 1), ("head-dim", None)):
        fits.add_argument(f"--{name}", type=int, default=default, required=default is None)
    fits.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    fits.add_argument("--causal", action="store_true")
    fits.add_argument("--inference", action="store_true", help="forward pass alone")
    fits.add_argument("--device", default="cuda", help="cpu, cuda, cuda:1: whose kernels; it need not be there")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a letter gets a mark in its place
        sys.stdout.reconfigure(errors="replace")
    try:
        given = parser.parse_args(arguments)
        if given.command == "check":
            return run_check(given.seed, given.count, resolve(given.device))
        use = "inference" if given.inference else "training"
        shape = {name: getattr(given, name) for name in ("batch", "heads", "head_dim", "dtype", "causal")}
        print(fit.explain(variant(given.variant), shape, fit.nbytes(given.memory), use, given.device, VARIANTS))
        sys.stdout.flush()
    except (UserError, WorkerDied, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
