"""Bytes counted by a GPU's hardware: what the profiler prints, what is damaged, and who may be counted."""

import pytest
from conftest import CPU_DATA

from attnlib import VARIANTS
from attnlib.core import Shape
from notebooks import traffic
from notebooks.block import in_block
from notebooks.races import ledger_traffic
from report.stored import machine_of

HEADER = '"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"\n"","","byte","byte"\n'
SPIN = "cuda::<unnamed>::spin_kernel(long)"
SHAPE = Shape(1, 1, 8, 4)


def printed(*kernels) -> str:
    """What ncu prints for kernels, `(name, bytes read, bytes written)`, behind its own remarks."""
    lines = [f'"{at}","{name}","{read:,}","{written:,}"' for at, (name, read, written) in enumerate(kernels)]
    return "==PROF== Connected\n" + HEADER + "\n".join(lines) + "\n"


def test_counters_are_summed_between_waiting_kernels():
    text = printed((SPIN, 9, 9), ("a", 1000, 2000), (SPIN, 9, 9), ("b", 10, 20), ("c<int, 2>(x)", 1, 2))
    forward, backward = traffic.summed(text, ["naive"], SHAPE)
    assert (forward["dram_bytes"], forward["kernels"]) == (3000, 1)
    assert (backward["dram_bytes"], backward["kernels"], backward["phase"]) == (33, 2, "backward")
    assert set(traffic.TRAFFIC) <= set(forward)


WHOLE = printed((SPIN, 9, 9), ("a", 1, 2), (SPIN, 9, 9), ("b", 1, 2))


@pytest.mark.parametrize(
    "damage", [('"byte"', '"Mbyte"'), ('"2"', '"n/a"'), ("dram__bytes_write.sum", "other"), ('"b"', '"spin_kernel"')]
)
def test_damaged_counters_are_no_rows(damage):
    assert traffic.summed(WHOLE, ["naive"], SHAPE)
    assert traffic.summed(WHOLE.replace(*damage), ["naive"], SHAPE) == []


@pytest.mark.parametrize("text", ["", "==ERROR== ERR_NVGPUCTRPERM", printed(), printed((SPIN, 1, 1), ("a", 1, 1))])
def test_without_counters_there_are_no_rows(text):
    assert traffic.summed(text, ["naive"], SHAPE) == []


def test_without_the_profiler_there_are_no_rows(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert traffic.counted(["naive"], SHAPE, "cuda:0") == []


def test_the_ledger_stands_in_for_counters():
    """Of a fused kernel: q, k, v and o once, and a float32 for each row."""
    shape, machine = Shape(1, 2, 256, 64), machine_of(CPU_DATA)
    rows = ledger_traffic([VARIANTS["naive"], VARIANTS["sdpa_flash"]], shape, machine)
    moved = rows.set_index(["variant", "phase"])["dram_bytes"]
    assert moved["sdpa_flash", "forward"] == 4 * 4 * 2 * 256 * 64 + 4 * 2 * 256
    assert moved["sdpa_flash", "forward"] < moved["naive", "forward"] < moved["naive", "backward"]


@pytest.mark.gpu
def test_what_is_profiled_takes_a_block(monkeypatch):
    monkeypatch.setitem(VARIANTS, "naive", in_block(VARIANTS["naive"]))
    traffic.run_once(["naive", "sdpa_math"], Shape(1, 2, 64, 8), "cuda:0")
