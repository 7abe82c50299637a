"""Published tables give their closed forms, to the printed digit; damaged ones give one line."""

import csv
import itertools
import json
import math
import random
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnlib import VARIANTS
from attnlib.core import PHASES, Shape, UserError
from attnlib.laws import ACCOUNTS, LINEAR, SCORES, evaluate
from attnlib.memory.allocator import account
from attnlib.memory.check import wrapped_scalars
from attnlib.rows import SIZES
from attnlib.variants.naive import naive
from notebooks.restated.audit import split_heads
from notebooks.restated.dilated_tables import report_004
from notebooks.restated.program_004 import forward_only, program_004, variant_004
from notebooks.restated.programs import BY_AMAX, by_amax, scaling_factor
from report.published import EVERY, MEANING, TERMS, beyond, closed_forms, dependencies, read, reproduce, terms_for

ROOT = Path(__file__).parent.parent
PUBLISHED, NOTEBOOKS = ROOT / "data" / "published", sorted((ROOT / "notebooks").glob("*.ipynb"))
GTX, CPU, A800 = (PUBLISHED / f"{name}_naive_sweep.csv" for name in ("000_gtx1080", "001_cpu", "002_a800"))
GTX_004 = [*csv.DictReader((PUBLISHED / "004_gtx1080_dilated.csv").read_text("utf-8").splitlines())]
MIB = "memory_before_backward_mib"
# file, column, figures, terms, how many closed forms there are up to 16 and up to 32 of each term
FITS = [
    (GTX, MIB, 12, {"L": 14, "S": 2, "M": 5, "R": 3, "W": 2}, (1, 1)),
    (A800, MIB, 20, {"L": 6, "S": 3, "M": 1, "R": 2, "P": 4, "W": 2}, (1, 1)),
    (CPU, "forward_memory_mb", 9, {"L": 4, "S": 1}, (6, 6)),
    (CPU, "backward_memory_mb", 9, {"L": 4, "S": 2}, (2, 3)),
]
HEADER = "batch,heads,seq_len,head_dim,dtype,memory_mib,status"


@pytest.mark.parametrize("path, column, figures, form, number", FITS, ids=["000", "002", "001fwd", "001bwd"])
def test_every_published_figure_is_reproduced(path, column, figures, form, number):
    """All 12, 20 and 2 × 9 figures by the closed form of fewest tensors; no other has as few."""
    rows = read(path, column)
    found = closed_forms(rows, column)
    assert found[0] == dict.fromkeys(TERMS, 0) | form
    assert (len(found), len(closed_forms(rows, column, 32))) == number
    assert all(sum(other.values()) > sum(form.values()) for other in found[1:])
    for other in found:
        table = reproduce(rows, column, other)
        assert len(table) == figures and list(table["published"]) == list(table["derived"]) and table["equal"].all()


@pytest.mark.parametrize("path, column, figures, form, number", FITS, ids=["000", "002", "001fwd", "001bwd"])
def test_one_more_or_less_of_a_term_fails(path, column, figures, form, number):
    """But for one or two D×D matrices in 001's forward pass, which its 0.1 MB cannot see."""
    rows = read(path, column)
    form = dict.fromkeys(TERMS, 0) | form
    nearby = [form | {name: count} for name in TERMS for count in (form[name] - 1, form[name] + 1) if count >= 0]
    unseen = [other for other in nearby if reproduce(rows, column, other)["equal"].all()]
    assert unseen == ([form | {"P": 1}] if column == "forward_memory_mb" else [])


def test_one_batch_size_cannot_tell_scores_from_masks():
    """S = B·N²·4 is 32 masks N² at batch 8 and 16 at batch 4: one solution at any limit but for that exchange."""
    assert dependencies(read(GTX), MIB) == dependencies(read(A800), MIB) == [{"S": 1, "M": -32}]
    assert dependencies(read(CPU), "forward_memory_mb") == [{"S": 1, "M": -16}]
    exchanged = [(form["S"], form["M"]) for form in closed_forms(read(A800), MIB, 1000)]
    assert exchanged == [(3, 1), (2, 33), (1, 65), (0, 97)]


def planted(path: Path, form: dict, draw: random.Random, decimals: int):
    """Write a table of random shapes whose memory, in MiB, is `form`."""
    lines = []
    for _ in range(15):
        sizes = (draw.randint(1, 8), draw.randint(1, 4), draw.randint(50, 9000), draw.randint(1, 128))
        dtype = draw.choice(["float32", "bfloat16"])
        nbytes = sum(count * evaluate(TERMS[name], Shape(*sizes, dtype)) for name, count in form.items())
        lines.append(f"{','.join(map(str, sizes))},{dtype},{nbytes / 2**20:.{decimals}f},ok")
    path.write_text("\n".join([HEADER, *lines, "8,1,99999,64,float32,,oom"]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [1, 3, 6])
def test_planted_coefficients_are_found(tmp_path, seed, decimals):
    draw = random.Random(seed)
    form = {name: draw.randint(0, 16) for name in TERMS}
    planted(tmp_path / "random.csv", form, draw, decimals)
    rows = read(tmp_path / "random.csv")
    found = closed_forms(rows, "memory_mib")
    assert form in found and reproduce(rows, "memory_mib", form)["equal"].sum() == 15
    assert dependencies(rows, "memory_mib") == []
    if decimals == 6:  # a byte
        assert found == [form]


@pytest.mark.parametrize("seed", range(3))
def test_no_closed_form_is_missed(tmp_path, seed):
    """The search finds what trying every combination finds, on a table of few digits that many of them print."""
    draw, terms = random.Random(seed), {name: TERMS[name] for name in "LMRP"}
    planted(tmp_path / "coarse.csv", {name: draw.randint(0, 3) for name in terms}, draw, 0)
    rows = read(tmp_path / "coarse.csv").head(3)
    combinations = (dict(zip(terms, counts, strict=True)) for counts in itertools.product(range(4), repeat=4))
    tried = [form for form in combinations if reproduce(rows, "memory_mib", form, terms)["equal"].all()]
    found = closed_forms(rows, "memory_mib", 3, terms)
    assert len(found) > 1 and sorted(map(str, found)) == sorted(map(str, tried))


def test_a_wrong_figure_has_no_closed_form(tmp_path):
    path = tmp_path / "wrong.csv"
    path.write_text(GTX.read_text().replace("1148.6", "1148.9"))
    assert closed_forms(read(path), MIB) == []


def test_a_tie_may_be_printed_either_way(tmp_path):
    """2.25 MiB = 9 · 4·B·N·D at B = 2, N = 256, D = 128: printed 2.2 by Python and 2.3 by others."""
    (tmp_path / "tie.csv").write_text(f"{HEADER}\n2,1,256,128,float32,2.2,ok\n")
    low = closed_forms(read(tmp_path / "tie.csv"), "memory_mib", 9, {"L": TERMS["L"]})
    (tmp_path / "tie.csv").write_text(f"{HEADER}\n2,1,256,128,float32,2.3,ok\n")
    high = closed_forms(read(tmp_path / "tie.csv"), "memory_mib", 9, {"L": TERMS["L"]})
    assert low == high == [{"L": 9}]


GOOD = f"{HEADER}\n8,1,256,16,float32,22.3,ok\n"


@pytest.mark.parametrize(
    "damaged, message",
    [
        (GOOD.replace("seq_len,", ""), "lacks the column(s) seq_len"),
        (GOOD.replace("memory_mib", "memory"), "lacks the column(s) memory_mib"),
        (GOOD.replace("22.3", "26. 4"), "line 2, column memory_mib: '26. 4' is not a number"),
        (GOOD.replace("22.3", "nan"), "line 2, column memory_mib: 'nan' is not a number"),
        (GOOD.replace("22.3", "-22.3"), "line 2, column memory_mib: '-22.3' is not a number"),
        (GOOD.replace("22.3", ""), "line 2, column memory_mib: '' is not a number"),
        (GOOD.replace("22.3", "22,3"), "line 2: more cells than columns"),
        (GOOD.replace("256", "abc"), "line 2: seq_len must be a positive integer, not 'abc'"),
        (GOOD.replace("8,1", "8.5,1"), "line 2: batch must be a positive integer, not '8.5'"),
        (GOOD.replace("8,1", "8,0"), "line 2: heads must be a positive integer, not 0"),
        (GOOD.replace("8,1", "-8,1"), "line 2: batch must be a positive integer, not '-8'"),
        (GOOD.replace("float32", "float31"), "line 2: dtype must be one of"),
        ("", "lacks the column(s) batch, heads, seq_len, head_dim, dtype, status, memory_mib"),
        (GOOD.replace("float32", "\xff").encode("latin-1"), "cannot read"),
        (None, "cannot read"),
    ],
)
def test_a_damaged_table_is_refused_with_one_line(tmp_path, damaged, message):
    path = tmp_path / "damaged.csv"
    if damaged is not None:
        path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(UserError) as error:
        read(path, "memory_mib")
    text = str(error.value)
    assert str(path) in text and message in text and "\n" not in text


@pytest.mark.parametrize("column", ["memory_mib", "forward_ms", "no_such_mib"])
@pytest.mark.parametrize("call", [closed_forms, dependencies, lambda *table: reproduce(*table, {"L": 1})])
@pytest.mark.parametrize("table", [HEADER, f"{HEADER}\n8,1,8192,16,float32,,oom\n"], ids=["empty", "all oom"])
def test_without_figures_there_is_nothing_to_fit(tmp_path, column, call, table):
    (tmp_path / "empty.csv").write_text(table)
    with pytest.raises(UserError, match=f"nothing to fit: no figures in a memory column '{column}'"):
        call(read(tmp_path / "empty.csv"), column)


@pytest.mark.parametrize(("gpu", "workspaces", "figures"), [("h100", {"X": 2}, 9), ("rtx3090", {"W": 2}, 8)])
def test_one_program_on_two_gpus_differs_by_its_workspaces(gpu, workspaces, figures):
    """Digits that resolve the allocator's smallest block leave one form for each column, of the same tensors."""
    rows = read(PUBLISHED / f"cs336_{gpu}_memory.csv")
    for column, form in ((MIB, {"L": 4, "S": 1, "A": 1}), ("peak_memory_mib", {"L": 5, "S": 4, "A": 2})):
        assert closed_forms(rows, column) == [dict.fromkeys(TERMS, 0) | form | workspaces]
        assert reproduce(rows, column, form | workspaces)["equal"].sum() == figures


def test_terms_of_a_fixed_size_are_tried_where_digits_resolve_them():
    """Else they would fill whatever rounding leaves: report 002 would have thirteen forms instead of one."""
    rows = read(A800)
    assert terms_for(rows, MIB) == TERMS and len(closed_forms(rows, MIB, terms=EVERY)) == 13


def test_terms_of_ones_own_are_reproduced_and_named(tmp_path):
    (tmp_path / "own.csv").write_text(f"{HEADER}\n2,1,256,128,float32,2.25,ok\n")
    rows, own = read(tmp_path / "own.csv"), {"tile": TERMS["L"], "L": TERMS["L"] * 2}
    form = {"tile": 1, "L": 4}
    assert form in closed_forms(rows, "memory_mib", 9, own)
    assert reproduce(rows, "memory_mib", form, own)["equal"].all()
    assert beyond(form, {"L": 3}, rows["shape"][0], own) == {"1 × tile": 2**18, "1 × a tensor like Q": 2**19}
    for call in (lambda: reproduce(rows, "memory_mib", form), lambda: beyond(form, {}, rows["shape"][0])):
        with pytest.raises(UserError, match="no term is called tile"):
            call()


def test_a_byte_order_mark_is_no_part_of_a_columns_name(tmp_path):
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert closed_forms(read(tmp_path / "bom.csv"), "memory_mib")


def test_every_term_has_a_meaning_and_every_file_is_sound():
    assert EVERY.keys() == MEANING.keys()
    for path in PUBLISHED.glob("*.csv"):
        timed = "cs336" not in path.name  # of which memory alone is taken
        phases = ["forward_ms"] * timed + ["backward_ms"] * (timed and "dilated" not in path.name)  # 004: forward alone
        assert set(SIZES[:5]) < set(read(path, *phases))


ITEMS = [*csv.DictReader((ROOT / "data" / "items.csv").open(encoding="utf-8"))]
OUTCOMES = {"reproduced", "re-derived", "differs", "not testable", "partial", "missing"}


def test_every_item_of_the_five_reports_points_to_what_is_there():
    """Labels of tables and figures, or a heading after "§": each stands in a notebook."""
    sources = [cell["source"] for path in NOTEBOOKS for cell in json.loads(path.read_text("utf-8"))["cells"]]
    lines = {line.strip() for source in sources for line in source}
    labels = {line.split()[-1] for line in lines if line.startswith("#| label:")}
    headings = {line.lstrip("# ").removeprefix("Appendix: ") for line in lines if line.startswith("##")}
    for item in ITEMS:
        first, _, heading = item["where"].partition("§ ")
        for label in first.split():
            assert label in labels, item
        assert not heading or heading in headings, item
        assert {item["gpu"], item["cpu"]} <= OUTCOMES and all(
            item["verdict"] + item[f"on_{one}"] for one in ("gpu", "cpu")
        )
        assert item["where"] or {item["gpu"], item["cpu"]} <= {"missing", "not testable"}, item
    assert {item["report"] for item in ITEMS} == {"000", "001", "002", "003", "004"}


def test_report_002s_program_keeps_three_matrices_to_the_byte():
    for shape in (Shape(8, 1, 256, 16), Shape(2, 3, 300, 8, causal=True), Shape(1, 2, 33, 40)):
        seen = account(BY_AMAX, *shape.inputs(), causal=shape.causal, backward=True)
        off = [seen[f"{one}_bytes"] - BY_AMAX.law.bytes(one, shape) for one in ACCOUNTS]
        assert all(0 <= nbytes <= wrapped_scalars("cpu") for nbytes in off)
        assert seen["saved_bytes"] // evaluate(SCORES, shape) >= 3
    q, k, v = Shape(1, 2, 40, 8).inputs()
    torch.testing.assert_close(by_amax(q, k, v, causal=True), naive(q, k, v, causal=True))


def test_report_004s_program_is_its_definition_and_holds_what_it_printed():
    """8.75 tensors of the size of Q in two branches, at most one part in a thousand more: a list of positions."""
    q, k, v = Shape(1, 8, 64, 8).inputs()
    config = {"segment_lengths": (16, 32), "dilation_rates": (1, 2)}
    want = split_heads(q.double(), k.double(), v.double(), **config)
    torch.testing.assert_close(program_004(q, k, v, **config).double(), want, rtol=1e-5, atol=1e-6)
    shape = Shape(1, 8, 1024, 64)
    row = forward_only(variant_004((256, 512), (1, 2)), shape, "cpu", 0.01)
    tensors = 3 + row["first_peak_bytes"] / (shape.input_bytes / 3)
    assert 8.75 <= tensors < 8.76


class Blocks:
    """How PyTorch's allocator on a GPU counts: in blocks, cut from segments of 2 or 20 MiB and joined again when free.

    The rules are those of its documentation and its source (c10/cuda/CUDACachingAllocator.cpp): sizes are multiples of
    512 bytes, the smallest free block that is large enough is taken, and it is split where at least 512 bytes, or of a
    large one more than 1 MiB, would be left."""

    def __init__(self):
        self.segments, self.used, self.peak = [], 0, 0  # a segment is a list of [size, free, whether it is small]

    def take(self, nbytes):
        need, small = max(512, -(-nbytes // 512) * 512), nbytes <= 2**20
        free = [
            (b[0], s, at) for s, seg in enumerate(self.segments) for at, b in enumerate(seg) if b[1:] == [True, small]
        ]
        if fitting := [one for one in free if one[0] >= need]:
            size, place, at = min(fitting)
        else:
            size = 2**21 if small else 20 * 2**20 if need < 10 * 2**20 else -(-need // 2**21) * 2**21
            place, at = len(self.segments), 0
            self.segments.append([[size, True, small]])
        segment, rest = self.segments[place], size - need
        if rest >= 512 if small else rest > 2**20:
            segment[at : at + 1] = [[need, True, small], [rest, True, small]]
        block = segment[at]
        block[1] = False
        self.used += block[0]
        self.peak = max(self.peak, self.used)
        return segment, block

    def give_back(self, segment, block):
        block[1] = True
        self.used -= block[0]
        at = next(i for i, one in enumerate(segment) if one is block)
        for other in (at + 1, at - 1):
            if 0 <= other < len(segment) and segment[other][1]:
                segment[min(other, at)][0] += segment.pop(max(other, at))[0]
                at = min(other, at)

    def empty(self):
        self.segments = [segment for segment in self.segments if len(segment) > 1 or not segment[0][1]]


class Followed(TorchDispatchMode):
    """Every storage that is made, taken from Blocks and given back when it goes."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.known = blocks, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)):
            if storage not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.blocks.give_back, *self.blocks.take(storage.nbytes()))
        return out


@pytest.mark.parametrize(
    "row",
    [*report_004().assign(printed=[one["memory_mib"] for one in GTX_004]).itertuples()],
    ids=lambda row: f"{row.table}-{row.Index}",
)
def test_report_004s_peaks_are_blocks_of_the_allocator(monkeypatch, row):
    """All 22 to the last digit, on tensors without data. Two of its tables warm up twice, empty the pool, and hold the
    output of a pass until the next one's is there. Of the fused call the output alone takes memory."""
    output_alone = lambda q, k, v, **_: q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", output_alone)
    fn = partial(program_004, segment_lengths=row.segment_lengths, dilation_rates=row.dilation_rates)
    held, blocks, sizes = (
        row.table in ("quick", "segments"),
        Blocks(),
        (row.batch, row.heads, row.seq_len, row.head_dim),
    )
    with FakeTensorMode(), Followed(blocks):
        q, k, v = (torch.empty(sizes, dtype=torch.float16) for _ in range(3))
        for warming_up in (True, True, False, False) if held else (False,):
            o = fn(q, k, v)
            if warming_up:
                blocks.empty()
                blocks.peak = blocks.used
        del o
    decimals = len(row.printed.partition(".")[2])
    assert f"{blocks.peak / 2**20:.{decimals}f}" == row.printed


@pytest.mark.parametrize("width, factor", [(16, "2.07"), (32, "2.00"), (64, "1.87"), (128, "1.70")])
def test_report_000s_scaling_factors(width, factor):
    rows = read(GTX, MIB).query(f"head_dim == '{width}' and status == 'ok'")
    assert f"{scaling_factor([float(x) for x in rows[MIB]]):.2f}" == factor


def test_report_001s_matrices_and_summary_follow_from_its_rows():
    """The size of one matrix in every row; averages and extremes of its nine, as it prints them."""
    rows = read(CPU, "attention_matrix_mb")
    sized = [Shape(4, 1, int(row.seq_len), int(row.head_dim)) for row in rows.itertuples()]
    assert [f"{evaluate(SCORES, shape) / 1e6:.1f}" for shape in sized] == rows["attention_matrix_mb"].tolist()
    forward, backward = (rows[f"{phase}_ms"].astype(float) for phase in PHASES)
    summary = forward.mean(), backward.mean(), forward.min(), forward.max()
    assert [f"{figure:.2f}" for figure in summary] == ["36.48", "38.79", "0.29", "107.12"]


def test_report_002s_components_and_remedies_follow_from_laws():
    """Its list at batch 8, N = 16384, width 16, in MiB; what four programs keep there, with the inputs, in GiB."""
    own = Shape(8, 1, 16384, 16)
    assert [evaluate(term, own) / 2**20 for term in (LINEAR, 3 * LINEAR, SCORES)] == [8, 24, 8192]
    listed = (BY_AMAX, 3), (VARIANTS["naive"], 1), (VARIANTS["naive_weights_only"], 1)  # 002 says 2 of the second
    for one, matrices in listed:
        kept = one.law.bytes("saved", own, "cuda") + own.input_bytes
        assert round(kept / 2**30) == 8 * matrices and kept // evaluate(SCORES, own) == matrices
    fused = replace(own, causal=True)
    kept = VARIANTS["sdpa_efficient"].law.bytes("saved", fused, "cuda") + own.input_bytes
    assert round(kept / 2**20, 1) == 32.5, "it prints about 32 MB"


def test_report_004s_factors_and_bytes_per_token_follow_from_its_rows():
    rows = report_004().query("table == 'length'")
    ms = rows["forward_ms"].tolist()
    assert [f"{one / ms[0]:.1f}" for one in ms] == ["1.0", "2.7", "10.2", "28.9", "149.8"]
    kib = rows["memory_mib"] * 1024 / rows["batch"] / rows["seq_len"]
    assert kib.iloc[2:].tolist() == [8.75] * 3 and all(8.75 <= one <= 8.85 for one in kib)
    assert f"{math.log(ms[-1] / (512 / 316.102)) / math.log(16):.2f}" == "1.80", "from its best throughput at N = 512"
    rows = report_004().query("table == 'quick'")
    given = 1e3 * rows["batch"] * rows["seq_len"] / rows["forward_ms"]
    assert (given / rows["tokens_per_s"]).between(0.994, 1.006).all(), "near what it prints, from other times"
