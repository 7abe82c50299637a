"""A notebook's run: what it measures is on disk, with what it was measured on, and a replay loads the same."""

import json

import faults
import pandas as pd
import pytest

from attnlib import VARIANTS
from attnlib.core import Shape, UserError
from attnlib.timing.sweep import Job
from attnlib.timing.worker import Worker
from report import run as running
from report import stored
from report.run import Run
from report.skipping import NotMeasured

POINTS = [(VARIANTS["naive"], Shape(1, 1, n, 4)) for n in (8, 9)]


@pytest.fixture
def live(tmp_path, monkeypatch):
    """Make runs that measure this CPU into an empty folder, from a worker that starts quickly."""
    workers = []
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    monkeypatch.setattr(running, "ceilings", faults.some_ceilings)
    monkeypatch.setattr(running, "Worker", lambda: workers.append(Worker()) or workers[-1])
    yield lambda notebook="01_test": Run(notebook, "cpu", "quick")
    for worker in workers:
        worker.stop()


def facts(run):
    """What machine.json says of the machine of a run."""
    return json.loads((stored.ROOT / "data" / run.folder / "machine.json").read_text())[run.machine.machine]


def test_a_replay_loads_what_was_measured(live):
    run = live()
    rows, others = run.sweep("points", POINTS, 0.003), run.collect("others", jobs(3), ["number"])
    assert run.folder.endswith("-quick") and rows["status"].tolist() == ["ok", "ok"]
    assert (facts(run)["rows"], facts(run)["threads"]) == ({"01_points": 2, "01_others": 3}, 1)
    again = Run("01_test", run.folder, "quick", True)
    pd.testing.assert_frame_equal(again.sweep("points", POINTS), rows)
    pd.testing.assert_frame_equal(again.collect("others", (), ["number"]), others)
    assert again.machine.ceilings["launch_us"] == 1 and again.machine.machine == run.machine.machine


def test_a_replay_has_the_rows_that_were_measured_and_no_others(live):
    """Points that were added since are not there, and nothing else changes."""
    run = live()
    rows = run.sweep("points", POINTS, 0.003)
    more = [*POINTS, (VARIANTS["tiled"], Shape(1, 1, 8, 4)), (VARIANTS["naive"], Shape(1, 1, 10, 4))]
    pd.testing.assert_frame_equal(Run("01_test", run.folder, "quick", True).sweep("points", more), rows)


def jobs(count, stop=None):
    """Jobs whose row is their number; the one called `stop` interrupts."""

    def row(at):
        if at == stop:
            raise KeyboardInterrupt
        return {"number": at}

    return [Job(f"job {at}", row, (at,), here=True) for at in range(count)]


def test_any_rows_of_a_notebook_go_on_after_an_interruption(live):
    """Not the sweeps of points alone. Until then the machine is described, and no row is said to be there."""
    with pytest.raises(KeyboardInterrupt):
        (run := live()).collect("others", jobs(5, stop=3), ["number"])
    assert facts(run)["rows"] == {} and not run.path("others").exists()
    done = jobs(5, stop=2)  # what is done is not done again
    assert live().collect("others", done, ["number"])["number"].tolist() == [*range(5)]


def test_a_machine_stays_described_as_long_as_rows_of_it_are_there(live):
    run = live()
    run.sweep("points", POINTS, 0.003)
    path = stored.ROOT / "data" / run.folder / "machine.json"
    known = json.loads(path.read_text())
    other, gone = {**facts(run), "machine": "other"}, {**facts(run), "machine": "gone"}
    path.write_text(json.dumps({**known, "other": other, "gone": gone}))
    run.path("points").with_name("02_points.csv").write_text(
        run.path("points").read_text().replace(run.machine.machine, "other")
    )
    live().collect("others", jobs(1), ["number"])
    assert {*json.loads(path.read_text())} == {run.machine.machine, "other"}


def test_jobs_without_a_row_leave_no_file(live):
    """Counters that cannot be read, a frontier for which there is no room: a replay finds that there is nothing."""
    run = live()
    with pytest.raises(NotMeasured, match="Nothing could be measured here for .counters."):
        run.collect("counters", [Job("none", list, (), here=True)], ["number"])
    assert not run.path("counters").exists() and facts(run)["rows"] == {}
    run.collect("others", jobs(1), ["number"])
    assert not Run("01_test", run.folder, "quick", True).has("counters")


def test_laws_and_observations_are_kept_in_the_order_in_which_they_were_made(capsys):
    run = Run("01_naive_sweep", "nvidia-h200", "full", True)
    run.law("one is one", 1, 1)
    run.law("one is two", 1, 2)
    run.law("about one", 1, 1.01, holds=True)
    assert run.observe("a share", 0.5, least=0.4) is True
    assert run.observe("a share", 0.5, least=0.4, most=0.45) is False
    assert [claim["kind"] for claim in run.claims] == ["law"] * 3 + ["observation"] * 2
    assert [claim["holds"] for claim in run.claims] == [True, False, True, True, False]
    assert run.claims[3]["expected"] == "at least 0.40" and run.claims[4]["measured"] == "0.50"
    assert all(isinstance(value, (str, bool)) for claim in run.claims for value in claim.values())


def test_what_was_not_measured_says_so_and_what_needs_the_computer_at_hand_too(live):
    run = live()
    with pytest.raises(NotMeasured, match="Chapter 2 was not measured on this device yet .*ONLY=02"):
        run.of_chapter("02", "frontier")
    with pytest.raises(NotMeasured, match="A frontier needs a GPU"):
        run.gpu_only("A frontier")
    with pytest.raises(NotMeasured, match="left to the full profile"):
        run.full_only("A frontier")
    run.collect("others", jobs(1), ["number"])
    again = Run("01_test", run.folder, "quick", True)
    with pytest.raises(NotMeasured, match="Not measured on this device yet: .points. of chapter 1"):
        again.sweep("points", POINTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("01_test", "cpu", "slow"), "profile must be one of full, quick"),
        (("01_test", "tpu"), "device must be"),
        (("01_test", "nowhere", "full", True), "no data for device 'nowhere'"),
    ],
)
def test_a_run_of_nothing_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Run(*arguments)
