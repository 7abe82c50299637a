"""What is built on the laws: the seedable check, what fits, the frontier, and the commands."""

import re
import time
from dataclasses import replace

import pandas as pd
import pytest

from attnlib import NAIVE, VARIANTS, check, fit, frontier, memory_tables
from attnlib.core import ACCOUNTS, AttnError, Shape
from attnlib.memory import ledger, main, reached

GIB = 2**30


def test_the_ledger_accounts_ten_terabytes_in_two_seconds():
    begun = time.perf_counter()
    rows = ledger(VARIANTS["naive"], Shape(8, 1, 400_000, 64), "cuda")
    assert time.perf_counter() - begun < 2
    assert reached(rows)["backward_peak"]["alive_bytes"] > 10 * 10**12


@pytest.mark.parametrize("seed", [7, 20261121])
def test_random_shapes_have_no_mismatch(seed, device):
    todo = check.cases(check.draw(seed, 3), device)
    seen = None if device == "cpu" else pd.DataFrame(check.observe_all(todo))
    rows = check.check(todo, seen)
    assert len(rows) >= 3 * 6 * len(NAIVE)
    assert check.mismatches(rows, device) == []
    assert device == "cpu" or rows[check.SEEN].notna().all(axis=None)


def test_draws_repeat_and_differ_by_seed():
    assert check.draw(7, 2) == check.draw(7, 2) != check.draw(8, 2)


def test_a_wrong_law_is_reported_with_its_terms(monkeypatch):
    law = replace(VARIANTS["naive"].law, saved={"weights": VARIANTS["naive"].law.saved["weights"]})
    monkeypatch.setitem(VARIANTS, "naive", replace(VARIANTS["naive"], law=law))
    (text,) = check.mismatches(pd.DataFrame([check.compare("naive", Shape(1, 1, 10, 4), "cpu")]), "cpu")
    assert "saved: law 400, ledger 560" in text and "{'weights': 400}" in text


def test_the_allocator_can_contradict_and_may_be_silent():
    todo = check.cases([Shape(1, 1, 10, 4), Shape(1, 1, 11, 4)], "cuda", ["naive"])
    law = {f"{a}_requested_bytes": VARIANTS["naive"].law.bytes(a, todo[0][1], "cuda") for a in ACCOUNTS}
    row = {"variant": "naive", **todo[0][1].columns(), **dict.fromkeys(check.SEEN, 0), **law}
    silent = {"variant": "naive", **todo[1][1].columns(), **dict.fromkeys(check.SEEN)}
    assert not check.mismatches(check.check(todo, pd.DataFrame([row, silent])), "cuda")
    (text,) = check.mismatches(check.check(todo, pd.DataFrame([row | {"saved_requested_bytes": 1}, silent])), "cuda")
    assert "saved: law 560, ledger 560, requested 1;" in text
    with pytest.raises(AttnError, match="1 of 2 configurations were not measured"):
        check.check(todo, pd.DataFrame([row]))


def test_the_tally_counts_what_was_measured_and_what_agrees():
    shape = Shape(1, 1, 10, 4)
    law = {f"{a}_bytes": VARIANTS["naive"].law.bytes(a, shape, "cuda") for a in ACCOUNTS}
    row = {"variant": "naive", **shape.columns(), **law}
    rows = pd.DataFrame([row, row | {"saved_bytes": 561, "backward_peak_bytes": None}])
    assert check.tally(rows, "cuda") == {"saved": (2, 1), "forward_peak": (2, 2), "backward_peak": (1, 1)}
    assert check.tally(rows, "cpu")["saved"] == (2, 2)


def test_slack_is_what_the_law_saw_and_holes_what_the_pool_lost():
    sizes = {"memory_bytes": 100, "need_bytes": 90, "requested_bytes": 70, "allocated_bytes": 72, "reserved_bytes": 95}
    found = memory_tables.slack(pd.DataFrame([sizes, sizes | {"need_bytes": 120}]))
    assert list(found["slack_bytes"]) == [10, 0]
    assert list(found["rounding_bytes"]) == [2, 2] and list(found["holes_bytes"]) == [23, 23]


def test_cases_wait_for_room_and_those_without_are_left_out(monkeypatch):
    """On a device with 10 GiB free, cases of 4 GiB run two at a time, and one of 20 GiB not at all."""
    running, most = [], []

    class Device:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def call(self, *_):
            return (10 * GIB, 16 * GIB)

    def run(case, device):
        running.append(case)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(case)
        return case.memory_bytes

    monkeypatch.setattr(frontier, "Worker", Device)
    cases = frontier.cases(4 * GIB, ["backward"], [64]) + frontier.cases(20 * GIB, ["backward"], [64])
    assert list(frontier.side_by_side(run, cases, "cuda")) == [4 * GIB] * len(NAIVE) and max(most) == 2


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), (" 7.9 GiB ", 8482560409), ("1PiB", 2**50)]
)
def test_memory_sizes(text, size):
    assert fit.nbytes(text) == size


@pytest.mark.parametrize(
    "text", ["24", "GiB", "-3GiB", "0GiB", "nanGiB", "1e3GiB", "24gib", "2PiB", "24 GiB or so", "", "9" * 400 + "GiB"]
)
def test_memory_sizes_without_sense(text):
    with pytest.raises(AttnError, match="number with a unit"):
        fit.nbytes(text)


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("phase", fit.PHASES)
@pytest.mark.parametrize(
    "shape", [Shape(8, 1, 1, 64), Shape(3, 5, 1, 256, "bfloat16", True), Shape(1, 1, 1, 1)], ids=str
)
def test_the_largest_length_fits_and_the_next_does_not(name, phase, shape):
    for memory in (10**5, GIB, 80 * 10**9):
        longest = fit.largest_seq_len(VARIANTS[name], shape, memory, phase)
        need = [
            fit.need(VARIANTS[name], fit.at_length(shape, n), phase, "cuda") for n in (max(longest, 1), longest + 1)
        ]
        assert need[0] <= memory < need[1] or (longest == 0 and need[1] > memory)
        solved = [int(root.subs(fit.M, memory)) for root in fit.solutions(VARIANTS[name], shape, phase).values()]
        assert min(solved) == longest


@pytest.mark.parametrize(("pool", "lost"), [("expandable", 2**20), ("default", GIB)])
@pytest.mark.parametrize("noise", [1, 7919])
def test_the_search_finds_the_frontier(monkeypatch, pool, lost, noise):
    """Against a pool that loses `lost` bytes and up to 20 MiB more, differently for each N but never less for more."""
    memory, tried = 8 * GIB, []

    def pretend(case, seq_len, device):
        tried.append(seq_len)
        need = fit.need(VARIANTS[case.variant], fit.at_length(case.shape, seq_len), case.phase, "cuda")
        loss = lost + seq_len * noise % (20 * 2**20)
        row = {"fits": need + loss <= memory, "memory_bytes": memory, "taken_bytes": 0, "libraries_bytes": 0}
        return row | {"requested_bytes": need, "allocated_bytes": need, "reserved_bytes": need + loss, "tried_bytes": 0}

    monkeypatch.setattr(frontier, "in_fresh_process", pretend)
    for case in frontier.cases(memory, fit.PHASES, [16, 128], pool=pool):
        tried.clear()
        row = frontier.search(case, "cuda")
        found = row["found_seq_len"]
        assert pretend(case, found, "")["fits"] and not pretend(case, found + 1, "")["fits"]
        assert found <= row["predicted_seq_len"] and row["trials"] <= 12


def test_a_frontier_of_linear_memory_is_found_to_a_mebibyte(monkeypatch):
    """Where a MiB holds many tokens the search does not go through them one by one."""
    memory, lost = GIB, 13 * 2**20 + 5
    case = frontier.Case("sdpa_flash", Shape(1, 1, 1, 64, "bfloat16"), "backward", memory, "expandable")

    def pretend(case, seq_len, device):
        need = fit.need(VARIANTS[case.variant], fit.at_length(case.shape, seq_len), case.phase, "cuda")
        row = {"fits": need + lost <= memory, "memory_bytes": memory, "taken_bytes": 0, "libraries_bytes": 0}
        return row | {"requested_bytes": need, "allocated_bytes": need, "reserved_bytes": need, "tried_bytes": 0}

    monkeypatch.setattr(frontier, "in_fresh_process", pretend)
    row = frontier.search(case, "cuda")
    left = memory - lost - fit.need(VARIANTS["sdpa_flash"], fit.at_length(case.shape, row["found_seq_len"]), "backward")
    assert 0 <= left <= 2**20 and row["trials"] <= 12


@pytest.mark.gpu
def test_a_frontier_on_the_device():
    (case,) = frontier.cases(GIB, ["backward"], [64], names=["naive"])
    row = frontier.search(case, "cuda:0")
    assert 0 <= row["predicted_seq_len"] - row["found_seq_len"] <= 0.02 * row["predicted_seq_len"]
    assert row["memory_bytes"] - row["need_bytes"] <= row["reserved_bytes"] - row["requested_bytes"] + 20 * 2**20


FIT = ["fit", "--memory", "24GiB", "--variant", "naive", "--batch", "8", "--head-dim", "64"]


def test_fit_says_what_fits_and_what_goes_further(capsys):
    assert main(FIT) == 0
    text = capsys.readouterr().out
    longest = fit.largest_seq_len(VARIANTS["naive"], Shape(8, 1, 1, 64), 24 * GIB, "backward")
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
