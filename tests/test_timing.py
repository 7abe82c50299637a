"""The times agree with the reference timers."""

import pytest
import torch
from agreement import disagreement, timers

from attnlib import VARIANTS
from attnlib import device as dev
from attnlib.core import Shape, useful_flops
from attnlib.measure import measure, statistics


def agrees(limit, *arguments, **options) -> bool:
    """Whether the two timers agree in one of five runs: a neighbour's load can only drive them apart."""
    for _ in range(5):
        frame = timers(*arguments, **options)
        if disagreement(frame[frame["reference_ms"] >= 0.1]["ratio"]) <= limit:
            return True
    return False


@pytest.mark.gpu
def test_times_agree_with_do_bench():
    assert agrees(0.03, "cuda", (1024, 4096), rounds=3)


def test_times_agree_with_torch_benchmark():
    assert agrees(0.05, "cpu", (256, 512), budget_s=0.05, rounds=8)


def test_statistics():
    found = statistics("forward", [1.0, 2.0, 3.0, 4.0, 10.0])
    assert found["forward_ms"] == 3 and found["forward_ms_mean"] == 4 and found["forward_ms_count"] == 5
    assert found["forward_ms_p20"] == pytest.approx(1.8) and found["forward_ms_p80"] == pytest.approx(5.2)


def test_at_most_a_hundred_passes_and_at_least_one(device):
    x = torch.ones(64, device=device)
    assert 1 <= len(dev.time_passes(lambda: x + 1, device, 1.0)) <= 100
    assert len(dev.time_passes(lambda: x + 1, device, 1e-9)) >= 1


def test_a_row_names_the_kernel_that_ran(device):
    shape = Shape(1, 2, 512, 64, "float16" if device == "cuda" else "float32")
    row = measure(VARIANTS["sdpa_flash"], shape, device, budget_s=0.1)
    assert {"cpu": "flash_attention_for_cpu", "cuda": "flash_fwd"}[device] in row["kernel"]


@pytest.mark.parametrize(("causal", "pairs"), [(False, 25), (True, 15)])
def test_useful_operations_are_those_of_the_pairs_that_are_seen(causal, pairs):
    shape = Shape(2, 3, 5, 7, causal=causal)
    assert useful_flops(shape, "forward") == 4 * 2 * 3 * 7 * pairs
    assert useful_flops(shape, "backward") == 2.5 * useful_flops(shape, "forward")


def test_measure_one_point(device):
    row = measure(VARIANTS["naive"], Shape(2, 2, 65, 17), device, budget_s=0.1)
    assert row["status"] == "ok" and row["phase"] == ""
    assert row["forward_ms_p20"] <= row["forward_ms"] <= row["forward_ms_p80"]
    assert row["saved_bytes"] < row["forward_peak_bytes"] < row["backward_peak_bytes"]


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
