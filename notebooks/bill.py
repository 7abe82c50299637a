"""What the same formula costs otherwise: joules, exponentials, and the same bits twice."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch

from attnlib.core import Machine, Shape, UserError
from attnlib.laws import Variant, work
from attnlib.memory.allocator import account
from attnlib.timing.clock import estimate, fitting, in_a_row, typical_ms
from attnlib.timing.machine import repeated, square_product, state
from attnlib.timing.sweep import Job, Row, point_name
from attnlib.variants.sdpa_laws import REPEATABLE_LAWS
from report.race import BATCHES, interval, passes
from report.skipping import NotMeasured

ENERGY = ["work", "joules", "low", "high", "ms", "burst_ms", "watts", "clock_mhz", "run"]  # the numbers of a row
AHEAD = 4  # calls that may be launched before they are due
SETTLING_S = 0.5  # until power and clock have settled
PATIENCE_S = 10.0  # for a step of the counter
AGAIN = 5  # backward passes that are to give the same bits


def energy_counter(device: str) -> Callable[[], float]:
    """A function that reads a GPU's energy counter, in joules. Raises NotMeasured where there is none."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        read = partial(nvml.nvmlDeviceGetTotalEnergyConsumption, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        read()
    except Exception as error:  # no library, no such counter, no permission: each says it in its own way
        raise NotMeasured(f"There is no energy counter here: {error}") from error
    return lambda: read() / 1e3


def step_of(read: Callable[[], float]) -> tuple[float, float]:
    """The time and the reading at a counter's next step. Raises NotMeasured if none comes in PATIENCE_S seconds."""
    before, begun = read(), time.perf_counter()
    while (now := read()) == before:
        if time.perf_counter() - begun > PATIENCE_S:
            raise NotMeasured("The energy counter here stands still.")
        time.sleep(5e-4)
    return time.perf_counter(), now


@contextmanager
def busy(call: Callable | None, device: str) -> Iterator[None]:
    """A thread that calls `call`, if there is one, without a pause, and has done so for SETTLING_S seconds."""
    stop, ahead = threading.Event(), deque[torch.cuda.Event]()

    def calls() -> None:
        with torch.cuda.device(device):
            while not stop.is_set() and call:
                call()
                ahead.append(torch.cuda.current_stream().record_event())
                if len(ahead) > AHEAD:  # or calls without an end would be waiting when it is to stop
                    ahead.popleft().synchronize()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(calls)
        try:
            time.sleep(SETTLING_S)
            yield
        finally:
            stop.set()
        done.result()  # raises what `call` did


def metered(name: str, make: Callable[[], tuple[Callable, int]] | None, device: str, window_s: float, run: int) -> Row:
    """What a function draws that `make` makes, called without a pause: `what`, the `work` of a call, `joules` and their
    99 % interval over BATCHES windows of `window_s` seconds, `ms`, in a burst of 0.1 s `burst_ms`, `watts` and
    `clock_mhz`. Of an idle device, where nothing is made, joules are those of a millisecond."""
    read, watts, clocks = energy_counter(device), list[float](), list[float]()
    call, flops = make() if make else (None, 0)
    burst = typical_ms(call, device, 0.1) if call else 1.0
    with busy(call, device):
        for _ in range(BATCHES):
            begun, before = step_of(read)
            time.sleep(window_s)
            clocks.append(state(device).get("clock_mhz", 0.0))
            ended, after = step_of(read)
            watts.append((after - before) / (ended - begun))
    ms = in_a_row(call, device, fitting(estimate(call, device, 0.1)[0], window_s)) if call else 1.0
    joules, low, high = (one * ms / 1e3 for one in interval(watts))
    row = {"what": name, "work": flops, "joules": joules, "low": low, "high": high, "ms": ms, "burst_ms": burst}
    return row | {"watts": 1e3 * joules / ms, "clock_mhz": sorted(clocks)[BATCHES // 2], "run": run}


def pass_of(variant: Variant, shape: Shape, phase: str, device: str) -> tuple[Callable, int]:
    """One pass, as a function to call, and its useful operations."""
    return passes(variant, shape, device, phase, 0), work(variant, shape, phase)


def copy_of(device: str) -> tuple[Callable, int]:
    """A copy of one GiB, and no operations."""
    source, target = (torch.randint(256, (2**30,), dtype=torch.uint8, device=device) for _ in range(2))
    return partial(target.copy_, source), 0


def energy_jobs(
    points: Iterable[tuple[Variant, Shape, str]], dtype: str, device: str, window_s: float, runs: int
) -> list[Job]:
    """`metered`, `runs` times: an idle device, a copy, a matrix product, and `(variant, shape, phase)`."""
    makes: dict[str, Any] = {"idle": None, "copy": partial(copy_of, device)}
    makes["matrix product"] = partial(square_product, device, dtype)
    for one, shape, phase in points:
        makes[f"{one.name}, {phase}, N = {shape.seq_len:,}"] = partial(pass_of, one, shape, phase, device)
    todo = [(name, make, device, window_s, run) for run in range(1, runs + 1) for name, make in makes.items()]
    return [Job(f"{arguments[0]}, run {arguments[-1]}", metered, arguments) for arguments in todo]


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms; without filling new memory, which is no part of them."""
    fills, before = torch.utils.deterministic, torch.get_deterministic_debug_mode()
    filled, fills.fill_uninitialized_memory = fills.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        fills.fill_uninitialized_memory = filled


def repeatable(variant: Variant, shape: Shape, device: str, budget_s: float) -> list[Row]:
    """As it comes, and under `deterministic`: the point's columns, `peak_bytes` of backward and `law_bytes`; with a
    budget whether AGAIN backward passes give the `same_bits`, and their `ms`; where PyTorch refuses, the `refused`."""
    rows = []
    for on, law in ((False, variant.law), (True, REPEATABLE_LAWS.get(variant.name, variant.law))):
        law_bytes = law.bytes("backward_peak", shape, Machine.of(device)) if law else None
        row = {"variant": variant.name, **shape.columns(), "deterministic": on, "refused": "", "law_bytes": law_bytes}
        try:
            with deterministic(on):
                passes(variant, shape, device, "backward", 0)()  # so that workspaces are there
                seen = account(variant, *variant.inputs(shape, device), causal=shape.causal, backward=True)
                row["peak_bytes"] = seen["backward_peak_bytes"]
                call = passes(variant, shape, device, "backward", 0)
                first = call()
                if budget_s:
                    row["same_bits"] = all(all(map(torch.equal, first, call())) for _ in range(AGAIN))
                    row["ms"] = typical_ms(call, device, budget_s)
        except (RuntimeError, UserError) as error:
            row["refused"] = str(error).splitlines()[0]
        rows.append(row)
    return rows


def repeatable_jobs(points: Iterable[tuple[Variant, Shape]], device: str, budget_s: float) -> list[Job]:
    """`repeatable` of each point; without a budget the memory alone."""
    return [Job(f"{point_name(*point)} {budget_s}", repeatable, (*point, device, budget_s)) for point in points]


def exponentials(device: str) -> Row:
    """`exponentials_per_s` of a device in float32, of numbers that stay where they are computed."""
    if torch.device(device).type == "cpu":
        rounds, numbers = 100, torch.rand(2**12 * torch.get_num_threads())  # 16 KiB a thread, and as many of results
        call = repeated(partial(torch.exp, numbers, out=torch.empty_like(numbers)), rounds)
    else:
        from notebooks._triton import only_exponentials

        numbers, rounds, size = torch.rand(2**22, device=device), 1000, 1024
        call = partial(only_exponentials[(numbers.numel() // size,)], numbers, ROUNDS=rounds, SIZE=size)
    return {"exponentials_per_s": 1e3 * numbers.numel() * rounds / typical_ms(call, device, 0.2)}
