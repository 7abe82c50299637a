"""Where memory runs out: the search against pools that lose more than any law says, and on the device."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from attnlib import VARIANTS, family
from attnlib.core import PHASES, Shape
from attnlib.laws import bytes_needed
from attnlib.memory.fit import at_length
from attnlib.timing.worker import Worker
from notebooks.block import in_block
from report import frontier, tables

GIB = 2**30
PLAIN = [*family("plain").values()]


def pool(memory, loss):
    """frontier.tried of a device with `memory` bytes, whose pool loses `loss(seq_len)` bytes."""

    def pretend(case, seq_len, *_):
        need = bytes_needed(case.variant, at_length(case.shape, seq_len), "cuda", case.phase)
        row = {"fits": need + loss(seq_len) <= memory, "memory_bytes": memory, "taken_bytes": 0, "libraries_bytes": 0}
        sizes = {"requested_bytes": need, "allocated_bytes": need, "reserved_bytes": need + loss(seq_len)}
        return row | sizes | {"tried_bytes": 0}

    return pretend


@pytest.mark.parametrize("lost", [2**20, GIB], ids=["expandable", "default"])
@pytest.mark.parametrize("noise", [1, 7919])
def test_the_search_finds_the_frontier(monkeypatch, lost, noise):
    """Against a pool that loses `lost` bytes and up to 20 MiB more, differently for each N but never less for more."""
    pretend = pool(8 * GIB, lambda seq_len: lost + seq_len * noise % (20 * 2**20))
    monkeypatch.setattr(frontier, "tried", pretend)
    for case in frontier.frontier_cases(8 * GIB, PHASES, [16, 128], variants=PLAIN):
        (row,) = frontier.search(case, "cuda")
        found = row["found_seq_len"]
        assert pretend(case, found, "")["fits"] and not pretend(case, found + 1, "")["fits"]
        assert found <= row["predicted_seq_len"] and row["trials"] <= 12


def test_a_frontier_of_linear_memory_is_found_to_a_mebibyte(monkeypatch):
    """Where a MiB holds many tokens the search does not go through them one by one."""
    memory, lost = GIB, 13 * 2**20 + 5
    case = frontier.Case(VARIANTS["sdpa_flash"], Shape(1, 1, 1, 64, "bfloat16"), "backward", memory, "expandable")
    monkeypatch.setattr(frontier, "tried", pool(memory, lambda seq_len: lost))
    (row,) = frontier.search(case, "cuda")
    left = memory - lost - bytes_needed(case.variant, at_length(case.shape, row["found_seq_len"]), "cuda")
    assert 0 <= left <= 2**20 and row["trials"] <= 12


def test_where_a_device_has_not_that_much_free_there_is_no_row(monkeypatch):
    monkeypatch.setattr(frontier, "tried", lambda *_: {"fits": None})
    monkeypatch.setattr(Worker, "call_again", lambda *_, **__: {"fits": None})
    (case,) = frontier.frontier_cases(GIB, ["backward"], [64], variants=PLAIN[:1])
    assert frontier.search(case, "cuda") == frontier.cells([case], "cuda") == []


def test_a_grid_is_gone_through_in_one_process_for_each_program_and_width(monkeypatch):
    """As the published programs did; each cell has its row, in order, and what ran out does not end the grid."""
    seen = []

    def pretend(worker, _, case, device, **__):
        seen.append(worker)
        return {"fits": case.shape.seq_len < 1024, "memory_bytes": case.memory_bytes}

    monkeypatch.setattr(Worker, "call_again", pretend)
    lengths = (256, 1024, 4096)
    cases = frontier.frontier_cases(GIB, ["backward"], [16, 64], variants=PLAIN[:2], lengths=lengths)
    jobs = frontier.grid_jobs(cases, "cuda")
    rows = [row for job in jobs for row in job.function(*job.arguments)]
    assert len(jobs) == 4 and len({*seen}) == 4
    assert [(row["seq_len"], row["fits"]) for row in rows] == [(n, n == 256) for n in lengths] * 4


def test_a_job_claims_what_its_processes_may_take():
    """All of a search's memory; of a grid what its largest trial needs and a pool loses; without a limit, all."""
    (case,) = frontier.frontier_cases(64 * GIB, ["backward"], [64], variants=PLAIN[:1], lengths=[256])
    (searched,), (tried,) = frontier.search_jobs([case], "cuda"), frontier.grid_jobs([case], "cuda")
    assert searched.claim_bytes == 64 * GIB and GIB < tried.claim_bytes < 2 * GIB and searched.here and tried.here
    (whole,) = frontier.search_jobs([replace(case, memory_bytes=0)], "cuda")
    assert whole.claim_bytes > 10**15


def test_slack_is_what_the_law_saw_and_holes_what_the_pool_lost():
    sizes = {"memory_bytes": 100, "need_bytes": 90, "requested_bytes": 70, "allocated_bytes": 72, "reserved_bytes": 95}
    found = tables.slack(pd.DataFrame([sizes, sizes | {"need_bytes": 120}]))
    assert list(found["slack_bytes"]) == [10, 0]
    assert list(found["rounding_bytes"]) == [2, 2] and list(found["holes_bytes"]) == [23, 23]


@pytest.mark.gpu
def test_a_frontier_on_the_device():
    (case,) = frontier.frontier_cases(GIB, ["backward"], [64], variants=[VARIANTS["naive"]])
    (row,) = frontier.search(case, "cuda:0")
    assert 0 <= row["predicted_seq_len"] - row["found_seq_len"] <= 0.02 * row["predicted_seq_len"]
    assert row["memory_bytes"] - row["need_bytes"] <= row["reserved_bytes"] - row["requested_bytes"] + 20 * 2**20


@pytest.mark.gpu
def test_a_trial_takes_a_block():
    """The block's own inputs are made, five tensors instead of three."""
    case = frontier.Case(in_block(VARIANTS["naive"]), Shape(1, 2, 64, 8), "backward", 0, "expandable")
    with Worker() as worker:
        assert worker.call(frontier.trial, case, "cuda:0")["fits"]


@pytest.mark.gpu
def test_what_forks_from_a_process_that_imported_the_package_can_use_the_gpu():
    with Worker() as worker:
        assert worker.call(torch.cuda.mem_get_info, "cuda")[0] > 0
