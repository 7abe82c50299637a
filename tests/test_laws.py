"""Formula = ledger = allocator: operations, traffic and memory of every variant."""

import random
from dataclasses import replace

import pytest

from attnlib import FAMILIES, VARIANTS
from attnlib.core import DTYPES, PHASES, Machine, Shape, UserError
from attnlib.laws import ACCOUNTS, bytes_needed, evaluate, law_of, useful_flops, work
from attnlib.memory.allocator import account
from attnlib.memory.check import wrapped_scalars
from attnlib.memory.ledger import ledger, reached

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
ALL = SHAPES + NARROW + ALIGNED
FA4_TOO = replace(Machine.of("cuda"), packages=("flash-attn-4",))


def able(shape, device):
    """The variants that take such a shape there, whether it is there or not; compiled ones have tests of their own."""
    known = [variant for name, variant in VARIANTS.items() if name not in FAMILIES["compiled"]]
    return [variant for variant in known if not variant.needs(shape, device)]


@pytest.mark.parametrize("shape", ALL, ids=str)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_formulas_equal_the_ledger(shape, kind):
    """Memory of each variant that has a law and a ledger, the operations of its matrix products, and its traffic.

    The latter two where they are given: of plain attention at random sizes, and of fused kernels, as PyTorch's own
    counter sees them, where D needs no padding; with a mask it counts all pairs of a fused kernel all the same.
    """
    wrong, seen = [], set()
    for variant in able(shape, kind):
        law = law_of(variant, shape, kind)
        if not variant.ledgered or not law:
            continue
        seen.add(variant.name)
        rows = ledger(variant, shape, kind)
        for which, row in reached(rows).items():
            found = {law.bytes(which, shape, kind), sum(law.at(which, shape, kind)[1].values())}
            if found != {row["alive_bytes"]} or row["alive_bytes"] != sum(row["alive"].values()):
                wrong.append((variant.name, which, found, row["alive_bytes"]))
        counts = {"flops": variant.flops, "traffic_bytes": variant.traffic}
        given = shape in (ALIGNED if variant.name in FAMILIES["kernels"] else SHAPES)
        for what, phases in counts.items():
            for phase in PHASES if given and phases else ():
                counted = sum(row[what] for row in rows if row["phase"] == phase)
                if evaluate(getattr(phases, phase), shape, kind) != counted:
                    wrong.append((variant.name, what, phase, counted))
    assert not wrong
    assert seen >= {*FAMILIES["plain"], "sdpa_math", "tiled"}


@pytest.mark.parametrize("shape", ALL, ids=str)
def test_law_equals_the_allocator(shape, device):
    """To the byte on CUDA. The CPU's allocator also counts numbers that were wrapped into tensors, and in the half-size
    types its kernels take buffers of their own, which no law of PyTorch's operations can know: there the peaks may be
    higher."""
    wrong, seen = [], set()
    for variant in able(shape, device):
        if not (law := law_of(variant, shape, device)):
            continue
        seen.add(variant.name)
        inputs = variant.inputs(shape, device)
        for _ in range(2):  # the first run makes the libraries' workspaces
            figures = account(variant, *inputs, causal=shape.causal, backward=True)
        for which in ACCOUNTS:
            excess = figures[f"{which}_bytes"] - law.bytes(which, shape, device)
            known = device == "cuda" or shape.dtype == "float32" or which == "saved"
            if known and not 0 <= excess <= wrapped_scalars(device):
                wrong.append((variant.name, which, excess))
    assert not wrong
    assert seen >= {*FAMILIES["plain"], "sdpa_math", "tiled"}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["sdpa_flash", "dilated"])
def test_the_law_counts_the_tiles_of_each_thread(name, count, threads):
    """The CPU's flash kernel gives every thread tiles of its own."""
    threads(count)
    variant, shape = VARIANTS[name], Shape(1, 4, 300, 32)
    seen = account(variant, *shape.inputs(), causal=False, backward=True)
    assert all(seen[f"{which}_bytes"] == variant.law.bytes(which, shape, "cpu") for which in ACCOUNTS)


def test_where_a_law_is_not_known_it_says_why():
    """In float32 a GPU runs dilated attention by the efficient kernel, whose memory on views nobody has derived: there
    is no law to be wrong, in no account, and whoever asks for one all the same is told the reason."""
    dilated, shape = VARIANTS["dilated"], Shape(1, 2, 64, 8)
    assert law_of(dilated, shape, "cpu") and law_of(dilated, replace(shape, dtype="bfloat16"), "cuda")
    assert law_of(dilated, shape, "cuda") is None
    assert "efficient kernel on views is not known" in dilated.law.unknown(shape, Machine.of("cuda"))
    for account_of in ACCOUNTS[1:]:
        with pytest.raises(UserError, match="is not known"):
            dilated.law.bytes(account_of, shape, "cuda")


def test_a_package_counts_where_the_machine_has_it():
    """FlashAttention-4 and its law are asked of the machine's record, not of this Python's packages."""
    variant, shape = VARIANTS["fa4"], Shape(1, 2, 512, 64, "bfloat16")
    assert "pip install" in variant.needs(shape, replace(FA4_TOO, packages=()))
    assert variant.needs(shape, FA4_TOO) is None and "CUDA" in variant.needs(shape, Machine("cpu"))
    assert "9.0" in variant.needs(shape, replace(FA4_TOO, compute_capability="8.0"))
    assert bytes_needed(variant, shape, FA4_TOO) > bytes_needed(variant, shape, FA4_TOO, "forward") > shape.input_bytes


@pytest.mark.parametrize(("causal", "pairs"), [(False, 25), (True, 15)])
def test_useful_operations_are_those_of_the_pairs_that_are_seen(causal, pairs):
    shape = Shape(2, 3, 5, 7, causal=causal)
    assert useful_flops(shape, "forward") == 4 * 2 * 3 * 7 * pairs
    assert useful_flops(shape, "backward") == 2.5 * useful_flops(shape, "forward")
    assert work(VARIANTS["naive"], shape, "forward") == useful_flops(shape, "forward")
    window = work(VARIANTS["window"], shape, "backward")
    assert window == evaluate(VARIANTS["window"].flops.backward, shape) == useful_flops(shape, "backward")
