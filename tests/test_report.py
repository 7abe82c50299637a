"""What the project hands in: README, notebooks, commands, and a report that is whole or not there."""

import json
import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import COMMITTED

from report import build as building
from report import stored
from report.run import CLAIMS, Run

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def readme_table() -> str:
    """The README's table, from the committed rows."""
    rows = stored.load("nvidia-h200", "01_naive_sweep").query("head_dim == 64")
    names = [*dict.fromkeys(rows["variant"])]
    lines = ["| N | " + " | ".join(f"`{name}`" for name in names) + " |", "|---:|" + "---:|" * len(names)]
    for seq_len in (1024, 4096, 16384, 32768):
        cells = []
        for name in names:
            row = rows[(rows["seq_len"] == seq_len) & (rows["variant"] == name)].iloc[0]
            figures = f"{row['forward_backward_ms']:.3g} ms, {row['backward_peak_bytes'] / 2**30:.2f} GiB"
            cells.append(figures if row["status"] == "ok" else f"out of memory in {row['phase']}")
        lines.append(f"| {seq_len} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_readme_table_is_computed():
    assert readme_table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_essays_without_outputs(path):
    """More is said than computed: five words and more for each line of code."""
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    lines = [sum(1 for line in "".join(cell["source"]).splitlines() if line.strip()) for cell in code]
    words = sum(len("".join(cell["source"]).split()) for cell in cells if cell["cell_type"] == "markdown")
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert words >= 5 * sum(lines)


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """What a build reads and writes, to be broken; `build` below works on it."""
    root = tmp_path / "project"
    ignore = shutil.ignore_patterns("__pycache__", "*-quick")
    for folder in ("attnlib", "report", "notebooks", "data/nvidia-h200", "data/published"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    monkeypatch.setattr(stored, "ROOT", root)
    monkeypatch.setattr(building, "ROOT", root)
    monkeypatch.setattr(building, "HERE", root / "report")
    monkeypatch.setenv("PYTHONPATH", "")
    return root


@pytest.fixture
def build(copy, monkeypatch, capsys):
    """Run report/build.py on the copy: its exit status, and what it wrote to stderr."""

    def run(*arguments):
        monkeypatch.setattr(building, "NOTEBOOKS", sorted((copy / "notebooks").glob("[0-9][0-9]_*.ipynb")))
        monkeypatch.setattr(sys, "argv", ["build.py", *arguments])
        status = building.main()
        return status, capsys.readouterr().err

    return run


def replace_notebook(root: Path, *cells: str):
    """Put a notebook of a few cells in place of all others; the first cell is tagged `parameters`."""
    for path in (root / "notebooks").glob("*.ipynb"):
        path.unlink()
    made = [nbformat.v4.new_code_cell(cell) for cell in cells]
    made[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), root / "notebooks" / "01_test.ipynb")


def is_one_line_error(status: int, err: str) -> bool:
    """Whether a command failed with one line that starts with `error: `, and no traceback."""
    return status != 0 and sum(line.startswith("error: ") for line in err.splitlines()) == 1 and "Traceback" not in err


def leaves_no_report(root: Path) -> bool:
    """Whether there is neither a report nor half of one."""
    return not list((root / "build" / "nvidia-h200").glob("report.*"))


PARAMETERS = 'device = "cpu"\nprofile = "quick"\nreplay = False'
RUN = "from report.run import Run\nrun = Run('01_test', device, profile, replay)\n"


def test_a_false_claim_in_a_notebook_that_does_not_look_leaves_no_report(copy, build):
    """The build checks the claims, not the notebook: nothing closes a run, and no cell can swallow what it claimed."""
    captured = f"%%capture\n{RUN}run.claim('one is two', 1, 2)"
    replace_notebook(copy, PARAMETERS, captured, "run.claim('one is one', 1, 1)")
    status, err = build("replay", "--device", "nvidia-h200")
    assert is_one_line_error(status, err) and "one is two (01_test)" in err and "one is one" not in err
    assert leaves_no_report(copy)
    claims = pd.read_csv(copy / "data" / "nvidia-h200" / "claims.csv")
    assert claims["holds"].tolist() == [False, True] and claims["notebook"].tolist() == ["01_test"] * 2


@pytest.mark.ci
def test_a_failing_notebook_leaves_no_report(copy, build):
    out = copy / "build" / "nvidia-h200"
    out.mkdir(parents=True)
    (out / "report.html").write_text("of an earlier run")
    replace_notebook(copy, PARAMETERS, "1 / 0")
    status, err = build("replay", "--device", "nvidia-h200")
    assert is_one_line_error(status, err) and "ZeroDivisionError" in err
    assert leaves_no_report(copy) and not (out / "notebooks" / "01_test.ipynb").exists()


@pytest.mark.ci
def test_an_error_without_a_text_is_one_line_too(copy, build):
    replace_notebook(copy, PARAMETERS, "assert 1 == 2")
    status, err = build("replay", "--device", "nvidia-h200")
    assert is_one_line_error(status, err) and "AssertionError" in err


@pytest.mark.ci
def test_a_killed_kernel_leaves_no_report(copy, build):
    replace_notebook(copy, PARAMETERS, "import os\nos.kill(os.getpid(), 9)")
    assert is_one_line_error(*build("replay", "--device", "nvidia-h200"))
    assert leaves_no_report(copy)


@pytest.mark.ci
@pytest.mark.parametrize("text", ["see @fig-nowhere", "raw \\unknownmacro{x} $\\unknownmacro{x}$", "<b>lost</b>"])
def test_what_would_be_lost_stops_the_export(copy, build, text):
    replace_notebook(copy, PARAMETERS, f"from report.run import say\nsay({text!r})")
    assert is_one_line_error(*build("replay", "--device", "nvidia-h200"))
    assert leaves_no_report(copy)


@pytest.mark.ci
@pytest.mark.parametrize("device", COMMITTED)
def test_both_formats_are_whole(device):
    """Of the replays that .ci/run has just made: mathematics as such, figures inside, nothing from the network."""
    out = ROOT / "build" / device
    if not (out / "report.html").exists():
        pytest.skip(f"make replay DEVICE={device} comes first")
    html = (out / "report.html").read_text()
    assert (out / "report.pdf").read_bytes().startswith(b"%PDF")
    assert "<math" in html and "data:image/svg+xml" in html and "prefers-color-scheme" in html
    assert 'src="http' not in html and 'href="http' not in html.split("<main>")[0]
    claims = pd.read_csv(ROOT / "data" / device / "claims.csv")
    assert claims["holds"].all() and len(claims) >= 10


@pytest.fixture
def executed(monkeypatch):
    """Let notebooks make the claims that are given, `{name: texts}`, without a kernel."""
    given = {}

    def execute(notebook, target, parameters):
        run = Run(notebook.stem, "nvidia-h200", "full", True)
        for text in given.get(notebook.stem, ()):
            run.claim(text, 1, 1)
        nbformat.write(nbformat.v4.new_notebook(), target)

    monkeypatch.setattr(building, "execute", execute)
    monkeypatch.setattr(building, "export", lambda out, machine: (out / "report.html").write_text("whole"))
    return given


def test_the_claims_of_a_report_are_those_of_all_its_notebooks(copy, build, executed):
    """In the order in which they were made; of the data's folder the file is replaced, not added to."""
    executed |= {"01_naive_sweep": ["first"], "03_flash": ["second", "third"]}
    assert build("replay", "--device", "nvidia-h200") == (0, "")
    assert (copy / "build" / "nvidia-h200" / "report.html").read_text() == "whole"
    claims = pd.read_csv(copy / "data" / "nvidia-h200" / "claims.csv")
    assert claims["claim"].tolist() == ["first", "second", "third"]
    assert claims["notebook"].tolist() == ["01_naive_sweep", "03_flash", "03_flash"]


def test_a_claim_is_a_line_and_is_on_record_whatever_becomes_of_the_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(CLAIMS, str(tmp_path / "claims"))
    Run("01_test", "nvidia-h200", "full", True).claim("one is two", [1], 2)
    assert capsys.readouterr().out == "FAILS: one is two (predicted [1], measured 2)\n"
    found = {"claim": "one is two", "predicted": "[1]", "measured": "2", "holds": False}
    assert json.loads((tmp_path / "claims").read_text()) == found


@pytest.mark.parametrize(
    "arguments",
    [
        ("measure", "--device", "tpu"),
        ("measure", "--device", "cuda:99"),
        ("measure", "--device", "cpu", "--profile", "slow"),
        ("measure", "--device", "cpu", "--only", "99"),
        ("replay", "--device", "nowhere"),
        ("measure", "--device", ""),
        ("replay", "--device", "../data/nvidia-h200"),
        ("replay", "--device", "nvidia-h200", "--profile", "slow"),
        ("replay", "--device", "nvidia-h200", "--only", "02"),
        ("replay", "--device", "published"),
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_line_and_touches_nothing(copy, build, arguments):
    before = sorted(path for path in copy.rglob("*") if "__pycache__" not in path.parts)
    assert is_one_line_error(*build(*arguments))
    assert [path for path in sorted(copy.rglob("*")) if "__pycache__" not in path.parts] == before
