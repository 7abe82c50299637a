"""The clock, the device at hand, a measured point, and the least time that a variant can take."""

import json
import math
import time
from dataclasses import asdict, replace
from statistics import median
from types import SimpleNamespace

import faults
import numpy as np
import pytest
import torch
from conftest import COMMITTED

from attnlib import VARIANTS
from attnlib.core import DTYPES, PHASES, Machine, Shape, UserError
from attnlib.rows import FIGURES, POINT, TIMED, lacking
from attnlib.timing import clock
from attnlib.timing import machine as at_hand
from attnlib.timing import measure as measuring
from attnlib.timing.clock import (
    PASSES,
    WARM_UPS,
    alone,
    estimate,
    fitting,
    graphed,
    in_a_row,
    milliseconds,
    statistics,
    time_passes,
)
from attnlib.timing.measure import measure, out_of_memory, sample_counts
from attnlib.timing.sweep import point_jobs, run_jobs
from attnlib.timing.worker import Worker
from report.floor import floor, operations, rate_at
from report.predicted import with_floors
from report.race import warm_up
from report.stored import load, machine_of


def test_statistics():
    found = statistics("forward", [1.0, 2.0, 3.0, 4.0, 10.0])
    assert found["forward_ms"] == 3 and found["forward_ms_mean"] == 4 and found["forward_ms_count"] == 5
    assert found["forward_ms_p20"] == pytest.approx(1.8) and found["forward_ms_p80"] == pytest.approx(5.2)


@pytest.mark.parametrize("passes", [1, 7, PASSES])
def test_as_many_samples_as_asked_for(device, passes):
    x, calls = torch.ones(64, device=device), []

    def call():
        calls.append(x + 1)

    estimate(call, device, 1.0)
    for timed in (time_passes, alone):
        calls.clear()
        times = timed(call, device, passes)
        assert len(times) == len(calls) == passes and min(times) > 0


def test_one_after_another_is_the_time_of_one(device):
    """By the host's clock, from the first call to the end of the last, over their number."""
    calls = []
    found = in_a_row(lambda: calls.append(time.sleep(0.002)), device, 5)
    assert len(calls) == 5 and 2 <= found < 200


class Ticks:
    """A clock that only goes on while a call runs, in place of the module time; `took` holds what the calls take."""

    def __init__(self, *took):
        self.now, self.took, self.calls = 0.0, took, 0

    def perf_counter(self):
        return self.now

    def call(self):
        self.now += self.took[min(self.calls, len(self.took) - 1)]
        self.calls += 1


@pytest.mark.parametrize(
    ("took", "budget_s", "calls", "seconds"),
    [
        ((3.0, 1.0), 100.0, WARM_UPS, 1.0),
        ((3.0, 1.0), 8.0, 2, 1.0),  # half the budget is spent
        ((3.0, 1.0), 1.0, 1, 3.0),  # but one there is always
        ((1.0, 1.0, 0.5, 2.0), 100.0, WARM_UPS, 0.5),
    ],
)
def test_an_estimate_is_the_least_of_a_few_calls(monkeypatch, took, budget_s, calls, seconds):
    ticks = Ticks(*took)
    monkeypatch.setattr(clock, "time", ticks)
    assert estimate(ticks.call, "cpu", budget_s) == (seconds, 0.0) and ticks.calls == calls


def test_calls_fit_in_a_budget_from_one_to_a_hundred():
    assert [fitting(seconds, 1.0) for seconds in (1e-9, 0.01, 0.3, 1.0, 60.0)] == [100, 100, 3, 1, 1]


def test_all_passes_are_made_within_the_budget_or_our_patience():
    """By estimates: 100 passes of all three take 60 s here."""
    seconds = dict(zip(TIMED, (0.1, 0.2, 0.3), strict=True))
    assert sample_counts(seconds, 61, 0) == sample_counts(seconds, 2, 61) == dict.fromkeys(TIMED, PASSES)
    assert sample_counts(seconds, 2, 59) == dict(zip(TIMED, (6, 3, 2), strict=True))
    assert sample_counts(seconds, 4, 0) == dict(zip(TIMED, (13, 6, 5), strict=True)), "five fit in the whole of it"
    assert sample_counts(seconds, 0.2, 0) == dict.fromkeys(TIMED, 1)
    assert sample_counts(seconds, 59, 0) == dict(zip(TIMED, (PASSES, 98, 65), strict=True))


@pytest.mark.parametrize(("patience_s", "counts"), [(0, (10, 5, 5)), (61, (PASSES,) * 3)])
def test_a_point_gets_the_passes_it_is_estimated_to_have(monkeypatch, patience_s, counts):
    """Estimates of 0.1 and 0.2 s, and so of 0.3 s for both; each phase is timed with its own launches."""
    guesses = {phase: (0.1 * at, float(at)) for at, phase in enumerate(TIMED, 1)}
    left = [*guesses.values()][:2]
    monkeypatch.setattr(measuring, "estimate", lambda fn, device, budget_s: (fn(), left.pop(0))[1])
    seen = []
    monkeypatch.setattr(measuring, "time_passes", lambda fn, device, n, ms: [fn(), seen.append((n, ms)), 1.0][2:] * n)
    row = measure(VARIANTS["naive"], Shape(1, 1, 16, 4), "cpu", 3.03, patience_s)
    assert tuple(row[f"{phase}_ms_count"] for phase in TIMED) == counts and row["status"] == "ok"
    assert seen == [(n, launch_ms) for n, (_, launch_ms) in zip(counts, guesses.values(), strict=True)]


def test_functions_take_turns_in_an_order_drawn_for_each_round(device):
    """Each once a round; who is first changes, so that nobody always finds the caches of the same other."""
    x, calls = torch.ones(8, device=device), []
    functions = [lambda at=at: (calls.append(at), x + 1) for at in range(3)]
    warm_up(functions, device)
    calls.clear()
    times = milliseconds(functions, 8, device)
    assert times.shape == (8, 3) and (times > 0).all()
    rounds = np.array(calls).reshape(8, 3)
    assert (np.sort(rounds) == [0, 1, 2]).all() and len({*rounds[:, 0]}) > 1


@pytest.mark.gpu
def test_times_do_not_depend_on_the_pace_of_the_host():
    """A call that launches its kernels slowly takes the device no longer."""
    x = torch.randn(512, 512, device="cuda")

    def slow():
        for _ in range(3):
            time.sleep(1e-3)
            x.relu()

    functions = [lambda: [x.relu() for _ in range(3)], slow]
    wait_ms = 2 * warm_up(functions, "cuda")
    fast_ms, slow_ms = np.median(milliseconds(functions, 20, "cuda", wait_ms), axis=0)
    assert slow_ms < 2 * fast_ms


def chain(q, k, v):
    """Attention, forward and backward, of inputs without a graph of their own, as a function to call."""
    do = torch.randn_like(q)
    return lambda: torch.autograd.grad(VARIANTS["naive"].fn(q, k, v), (q, k, v), do)


@pytest.mark.gpu
def test_a_graph_replays_what_was_captured():
    """Forward alone, forward and backward, with what is in the inputs then; faster than by launching it."""
    q, k, v = Shape(1, 1, 64, 16).inputs("cuda")
    out = torch.zeros_like(q)
    forward = graphed(lambda: out.copy_(VARIANTS["naive"].fn(q, k, v).detach()), "cuda")
    with torch.no_grad():
        v.mul_(2)
    out.zero_()
    forward()
    torch.testing.assert_close(out, VARIANTS["naive"].fn(q, k, v).detach())
    both = chain(q, k, v)
    replay = graphed(both, "cuda")
    estimates = [estimate(fn, "cuda", 1.0) for fn in (both, replay)]
    assert estimates[1][1] < estimates[0][1], "one launch takes the host less than those of all kernels"
    assert median(time_passes(replay, "cuda", 20, estimates[1][1])) > 0
    assert median(alone(replay, "cuda", 20)) < median(alone(both, "cuda", 20))
    assert in_a_row(replay, "cuda", 20) < in_a_row(both, "cuda", 20)


@pytest.mark.gpu
def test_the_users_clock_sees_the_launches_and_the_devices_does_not():
    q, k, v = Shape(1, 1, 64, 16).inputs("cuda")
    both = chain(q, k, v)
    _, launch_ms = estimate(both, "cuda", 1.0)
    assert launch_ms > 0
    device_ms = median(time_passes(both, "cuda", 50, launch_ms))
    assert device_ms < in_a_row(both, "cuda", 50) and device_ms < median(alone(both, "cuda", 50))


def test_no_graph_is_made_on_a_cpu():
    with pytest.raises(UserError, match="CUDA graph needs a CUDA GPU"):
        graphed(lambda: None, "cpu")


def capture_a_wait():
    """What is said of a call that waits for the device, and whether the stream is the same afterwards."""
    x, before = torch.ones(8, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(UserError) as error:
        graphed(lambda: x.sum().item(), "cuda")
    return str(error.value), torch.cuda.current_stream() == before


@pytest.mark.gpu
def test_what_no_graph_can_hold_is_refused():
    """In a process of its own, whose allocator may take the capture to go on. Its stream is left."""
    with Worker() as worker:
        text, same_stream = worker.call(capture_a_wait)
    assert text.startswith("no CUDA graph can be made of it: ") and "\n" not in text and same_stream


@pytest.mark.gpu
def test_the_clock_needs_no_memory_to_flush_the_cache(monkeypatch):
    """With room for the call and 4 MiB beside it, and not with none."""
    torch.cuda.empty_cache()
    x = torch.randn(2**20, device="cuda")
    held, limit = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(clock, "CACHE_BYTES", limit)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (held + 64 * 2**20) / limit))
    try:
        assert len(time_passes(lambda: x + 1, "cuda", 3)) == 3
        with pytest.raises(torch.OutOfMemoryError):
            time_passes(lambda: torch.empty(2**27, device="cuda"), "cuda", 3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_measure_one_point(device):
    row = measure(VARIANTS["naive"], Shape(2, 2, 65, 17), device, budget_s=0.1)
    assert row["status"] == "ok" and row["phase"] == "" and not lacking(row)
    assert row["forward_ms_p20"] <= row["forward_ms"] <= row["forward_ms_p80"]
    assert row["saved_bytes"] < row["forward_peak_bytes"] < row["backward_peak_bytes"]
    assert {*row} <= {*POINT, *FIGURES, "status", "phase", "reason", "kernel"}


def test_a_row_names_the_kernel_that_ran(device):
    shape = Shape(1, 2, 2048, 64, "float16" if device == "cuda" else "float32")
    row = measure(VARIANTS["sdpa_flash"], shape, device, budget_s=0.1)
    assert {"cpu": "flash_attention_for_cpu", "cuda": "flash_fwd"}[device] in row["kernel"]


def test_a_device_may_be_named_by_torch_or_by_a_word(device):
    """An answer for torch.device("cuda") must not be one for the CPU, nor the other way round."""
    row = measure(VARIANTS["naive"], Shape(1, 1, 16, 4), torch.device(device), budget_s=0.01)
    assert row["status"] == "ok" and ("reserved_peak_bytes" in row) == (device == "cuda")


@pytest.mark.gpu
def test_running_out_of_memory_is_a_row_with_its_phase():
    shape = Shape(8, 1, 4096, 64)
    limit = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2.5 * 2**30 / limit))  # forward needs 1.5 GiB, backward 3
    try:
        row = measure(VARIANTS["naive_custom"], shape, "cuda", budget_s=0.3)
        assert (row["status"], row["phase"]) == ("oom", "backward") and row["forward_ms"] > 0
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1.2 * 2**30 / limit))
        row = measure(VARIANTS["naive_custom"], shape, "cuda", budget_s=0.3)
        assert (row["status"], row["phase"]) == ("oom", "forward") and "forward_ms" not in row
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def allocation_error() -> RuntimeError:
    """What PyTorch's CPU allocator really says."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    return error.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        allocation_error(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_what_says_that_memory_ran_out_does(error):
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "text", ["invalid allocator config", "misaligned allocation", "CUDA error: an illegal memory access", "", "alloc"]
)
def test_what_only_speaks_of_allocation_does_not(text):
    assert not out_of_memory(RuntimeError(text))


def large_only(error):
    """An attention that raises `error`, but for the small tensors on which the libraries' workspaces are made."""

    def fails(q, k, v, *, causal=False):
        if q.shape[2] > 16:
            raise error
        return q + k + v

    return faults.variant(fails)


@pytest.mark.parametrize("error", [allocation_error(), MemoryError("no memory")], ids=["PyTorch", "Python"])
def test_running_out_is_a_row(error):
    row = measure(large_only(error), Shape(1, 1, 32, 4), "cpu", budget_s=0.01)
    assert (row["status"], row["phase"]) == ("oom", "forward") and row["reason"]


def test_any_other_error_is_none():
    """See test_sweep for the row that stands in its place, a crash with its reason."""
    with pytest.raises(RuntimeError, match="misaligned"):
        measure(large_only(RuntimeError("misaligned allocation")), Shape(1, 1, 32, 4), "cpu", budget_s=0.01)


def test_an_operation_that_a_dtype_lacks_is_no_want_of_memory():
    lacks = large_only(NotImplementedError('"softmax" not implemented for this type\nand so on'))
    row = measure(lacks, Shape(1, 1, 32, 4), "cpu", budget_s=0.01)
    assert (row["status"], row["reason"]) == ("unsupported", '"softmax" not implemented for this type')


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:99", "", "CPU", "auto:1"])
def test_a_device_that_is_none_or_not_there_is_refused(name):
    with pytest.raises(UserError, match="device"):
        at_hand.resolve(name)


def test_the_description_is_of_the_machine_at_hand(device):
    found = at_hand.describe(device)
    assert found.kind == device and found.slug and found.date and found.memory_bytes > 2**30
    assert found.torch == torch.__version__ and len(found.machine) == 12 and at_hand.describe(device) == found
    assert at_hand.resolve("auto").startswith("cuda" if torch.cuda.is_available() else "cpu")


def test_the_digest_is_of_what_lasts():
    """Rows of one machine stay of one machine: whoever else uses it, whatever the driver tells on that day."""
    found = at_hand.describe("cpu")
    changed = replace(found, notes=("busy",), driver="580.1", power_limit_w=700.0)
    assert at_hand.digest(changed) == at_hand.digest(found) != at_hand.digest(replace(found, threads=99))


def test_a_machine_is_read_back_as_it_was_written():
    """JSON makes lists of tuples."""
    found = Machine("cuda", packages=("flash-attn-4",), notes=("one", "two"), driver="580.1", power_limit_w=700.0)
    again = Machine.from_facts(json.loads(json.dumps(asdict(found))))
    assert again == found and again.notes == found.notes and hash(again) == hash(found)
    assert Machine.from_facts({"kind": "cpu"}).notes == ()


@pytest.mark.parametrize(("others", "count"), [(0, 0), (2**30, 0), (3 * 2**30, 1)])
def test_a_gpu_that_others_use_has_a_note(others, count):
    """Half a GiB is the driver's own, for us; what PyTorch holds is ours as well."""
    total, reserved = 80 * 2**30, 2**30
    notes = at_hand.crowding(total - others - 2**29 - reserved, total, reserved)
    assert len(notes) == count
    assert not notes or notes[0] == "Other programs held 3.0 GiB of this GPU when the measuring began."


def test_a_driver_is_asked_by_uuid_and_may_keep_silent(monkeypatch):
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetHandleByUUID={"GPU-1-2": 7}.__getitem__,
        nvmlDeviceGetEnforcedPowerLimit={7: 700_000}.__getitem__,
    )
    monkeypatch.setattr(at_hand, "import_module", lambda name: library)
    assert at_hand.from_driver("1-2") == at_hand.from_driver("GPU-1-2") == {"driver": "580.1", "power_limit_w": 700.0}
    assert at_hand.from_driver("other") == {"driver": "580.1"}
    monkeypatch.setattr(at_hand, "import_module", lambda name: 1 / 0)
    assert at_hand.from_driver("1-2") == {}


def test_points_at_the_power_limit_are_counted():
    machine = Machine("cuda", power_limit_w=700.0)
    found = at_hand.at_power_limit([679.0, 678.0, 705.5, math.nan, None], machine)
    told = "In 2 of 3 points, short bursts with rests between, the GPU drew at least 97% of its power limit of 700 W"
    assert found == f"{told}; a clock may sink long before that."
    assert at_hand.at_power_limit([100.0], machine) is None and at_hand.at_power_limit([], machine) is None
    assert at_hand.at_power_limit([700.0], Machine("cuda")) is None


def test_a_cpu_that_hides_its_clock_costs_nothing(monkeypatch):
    monkeypatch.setattr(at_hand.psutil, "cpu_freq", lambda: 1 / 0, raising=False)
    assert at_hand.state("cpu") == {}


def test_ceilings_are_rates_by_size_and_by_dtype(monkeypatch):
    """On clocks on which a pass takes a millisecond at best: 100 operations, copies of both operands, a product."""
    monkeypatch.setattr(at_hand, "estimate", lambda fn, device, budget_s: (budget_s / 3, 0.0))
    monkeypatch.setattr(at_hand, "time_passes", lambda fn, device, passes, launch_ms: [5.0, 1.0, 1.5])
    rows = iter([2.0] * 9 + [1.0] + [3.0] * 10)
    monkeypatch.setattr(at_hand, "in_a_row", lambda fn, device, calls: next(rows))
    monkeypatch.setattr(at_hand, "memory_free", lambda device: 2**27)
    found = at_hand.ceilings("cpu", budget_s=1e-3)
    assert found["launch_us"] == found["graph_us"] == pytest.approx(10) and not [*rows]
    sizes = [2**14, 2**17, 2**20, 2**23]  # an eighth of the free memory at most
    assert [*found["copy_gb_s"]] == [*found["clone_gb_s"]] == sizes
    moved = {size: 2 * size * min(100, 2**26 // size) for size in sizes}
    assert found["copy_gb_s"] == pytest.approx({size: nbytes / 1e-3 / 1e9 for size, nbytes in moved.items()})
    assert found["gemm_tflop_s"] == pytest.approx(dict.fromkeys(DTYPES, 2 * 512**3 / 1e-3 / 1e12))


def test_ceilings_of_the_device_at_hand(device, monkeypatch):
    """Real ones, in a hurry: all there, positive and finite."""
    monkeypatch.setattr(at_hand, "memory_free", lambda device: 2**27)
    found = at_hand.ceilings(device, budget_s=1e-3)
    assert {*found} == {"launch_us", "graph_us", "copy_gb_s", "clone_gb_s", "gemm_tflop_s"}
    tables = [table for table in found.values() if isinstance(table, dict)]
    rates = [found["launch_us"], found["graph_us"], *(rate for table in tables for rate in table.values())]
    assert all(0 < rate < math.inf for rate in rates) and all(tables)
    assert found["graph_us"] <= found["launch_us"] and (device == "cuda" or found["graph_us"] == found["launch_us"])


def toy(kind="cuda", launch_us=0.0, graph_us=0.0, gb_s=1e9, tflop_s=1e6):
    """A machine with one rate for all sizes; what is not said takes no time."""
    rates = {"launch_us": launch_us, "copy_gb_s": {"1024": gb_s}, "gemm_tflop_s": dict.fromkeys(DTYPES, tflop_s)}
    return Machine(kind, ceilings=rates | ({} if graph_us is None else {"graph_us": graph_us}))


NAIVE, SMALL = VARIANTS["naive"], Shape(2, 1, 128, 32)


def test_the_rate_of_a_size_is_the_best_seen_from_the_next_below_it_up():
    """What lies between two sizes may still run in the cache in which the smaller one runs. Beyond the largest tried,
    that one's rate stands; below the smallest, the best of all. JSON's keys are texts."""
    rates = {"1000": 50.0, "100000": 900.0, "1000000": 700.0, "1000000000": 400.0}
    sizes = (1, 1000, 99_999, 10**5, 10**6 - 1, 10**6, 10**9 - 1, 10**9, 10**12)
    assert [rate_at(rates, size) for size in sizes] == [900] * 5 + [700] * 2 + [400] * 2


def test_a_rate_is_a_bound_between_the_sizes_seen():
    """Of a machine whose rate falls, or rises, from size to size: no size in between goes faster than `rate_at`."""
    for true_rate in (lambda size: 1e6 / size, lambda size: size / 1e6):
        seen = {size: true_rate(size) for size in (10, 100, 1000)}
        assert all(rate_at(seen, size) >= true_rate(size) for size in range(10, 1001))


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_the_floor_is_the_sum_of_its_operations(kind):
    """By hand: each operation waits for its bytes, for its product, or for being an operation at all."""
    tiny = {"cpu": {"launch_us": 3.0}, "cuda": {"graph_us": 3.0}}[kind]
    machine = toy(kind, gb_s=60.0, tflop_s=0.5, **tiny)
    one = VARIANTS["naive_custom"]  # whose row sums are tiny
    found, each = floor(one, SMALL, machine), operations(one, SMALL, machine)
    for phase, products in (("forward", 2), ("backward", 4)):
        mine = [op for op in each if op["phase"] == phase]
        least = [max(op["traffic_bytes"] / 60 / 1e6, op["flops"] / 0.5 / 1e9, 3e-3) for op in mine]
        assert found[f"{phase}_floor_ms"] == pytest.approx(sum(least))
        assert sum(op["flops"] > 0 for op in mine) == products
        assert all(op["traffic_bytes"] or op["flops"] for op in mine)
    assert "return" not in {op["op"] for op in each} and {op["phase"] for op in each} == {*PHASES}
    assert {op["regime"] for op in each} == {"launch" if kind == "cpu" else "latency", "bandwidth", "compute"}


@pytest.mark.parametrize(
    ("machine", "regime"),
    [
        (toy(graph_us=1e3), "latency"),
        (toy(graph_us=1.0, launch_us=1e3), "latency"),
        (toy(gb_s=1e-3, launch_us=1.0), "bandwidth"),
        (toy(gb_s=1e-3, launch_us=1e9), "bandwidth"),
        (toy(tflop_s=1e-6), "compute"),
        (toy("cpu", launch_us=1e3, graph_us=1.0), "launch"),
        (toy("cpu", launch_us=1.0, gb_s=1e-3), "bandwidth"),
        (toy(graph_us=None, gb_s=1e-3), "bandwidth"),
    ],
)
def test_each_clock_has_its_floor(machine, regime):
    """The user waits for the device, and for all launches one after the other; on a CPU the clocks are one."""
    found, each = floor(NAIVE, SMALL, machine), operations(NAIVE, SMALL, machine)
    for phase in PHASES:
        mine = [op["execution_ms"] for op in each if op["phase"] == phase]
        launches = len(mine) * machine.ceilings["launch_us"] / 1e3
        assert found[f"{phase}_regime"] == regime
        assert found[f"{phase}_floor_ms"] == pytest.approx(sum(mine))
        assert found[f"{phase}_user_floor_ms"] == pytest.approx(max(sum(mine), launches))
        assert not machine.is_cpu or found[f"{phase}_user_floor_ms"] == found[f"{phase}_floor_ms"]


def test_a_floor_falls_in_proportion_to_the_rate_that_bounds_it():
    slow, fast = (floor(NAIVE, SMALL, toy(gb_s=rate, tflop_s=1e9)) for rate in (1.0, 4.0))
    assert slow["backward_floor_ms"] == pytest.approx(4 * fast["backward_floor_ms"])
    assert slow["backward_floor_ms"] > slow["forward_floor_ms"] > 0


def test_no_committed_median_lies_below_its_floor():
    """On any device, at any point: a floor that is undercut is none."""
    below = []
    for device in COMMITTED:
        rows = with_floors(load(device, "01_naive_sweep"), machine_of(device, "01"))
        for phase in PHASES:
            under = rows[rows[f"{phase}_ms"] < rows[f"{phase}_floor_ms"]]
            below += [(device, phase, *point) for point in under[[*POINT]].itertuples(index=False, name=None)]
    assert not below


def test_points_of_one_name_are_measured_once(worker):
    point = VARIANTS["naive"], Shape(1, 1, 16, 4)
    ((job, rows),) = run_jobs(point_jobs([point, point], "cpu", 0.003), worker=worker)
    assert job.name == "naive 1 1 16 4 float32" and len(rows) == 1
