"""The first page says what the chapters' rows say, and its advice follows them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from attnlib import VARIANTS
from attnlib.core import Shape
from attnlib.laws import bytes_needed
from notebooks import overview
from report import stored
from report.run import Run

ROOT = Path(__file__).parent.parent
DEVICES = [path.parent.name for path in sorted((ROOT / "data").glob("*/machine.json"))]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A copy of data/ to alter."""
    shutil.copytree(ROOT / "data", tmp_path / "data")
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    return tmp_path / "data"


def opened(device: str) -> Run:
    """The overview's run."""
    return Run("00_overview", device, "full", replay=True)


def alter(path: Path, change) -> None:
    """Change a file's rows."""
    rows = pd.read_csv(path)
    change(rows)
    rows.to_csv(path, index=False)


@pytest.mark.parametrize("device", DEVICES)
def test_the_numbers_are_the_chapters_own(device):
    run = opened(device)
    every = overview.all_kinds(run)
    numbers, dtype = overview.as_numbers(every, run.machine), every["dtype"].iloc[0]
    here = f"seq_len == {overview.common_length(every)} and status == 'ok'"
    measured = pd.read_csv(ROOT / "data" / device / "03_memory.csv").query(here).set_index("variant")
    assert {"naive", "dilated"} < {*numbers["variant"]} and len(numbers) == len(
        measured.drop("tiled", errors="ignore")
    ) + 1
    for row in numbers.query("variant != 'dilated'").itertuples():
        seen, one = measured.loc[row.variant], VARIANTS[row.variant]
        assert row.passes == seen["forward_backward_ms_count"]
        assert row.ms * seen["heads"] == pytest.approx(seen["forward_backward_ms"] * overview.HEADS)
        if not run.machine.is_cpu:
            assert (row.saved, row.backward_peak) == (seen["saved_bytes"], seen["backward_peak_bytes"])
        shapes = (Shape(1, overview.HEADS, row.longest + more, 64, dtype) for more in (0, 1))
        fits = [bytes_needed(one, shape, run.machine) <= run.machine.memory_bytes for shape in shapes]
        assert fits == [True, False]
    dilated = pd.read_csv(ROOT / "data" / device / "04_memory.csv").query(here).iloc[-1]
    ours = numbers.set_index("variant").loc["dilated"]
    assert ours["ms"] * dilated["heads"] == pytest.approx(dilated["forward_backward_ms"] * overview.HEADS)


def advised(device: str) -> pd.DataFrame:
    """The table of what to use when, by its first column."""
    run = opened(device)
    every = overview.all_kinds(run)
    numbers = overview.as_numbers(every, run.machine)
    best = numbers[numbers["variant"].str.match(overview.FUSED)].set_index("variant")["ms"].idxmin()
    again = run.of_chapter("05", "repeat", ["law_bytes"])
    return overview.advice(run, every, best, {"a spelling": "a kernel"}, again).data.set_index("when")


def test_what_to_use_follows_the_rows(data):
    before = advised("nvidia-h200")
    folder = data / "nvidia-h200"
    alter(folder / "03_crossover.csv", lambda rows: rows.update({"ratio": rows["ratio"] * 0 + 0.5}))
    alter(folder / "04_duels.csv", lambda rows: rows.update({"ratio": rows["ratio"] * 0 + 2.0}))

    def efficient_is_fast(rows):
        rows.loc[rows["variant"] == "sdpa_efficient", "ms"] /= 1000

    alter(folder / "05_repeat.csv", efficient_is_fast)

    def flash_is_fast(rows):
        rows.loc[rows["variant"] == "sdpa_flash", "forward_backward_ms"] /= 1000

    def flash_wins(rows):
        rows.loc[rows["variant"] == "sdpa_flash", overview.races.OF_DEFAULT] *= 1000

    alter(folder / "03_memory.csv", flash_is_fast)
    alter(folder / "03_race.csv", flash_wins)
    after = advised("nvidia-h200")
    assert "N >" not in before.loc["short sequences, no mask", "threshold here"]
    assert "N >" in after.loc["short sequences, no mask", "threshold here"], "plain attention is never slower now"
    assert after.loc["all pairs, causal or not", "use"] == "sdpa_flash" != before.loc["all pairs, causal or not", "use"]
    assert "N ≤" in after.loc["long sequences, a pattern will do", "threshold here"]
    assert "N ≤" not in before.loc["long sequences, a pattern will do", "threshold here"]
    bits = "the same bits on every run, of PyTorch's kernels"
    assert (before.loc[bits, "use"], after.loc[bits, "use"]) == ("sdpa_flash", "sdpa_efficient")


def test_what_never_wins_is_not_advised(data):
    folder = data / "nvidia-h200"
    alter(folder / "04_duels.csv", lambda rows: rows.update({"ratio": rows["ratio"] * 0 + 0.5}))
    alter(folder / "03_race.csv", lambda rows: rows.update(rows[overview.races.OF_DEFAULT] / 10))
    use = advised("nvidia-h200")["use"]
    assert use["long sequences, a pattern will do"] == "fa4"
    assert use["all pairs, causal or not"] == "what PyTorch picks"


def test_a_threshold_names_both_runs_where_they_lie_apart():
    cell = {"phase": "forward", "shortest": 64, "longest": 8192}
    for lengths, told in {
        (700.0, 720.0): "= 700",
        (64.0, 152.4): "≤ 64 or 152",
        (9000.0, float("inf")): "= 9,000 or > 8,192",
    }.items():
        cells = pd.DataFrame([{**cell, "seq_len": n} for n in lengths])
        assert overview.starting(cells) == f"forward from N {told}"
    assert overview.speed([0.5, 0.25]) == "it takes 2.0 and 4.0 times as long"
    assert overview.speed([2.0, 0.5]) == "it is 2.0 and 0.5 times as fast"


def test_what_does_not_hold_is_that_of_this_build_or_of_the_last_one(data, tmp_path, monkeypatch):
    kept = pd.read_csv(data / "nvidia-h200" / "claims.csv").query("kind == 'observation'")
    count, broken = overview.unmet(opened("nvidia-h200"))
    assert (count, len(broken)) == (len(kept), (~kept["holds"]).sum())
    claims = [{"kind": "law", "claim": "a", "holds": False}]
    claims += [{"kind": "observation", "claim": name, "holds": name == "b"} for name in "bcd"]
    (tmp_path / "03_flash.claims").write_text("".join(json.dumps(one) + "\n" for one in claims))
    monkeypatch.setenv("ATTNLIB_CLAIMS", str(tmp_path / "00_overview.claims"))
    count, broken = overview.unmet(opened("nvidia-h200"))
    assert (count, [*broken["claim"]], {*broken["notebook"]}) == (3, ["c", "d"], {"03_flash"})


def as_markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown: names on the left, figures on the right."""
    lines = [list(frame), [":---", *["---:"] * (len(frame.columns) - 1)]]
    lines += [[f"`{name}`", *figures] for name, *figures in frame.astype(str).itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def readme_answer(device: str = "nvidia-h200") -> list[str]:
    """What the README tells in its first lines: the overview's answer and its five findings, and its table."""
    command = [sys.executable, ROOT / "tests" / "replaying.py", device, "--bounded", "00"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    told = [text for text in json.loads(done.stdout)["said"] if re.match(r"\*\*The answer|\d\. ", text)]
    run = opened(device)
    table = overview.as_table(overview.as_numbers(overview.all_kinds(run), run.machine)).data
    return [told[0], "\n".join(told[1:]), as_markdown(table)]


def test_the_readme_says_what_the_overview_says():
    """`python tests/test_overview.py` prints what has to stand there."""
    text = (ROOT / "README.md").read_text()
    assert [part for part in readme_answer() if part not in text] == []


if __name__ == "__main__":
    print("\n\n".join(readme_answer()))
