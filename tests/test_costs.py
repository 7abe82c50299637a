"""What chapter 5 and the profiles measure: kernels that add up, a forecast made of speeds, the same bits, joules."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from attnlib import VARIANTS
from attnlib.core import PHASES, Machine, Shape
from attnlib.dilated.attention import dilated_variant
from attnlib.laws import useful_flops
from attnlib.memory import check
from attnlib.memory.ledger import ledger
from attnlib.variants.sdpa_laws import REPEATABLE_LAWS
from notebooks import bill
from notebooks.block import in_block
from report import anatomy, forecast
from report.skipping import NotMeasured

CEILINGS = {"copy_gb_s": {"1024": 10.0}, "gemm_tflop_s": {"float32": 1.0, "bfloat16": 2.0}, "launch_us": 1.0}
CPU = Machine("cpu", ceilings=CEILINGS)
GPU = Machine("cuda", multiprocessors=100, ceilings=CEILINGS | {"graph_us": 2.0})


def speeds(*rows: tuple) -> pd.DataFrame:
    """Rows of speeds: `(kind, batch, heads, seq_len, head_dim, work, ms)`, float32 without a mask."""
    columns = ["kind", "batch", "heads", "seq_len", "head_dim", "work", "ms"]
    return pd.DataFrame(rows, columns=columns).assign(dtype="float32", causal=False)


@pytest.mark.parametrize("name", ["naive_custom", "naive", "naive_weights_only", "naive_recompute"])
def test_each_operation_of_a_ledger_has_its_time(name):
    """Also where checkpoint breaks off a product, which a profiler sees begin and no ledger lists."""
    shape = Shape(2, 1, 128, 16)
    parts = anatomy.anatomy(pd.DataFrame(anatomy.profiled(VARIANTS[name], shape, "cpu")), CPU)
    counted = [row for row in ledger(VARIANTS[name], shape) if row["phase"] in PHASES and row["traffic_bytes"]]
    assert len(parts) == len(counted) and parts["flops"].sum() == sum(row["flops"] for row in counted)
    assert (parts["ms"] > 0).all() and (parts["share"] == parts["least_ms"] / parts["ms"]).all()


def test_a_step_inside_an_operation_is_part_of_it():
    """The softmax's backward on a GPU is two rows of a ledger and one operation of a profiler."""
    found = anatomy.by_ledger(VARIANTS["naive"], Shape(1, 1, 64, 16), GPU).set_index("op")
    six = 6 * 64 * 64 * 4
    assert found.loc["_softmax_backward_data", "traffic_bytes"] == six and not any("(in" in op for op in found.index)


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>(float*)", "cunn_SoftMaxForward"),
        ("sm80_xmma_gemm_tn_n_tilesize128x128x8_stage3_warpsize2x4x1", "sm80_xmma_gemm_tn_n_tilesize128x128x8"),
        ("aten::_softmax", "_softmax"),
    ],
)
def test_names_of_kernels_are_cut_to_what_tells_them_apart(kernel, short):
    assert anatomy.short_name(kernel) == short


def test_a_kind_is_a_name_and_how_operands_lie():
    shape = Shape(2, 3, 64, 16, "bfloat16")
    kinds = [forecast.kind(row, shape) for row in ledger(VARIANTS["naive_custom"], shape) if row["call"]]
    assert {"bmm(ND, DNᵀ)", "bmm(NN, ND)", "bmm(NNᵀ, ND)", "exp(NN32)", "max(NN32)"} <= {*kinds}


def test_a_forecast_of_plain_attention_is_the_sum_of_its_operations():
    """Each at the rate that was measured for it, here the same at all lengths; other operations at the ceilings."""
    shape, naive = Shape(4, 1, 256, 64), VARIANTS["naive"]
    rows = [row for row in ledger(naive, shape) if row["phase"] == "forward" and row["call"]]
    one = {forecast.kind(row, shape): row["flops"] or row["traffic_bytes"] for row in rows} | {"": 0}
    known = [(kind, 4, 1, 256, 64, work, 3.0) for kind, work in one.items() if kind]
    found = forecast.Forecast(speeds(*known), CPU).of(naive, "forward", shape)
    others = [row for row in forecast.operations(naive, shape, CPU) if row["phase"] == "forward"]
    unknown = sum(row["execution_ms"] for row in others if not forecast.kind(row, shape))
    assert math.isclose(found, 3.001 * sum(forecast.kind(row, shape) != "" for row in rows) + unknown)


def test_between_two_lengths_rates_lie_on_a_line_in_logarithms_and_beyond_they_stay():
    made = forecast.Forecast(speeds(("x", 4, 1, 256, 64, 100.0, 1.0), ("x", 4, 1, 1024, 64, 1600.0, 4.0)), CPU)
    rates = [made.rate("x", Shape(4, 1, n, 64)) for n in (128, 256, 512, 1024, 4096)]
    assert [round(rate) for rate in rates] == [100, 100, 200, 400, 400] and made.rate("y", Shape(4, 1, 256, 64)) == 0


def test_few_matrices_take_longer_each_than_many():
    """As they leave a device idle: between the two measured the time is on a line, beyond the last in proportion."""
    made = forecast.Forecast(speeds(("x", 10, 1, 256, 64, 10.0, 2.0), ("x", 30, 1, 256, 64, 30.0, 4.0)), CPU)
    times = [count / made.rate("x", Shape(count, 1, 256, 64)) for count in (5, 10, 20, 30, 60)]
    assert [round(ms, 6) for ms in times] == [1.0, 2.0, 3.0, 4.0, 8.0]


def test_a_fused_kernel_is_slower_by_the_multiprocessors_that_its_tiles_leave_idle():
    full, third = Shape(100, 1, 128, 64), Shape(33, 1, 128, 64)
    known = [(f"{phase} sdpa_efficient", 100, 1, 128, 64, useful_flops(full, phase), 1.0) for phase in PHASES]
    made = forecast.Forecast(speeds(*known), GPU)
    assert math.isclose(made.of(VARIANTS["sdpa_efficient"], "forward", full), 1.002)
    assert math.isclose(made.of(VARIANTS["sdpa_efficient"], "forward", third), 1.002, rel_tol=1e-6)
    assert math.isnan(made.of(VARIANTS["fa4"], "forward", full))
    inside = made.of(in_block(VARIANTS["sdpa_efficient"]), "backward", full)
    assert inside > made.of(VARIANTS["sdpa_efficient"], "backward", full)


def test_a_forecast_of_dilated_attention_adds_its_calls_and_what_joins_them():
    one, two = (dilated_variant("dilated", *how, kernel="cpu") for how in (((256,), (1,)), ((256, 512), (1, 2))))
    shape, short = Shape(1, 2, 1024, 16), Shape(8, 1, 256, 16)
    known = [(f"{phase} sdpa_flash", 8, 1, 256, 16, useful_flops(short, phase), 1.0) for phase in PHASES]
    made = forecast.Forecast(speeds(*known), CPU)
    assert math.isclose(made.of(one, "forward", shape), 1.001)  # four segments of each of two heads
    assert made.of(two, "forward", shape) > 1.5 and made.of(two, "backward", shape) > made.of(two, "forward", shape)


def test_a_forecast_is_tried_on_passes_that_took_long_enough():
    """On a CPU by the 20th percentile."""
    row = {"variant": "sdpa_flash", **Shape(1, 2, 1024, 16).columns(), "forward_ms_p20": 2.0, "backward_ms_p20": 0.01}
    known = [
        (f"{phase} sdpa_flash", 1, 2, 1024, 16, useful_flops(Shape(1, 2, 1024, 16), phase), 1.0) for phase in PHASES
    ]
    rows, made = pd.DataFrame([row, row | {"variant": "fa4"}]), forecast.Forecast(speeds(*known), CPU)
    (found,) = forecast.forecasts(rows, VARIANTS, made, 0.1).to_dict("records")
    assert found["phase"] == "forward" and math.isclose(found["off"], 1.001 / 2 - 1)


def test_what_is_timed_covers_each_mask_and_leaves_out_what_cannot_run():
    plain, fused = forecast.what_to_time(replace(GPU, compute_capability="7.5"), "float16", quick=False)
    assert {shape.causal for shape, _ in plain} == {False, True} and {name for name, _ in fused} >= {"sdpa_efficient"}
    assert "sdpa_flash" not in {name for name, _ in fused}
    assert {name for name, _ in forecast.what_to_time(CPU, "bfloat16", quick=True)[1]} == {"sdpa_flash", "sdpa_default"}


def test_deterministic_memory_is_that_of_the_law(device):
    """To the byte on a GPU, at random shapes in both half types; on a CPU nothing changes."""
    wrong, drawn = [], {(one.batch, one.heads, one.seq_len, one.head_dim) for one in check.draw(31, 6)}
    for name, (b, h, n, d) in [(name, size) for name in REPEATABLE_LAWS for size in sorted(drawn)]:
        shape = Shape(b, h, min(n, 700), -(-d // 8) * 8, "float32" if device == "cpu" else "bfloat16", n % 2 == 0)
        if not VARIANTS[name].needs(shape, device):
            (plain, strict) = bill.repeatable(VARIANTS[name], shape, device, 0.0)
            same = strict["peak_bytes"] == strict["law_bytes"] and plain["peak_bytes"] == plain["law_bytes"]
            wrong += [] if same else [(name, shape, plain, strict)]
    assert not wrong and not torch.are_deterministic_algorithms_enabled()


def test_the_memory_of_the_same_bits_grows_with_the_gpu_and_falls_with_heads():
    law, shape = REPEATABLE_LAWS["sdpa_flash"], Shape(1, 4, 16384, 128, "bfloat16")
    small, large = (Machine("cuda", multiprocessors=m) for m in (66, 132))
    beyond = {
        m: law.bytes("backward_peak", shape, m) - 8 * shape.input_bytes // 3 for m in (small, large)
    }  # o, do, dq, dk, dv and the two copies
    assert beyond[large] > 1.9 * beyond[small]
    many = law.bytes("backward_peak", replace(shape, heads=132), large) / 33
    assert many < law.bytes("backward_peak", shape, large) / 3


def test_a_device_without_an_energy_counter_says_so():
    with pytest.raises(NotMeasured, match="no energy counter"):
        bill.metered("idle", None, "cpu", 0.1, 1)


def test_a_counter_that_moves_in_steps_is_read_at_a_step(monkeypatch):
    monkeypatch.setattr(bill, "PATIENCE_S", 0.1)
    with pytest.raises(NotMeasured, match="stands still"):
        bill.step_of(lambda: 1.0)
    readings = iter([1.0, 1.0, 1.0, 2.5])
    assert bill.step_of(lambda: next(readings))[1] == 2.5


def test_exponentials_are_counted_on_a_cpu_too():
    assert bill.exponentials("cpu")["exponentials_per_s"] > 1e6
