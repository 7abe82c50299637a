"""Variants and jobs that misbehave, importable by a worker process."""

import ctypes
import os
import time
from dataclasses import replace

from attnlib.core import UserError
from attnlib.variants.naive import NAIVE, naive


def quick(q, k, v, *, causal=False):
    """Attention that behaves."""
    return naive(q, k, v, causal=causal)


def segfault(q, k, v, *, causal=False):
    """The process is gone."""
    ctypes.string_at(0)


def hang(q, k, v, *, causal=False):
    """No answer."""
    time.sleep(3600)


def fail(q, k, v, *, causal=False):
    """A bug."""
    raise ValueError("a bug\nof two lines")


def misaligned(q, k, v, *, causal=False):
    """A bug whose text speaks of allocation, and not of memory that ran out."""
    raise RuntimeError("misaligned allocation")


def refuse(shape, machine):
    """A reason why a variant cannot run."""
    return "cannot run here"


def die_once(path):
    """End this process, unless the file `path` says that one has."""
    if not path.exists():
        path.touch()
        os._exit(1)
    return "alive"


def die(*_):
    """End this process, always."""
    os._exit(1)


def whose(*_):
    """A row that names the process it was made in."""
    return {"process": os.getpid()}


def variant(fn, **changes):
    """`naive` with another function and the function's name."""
    return replace(NAIVE, **{"name": fn.__name__, "fn": fn} | changes)


def slowly(row):
    """The row, after a moment."""
    time.sleep(0.003)
    return row


def numbered(at):
    """A row with a number and the process that it was made in."""
    return {"number": at, "process": os.getpid()}


def refuse_input(*_):
    """What the user can mend."""
    raise UserError("bad input")


def some_ceilings(device, budget_s):
    """Ceilings that nobody waited for."""
    return {"launch_us": 1.0, "copy_gb_s": {1024: 1.0}, "clone_gb_s": {1024: 1.0}, "gemm_tflop_s": {"float32": 1.0}}


def sleep_and_answer(seconds, answer):
    time.sleep(seconds)
    return answer
