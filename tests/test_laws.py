"""Formula = ledger = allocator: operations, traffic and memory of every variant."""

import random

import pytest

from attnlib import FUSED, NAIVE, VARIANTS
from attnlib.core import ACCOUNTS, DTYPES, Shape
from attnlib.memory import account, ledger, reached
from attnlib.tables import law_and_ledger

draw = random.Random(7)
SHAPES = [
    Shape(draw.randint(1, 2), draw.randint(1, 2), draw.randint(200, 500), draw.randint(1, 40), dtype, causal)
    for dtype in DTYPES
    for causal in (False, True)
]
# where N does not exceed D, other operations than the softmax decide the peaks
NARROW = [
    Shape(1, 1, 1, 1),
    Shape(2, 3, 1, 64, "bfloat16", True),
    Shape(1, 2, 3, 256, "float16", True),
    Shape(3, 1, 40, 100),
    Shape(1, 1, 130, 129, "bfloat16"),
]
# what the fused kernels of a GPU take: D in multiples of 8; few rows, so that keys are split; more than one tile
ALIGNED = [
    Shape(1, 1, 1100, 64, "bfloat16", True),
    Shape(2, 3, 333, 128, "float16"),
    Shape(1, 2, 77, 192, "bfloat16", True),
    Shape(2, 1, 500, 16),
    Shape(1, 3, 200, 96, causal=True),
]


def runnable(name, shape, device, *, by="ledger"):
    """The variant, unless it has no law or is not made for such a shape or device: then the test is skipped."""
    variant = VARIANTS[name]
    if not variant.law or (by == "ledger" and not variant.ledgered):
        pytest.skip(f"{name} has no law" if not variant.law else f"no ledger can run {name}")
    if reason := variant.needs(shape, device):
        pytest.skip(reason)
    return variant


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_counts_equal_the_ledger(name, shape, kind):
    for what in ("flops", "traffic"):
        formula, counted = law_and_ledger({name: VARIANTS[name]}, [shape], what, kind)
        assert formula == counted, what


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("shape", ALIGNED, ids=str)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_products_of_fused_kernels_equal_the_ledger(name, shape, kind):
    """As PyTorch's own counter sees them: with a mask it counts all pairs of a fused kernel all the same."""
    variant = runnable(name, shape, kind)
    rows = ledger(variant, shape, kind)
    for phase in ("forward", "backward"):
        counted = sum(row["flops"] for row in rows if row["phase"] == phase)
        assert shape.evaluate(getattr(variant.flops, phase), kind) == counted, phase


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES + NARROW + ALIGNED, ids=str)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_laws_equal_the_ledger(name, shape, kind):
    law = runnable(name, shape, kind).law
    for which, row in reached(ledger(VARIANTS[name], shape, kind)).items():
        assert law.bytes(which, shape, kind) == row["alive_bytes"] == sum(row["alive"].values()), which
        assert law.bytes(which, shape, kind) == sum(law.at(which, shape, kind)[1].values()), which


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES + NARROW + ALIGNED, ids=str)
def test_law_equals_the_allocator(name, shape, device):
    """To the byte on CUDA. The CPU's allocator also counts the scale factor as a tensor, and in the half-size types its
    kernels take buffers of their own, which no law of PyTorch's operations can know: there the peaks may be higher."""
    variant, qkv = runnable(name, shape, device, by="allocator"), shape.inputs(device)
    for _ in range(2):  # the first run makes the libraries' workspaces
        seen = account(variant, *qkv, causal=shape.causal, backward=True)
    for which in ACCOUNTS:
        excess = seen[f"{which}_bytes"] - variant.law.bytes(which, shape, device)
        if device == "cuda":
            assert excess == 0, which
        elif shape.dtype == "float32" or which == "saved":
            assert 0 <= excess <= 16, which
