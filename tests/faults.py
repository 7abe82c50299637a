"""Variants that misbehave, importable by the worker process."""

import ctypes
import dataclasses
import os
import time

from attnlib import VARIANTS
from attnlib.naive import naive


def quick(q, k, v, *, causal=False):
    return naive(q, k, v, causal=causal)


def segfault(q, k, v, *, causal=False):
    ctypes.string_at(0)


def hang(q, k, v, *, causal=False):
    time.sleep(3600)


def fail(q, k, v, *, causal=False):
    raise ValueError("a bug\nof two lines")


def refuse(shape, device):
    return "cannot run here"


def die_once(path):
    """End this process, unless the file `path` says that one has."""
    if not path.exists():
        path.touch()
        os._exit(1)
    return "alive"


def variant(fn, **changes):
    """`naive` with another function and the function's name."""
    return dataclasses.replace(VARIANTS["naive"], **{"name": fn.__name__, "fn": fn} | changes)
