"""What is built on the laws: the seedable check, what fits, and the commands."""

import re
from dataclasses import replace

import pytest
import torch

from attnlib import FAMILIES, VARIANTS, family
from attnlib.__main__ import main
from attnlib.core import PHASES, Machine, Shape, UserError
from attnlib.laws import ACCOUNTS, USES, bytes_needed
from attnlib.memory import check, fit
from attnlib.memory.ledger import Ledger, ledger, reached
from attnlib.timing.room import memory_free
from attnlib.timing.sweep import observation_jobs, run_jobs
from report import predicted

GIB = 2**30
PLAIN = family("plain")


def test_the_ledger_accounts_ten_terabytes_without_allocating_any():
    rows = ledger(VARIANTS["naive"], Shape(8, 1, 400_000, 64), "cuda")
    assert reached(rows)["backward_peak"]["alive_bytes"] > 10 * 10**12


def test_a_ledger_writes_an_operation_with_what_moved_and_what_is_alive():
    """Any code on tensors without data: here one product, of whose operands one was there before."""
    a, book = torch.empty(8, 16, device="meta"), Ledger("cpu")
    book.know(a)
    with book:
        b = torch.empty(16, 4, device="meta")
        out = a @ b
    (row,) = book.rows
    assert (row["op"], row["flops"], row["largest_bytes"]) == ("mm", 2 * 8 * 16 * 4, a.nbytes)
    assert row["traffic_bytes"] == a.nbytes + b.nbytes + out.nbytes and row["alive_bytes"] == b.nbytes + out.nbytes


@pytest.mark.parametrize("seed", [7, 20261121])
def test_random_shapes_have_no_mismatch(seed, device):
    todo = check.cases(check.draw(seed, 3), device, VARIANTS)
    seen = []
    if device != "cpu":
        jobs = run_jobs(observation_jobs(todo, device, Machine.of(device)), lanes=4, room_bytes=memory_free(device))
        seen = [row for _, rows in jobs for row in rows]
    rows = check.with_observed([check.compare(*case, device) for case in todo], seen)
    assert len(rows) >= 3 * 6 * len(PLAIN)
    assert check.mismatches(rows, VARIANTS, device) == []
    assert device == "cpu" or all(row[column] is not None for row in rows for column in check.SEEN)


def test_draws_repeat_and_differ_by_seed():
    assert check.draw(7, 2) == check.draw(7, 2) != check.draw(8, 2)


@pytest.mark.parametrize("count", [0, -3, 10**9])
def test_no_draws_and_too_many_are_refused(count):
    with pytest.raises(UserError, match="count must be"):
        check.draw(7, count)


def test_a_wrong_law_is_reported_with_its_terms():
    right = VARIANTS["naive"]
    wrong = replace(right, law=replace(right.law, saved={"weights": right.law.saved["weights"]}))
    booked = [check.compare(wrong, Shape(1, 1, 10, 4), "cpu")]
    (text,) = check.mismatches(booked, {"naive": wrong}, "cpu")
    assert "saved: law 400, ledger 560" in text and "{'weights': 400}" in text


def test_the_allocator_can_contradict_and_may_be_silent():
    todo = check.cases([Shape(1, 1, 10, 4), Shape(1, 1, 11, 4)], "cuda", {"naive": VARIANTS["naive"]})
    booked = [check.compare(*case, "cuda") for case in todo]
    law = {f"{a}_requested_bytes": VARIANTS["naive"].law.bytes(a, todo[0][1], "cuda") for a in ACCOUNTS}
    row = {"variant": "naive", **todo[0][1].columns(), **dict.fromkeys(check.SEEN, 0), **law}
    silent = {"variant": "naive", **todo[1][1].columns(), **dict.fromkeys(check.SEEN)}

    def wrong(*seen):
        return check.mismatches(check.with_observed(booked, seen), VARIANTS, "cuda")

    assert not wrong(row, silent) and not wrong(row) and not wrong()
    (text,) = wrong(row | {"saved_requested_bytes": 1}, silent)
    assert "saved: law 560, ledger 560, requested 1;" in text


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), (" 7.9 GiB ", 8482560409), ("1PiB", 2**50)]
)
def test_memory_sizes(text, size):
    assert fit.nbytes(text) == size


@pytest.mark.parametrize(
    "text", ["24", "GiB", "-3GiB", "0GiB", "nanGiB", "1e3GiB", "24gib", "2PiB", "24 GiB or so", "", "9" * 400 + "GiB"]
)
def test_memory_sizes_without_sense(text):
    with pytest.raises(UserError, match="number with a unit"):
        fit.nbytes(text)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "shape", [Shape(8, 1, 1, 64), Shape(3, 5, 1, 256, "bfloat16", True), Shape(1, 1, 1, 1)], ids=str
)
def test_the_largest_length_fits_and_the_next_does_not(name, phase, shape):
    """By search, and by solving the laws for N."""
    variant, solved = VARIANTS[name], predicted.solutions(VARIANTS[name], shape, phase, Machine("cuda")).values()
    for memory in (10**5, GIB, 80 * 10**9):
        longest = fit.largest_seq_len(variant, shape, memory, phase, "cuda")
        need = [bytes_needed(variant, fit.at_length(shape, n), "cuda", phase) for n in (max(longest, 1), longest + 1)]
        assert need[0] <= memory < need[1] or (longest == 0 and need[1] > memory)
        assert min(int(root.subs(predicted.M, memory)) for root in solved) == longest


def test_what_fills_the_memory_adds_up_to_what_is_needed():
    variant, shape = VARIANTS["naive"], Shape(8, 1, 4096, 64)
    operation, terms = fit.contents(variant, shape, "backward", "cuda")
    assert operation == "softmax's backward" and list(terms)[0] == "q, k, v"
    assert sum(terms.values()) == bytes_needed(variant, shape, "cuda", "backward")


def test_the_options_are_those_that_take_such_shapes():
    """Dense variants with a law, for the machine that is asked about."""
    found = fit.options(Shape(8, 1, 1, 64, "bfloat16"), GIB, Machine("cuda"), VARIANTS)
    names = [row["variant"] for row in found]
    assert set(names) >= {*FAMILIES["plain"], "sdpa_flash"} and not {*names} & {"sdpa_default", "window", "dilated"}
    assert all(row["training"] < row["inference"] for row in found)
    on_cpu = [row["variant"] for row in fit.options(Shape(8, 1, 1, 64), GIB, Machine("cpu"), VARIANTS)]
    assert "sdpa_cudnn" not in on_cpu and "sdpa_flash" in on_cpu


FIT = ["fit", "--memory", "24GiB", "--variant", "naive", "--batch", "8", "--head-dim", "64"]


def test_fit_says_what_fits_and_what_goes_further(capsys):
    assert main(FIT) == 0
    text = capsys.readouterr().out
    longest = fit.largest_seq_len(VARIANTS["naive"], Shape(8, 1, 1, 64), 24 * GIB, "backward", "cuda")
    assert f"largest N: {longest:,}" in text and "softmax's backward" in text and "take instead: " in text
    assert main([*FIT, "--inference", "--dtype", "float16", "--causal", "--device", "cpu"]) == 0
    assert main(["fit", "--memory", "1KB", "--variant", "naive", "--batch", "9", "--head-dim", "64"]) == 0
    assert "not even N = 1 fits" in capsys.readouterr().out
    assert main([*FIT, "--variant", "sdpa_flash", "--dtype", "bfloat16"]) == 0
    assert "log-sum-exp" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["check", "--seed", "x"],
        ["check", "--seed", "7", "--count", "0"],
        ["check", "--seed", "7", "--count", "-3"],
        ["check", "--seed", "7", "--count", "1.5"],
        ["check", "--seed", "7", "--device", "tpu"],
        ["check", "--seed", "7", "--device", "cuda:99"],
        ["fit"],
        [*FIT, "--memory", "24"],
        [*FIT, "--memory", "9PiB"],
        [*FIT, "--variant", "flash"],
        [*FIT, "--variant", "sdpa_default"],
        [*FIT, "--variant", "dilated"],
        [*FIT, "--variant", "sdpa_flash"],
        [*FIT, "--variant", "sdpa_cudnn", "--dtype", "bfloat16", "--head-dim", "12"],
        [*FIT, "--dtype", "int8"],
        [*FIT, "--batch", "0"],
        [*FIT, "--batch", "-8"],
        [*FIT, "--head-dim", "64.5"],
        [*FIT, "--device", "tpu"],
        ["guess"],
        [],
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_line(arguments, capsys):
    assert main(arguments) == 1
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.startswith("error: ") and seen.err.count("\n") == 1


def test_check_reports_and_exits_0(capsys):
    assert main(["check", "--seed", "1", "--count", "1"]) == 0
    assert re.fullmatch(r"law = ledger for (\d+) of \1 configurations, to the byte\n", capsys.readouterr().out)


def test_check_reports_a_mismatch_and_exits_1(capsys, monkeypatch):
    right = VARIANTS["naive"]
    law = replace(right.law, saved={"weights": right.law.saved["weights"]})
    monkeypatch.setitem(VARIANTS, "naive", replace(right, law=law))
    assert main(["check", "--seed", "1", "--count", "1"]) == 1
    *texts, last = capsys.readouterr().out.splitlines()
    wrong, of = (int(number) for number in re.search(r"for (\d+) of (\d+)", last).groups())
    assert len(texts) == of - wrong == 6 and all(text.startswith("naive Shape(") for text in texts)


def test_what_fits_is_asked_for_by_a_use_or_a_phase_and_without_a_length():
    """Of sizes without N, as on the command line; any other word is refused in one line."""
    sizes, naive = {"batch": 8, "heads": 1, "head_dim": 64}, VARIANTS["naive"]
    for use, phase in USES.items():
        found = {
            fit.largest_seq_len(naive, one, GIB, word, "cuda")
            for one in (sizes, Shape(8, 1, 9, 64))
            for word in (use, phase)
        }
        assert len(found) == 1
        assert f"largest N: {found.pop():,}" in fit.explain(naive, sizes, GIB, use, "cuda", VARIANTS)
    for call in (
        lambda: fit.largest_seq_len(naive, sizes, GIB, "Training", "cuda"),
        lambda: fit.contents(naive, Shape(8, 1, 9, 64), "both", "cuda"),
        lambda: fit.explain(naive, sizes, GIB, "backward", "cuda", VARIANTS),
    ):
        with pytest.raises(UserError, match=r"^[^\n]*training, not '\w+'$"):
            call()


def test_without_a_law_nothing_is_said_to_fit():
    for call in (bytes_needed, lambda one, shape, machine: fit.largest_seq_len(one, shape, GIB, "training", machine)):
        with pytest.raises(UserError, match="sdpa_default has no law"):
            call(VARIANTS["sdpa_default"], Shape(1, 1, 8, 8), "cpu")
    assert "no other variant" in fit.explain(VARIANTS["naive"], Shape(1, 1, 8, 8), GIB, "training", "cuda", {})


@pytest.mark.parametrize("device", ["cuda:00", "cuda:01", "cpu:1"])
def test_a_device_that_torch_would_not_know_is_refused(device, capsys):
    fits = "fit --memory 1GiB --variant naive --batch 1 --head-dim 8 --device"
    assert main([*fits.split(), device]) == 1
    assert capsys.readouterr().err == f"error: device must be cpu, cuda or cuda:<index>, not {device!r}\n"
