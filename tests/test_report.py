"""What the project hands in: README, notebooks, commands, and a report that is always built and says what is wrong."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import COMMITTED

from attnlib.core import UserError
from report import build as building
from report import export as exporting
from report import stored
from report.run import CLAIMS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_essays_without_outputs(path):
    """More is said than computed: five words and more for each line of code."""
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    lines = [sum(1 for line in "".join(cell["source"]).splitlines() if line.strip()) for cell in code]
    words = sum(len("".join(cell["source"]).split()) for cell in cells if cell["cell_type"] == "markdown")
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert words >= 5 * sum(lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_is_not_printed_is_folded_in_jupyterlab(path):
    """So that a page of a notebook shows text and figures, and a click what draws them."""
    for cell in json.loads(path.read_text())["cells"]:
        hidden = bool({"hide-input", "remove-input"} & {*cell["metadata"].get("tags", [])})
        assert cell["metadata"].get("jupyter", {}).get("source_hidden", False) == hidden, cell["source"]


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """What a build reads and writes, to be broken; `build` below works on it."""
    root = tmp_path / "project"
    ignore = shutil.ignore_patterns("__pycache__", "*-quick")
    for folder in ("attnlib", "report", "notebooks", "data/nvidia-h200", "data/published", "figures/nvidia-h200"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    monkeypatch.setattr(stored, "ROOT", root)
    for notes in ("at_power_limit", "several_occasions"):  # what it was then is another test's matter
        monkeypatch.setattr(stored, notes, lambda *_: None)
    monkeypatch.setattr(building, "ROOT", root)
    monkeypatch.setattr(exporting, "HERE", root / "report")
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


REPLAY = ("replay", "--device", "nvidia-h200")
PARAMETERS = 'device = "cpu"\nprofile = "quick"\nreplay = False'
KERNEL = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}


def notebook_of(*cells: str, title: str = "A chapter"):
    """A notebook of a title, parameters and code cells; a line `# tag: x` tags the cell that it stands in."""
    code = [nbformat.v4.new_code_cell(cell) for cell in (PARAMETERS, *cells)]
    code[0].metadata["tags"] = ["parameters"]
    for cell in code[1:]:
        cell.metadata["tags"] = re.findall("# tag: (.*)", cell.source)
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {title}"), *code], metadata=KERNEL)


def replace_notebooks(root: Path, *notebooks):
    """Put these in place of all others, as 01_test.ipynb, 02_test.ipynb, …"""
    for path in (root / "notebooks").glob("*.ipynb"):
        path.unlink()
    for number, notebook in enumerate(notebooks, 1):
        nbformat.write(notebook, root / "notebooks" / f"{number:02}_test.ipynb")


def tracked(root: Path) -> dict[str, bytes]:
    """What a build may not change unless it measures or publishes."""
    paths = [path for name in ("data", "figures") for path in (root / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def is_one_line_error(status: int, err: str) -> bool:
    """Whether a command failed with one line that starts with `error: `, and no traceback."""
    return status == 1 and sum(line.startswith("error: ") for line in err.splitlines()) == 1 and "Traceback" not in err


def page(root: Path, folder: str = "nvidia-h200") -> tuple[str, str]:
    """The first page of the HTML report, and what follows; each with its white space as one blank."""
    html = (root / "build" / folder / "report.html").read_text().split("<main>")[1]
    return tuple(" ".join(part.split()) for part in html.split("</header>", 1))


def claim(claim: str, holds: bool, kind: str = "law") -> dict:
    """A line of those that report.run leaves for the build."""
    return {"kind": kind, "claim": claim, "expected": "1", "measured": "2", "holds": holds}


@pytest.fixture
def executed(copy, monkeypatch):
    """Notebooks without a kernel and a report without pandoc: what they claim, `{number: lines}`, or why they stop,
    `{number: reason}`, is given; who ran and the notices of the first page are noted."""

    class Given(dict):
        ran, notices = [], []

    given = Given()

    def execute(notebook, target, parameters, kind, errors):
        number = notebook.name[:2]
        given.ran.append((number, parameters.get("replay", False)))
        found = given.get(number, [])
        with open(building.os.environ[CLAIMS], "w") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in found if isinstance(found, list))
        figures = target.parent.parent / "figures"
        figures.mkdir(exist_ok=True)
        (figures / f"{number}_new.svg").write_text(f"<svg>{number}</svg>")
        nbformat.write(nbformat.v4.new_notebook(), target)
        return found if isinstance(found, str) else None

    def export(out, machine, notices, declared, laws):
        given.notices, given.declared = notices, declared
        for name in ("report.html", "report.pdf"):
            (out / name).write_text("whole")

    monkeypatch.setattr(building, "execute", execute)
    monkeypatch.setattr(building, "export", export)
    monkeypatch.setattr(building, "REPLAYED_AT_ONCE", 1)  # another process would know of none of this
    given.ran.clear()
    return given


def test_the_claims_of_a_report_are_those_of_all_its_notebooks(copy, build, executed):
    """In the order in which they were made, beside the report; nothing that is tracked is touched."""
    before = tracked(copy)
    executed |= {"01": [claim("first", True)], "03": [claim("second", True), claim("third", False, "observation")]}
    assert build(*REPLAY) == (0, "") and executed.notices == []
    assert (copy / "build" / "nvidia-h200" / "report.html").read_text() == "whole"
    claims = pd.read_csv(copy / "build" / "nvidia-h200" / "claims.csv")
    assert [*claims] == ["notebook", "kind", "claim", "expected", "measured", "holds"]
    assert claims["claim"].tolist() == ["first", "second", "third"]
    assert claims["notebook"].tolist() == ["01_naive_sweep", "03_flash", "03_flash"]
    assert tracked(copy) == before and "tbl-ledger" in executed.declared


def test_a_broken_law_and_a_chapter_that_stopped_cost_the_exit_status_and_not_the_report(copy, build, executed):
    executed |= {"02": [claim("1 <x> *is* 2", False)], "03": "its kernel died"}
    status, err = build(*REPLAY)
    assert is_one_line_error(status, err) and (copy / "build" / "nvidia-h200" / "report.html").exists()
    assert "chapter 2: 1 <x> *is* 2 (expected 1, measured 2)" in err and "chapter 3 stopped" in err
    assert [number for number, _ in executed.ran] == ["01", "02", "03", "04", "05", "06", "07", "00"]
    assert [look for look, _ in executed.notices] == ["broken", "notice"] and r"1 \<x\> \*is\* 2" in str(
        executed.notices[0][1]
    )


def test_the_first_page_says_what_a_reader_must_know_of_the_machine(build, executed, monkeypatch):
    machine = replace(stored.machine_of("nvidia-h200"), notes=("Others use the card.",))
    monkeypatch.setattr(stored, "machine_of", lambda *_: machine)
    assert build(*REPLAY) == (0, "")
    assert executed.notices == [("notice", exporting.plain("Others use the card."))]


def test_a_chapter_without_data_is_a_title_and_a_notice(copy, build, executed):
    for path in (copy / "data" / "nvidia-h200").glob("03_*.csv"):
        path.unlink()
    assert build(*REPLAY) == (0, "")
    assert [number for number, _ in executed.ran] == ["01", "02", "04", "05", "06", "07", "00"]
    assert [look for look, _ in executed.notices] == ["notice"] and "Chapter 3 is not there" in executed.notices[0][1]
    (cell,) = nbformat.read(copy / "build" / "nvidia-h200" / "notebooks" / "03_flash.ipynb", 4).cells
    assert cell.source.startswith("# Who has to pay N²?\n\n::: notice\nNot measured on this device yet: ")
    assert "`make report ONLY=03`" in cell.source


def test_only_works_on_a_machine_without_any_data(copy, build, executed):
    """It measures what it was asked for, and leaves out the rest."""
    shutil.rmtree(copy / "data" / "nvidia-h200")
    assert build("measure", "--device", "cpu", "--profile", "quick", "--only", "02") == (0, "")
    assert executed.ran == [("02", False), ("07", True), ("00", True)] and len(executed.notices) >= 3
    (out,) = (path for path in (copy / "build").iterdir() if path.name != "jupyter")
    stub = nbformat.read(out / "notebooks" / "01_naive_sweep.ipynb", 4).cells[0].source
    assert "`make report PROFILE=quick ONLY=01`" in stub


def test_only_replays_the_chapters_that_have_data(copy, build, executed, machine):
    (copy / "data" / "nvidia-h200").rename(copy / "data" / machine.slug)
    assert build("measure", "--device", "cpu", "--only", "02") == (0, "")
    assert executed.ran == [
        ("01", True),
        ("02", False),
        ("03", True),
        ("04", True),
        ("05", True),
        ("06", True),
        ("07", True),
        ("00", True),
    ]


def test_publish_keeps_claims_figures_and_report_of_a_replay_and_nothing_else(copy, build, executed):
    before = tracked(copy)
    executed |= {"01": [claim("first", True), claim("second", False, "observation")]}
    assert build("publish", "--device", "nvidia-h200") == (0, "")
    after = tracked(copy)
    claims = "data/nvidia-h200/claims.csv"
    assert after[claims] == (copy / "build" / "nvidia-h200" / "claims.csv").read_bytes() != before[claims]
    figures = {name: text for name, text in after.items() if name.startswith("figures/")}
    kept = {f"0{n}_new.svg": f"<svg>0{n}</svg>" for n in range(8)}
    kept |= {"report.html": "whole", "report.pdf": "whole", "digest.txt": f"{building.fingerprint('nvidia-h200')}\n"}
    assert figures == {f"figures/nvidia-h200/{name}": text.encode() for name, text in kept.items()}
    rest = {name for name in before if not name.startswith("figures/")} - {claims}
    assert {*after} == {*rest, claims, *figures} and all(after[name] == before[name] for name in rest)


@pytest.mark.parametrize(
    "name",
    ["data/items.csv", "data/published/new.csv", "data/nvidia-h200/machine.json", "data/nvidia-h200/01_new.csv"]
    + ["notebooks/new.py", "notebooks/01_naive_sweep.ipynb", "attnlib/dilated/law.py", "report/filter.lua"],
)
def test_a_digest_is_of_data_notebooks_and_code(copy, name):
    before = building.fingerprint("nvidia-h200")
    with open(copy / name, "a") as file:
        file.write("\n")
    assert building.fingerprint("nvidia-h200") != before


def test_a_digest_is_not_of_what_git_ignores_or_of_another_device(copy):
    before = building.fingerprint("nvidia-h200")
    names = ("data/another/01_new.csv", "data/nvidia-h200/01_new.csv.partial", "build/new.csv", "figures/new.svg")
    for name in (*names, "notebooks/.ipynb_checkpoints/new.ipynb", "report/__pycache__/new.pyc"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("new")
    assert building.fingerprint("nvidia-h200") == before


@pytest.mark.ci
@pytest.mark.parametrize("device", COMMITTED)
def test_published_reports_are_current_and_small_enough_for_the_web(device):
    folder, readme = ROOT / "figures" / device, (ROOT / "README.md").read_text()
    paths = [folder / f"report.{kind}" for kind in ("html", "pdf")]
    assert all(f"(figures/{device}/{path.name})" in readme for path in paths)
    if not any(path.exists() for path in (*paths, folder / "digest.txt")):
        pytest.skip(f"no report of {device} is published yet: make publish DEVICE={device}")
    stale = (folder / "digest.txt").read_text().strip() != building.fingerprint(device)
    assert not stale, f"data, notebooks or code have changed since: run `make publish DEVICE={device}`"
    assert all(0 < path.stat().st_size <= 5e6 for path in paths)


@pytest.mark.parametrize("found", [[claim("one is two", False)], "ValueError: no"], ids=["broken", "stopped"])
def test_publish_keeps_nothing_of_a_report_with_something_wrong(copy, build, executed, found):
    before, executed["04"] = tracked(copy), found
    status, err = build("publish", "--device", "nvidia-h200")
    assert is_one_line_error(status, err) and err.startswith("error: not published; ")
    assert tracked(copy) == before


def test_publish_keeps_nothing_of_a_report_that_lacks_a_chapter(copy, build, executed):
    for path in (copy / "data" / "nvidia-h200").glob("03_*.csv"):
        path.unlink()
    before = tracked(copy)
    status, err = build("publish", "--device", "nvidia-h200")
    assert is_one_line_error(status, err) and "chapter 3 is not there" in err and tracked(copy) == before


def test_a_line_that_a_killed_kernel_left_unfinished_is_no_claim(tmp_path):
    (tmp_path / "notebooks").mkdir()
    whole = json.dumps(claim("whole", True))
    error = json.dumps({"kind": "error", "claim": "This part failed: x"})
    (tmp_path / "notebooks" / "01_test.claims").write_text(f"{whole}\n{error}\n{whole[:20]}")
    claims, errors = building.claims_of(tmp_path)
    assert [found["claim"] for found in claims] == ["whole"] and errors == ["chapter 1: This part failed: x"]
    assert pd.read_csv(tmp_path / "claims.csv")["claim"].tolist() == ["whole"]


def test_kernels_repeat_no_line_on_stderr():
    out = io.StringIO()
    once = building.Once(out)
    for text in (
        "warning: a\n",
        "[01] x: ok\nwarn",
        "ing: a\n",
        "\n",
        "[01] y: ok\n",
        "\r 10%",
        "\r 20%",
        "\n",
        "rest",
    ):
        once.write(text)
    assert out.getvalue() == "warning: a\n[01] x: ok\n[01] y: ok\n\r 10%\r 20%\n" and once.rest == "rest"


def exported(copy: Path, *texts: str, notices=(), declared=()) -> Path:
    """The folder of a report that is made of these texts."""
    out = copy / "build" / "made"
    (out / "notebooks").mkdir(parents=True)
    cells = [nbformat.v4.new_markdown_cell(text) for text in texts]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), out / "notebooks" / "01_test.ipynb")
    exporting.export(out, stored.machine_of("nvidia-h200"), [*notices], [*declared])
    return out


BROKEN = "::: broken\n**Broken law.** One is two, see @fig-none.\n:::"


def test_a_broken_law_is_red_in_its_place_and_on_the_first_page(copy):
    strange = "$x$ <b>1</b> \\frac *2* [3](#four) @fig-nowhere #strong[5] `6` _7_"
    notices = [("broken", f"**Broken law**, {exporting.plain(strange)}"), ("notice", "The card is shared.")]
    exported(copy, "# A", BROKEN, "# B\n\n::: notice\nNot measured.\n:::", notices=notices, declared=["fig-none"])
    first, rest = page(copy, "made")
    shown = "$x$ &lt;b&gt;1&lt;/b&gt; \\frac *2* [3](#four) @fig-nowhere #strong[5] `6` _7_"
    assert f'<p class="broken"><strong>Broken law</strong>, {shown}</p>' in first
    assert '<p class="notice">The card is shared.</p>' in first
    assert '<div class="broken"> <p><strong>Broken law.</strong> One is two, see a figure that is not there.' in rest
    assert '<div class="notice"> <p>Not measured.' in rest
    assert (copy / "build" / "made" / "report.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("look", ["broken", "notice"])
def test_style_and_template_know_each_look(look):
    assert f".{look}" in (ROOT / "report" / "style.css").read_text()
    assert (ROOT / "report" / "style.css").read_text().count(f"--{look}: #") == 2, "by day and by night"
    assert f"#let {look}(" in (ROOT / "report" / "template.typst").read_text()


@pytest.mark.parametrize(
    "text",
    ["see @fig-nowhere", "see @sec-none", "raw \\unknownmacro{x} $\\unknownmacro{x}$", "<b>lost</b>", "[a](#nowhere)"],
)
def test_what_would_be_lost_stops_the_export(copy, text):
    """Also inside a notice."""
    with pytest.raises(UserError) as error:
        exported(copy, f"::: notice\n{text}\n:::", declared=["sec-none"])
    assert "\n" not in str(error.value) and "traceback" not in str(error.value)
    assert not [*(copy / "build" / "made").glob("report.*")]


def test_the_labels_of_cells_are_what_a_text_may_refer_to(tmp_path):
    notebook = notebook_of('#| label: tbl-a\n#| caption: "x"\n1', "1  #| label: no", '#| label: "fig-b"')
    nbformat.write(notebook, tmp_path / "01_test.ipynb")
    assert exporting.labels([tmp_path / "01_test.ipynb"]) == ["tbl-a", "fig-b"]


RUN = "from report.run import Run\nrun = Run('01_test', device, profile, replay)\n"
LAWS = f"{RUN}run.law('one is two', 1, 2)\nrun.observe('warm enough', 1.0, least=2.0)"
OUTLIVED = "print('of the cell that failed')\n"


@pytest.mark.ci
def test_the_kernel_is_of_the_python_that_builds(copy, build, tmp_path, monkeypatch):
    """Whatever kernel called python3 a user has, here one that cannot start; letters beyond a locale's come through."""
    theirs = tmp_path / "jupyter" / "kernels" / "python3"
    theirs.mkdir(parents=True)
    spec = {"argv": ["/nowhere/python", "-f", "{connection_file}"], "display_name": "other", "language": "python"}
    (theirs / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("LC_ALL", "C")
    replace_notebooks(copy, notebook_of(f"{RUN}import sys\nprint('∘ python', {sys.executable!r} == sys.executable)"))
    assert build(*REPLAY) == (0, "")
    assert "∘ python True" in page(copy)[1]


@pytest.mark.ci
def test_a_broken_law_may_contain_what_markdown_and_html_would_take_for_theirs(copy, build):
    replace_notebooks(copy, notebook_of(f"{RUN}run.law('2*B*H**2 <of> $x$ @tbl-x', '<object at 0>', [1, '\\\\z'])"))
    status, err = build(*REPLAY)
    first, rest = page(copy)
    assert status == 1 and is_one_line_error(status, err)
    assert all("2*B*H**2 &lt;of&gt; $x$ @tbl-x" in part and "&lt;object at 0&gt;" in part for part in (first, rest))


@pytest.mark.ci
def test_whatever_happens_to_a_chapter_the_report_is_there(copy, build):
    """A law that fails, an exception, a kernel that is killed, an early exit: what ran is kept, the others run, and no
    file that is tracked is touched."""
    before = tracked(copy)
    replace_notebooks(
        copy,
        notebook_of(LAWS, "print('text of', 'the first')", title="First"),
        notebook_of("print('text of', 'the second')", f"{OUTLIVED}raise ValueError('no\\nmore')", "print('lo' 'st')"),
        notebook_of("print('text of', 'the third')", "import os\nos.kill(os.getpid(), 9)", "print('lo' 'st')"),
        notebook_of("print('text of', 'the fourth')", "raise SystemExit(0)", "print('lo' 'st')", title="Last"),
    )
    status, err = build(*REPLAY)
    assert is_one_line_error(status, err) and len(err.splitlines()) <= 3  # IPython has a word on the early exit
    assert "broken law, chapter 1: one is two (expected 1, measured 2)" in err and "warm enough" not in err
    assert "chapter 2 stopped before its end: ValueError: no; chapter 3 stopped before its end: its kernel died" in err
    first, rest = page(copy)
    assert '<p class="broken"><strong>Broken law</strong>, chapter 1: one is two (expected 1, measured 2)</p>' in first
    assert first.count('class="notice"') == 3 and "Chapter 2 stopped before its end: ValueError: no" in first
    assert '<div class="broken">' in rest and rest.count("This chapter stopped here:") == 3 and "lost" not in rest
    assert all(f"text of the {which}" in rest for which in ("first", "second", "third", "fourth"))
    assert "of the cell that failed" in rest and "Traceback" not in rest and "warm enough" in rest
    assert (copy / "build" / "nvidia-h200" / "report.pdf").read_bytes().startswith(b"%PDF")
    assert tracked(copy) == before


@pytest.mark.ci
def test_an_observation_that_does_not_hold_costs_nothing_and_no_cell_can_swallow_a_law(copy, build):
    """The build asks for the claims, not the notebook."""
    replace_notebooks(copy, notebook_of(f"{RUN}run.observe('warm enough', 1.0, least=2.0)"))
    assert build(*REPLAY) == (0, "")
    assert pd.read_csv(copy / "build" / "nvidia-h200" / "claims.csv")["holds"].tolist() == [False]
    replace_notebooks(copy, notebook_of(f"%%capture\n{RUN}run.law('one is two', 1, 2)"))
    assert is_one_line_error(*build(*REPLAY)) and "one is two" in page(copy)[0]


@pytest.mark.ci
def test_cells_for_another_kind_of_device_do_not_run(copy, build):
    """So neither does what they need; and the warnings of kernels are said once."""
    cells = ["print('for', 'a GPU')\n# tag: gpu", "1 / 0\n# tag: cpu", "import warnings\nwarnings.warn('again')"]
    replace_notebooks(copy, notebook_of(*cells), notebook_of(cells[2].replace("\n", ";")))
    status, err = build(*REPLAY)
    assert status == 0 and "for a GPU" in page(copy)[1] and len(err.splitlines()) <= 4
    replace_notebooks(copy, notebook_of("1 / 0\n# tag: gpu", "print('for', 'a CPU')\n# tag: cpu"))
    assert build("measure", "--device", "cpu", "--profile", "quick") == (0, "")


@pytest.mark.ci
def test_a_cell_whose_rows_are_not_there_leaves_a_notice(copy, build):
    """And a text that refers to its table says so."""
    cells = [RUN, "#| label: tbl-rows\n#| caption: none\nrun.sweep('nothing', [])"]
    notebook = notebook_of(*cells)
    notebook.cells.append(nbformat.v4.new_markdown_cell("Compare @tbl-rows."))
    replace_notebooks(copy, notebook)
    assert build(*REPLAY) == (0, "")
    assert "Not measured on this device yet" in page(copy)[1] and "Compare a table that is not there." in page(copy)[1]


@pytest.mark.ci
@pytest.mark.parametrize("device", COMMITTED)
def test_both_formats_are_whole(device):
    """Of the replays that .ci/run has just made: mathematics as such, figures inside, nothing from the network; and
    the claims are the committed ones."""
    out = ROOT / "build" / device
    if not (out / "report.html").exists():
        pytest.skip(f"make replay DEVICE={device} comes first")
    html = (out / "report.html").read_text()
    assert (out / "report.pdf").read_bytes().startswith(b"%PDF")
    assert "<math" in html and "data:image/svg+xml" in html and "prefers-color-scheme" in html
    assert 'src="http' not in html and 'href="http' not in html.split("<main>")[0]
    claims = pd.read_csv(ROOT / "data" / device / "claims.csv")
    assert claims[claims["kind"] == "law"]["holds"].all() and len(claims) >= 10
    assert (out / "claims.csv").read_bytes() == (ROOT / "data" / device / "claims.csv").read_bytes()


def test_a_pin_for_each_package_that_the_report_needs():
    """As Linux and macOS can install it: no local version, no CUDA library."""
    lines = (ROOT / "report" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not [version for version in pins.values() if "+" in version]
    assert [name for name in pins if name.startswith("nvidia")] == ["nvidia-ml-py"]
    project = (ROOT / "pyproject.toml").read_text()
    needed = project.split("dependencies = [")[1].split("fa4")[0]
    assert not {*re.findall(r'"([a-z][a-z-]*)(?=[">])', needed)} - {*pins}


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
        ("publish", "--device", "auto"),
        ("publish", "--device", "nvidia-h200", "--only", "02"),
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_line_and_touches_nothing(copy, build, arguments):
    before = sorted(path for path in copy.rglob("*") if "__pycache__" not in path.parts)
    assert is_one_line_error(*build(*arguments))
    assert [path for path in sorted(copy.rglob("*")) if "__pycache__" not in path.parts] == before


def test_a_user_without_a_name_or_a_home_has_a_report():
    """As in a container that is run under some number: what Jupyter, matplotlib and compilers ask for is there."""
    code = """
import pwd
def getpwuid(uid): raise KeyError(uid)
pwd.getpwuid = getpwuid
import report.build, getpass, pathlib
print(pathlib.Path.home().name, getpass.getuser())
"""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "home nobody\n", "")
