"""What the project hands in: README, notebooks, commands, and a report that is whole or not there."""

import json
import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from attnlib import NAIVE, stored
from attnlib.core import AttnError
from report import build as report

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def readme_table() -> str:
    """The README's table, from the committed rows."""
    rows = stored.load("nvidia-h200", "01_naive_sweep").query("head_dim == 64")
    lines = ["| N | " + " | ".join(f"`{name}`" for name in NAIVE) + " |", "|---:|" + "---:|" * len(NAIVE)]
    for seq_len in (1024, 4096, 16384, 32768):
        cells = []
        for name in NAIVE:
            row = rows[(rows["seq_len"] == seq_len) & (rows["variant"] == name)].iloc[0]
            figures = f"{row['forward_backward_ms']:.3g} ms, {row['backward_peak_bytes'] / 2**30:.2f} GiB"
            cells.append(figures if row["status"] == "ok" else f"out of memory in {row['phase']}")
        lines.append(f"| {seq_len} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """The project without its history and what it built, to be broken; `build` below works on it."""
    ignore = shutil.ignore_patterns(".*", "build", "*-quick", "__pycache__", "*.egg-info")
    root = Path(shutil.copytree(ROOT, tmp_path / "project", ignore=ignore))
    monkeypatch.setattr(stored, "ROOT", root)
    monkeypatch.setattr(report, "ROOT", root)
    monkeypatch.setattr(report, "HERE", root / "report")
    monkeypatch.setenv("PYTHONPATH", "")
    return root


@pytest.fixture
def build(copy, monkeypatch, capsys):
    """Run report/build.py on the copy: its exit status, and what it wrote to stderr."""

    def run(*arguments):
        monkeypatch.setattr(report, "NOTEBOOKS", sorted((copy / "notebooks").glob("[0-9][0-9]_*.ipynb")))
        monkeypatch.setattr(sys, "argv", ["build.py", *arguments])
        status = report.main()
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


PARAMETERS = 'device = "cpu"\nprofile = "quick"\nreplay = False'


def test_readme_table_is_computed():
    assert readme_table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_essays_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    lines = [sum(1 for line in "".join(cell["source"]).splitlines() if line.strip()) for cell in code]
    words = sum(len("".join(cell["source"]).split()) for cell in cells if cell["cell_type"] == "markdown")
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert max(lines) <= 20 and words >= 6 * sum(lines)


def test_replay_makes_both_formats_from_committed_data(copy, build):
    assert build("replay", "--device", "nvidia-h200") == (0, "")
    out = copy / "build" / "nvidia-h200"
    html = (out / "report.html").read_text()
    assert (out / "report.pdf").read_bytes().startswith(b"%PDF")
    assert "<math" in html and "data:image/svg+xml" in html and "prefers-color-scheme" in html
    assert 'src="http' not in html and 'href="http' not in html.split("<main>")[0]
    claims = pd.read_csv(copy / "data" / "nvidia-h200" / "claims.csv")
    assert claims["holds"].all() and len(claims) >= 10


def test_a_failing_notebook_leaves_no_report(copy, build):
    out = copy / "build" / "nvidia-h200"
    out.mkdir(parents=True)
    (out / "report.html").write_text("of an earlier run")
    replace_notebook(copy, PARAMETERS, "1 / 0")
    status, err = build("replay", "--device", "nvidia-h200")
    assert is_one_line_error(status, err) and "ZeroDivisionError" in err
    assert not list(out.glob("report.*")) and not (out / "notebooks" / "01_test.ipynb").exists()


def test_an_error_without_a_text_is_one_line_too(copy, build):
    replace_notebook(copy, PARAMETERS, "assert 1 == 2")
    status, err = build("replay", "--device", "nvidia-h200")
    assert is_one_line_error(status, err) and "AssertionError" in err


def test_a_killed_kernel_leaves_no_report(copy, build):
    replace_notebook(copy, PARAMETERS, "import os\nos.kill(os.getpid(), 9)")
    assert is_one_line_error(*build("replay", "--device", "nvidia-h200"))
    assert not list((copy / "build" / "nvidia-h200").glob("report.*"))


def test_a_false_claim_leaves_no_report(copy, build):
    run = "from attnlib.results import Run\nrun = Run('01_test', device, profile, replay)\n"
    replace_notebook(copy, PARAMETERS, run + "run.claim('one is two', 1, 2)\nrun.close()")
    status, err = build("replay", "--device", "nvidia-h200")
    assert is_one_line_error(status, err) and "one is two" in err
    assert not list((copy / "build" / "nvidia-h200").glob("report.*"))


@pytest.mark.parametrize("text", ["see @fig-nowhere", "raw \\unknownmacro{x} $\\unknownmacro{x}$", "<b>lost</b>"])
def test_what_would_be_lost_stops_the_export(copy, build, text):
    replace_notebook(copy, PARAMETERS, f"from attnlib.results import say\nsay({text!r})")
    assert is_one_line_error(*build("replay", "--device", "nvidia-h200"))
    assert not list((copy / "build" / "nvidia-h200").glob("report.*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("measure", "--device", "tpu"),
        ("measure", "--device", "cuda:99"),
        ("measure", "--device", "cpu", "--profile", "slow"),
        ("measure", "--device", "cpu", "--profile", "quick", "-p", "speed", "11"),
        ("replay", "--device", "nowhere"),
        ("measure", "--device", ""),
        ("measure", "--device", "cpu", "-p", "replay", "False"),
        ("replay", "--device", "../data/nvidia-h200"),
        ("replay", "--device", "nvidia-h200", "--profile", "slow"),
        ("replay", "--device", "published"),
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_line_and_touches_nothing(copy, build, arguments):
    before = sorted(path for path in copy.rglob("*") if "__pycache__" not in path.parts)
    assert is_one_line_error(*build(*arguments))
    assert [path for path in sorted(copy.rglob("*")) if "__pycache__" not in path.parts] == before


DAMAGES = {
    "a missing column": lambda rows: rows.drop(columns="saved_bytes"),
    "no rows": lambda rows: rows.head(0),
    "a row twice": lambda rows: pd.concat([rows, rows.head(1)]),
    **{
        f"{column} {text!r}": lambda rows, column=column, text=text: rows.assign(
            **{column: [text if i == 3 else old for i, old in enumerate(rows[column])]}
        )
        for column, text in (
            *(
                ("status", "fast"),
                ("machine", "another"),
                ("torch", "2.11.0"),
                ("forward_ms", "fast"),
                ("forward_ms", ""),
            ),
            *(("forward_ms", "-3"), ("forward_ms", "inf"), ("seq_len", "-4"), ("seq_len", "long"), ("causal", "maybe")),
            *(("dtype", "float8"), ("variant", "flash9"), ("machine", "")),
        )
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_csv_is_refused(monkeypatch, tmp_path, damage):
    shutil.copytree(ROOT / "data" / "nvidia-h200", tmp_path / "data" / "nvidia-h200")
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    path = tmp_path / "data" / "nvidia-h200" / "01_naive_sweep.csv"
    DAMAGES[damage](pd.read_csv(path, dtype=str)).to_csv(path, index=False)
    with pytest.raises(AttnError) as error:
        stored.load("nvidia-h200", "01_naive_sweep")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "{", '{"a": {}}', '{"a": 1}', ""])
def test_a_damaged_machine_json_is_refused(monkeypatch, tmp_path, text):
    (tmp_path / "data" / "x").mkdir(parents=True)
    (tmp_path / "data" / "x" / "machine.json").write_text(text)
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    with pytest.raises(AttnError, match="damaged"):
        stored.machines(tmp_path / "data" / "x")


def test_a_report_names_each_day_that_its_data_were_measured(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "data" / "nvidia-h200", tmp_path / "data" / "nvidia-h200")
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    path = tmp_path / "data" / "nvidia-h200" / "machine.json"
    known = json.loads(path.read_text())
    for facts in known.values():
        facts["dates"] = {"01_naive_sweep": "2026-01-02", "01_options": "2026-01-03"}
        facts["date"] = "2026-01-04"
    path.write_text(json.dumps(known))
    assert stored.machine_of("nvidia-h200", "01")["date"] == "2026-01-02 and 2026-01-03"
    assert stored.machine_of("nvidia-h200", "03")["date"] == "2026-01-04"
