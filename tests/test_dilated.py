"""Dilated attention against the oracle: output and gradients, on views of any configuration; and what it refuses."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from attnlib.core import Machine, Shape, UserError
from attnlib.dilated import dilated, dilated_reference, law
from attnlib.dilated.attention import dilated_variant, planned
from attnlib.dilated.definition import dilated_reach
from attnlib.dilated.kernels import KERNELS, chosen, takes_all, workspace_of
from attnlib.dilated.packing import MAX_BYTES, blocks_of, packing_of
from attnlib.dilated.views import HEAD_OFFSETS, MAX_GRID_AXIS, branch_views
from attnlib.laws import ACCOUNTS, evaluate, law_of
from attnlib.memory.allocator import account
from report.accuracy import RESULTS, compared

# segment lengths, dilation rates, batch, heads, length
CONFIGS = [
    ((16, 32, 64, 128, 256), (1, 2, 4, 6, 12), 1, 3, 300),  # the paper's own, smaller: 6 and 12 do not divide
    ((16, 32, 64), (1, 2, 4), 2, 4, 128),  # nested, whole segments, three axes to fold
    ((8, 12), (1, 3), 1, 6, 100),  # not nested, a shorter segment at the end
    ((7, 13), (2, 3), 3, 2, 50),  # no branch of rate 1: some queries see nothing
    ((32,), (8,), 1, 3, 77),  # one branch, more offsets than heads
    ((10, 20), (1, 4), 2, 10, 61),  # heads no multiple of the rate
    ((64,), (1,), 2, 3, 64),  # dense
    ((3, 3), (1, 1), 1, 2, 8),  # two equal branches, a shorter segment at the end
    ((9,), (9,), 1, 12, 40),  # one row a segment and head
    ((50, 60), (1, 2), 1, 2, 49),  # longer than the sequence
    ((4, 8, 16), (1, 2, 4), 1, 1, 1),  # one position
    ((6, 5), (4, 5), 2, 7, 33),  # segments shorter than some offsets at the end
]


PAPERS = ((2048, 1), (4096, 2), (8192, 4), (16384, 6), (32768, 12))  # the paper's own setting


def by_kernels(widths, rates, head_offsets, shape, device):
    """`{name: variant}`: dilated attention by each kernel that takes such a shape there, and on a GPU by default."""
    names = [*KERNELS, *[None] * (torch.device(device).type == "cuda")]
    made = {name: dilated_variant(str(name), widths, rates, head_offsets, name) for name in names}
    return {name: variant for name, variant in made.items() if not variant.needs(shape, device)}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_offsets", HEAD_OFFSETS)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_oracle(config, dtype, head_offsets, causal, device):
    """By each kernel, and in float32 the readable definition: within twice the error of dense attention over the same
    multiset of keys in the same dtype."""
    widths, rates, batch, heads, seq_len = config
    shape = Shape(batch, heads, seq_len, 8, dtype, causal)
    variants = by_kernels(widths, rates, head_offsets, shape, device)
    assert variants, "some kernel takes it"
    if dtype == "float32":
        how = {"segment_lengths": widths, "dilation_rates": rates, "head_offsets": head_offsets}
        any_of_them = next(iter(variants.values()))
        variants["reference"] = replace(any_of_them, name="reference", fn=partial(dilated_reference, **how))
    reach, wrong = next(iter(variants.values())).reach, {}  # the same one for all, so that they share an oracle
    for name, variant in variants.items():
        draws = min(300, max(1, 1000 // math.prod((batch, heads, seq_len))))
        found = compared(replace(variant, reach=reach), shape, device, draws)
        wrong |= {f"{name} {what}": x for what in RESULTS if not (x := found[f"{what}_of_reference"]) <= 2}
    assert not wrong


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("head_offsets", HEAD_OFFSETS)
def test_views_hold_every_kept_row_once(config, head_offsets):
    widths, rates, batch, heads, seq_len = config
    for width, rate in zip(widths, rates, strict=True):
        times = torch.zeros(batch, heads, seq_len)
        for view in branch_views(batch, heads, seq_len, width, rate, head_offsets):
            view.of(times).add_(1)
        shape = Shape(batch, heads, seq_len, 1)
        reach = dilated_reach(shape, segment_lengths=(width,), dilation_rates=(rate,), head_offsets=head_offsets)
        assert (times == reach.diagonal(dim1=-2, dim2=-1)).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("head_offsets", HEAD_OFFSETS)
def test_packed_blocks_hold_every_kept_row_once(config, head_offsets):
    """Each in a place of its own, those of one group without a gap."""
    widths, rates, batch, heads, seq_len = config
    branches = tuple(zip(widths, rates, strict=True))
    times, held = torch.zeros(heads, seq_len), 0
    for block in blocks_of(heads, seq_len, branches, head_offsets):
        places = set()
        for head, segment in itertools.product(range(heads), range(block.many)):
            own, whole = head // block.step % block.period, block.step * block.period
            if block.first <= own < block.last:
                kept = torch.arange(block.rows) * block.rate + own
                assert kept[-1] < block.length
                times[head, block.start + segment * block.length + kept] += 1
                places.add(
                    head // whole * block.step * (block.last - block.first) + head % whole - block.step * block.first
                )
        assert places == {*range(block.members)}
        held += block.many * block.members * block.rows
    how = {"segment_lengths": widths, "dilation_rates": rates, "head_offsets": head_offsets}
    assert (times == dilated_reach(Shape(1, heads, seq_len, 1), **how).diagonal(dim1=-2, dim2=-1)).all()
    packing = packing_of(Shape(batch, heads, seq_len, 8), branches, head_offsets, Machine("cuda"))
    assert packing is None or sum(packing.sizes) == batch * held


def test_short_sequences_are_packed_on_a_gpu():
    branches = ((16, 1), (32, 2), (64, 4))
    long = MAX_BYTES // (2 * 4 * 64 * 2)  # of three branches that keep 1.75 times as many rows
    ways = {
        n: packing_of(Shape(1, 4, n, 64, "bfloat16"), branches, "modulo", Machine("cuda")) for n in (64, long, 2 * long)
    }
    assert ways[64].groups == ((4 * (4 + 2 + 1), 16),) and ways[long] and not ways[2 * long]
    assert packing_of(Shape(1, 4, 64, 64), branches, "modulo", Machine("cpu")) is None
    assert packing_of(Shape(1, 4, 64, 64), ((64, 1),), "modulo", Machine("cuda")) is None, "one call as it is"


def test_one_kernel_takes_all_that_is_packed_where_that_saves_calls():
    """FlashAttention-2; no other takes segments of unlike lengths, and who asks for a kernel gets it."""
    nested, unlike, gpu = ((16, 1), (32, 2), (64, 4)), ((16, 1), (32, 2), (32, 4), (32, 8)), Machine("cuda")
    for branches, dtype, taken in ((nested, "bfloat16", False), (unlike, "bfloat16", True), (unlike, "float32", False)):
        shape = Shape(1, 4, 64, 64, dtype)
        packing = packing_of(shape, branches, "modulo", gpu)
        assert takes_all(None, packing, shape, gpu) == taken
        assert packing.whole.groups == ((1, sum(packing.sizes)),) and packing.whole.whole == packing.whole
        for name in (None, "flash"):
            asked = workspace_of(name, shape, gpu, packing) if dtype != "float32" else None
            assert asked is None or asked.at_once == (taken and not name)


@pytest.mark.parametrize(
    ("shape", "branches", "taken"),
    [
        (Shape(1, 16, 4096, 64, "bfloat16"), PAPERS, True),
        (Shape(1, 16, 8192, 64, "bfloat16"), PAPERS, False),
        (Shape(4, 16, 4096, 64, "bfloat16"), ((8, 1), (8, 2), (8, 4)), False),
        (Shape(8, 16, 1024, 64, "bfloat16"), ((16, 1), (32, 2), (32, 4), (32, 8)), False),
    ],
    ids=str,
)
def test_neither_long_rows_nor_very_many_segments_are_taken_at_once(shape, branches, taken):
    """For each segment the kernel keeps 128 rows of float32 more, and CUDA's grid takes 65,535 of them."""
    gpu = Machine("cuda")
    packing = packing_of(shape, branches, "modulo", gpu)
    assert packing and len(packing.groups) > 2 and takes_all(None, packing, shape, gpu) == taken


@pytest.mark.gpu
def test_a_first_call_may_be_captured_into_a_graph():
    config = {"segment_lengths": (16, 32, 32, 32), "dilation_rates": (1, 2, 4, 8)}
    q, k, v = (x.detach() for x in Shape(1, 4, 100, 64, "bfloat16").inputs("cuda"))
    dilated(*(x[:, :, :90] for x in (q, k, v)), **config)  # Triton's kernels are compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = dilated(q, k, v, **config)
    graph.replay()
    exact = dilated(*(x.double() for x in (q, k, v)), **config)
    assert (o - exact).norm() <= 2 * (dilated(q, k, v, **config) - exact).norm()


@pytest.mark.gpu
def test_results_repeat_where_pytorch_is_told_that_they_must():
    inputs, config = (
        Shape(1, 4, 500, 64, "bfloat16").inputs("cuda"),
        {"segment_lengths": (500,), "dilation_rates": (1,)},
    )
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(None, Shape(1, 4, 500, 64, "bfloat16"), Machine.of("cuda"), True).repeats
        first, second = (torch.autograd.grad(dilated(*inputs, **config).sum(), inputs) for _ in range(2))
        assert all(map(torch.equal, first, second))
        with pytest.raises(UserError, match="does not repeat its bits"):
            dilated(*inputs, **config, kernel="cudnn")
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_kernel_that_varies_is_left_out_where_results_are_to_repeat():
    shape, gpu = Shape(1, 4, 64, 64, "bfloat16"), Machine("cuda")
    assert chosen(None, shape, gpu).name == "cudnn" and chosen(None, shape, gpu, repeat=True).name == "flash"


@pytest.fixture
def nothing_packed(monkeypatch):
    """Views also where a GPU would pack."""
    known = packing_of, planned, law.largest, law.packed_largest
    monkeypatch.setattr("attnlib.dilated.packing.MAX_BYTES", 0)
    for one in known:
        one.cache_clear()
    yield
    for one in known:
        one.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS[:4], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_short_views_equal_the_oracle_and_their_law(config, causal, nothing_packed):
    test_equals_the_oracle(config, "bfloat16", "modulo", causal, "cuda")
    test_law_equals_the_allocator(config, "modulo", causal, "cuda")


@pytest.mark.parametrize(("heads", "rate", "count"), [(16, 4, 4), (16, 16, 1), (16, 1, 1), (3, 8, 1), (12, 5, 3)])
def test_few_views_cover_all_heads(heads, rate, count):
    """min(r, H/r) where r divides H and the segment; one where r is H or more."""
    assert len(list(branch_views(1, heads, 960, 240, rate, "modulo"))) == count


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_those_that_the_oracle_sees(causal):
    for widths, rates, batch, heads, seq_len in CONFIGS:
        shape = Shape(batch, heads, seq_len, 8, causal=causal)
        variant = dilated_variant("dilated", widths, rates)
        assert evaluate(variant.flops.forward, shape) == 4 * batch * 8 * int(variant.reach(shape).sum())


@pytest.mark.parametrize(
    "config",
    [*CONFIGS, ((64, 128, 256), (1, 2, 4), 1, 4, 512), ((64, 128), (1, 2), 2, 1, 512), ((512,), (1,), 1, 100, 512)],
    ids=str,
)
@pytest.mark.parametrize("head_offsets", HEAD_OFFSETS)
@pytest.mark.parametrize("causal", [False, True])
def test_law_equals_the_allocator(config, head_offsets, causal, device):
    """Saved bytes and both peaks, to the byte, by each kernel whose memory is known: what the largest call holds, and
    the kernel's own workspace."""
    widths, rates, batch, heads, seq_len = config
    shape, wrong = Shape(batch, heads, seq_len, 16, "float32" if device == "cpu" else "bfloat16", causal), {}
    variants = by_kernels(widths, rates, head_offsets, shape, device)
    assert variants and all(law_of(variant, shape, device) for variant in variants.values())
    for name, variant in variants.items():
        for _ in range(2):  # the first makes the workspaces
            seen = account(variant, *shape.inputs(device), causal=causal, backward=True)
        figures = [seen[f"{which}_bytes"] for which in ACCOUNTS]
        law = [variant.law.bytes(which, shape, device) for which in ACCOUNTS]
        if figures != law:
            wrong[name] = (figures, law)
    assert not wrong


def test_only_output_and_log_sum_exp_are_saved():
    q, k, v = Shape(1, 4, 512, 16).inputs()
    o = dilated(q, k, v, segment_lengths=(64, 128), dilation_rates=(1, 2))
    mine = [x for x in o.grad_fn.saved_tensors if all(x.data_ptr() != y.data_ptr() for y in (q, k, v))]
    assert sum(x.untyped_storage().nbytes() for x in mine) == o.nbytes + 4 * 4 * 512


@pytest.mark.parametrize("layout", ["BNHD", "D outermost", "expanded gradient", "projection"])
@pytest.mark.parametrize("rates", [(1, 3), (1, 2)], ids=str)
def test_strides_do_not_matter(layout, rates, device):
    """Also where heads are a multiple of the rates, so that a batch of several may be folded into them."""
    config = {"segment_lengths": (16, 48), "dilation_rates": rates, "causal": True}
    packed = torch.randn(2, 100, 3, 4, 8, device=device)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    if layout == "D outermost":
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    if layout == "BNHD":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    do = torch.ones((), device=device).expand(q.shape) if layout == "expanded gradient" else torch.randn_like(q)
    results = []
    for copy in (torch.Tensor.contiguous, lambda x: x):
        leaves = [copy(x.detach()).requires_grad_() for x in (q, k, v)]
        o = dilated(*leaves, **config)
        results.append([o, *torch.autograd.grad(o, leaves, copy(do))])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # the same kernel on the same numbers


BAD = [
    ({"segment_lengths": ()}, "same length"),
    ({"dilation_rates": (1,)}, "same length"),
    ({"segment_lengths": (4, 0)}, "positive integers"),
    ({"dilation_rates": (1, -2)}, "positive integers"),
    ({"dilation_rates": (1, 2.0)}, "positive integers"),
    ({"dilation_rates": (1, True)}, "positive integers"),
    ({"dilation_rates": None}, "positive integers"),
    ({"segment_lengths": 4}, "positive integers"),
    ({"segment_lengths": "48"}, "positive integers"),
    ({"segment_lengths": {4, 8}}, "positive integers"),
    ({"segment_lengths": [[4], [8]]}, "positive integers"),
    ({"dilation_rates": (1, 9)}, "exceeds its segment"),
    ({"head_offsets": "random"}, "modulo, grouped"),
    ({"head_offsets": ["modulo"]}, "modulo, grouped"),
    ({"causal": "yes"}, "causal must be"),
    ({"causal": None}, "causal must be"),
    ({"causal": torch.ones(3, 3)}, r"causal must be True or False, not tensor[^\n]*$"),
    ({"dilation_rates": (1, True)}, "positive integers, not True"),
    ({"segment_lengths": np.full((4, 4), 4.5)}, r"positive integers, not array[^\n]*$"),
    ({"segment_lengths": torch.tensor([4, 8], device="meta")}, "positive integers, not tensor"),
]


@pytest.mark.parametrize("fn", [dilated, dilated_reference])
@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: str(x))
def test_bad_configurations_get_one_line(fn, change, message):
    config = {"segment_lengths": (4, 8), "dilation_rates": (1, 2), **change}
    with pytest.raises(UserError, match=message):
        fn(*Shape(1, 2, 16, 4).inputs(), **config)


@pytest.mark.parametrize("fn", [dilated, dilated_reference])
@pytest.mark.parametrize("many", [list, np.array, iter, torch.tensor], ids=["list", "array", "iter", "tensor"])
def test_lists_may_be_anything_in_order(fn, many):
    inputs = Shape(1, 2, 16, 4).inputs()
    want = fn(*inputs, segment_lengths=(4, 8), dilation_rates=(1, 2))
    assert torch.equal(fn(*inputs, segment_lengths=many([4, 8]), dilation_rates=many([1, 2])), want)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (((), ()), "not empty"),
        (((4,), (5,)), "exceeds"),
        (((4, 8), (1,)), "same length"),
        (((4,), (1,), "other"), "modulo, grouped"),
        (((4,), (1,), "modulo", "flash9"), "kernel must be one of"),
    ],
    ids=str,
)
def test_a_variant_of_no_configuration_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        dilated_variant("bad", *config)


def test_segments_beyond_any_sequence_are_the_whole_of_it():
    inputs = Shape(1, 2, 40, 4).inputs()
    config = {"segment_lengths": (2**63, 2**62), "dilation_rates": (1, 2**62)}
    torch.testing.assert_close(dilated(*inputs, **config), dilated_reference(*inputs, **config))


def test_rows_that_overlap_are_copied():
    windows = torch.randn(1, 2, 49).unfold(-1, 33, 1)
    config = {"segment_lengths": (16,), "dilation_rates": (1,)}
    apart = windows.contiguous()
    assert torch.equal(dilated(*[windows] * 3, **config), dilated(*[apart] * 3, **config))


def test_no_axis_is_longer_than_a_grid_of_blocks():
    found = list(branch_views(1, 2, 3 * MAX_GRID_AXIS + 5, 1, 1, "modulo"))
    assert max(max(view.size[:2]) for view in found) <= MAX_GRID_AXIS
    assert sum(math.prod(view.size) for view in found) == 2 * (3 * MAX_GRID_AXIS + 5)


def test_bad_tensors_get_one_line():
    config = {"segment_lengths": (4,), "dilation_rates": (1,)}
    q, k, v = Shape(1, 2, 16, 4).inputs()
    for bad, message in (
        ((q, k.half(), v), "same shape, dtype and device"),
        ((q, k[:, :1], v), "same shape, dtype and device"),
        ((q[0], k[0], v[0]), r"\[B, H, N, D\]"),
        ([x[:, :0] for x in (q, k, v)], "no size zero"),
        ([x.int() for x in (q, k, v)], "floating-point"),
        ([x.to(torch.float8_e4m3fn) for x in (q, k, v)], "16 bits or more"),
        ((None, k, v), "must be tensors"),
        ([x.to_sparse() for x in (q, k, v)], "neither sparse"),
    ):
        with pytest.raises(UserError, match=message):
            dilated(*bad, **config)


def test_a_kernel_that_cannot_run_there_is_refused():
    config = {"segment_lengths": (4,), "dilation_rates": (1,)}
    for kernel, message in (
        ("cudnn", "CUDA"),
        ("flash9", "kernel must be one of"),
        (["cpu"], "kernel must be one of"),
        ("fa4", "CUDA|pip install"),
    ):
        with pytest.raises(UserError, match=message):
            dilated(*Shape(1, 2, 16, 8).inputs(), **config, kernel=kernel)


def test_a_second_derivative_is_refused():
    """Wherever the upstream gradient comes from, and not before it is asked for."""
    inputs = Shape(1, 2, 16, 4).inputs()
    o = dilated(*inputs, segment_lengths=(4,), dilation_rates=(1,))
    (dq,) = torch.autograd.grad(o.sum(), inputs[0], create_graph=True)
    with pytest.raises(UserError, match="no second derivative"):
        torch.autograd.grad(dq.sum(), inputs[1])
