"""The device at hand: which one a name means, what it is, what state it is in, and how fast it goes at best."""

import hashlib
import platform
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from attnlib.core import DTYPES, Machine, UserError
from attnlib.rows import is_missing
from attnlib.timing.clock import estimate, fitting, graphed, in_a_row, time_passes
from attnlib.timing.room import memory_free

CONTEXT_BYTES = 2**29  # of a GPU, about what the driver takes for this process itself
CROWDED_BYTES = 2**30  # held by others, from which on a reader is told
AT_LIMIT = 0.97  # of its power limit: a GPU that draws as much lowers its clock
TINY = 100  # operations on one element, as many as are timed together
CHANGING = ("notes", "driver", "power_limit_w")  # what may differ, or not be told, from one description to the next


def resolve(name: str) -> str:
    """The torch device that `name` means: "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:1". Raises
    UserError for anything else, and for a GPU that is not there."""
    gpus = torch.cuda.device_count()
    if name in ("auto", "cpu"):
        return "cuda:0" if gpus and name == "auto" else "cpu"
    if not (match := re.fullmatch(r"cuda(?::(\d+))?", name)):
        raise UserError(f"device must be auto, cpu, cuda or cuda:<index>, not {name!r}")
    if (index := int(match[1] or 0)) >= gpus:
        raise UserError(f"device {name} is not there: torch {torch.__version__} sees {gpus} GPU(s)")
    return f"cuda:{index}"


def from_driver(uuid: str) -> dict[str, Any]:
    """`driver` and `power_limit_w` of the GPU of that UUID, as far as nvidia-ml-py is there and NVIDIA's library tells.
    By UUID, since CUDA_VISIBLE_DEVICES changes the numbers that torch gives to GPUs, and not the library's."""
    found: dict[str, Any] = {}
    with suppress(Exception):  # a driver that hides one of them must not cost the measurement
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        found["driver"] = str(nvml.nvmlSystemGetDriverVersion())
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        found["power_limit_w"] = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    return found


def crowding(free: int, total: int, reserved: int) -> tuple[str, ...]:
    """What a reader must know if others hold much of a GPU, from its bytes `free`, in `total`, and `reserved` here."""
    others = total - free - reserved - CONTEXT_BYTES
    text = f"Other programs held {others / 2**30:.1f} GiB of this GPU when the measuring began."
    return (text,) if others > CROWDED_BYTES else ()


def digest(machine: Machine) -> str:
    """Twelve letters that stand for all lasting facts of a machine of this host: see Machine.machine."""
    facts = {name: fact for name, fact in asdict(machine).items() if name not in CHANGING}
    return hashlib.sha256(repr((platform.node(), sorted(facts.items()))).encode()).hexdigest()[:12]


def triton_version() -> str:
    """The version of Triton, from its package's record where there is one: to import it takes a second."""
    try:
        return version("triton")
    except PackageNotFoundError:  # as in PyTorch's nightly builds
        return import_module("triton").__version__


def describe(device: str | torch.device) -> Machine:
    """What `device` is and which versions run on it, without ceilings; on a GPU it makes a CUDA context."""
    found = replace(Machine.of(device), torch=torch.__version__, python=platform.python_version())
    if found.is_cpu:
        facts = Path("/proc/cpuinfo")  # which not every system has
        told = re.search(r"^model name\s*:\s*(.+)$", facts.read_text("utf-8"), re.M) if facts.exists() else None
        name = told[1].strip() if told else f"CPU {platform.processor() or platform.machine()}"
        found = replace(found, name=name, memory_bytes=psutil.virtual_memory().total)
    else:
        gpu = torch.cuda.get_device_properties(device)
        # of cuDNN the one that is loaded, as cudnnGetVersion tells, not the one that PyTorch was built with
        versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": triton_version()}
        free, total = torch.cuda.mem_get_info(device)
        asked = from_driver(str(gpu.uuid)) | {"notes": crowding(free, total, torch.cuda.memory_reserved(device))}
        found = replace(found, memory_bytes=gpu.total_memory, l2_bytes=gpu.L2_cache_size, **versions, **asked)
    slug = re.sub(r"[^a-z0-9]+", "-", found.name.lower()).strip("-")
    return replace(found, machine=digest(found), slug=slug, date=date.today().isoformat())


def at_power_limit(rows_power_w: Iterable[Any], machine: Machine) -> str | None:
    """A sentence on how many points whose power is told drew as much as the GPU may; None for none, or no limit."""
    known = [power for power in rows_power_w if not is_missing(power)]
    limited = sum(power >= AT_LIMIT * machine.power_limit_w for power in known)
    if not machine.power_limit_w or not limited:
        return None
    points, share = f"In {limited} of {len(known)} points, short bursts with rests between,", f"{AT_LIMIT:.0%}"
    limit = f"its power limit of {machine.power_limit_w:.0f} W"
    return f"{points} the GPU drew at least {share} of {limit}; a clock may sink long before that."


def state(device: str | torch.device) -> dict[str, float]:
    """`clock_mhz, power_w, temperature_c` of the device now, as far as it tells."""
    seen: dict[str, float] = {}
    readers: dict[str, Callable] = {"clock_mhz": lambda _: psutil.cpu_freq().current}
    if torch.device(device).type == "cuda":
        known = {"clock_mhz": "clock_rate", "power_w": "power_draw", "temperature_c": "temperature"}
        readers = {name: getattr(torch.cuda, read) for name, read in known.items()}
    for name, read in readers.items():
        with suppress(Exception):  # a system or driver that hides one of them must not cost the measurement
            seen[name] = read(device) / (1000 if name == "power_w" else 1)
    return seen


def square_product(device: str | torch.device, dtype: str) -> tuple[Callable[[], torch.Tensor], int]:
    """A square matrix product on random data, as a function to call, and its floating-point operations."""
    size = 512 if torch.device(device).type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def repeated(fn: Callable, times: int) -> Callable[[], None]:
    """A function that calls `fn` so many times."""

    def calls() -> None:
        for _ in range(times):
            fn()

    return calls


def fastest_ms(fn: Callable, device: str | torch.device, budget_s: float) -> float:
    """The least time of a call on the device's clock, of as many as fit in `budget_s` seconds."""
    seconds, launch_ms = estimate(fn, device, budget_s)
    return min(time_passes(fn, device, fitting(seconds, budget_s), launch_ms))


def overheads(device: str | torch.device, budget_s: float) -> dict[str, float]:
    """`launch_us` and `graph_us` of `ceilings`."""
    one, upstream = torch.ones(1, device=device), torch.ones(1, device=device)
    leaf = chain = torch.ones(1, device=device, requires_grad=True)
    for _ in range(TINY):
        chain = chain.neg()
    from_python = repeated(lambda: one.add_(1), TINY)
    from_autograd = partial(torch.autograd.grad, chain, leaf, upstream, retain_graph=True)

    def row_ms(fn: Callable, rows: int = 10) -> float:
        calls = fitting(estimate(fn, device, budget_s)[0], budget_s / rows)
        return min(in_a_row(fn, device, calls) for _ in range(rows))

    launched = min(row_ms(from_python), row_ms(from_autograd))
    executed, ways = launched, [from_python]
    if torch.device(device).type == "cuda":
        with suppress(UserError):
            ways.append(graphed(from_python, device))
        executed = min(launched, *(fastest_ms(way, device, budget_s) for way in ways))
    return {"launch_us": 1e3 * launched / TINY, "graph_us": 1e3 * executed / TINY}


def ceilings(device: str | torch.device, budget_s: float = 0.3) -> dict:
    """How fast the device goes at best, as measured now: the fastest of what fits in `budget_s` seconds for a figure.

    launch_us: what the host needs for one operation, one after another on the user's clock: on one element, called from
    Python or by a backward pass, whichever is cheaper. graph_us: what the device needs for it, on the device's clock:
    replayed from a CUDA graph, or, where none can be made, the least of the other ways; on a CPU launch_us. copy_gb_s:
    `{bytes: rate}`, a copy between two tensors of that many bytes, counting bytes read and written. clone_gb_s: the
    same into a tensor allocated for it, as every operation of a model does. gemm_tflop_s: `{dtype: rate}`, a square
    matrix product, a multiply-add counted as two operations."""
    copies: dict[int, float] = {}
    clones: dict[int, float] = {}
    on_cpu = torch.device(device).type == "cpu"
    # on a GPU closer together about the size at which both tensors just fit its L2 cache
    for log2 in (14, 17, 20, 23, 26, 29) if on_cpu else (17, 20, 23, 24, 25, 26, 29, 32):
        nbytes, repeats = 2**log2, min(100, max(1, 2 ** ((26 if on_cpu else 28) - log2)))
        if 8 * nbytes > memory_free(device):
            break
        source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        moved = 2 * nbytes * repeats / 1e6
        copies[nbytes] = moved / fastest_ms(repeated(partial(target.copy_, source), repeats), device, budget_s)
        clones[nbytes] = moved / fastest_ms(repeated(source.clone, repeats), device, budget_s)
    products = {name: square_product(device, name) for name in DTYPES}
    rates = {name: flops / fastest_ms(fn, device, budget_s) / 1e9 for name, (fn, flops) in products.items()}
    found = {"copy_gb_s": copies, "clone_gb_s": clones, "gemm_tflop_s": rates}
    return overheads(device, budget_s) | found
