"""The clock, the device at hand, a measured point, and the least time that a variant can take."""

import math

import faults
import numpy as np
import pytest
import torch

from attnlib import VARIANTS
from attnlib.core import DTYPES, Machine, Shape, UserError
from attnlib.rows import FIGURES, POINT, lacking
from attnlib.timing import machine as at_hand
from attnlib.timing.clock import milliseconds, statistics, time_passes, warm_up
from attnlib.timing.floor import floor, operations, rate_at
from attnlib.timing.measure import measure, out_of_memory
from attnlib.timing.sweep import point_jobs, run_jobs


def test_statistics():
    found = statistics("forward", [1.0, 2.0, 3.0, 4.0, 10.0])
    assert found["forward_ms"] == 3 and found["forward_ms_mean"] == 4 and found["forward_ms_count"] == 5
    assert found["forward_ms_p20"] == pytest.approx(1.8) and found["forward_ms_p80"] == pytest.approx(5.2)


def test_at_most_a_hundred_passes_and_at_least_one(device):
    x = torch.ones(64, device=device)
    assert 1 <= len(time_passes(lambda: x + 1, device, 0.2)) <= 100
    assert len(time_passes(lambda: x + 1, device, 1e-9)) >= 1


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
    import time

    x = torch.randn(512, 512, device="cuda")

    def slow():
        for _ in range(3):
            time.sleep(1e-3)
            x.relu()

    functions = [lambda: [x.relu() for _ in range(3)], slow]
    wait_ms = 2 * warm_up(functions, "cuda")
    fast_ms, slow_ms = np.median(milliseconds(functions, 20, "cuda", wait_ms), axis=0)
    assert slow_ms < 2 * fast_ms


def test_measure_one_point(device):
    row = measure(VARIANTS["naive"], Shape(2, 2, 65, 17), device, budget_s=0.1)
    assert row["status"] == "ok" and row["phase"] == "" and not lacking(row)
    assert row["forward_ms_p20"] <= row["forward_ms"] <= row["forward_ms_p80"]
    assert row["saved_bytes"] < row["forward_peak_bytes"] < row["backward_peak_bytes"]
    assert {*row} <= {*POINT, *FIGURES, "status", "phase", "reason", "kernel"}


def test_a_row_names_the_kernel_that_ran(device):
    shape = Shape(1, 2, 512, 64, "float16" if device == "cuda" else "float32")
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


def test_ceilings_are_rates_by_size_and_by_dtype(monkeypatch):
    """On a clock on which every pass takes a millisecond: 100 launches, a copy of both its operands, a product."""
    monkeypatch.setattr(at_hand, "time_passes", lambda fn, device, budget_s: [1.0, 1.0, 5.0])
    monkeypatch.setattr(at_hand, "memory_free", lambda device: 2**27)
    found = at_hand.ceilings("cpu", budget_s=1e-3)
    assert found["launch_us"] == pytest.approx(10)
    sizes = [2**20, 2**23]  # an eighth of the free memory at most
    assert [*found["copy_gb_s"]] == [*found["clone_gb_s"]] == sizes
    assert found["copy_gb_s"] == pytest.approx({size: 2 * 2**26 / 1e-3 / 1e9 for size in sizes})
    assert found["gemm_tflop_s"] == pytest.approx(dict.fromkeys(DTYPES, 2 * 512**3 / 1e-3 / 1e12))


def test_ceilings_of_the_device_at_hand(device, monkeypatch):
    """Real ones, in a hurry: positive and finite."""
    monkeypatch.setattr(at_hand, "memory_free", lambda device: 2**27)
    found = at_hand.ceilings(device, budget_s=1e-3)
    rates = [
        found["launch_us"],
        *(x for kind in ("copy_gb_s", "clone_gb_s", "gemm_tflop_s") for x in found[kind].values()),
    ]
    assert all(0 < rate < math.inf for rate in rates)


def toy(launch_us=1.0, gb_s=1000.0, tflop_s=1.0):
    """A machine with one rate for all sizes."""
    rates = {"launch_us": launch_us, "copy_gb_s": {"1024": gb_s}, "gemm_tflop_s": dict.fromkeys(DTYPES, tflop_s)}
    return Machine("cuda", ceilings=rates)


def test_the_rate_of_a_size_is_the_best_seen_at_that_size_or_above():
    """A small copy runs in a cache at a rate that a large one never sees, a tiny one waits for its launch: it is held
    against the best of all larger ones. Beyond the largest tried, that one's rate stands. JSON's keys are texts."""
    rates = {"1000": 50.0, "1000000": 900.0, "1000000000": 400.0}
    assert [rate_at(rates, size) for size in (1, 1000, 1001, 10**6, 10**6 + 1, 10**12)] == [900] * 4 + [400] * 2


def test_the_floor_is_the_sum_of_its_operations_or_of_their_launches():
    """By hand: each operation waits for its bytes or for its product, whichever takes longer; and the whole takes at
    least the launches one after the other."""
    variant, shape = VARIANTS["naive"], Shape(2, 1, 128, 32)
    for machine, regime in (
        (toy(launch_us=1e3), "launch"),
        (toy(launch_us=0, gb_s=1e-3, tflop_s=1e6), "bandwidth"),
        (toy(launch_us=0, gb_s=1e9, tflop_s=1e-6), "compute"),
    ):
        found, each = floor(variant, shape, machine), operations(variant, shape, machine)
        for phase, products in (("forward", 2), ("backward", 4)):
            mine = [op for op in each if op["phase"] == phase]
            launched = len(mine) * machine.ceilings["launch_us"] / 1e3
            executed = sum(
                max(
                    op["traffic_bytes"] / machine.ceilings["copy_gb_s"]["1024"] / 1e6,
                    op["flops"] / machine.ceilings["gemm_tflop_s"]["float32"] / 1e9,
                )
                for op in mine
            )
            assert found[f"{phase}_floor_ms"] == pytest.approx(max(launched, executed))
            assert found[f"{phase}_regime"] == regime
            assert sum(op["flops"] > 0 for op in mine) == products
    assert "return" not in {op["op"] for op in each} and {op["phase"] for op in each} == {"forward", "backward"}


def test_a_floor_falls_in_proportion_to_the_rate_that_bounds_it():
    variant, shape = VARIANTS["naive"], Shape(2, 1, 128, 32)
    slow, fast = (floor(variant, shape, toy(launch_us=0, gb_s=rate, tflop_s=1e9)) for rate in (1.0, 4.0))
    assert slow["backward_floor_ms"] == pytest.approx(4 * fast["backward_floor_ms"])
    assert slow["backward_floor_ms"] > slow["forward_floor_ms"] > 0


def test_a_floor_may_be_taken_at_other_rates():
    """Of clones, into memory allocated for them, in place of copies."""
    machine = toy(launch_us=0, tflop_s=1e9)
    machine.ceilings["clone_gb_s"] = {"1024": 500.0}
    variant, shape = VARIANTS["naive"], Shape(2, 1, 128, 32)
    copied, cloned = floor(variant, shape, machine), floor(variant, shape, machine, "clone_gb_s")
    assert cloned["forward_floor_ms"] == pytest.approx(2 * copied["forward_floor_ms"])


def test_points_of_one_name_are_measured_once(worker):
    point = VARIANTS["naive"], Shape(1, 1, 16, 4)
    ((job, rows),) = run_jobs(point_jobs([point, point], "cpu", 0.003), worker=worker)
    assert job.name == "naive 1 1 16 4 float32" and len(rows) == 1
