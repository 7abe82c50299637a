"""The device: which one it is, how its time is taken, what state it is in, and how fast it can go at best."""

import hashlib
import os
import platform
import random
import re
import time
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attnlib.core import DTYPES, AttnError

PASSES = 100  # the published protocol's number of timed passes
CYCLES_PER_MS = 2_000_000  # of a waiting kernel, at about the highest clock that GPUs have
CACHE_BYTES = 256 * 2**20  # overwritten before each pass, more than any cache holds, as triton's do_bench does


def resolve(name: str) -> str:
    """The torch device that `name` means: "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:1".

    Raises AttnError for anything else, and for a GPU that is not there.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return "cuda:0" if gpus else "cpu"
    if name == "cpu":
        return name
    if not (match := re.fullmatch(r"cuda(?::(\d+))?", name)):
        raise AttnError(f"device must be auto, cpu, cuda or cuda:<index>, not {name!r}")
    index = int(match[1] or 0)
    if index >= gpus:
        raise AttnError(f"device {name} is not there: torch {torch.__version__} sees {gpus} GPU(s)")
    return f"cuda:{index}"


def slug(name: str) -> str:
    """The folder name of a device: "NVIDIA H200" becomes "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    """The processor's model name where the system tells it, else its architecture."""
    try:
        return re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)[1].strip()
    except (OSError, TypeError):
        return f"CPU {platform.processor() or platform.machine()}"


def memory_free(device: str) -> int:
    """Bytes that a new allocation can get: a GPU's free memory, and what PyTorch holds of it and does not use; on the
    CPU the machine's or the container's."""
    if device != "cpu":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        return min(free, limit)
    except (OSError, ValueError):
        return free


def describe(device: str) -> dict:
    """What `device` is and which versions run on it. Call it in a worker: on a GPU it makes a CUDA context.

    `machine` is a digest of all of it and of the host's name: rows of the same digest may stand in one file.
    """
    facts = {"kind": torch.device(device).type}
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    if device == "cpu":
        facts |= {"name": cpu_name(), "memory_bytes": psutil.virtual_memory().total}
    else:
        import triton

        gpu = torch.cuda.get_device_properties(device)
        facts |= {"name": gpu.name, "memory_bytes": gpu.total_memory, "triton": triton.__version__}
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        facts |= {"compute_capability": f"{gpu.major}.{gpu.minor}", "l2_bytes": gpu.L2_cache_size}
        facts |= {"multiprocessors": gpu.multi_processor_count}
    digest = hashlib.sha256(repr((platform.node(), sorted(facts.items()))).encode()).hexdigest()[:12]
    return {"machine": digest, "slug": slug(facts["name"]), "date": date.today().isoformat(), **facts}


def state(device: str) -> dict:
    """`sm_clock_mhz, power_w, temperature_c` of the device now, as far as it tells."""
    if device == "cpu":
        clock = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
        return {"clock_mhz": clock.current} if clock else {}
    readers = {
        "clock_mhz": lambda: torch.cuda.clock_rate(device),
        "power_w": lambda: torch.cuda.power_draw(device) / 1000,
        "temperature_c": lambda: torch.cuda.temperature(device),
    }
    seen = {}
    for name, read in readers.items():
        try:
            seen[name] = read()
        except Exception:  # a driver that hides one of them must not cost the measurement
            continue
    return seen


def warm_up(functions: list, device: str) -> float:
    """Call each function, on a GPU twice. Returns the longest that the host took to launch the second call, in ms."""
    slowest = 0.0
    for fn in functions:
        fn()
        if device != "cpu":
            torch.cuda.synchronize(device)
            begun = time.perf_counter()
            fn()
            slowest = max(slowest, 1e3 * (time.perf_counter() - begun))
    return slowest


def milliseconds(functions: list, rounds: int, device: str, wait_ms: float = 0.5) -> np.ndarray:
    """`[rounds, len(functions)]`: each call's time, the functions taking turns in an order drawn for each round.

    On CUDA each call is queued behind a kernel that waits for `wait_ms`. What the host launches in that time runs at
    the device's pace alone; what takes longer to launch does not.
    """
    times, order = np.zeros((rounds, len(functions))), list(range(len(functions)))
    flush = None if device == "cpu" else torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    marks = []
    for turn in range(rounds):
        random.Random(turn).shuffle(order)
        for which in order:
            if device == "cpu":
                begun = time.perf_counter_ns()
                functions[which]()
                times[turn, which] = (time.perf_counter_ns() - begun) / 1e6
                continue
            with torch.cuda.device(device):
                flush.zero_()
                torch.cuda._sleep(int(wait_ms * CYCLES_PER_MS))
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


def time_passes(fn, device: str, budget_s: float) -> list[float]:
    """Milliseconds of up to 100 calls of `fn`, as many as fit in `budget_s` seconds, at least one, after warm-ups.

    On CUDA by triton.testing.do_bench: device events, the L2 cache flushed before each pass, six warm-ups of its own.
    On the CPU by torch.utils.benchmark.Timer with all of torch's threads, after five warm-ups (fewer where they alone
    would use up half the budget); where a pass is shorter than about a millisecond each figure is the mean over a block
    of passes. Where fewer than six passes fit, by `milliseconds`, which needs no more of them.
    """
    warm_ups, begun = 5 if device == "cpu" else 2, time.perf_counter()
    for _ in range(warm_ups):
        started = time.perf_counter()
        fn()
        if device != "cpu":
            torch.cuda.synchronize(device)
        estimate_s = time.perf_counter() - started
        if time.perf_counter() - begun > budget_s / 2:
            break
    if estimate_s > budget_s / 6:
        return milliseconds([fn], max(1, int(budget_s / estimate_s)), device)[:, 0].tolist()
    span_s = min(budget_s, PASSES * estimate_s)
    if device == "cpu":
        from torch.utils.benchmark import Timer  # not at the top: it counts GPUs, and no fork could then use one

        timer = Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
        return [1e3 * s for s in timer.blocked_autorange(min_run_time=span_s).times[:PASSES]]
    from triton.testing import do_bench

    with torch.cuda.device(device):
        return do_bench(fn, warmup=0, rep=1e3 * span_s, return_mode="all")[:PASSES]


def kernel(fn, device: str) -> str:
    """The name of the kernel that one call of `fn` spends most time in; on the CPU, of PyTorch's operator."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes two lines to stderr each time
    kind = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[kind], acc_events=True) as seen:
        fn()
        if device != "cpu":
            torch.cuda.synchronize(device)
    time_of = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    events = [event for event in seen.key_averages() if device == "cpu" or event.device_type != DeviceType.CPU]
    return max(events, key=lambda event: getattr(event, time_of)).key if events else ""


def median(values) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def gemm(device: str, dtype: str):
    """A square matrix product on random data, as a function to call, and its floating-point operations."""
    size = 512 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def ceilings(device: str, budget_s: float = 0.3) -> dict:
    """How fast the device goes at best, as measured now; three numbers explain most of what attention costs.

    launch_us: one operation on one element, its overhead and nothing else. copy_gb_s: `{bytes: rate}`, a copy between
    two tensors of that many bytes, counting bytes read and written. clone_gb_s: the same into a tensor allocated for
    it, as every operation of a model does. gemm_tflop_s: `{dtype: rate}`, a square matrix product, a multiply-add
    counted as two operations.
    """

    def seconds(fn):
        return median(time_passes(fn, device, budget_s)) / 1e3

    def repeat(fn, times):
        for _ in range(times):
            fn()

    one = torch.ones(1, device=device)
    found = {"launch_us": seconds(lambda: repeat(lambda: one.add_(1), 100)) * 1e6 / 100}
    found |= {"copy_gb_s": {}, "clone_gb_s": {}, "gemm_tflop_s": {}}
    for log2 in range(20, 30 if device == "cpu" else 33, 3):
        nbytes, repeats = 2**log2, max(1, 2 ** (26 - log2))
        if 8 * nbytes > memory_free(device):
            break
        source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        moved = 2 * nbytes * repeats / 1e9
        # the loops bind this round's tensors: each is called before the next round
        found["copy_gb_s"][nbytes] = moved / seconds(lambda: repeat(lambda: target.copy_(source), repeats))  # noqa: B023
        found["clone_gb_s"][nbytes] = moved / seconds(lambda: repeat(lambda: source.clone(), repeats))  # noqa: B023
    for name in DTYPES:
        product, flops = gemm(device, name)
        found["gemm_tflop_s"][name] = flops / seconds(product) / 1e12
    return found
