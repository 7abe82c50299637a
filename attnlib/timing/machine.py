"""The device at hand: which one a name means, what it is, what state it is in, and how fast it goes at best."""

import hashlib
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import torch

from attnlib.core import DTYPES, Machine, UserError
from attnlib.timing.clock import time_passes


def resolve(name: str) -> str:
    """The torch device that `name` means: "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:1".

    Raises UserError for anything else, and for a GPU that is not there."""
    gpus = torch.cuda.device_count()
    if name in ("auto", "cpu"):
        return "cuda:0" if gpus and name == "auto" else "cpu"
    if not (match := re.fullmatch(r"cuda(?::(\d+))?", name)):
        raise UserError(f"device must be auto, cpu, cuda or cuda:<index>, not {name!r}")
    if (index := int(match[1] or 0)) >= gpus:
        raise UserError(f"device {name} is not there: torch {torch.__version__} sees {gpus} GPU(s)")
    return f"cuda:{index}"


def cpu_name() -> str:
    """The processor's model name where the system tells it, else its architecture."""
    facts = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", facts.read_text(), re.M) if facts.exists() else None
    return found[1].strip() if found else f"CPU {platform.processor() or platform.machine()}"


def memory_free(device: str | torch.device) -> int:
    """Bytes that a new allocation can get, with what PyTorch holds unused; on the CPU of the container, if any."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup")
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


def describe(device: str | torch.device) -> Machine:
    """What `device` is and which versions run on it, without ceilings; on a GPU it makes a CUDA context."""
    found = replace(Machine.of(device), torch=torch.__version__, python=platform.python_version())
    if found.is_cpu:
        found = replace(found, name=cpu_name(), memory_bytes=psutil.virtual_memory().total)
    else:
        import triton

        gpu = torch.cuda.get_device_properties(device)
        versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": triton.__version__}
        found = replace(found, memory_bytes=gpu.total_memory, l2_bytes=gpu.L2_cache_size, **versions)
    digest = hashlib.sha256(repr((platform.node(), sorted(asdict(found).items()))).encode()).hexdigest()[:12]
    slug = re.sub(r"[^a-z0-9]+", "-", found.name.lower()).strip("-")
    return replace(found, machine=digest, slug=slug, date=date.today().isoformat())


def state(device: str | torch.device) -> dict[str, float]:
    """`clock_mhz, power_w, temperature_c` of the device now, as far as it tells."""
    if torch.device(device).type == "cpu":
        clock = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
        return {"clock_mhz": clock.current} if clock else {}
    seen = {}
    readers = {
        "clock_mhz": torch.cuda.clock_rate,
        "power_w": torch.cuda.power_draw,
        "temperature_c": torch.cuda.temperature,
    }
    for name, read in readers.items():
        with suppress(Exception):  # a driver that hides one of them must not cost the measurement
            seen[name] = read(device) / (1000 if name == "power_w" else 1)
    return seen


def square_product(device: str | torch.device, dtype: str) -> tuple[Callable[[], torch.Tensor], int]:
    """A square matrix product on random data, as a function to call, and its floating-point operations."""
    size = 512 if torch.device(device).type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def ceilings(device: str | torch.device, budget_s: float = 0.3) -> dict:
    """How fast the device goes at best, as measured now; three numbers explain most of what attention costs.

    launch_us: one operation on one element, its overhead and nothing else. copy_gb_s: `{bytes: rate}`, a copy between
    two tensors of that many bytes, counting bytes read and written. clone_gb_s: the same into a tensor allocated for
    it, as every operation of a model does. gemm_tflop_s: `{dtype: rate}`, a square matrix product, a multiply-add
    counted as two operations."""

    def seconds(fn: Callable, times: int = 1) -> float:
        def repeated() -> None:
            for _ in range(times):
                fn()

        return float(np.median(time_passes(repeated, device, budget_s))) / 1e3

    one = torch.ones(1, device=device)
    launch_us = seconds(lambda: one.add_(1), 100) * 1e6 / 100
    copies: dict[int, float] = {}
    clones: dict[int, float] = {}
    for log2 in range(20, 30 if torch.device(device).type == "cpu" else 33, 3):
        nbytes, repeats = 2**log2, max(1, 2 ** (26 - log2))
        if 8 * nbytes > memory_free(device):
            break
        source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        moved = 2 * nbytes * repeats / 1e9
        # the lambdas bind this round's tensors: each is called before the next round
        copies[nbytes] = moved / seconds(lambda: target.copy_(source), repeats)  # noqa: B023
        clones[nbytes] = moved / seconds(lambda: source.clone(), repeats)  # noqa: B023
    products = {name: square_product(device, name) for name in DTYPES}
    rates = {name: flops / seconds(product) / 1e12 for name, (product, flops) in products.items()}
    return {"launch_us": launch_us, "copy_gb_s": copies, "clone_gb_s": clones, "gemm_tflop_s": rates}
