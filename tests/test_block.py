"""The block around an attention variant: what it computes, and that all that measures a variant takes a block."""

import pytest
import torch

from attnlib import VARIANTS
from attnlib.core import Machine, Shape
from attnlib.memory.allocator import account
from attnlib.memory.check import compare, mismatches, observed, with_observed
from attnlib.memory.ledger import ledger
from attnlib.timing.measure import measure
from attnlib.timing.sweep import observation_jobs
from notebooks.block import block_inputs, in_block, transformer_block
from report.race import batch, passes


def test_the_block_is_what_torch_calls_attention_with_a_residual_and_a_norm():
    """nn.MultiheadAttention with the same weights, then x + …, then nn.LayerNorm."""
    shape = Shape(2, 3, 10, 4)
    x, qkv_weight, out_weight, gain, bias = block_inputs(shape)
    attention = torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    attention.load_state_dict({"in_proj_weight": qkv_weight, "out_proj.weight": out_weight})
    hidden = x.flatten(2)
    expected = torch.nn.LayerNorm(12)(hidden + attention(hidden, hidden, hidden, need_weights=False)[0])
    found = transformer_block(VARIANTS["naive"].fn, x, qkv_weight, out_weight, gain, bias)
    torch.testing.assert_close(found.flatten(2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["naive_custom", "naive_recompute", "sdpa_math", "sdpa_flash", "tiled"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_variant_gives_the_same_block(name, causal):
    inputs = block_inputs(Shape(2, 3, 33, 8))
    results = []
    for variant in ("naive", name):
        o = in_block(VARIANTS[variant]).fn(*inputs, causal=causal)
        results.append([o, *torch.autograd.grad(o, inputs, torch.ones_like(o) + o.detach())])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_block_is_measured_like_a_variant(device):
    """Its row names the kernel of the attention alone, not a projection's."""
    row = measure(in_block(VARIANTS["sdpa_flash"]), Shape(1, 4, 256, 64, "bfloat16"), device, budget_s=0.05)
    assert row["status"] == "ok" and row["variant"] == "sdpa_flash" and row["forward_backward_ms"] > 0
    assert ("flash_fwd" if device == "cuda" else "flash_attention_for_cpu") in row["kernel"]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_block_races_like_a_variant(phase, device):
    """`passes` takes the variant's own inputs, of which a block has five, and gives a gradient for each."""
    block, shape = in_block(VARIANTS["naive"]), Shape(1, 2, 16, 8)
    found = passes(block, shape, device, phase, 0)()
    assert len(found) == (1 if phase == "forward" else 5)
    assert batch([(block, shape), (VARIANTS["naive"], shape)], device, phase, 0, 0.01).shape[1] == 2


def test_the_memory_of_a_block_is_more_than_that_of_its_attention(device):
    """The allocator sees it like any variant; it also keeps the projections and what the norm needs."""
    shape, seen = Shape(1, 2, 64, 8), []
    for variant in (VARIANTS["naive"], in_block(VARIANTS["naive"])):
        inputs = variant.inputs(shape, device)
        for _ in range(2):  # the first makes the libraries' workspaces
            found = account(variant, *inputs, causal=False, backward=True)
        seen.append(found)
    assert all(seen[0][f"{which}_bytes"] < seen[1][f"{which}_bytes"] for which in ("saved", "backward_peak"))


def test_a_block_is_observed_like_a_variant(device):
    row = observed(in_block(VARIANTS["naive"]), Shape(1, 2, 64, 8), device)
    assert row["variant"] == "naive" and row["saved_requested_bytes"] > 0
    assert (row["saved_allocated_bytes"] is None) == (device == "cpu")


def test_of_a_block_nothing_is_booked_and_nothing_can_be_contradicted():
    """No law, no ledger: the allocator's word stands alone, in the check of memory and in how many may run at once."""
    block, shape = in_block(VARIANTS["naive"]), Shape(1, 2, 16, 8)
    rows = with_observed([compare(block, shape)], [observed(block, shape, "cpu")])
    assert mismatches(rows, {"naive": block}, "cpu") == []
    (job,) = observation_jobs([(block, shape)], "cpu", Machine.of("cpu"))
    assert job.claim_bytes == 0 and job.function(*job.arguments)["saved_requested_bytes"] > 0
    assert ledger(block, shape)[-1]["phase"] == "backward"
