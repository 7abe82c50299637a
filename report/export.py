"""From executed notebooks to a document: Markdown by nbconvert, HTML by pandoc, PDF by typst."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbconvert.exporters import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, Preprocessor, TagRemovePreprocessor

from attnlib.core import Machine, UserError
from report.dark import with_dark_version
from report.skipping import plain

HERE = Path(__file__).parent
APPENDIX = "## Appendix: "  # the heading in a notebook from which on its text is printed behind all chapters
OPTION = re.compile(r'^#\| *(\w+) *: *"?(.*?)"? *$', re.MULTILINE)  # of a cell, `#| key: "value"`


def cell_of(text: str, notice: str):
    """A cell of Markdown that ends in a notice."""
    return nbformat.v4.new_markdown_cell(f"{text}\n\n::: notice\n{notice}\n:::")


def heading(notebook) -> str:
    """The line with a notebook's title."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return next((line for text in texts for line in text.splitlines() if line.startswith("# ")), "# A chapter")


def cut(ran, reason: str):
    """Drop what comes after the last cell that was begun, and that cell's error; say so in its place."""
    begun = [at for at, cell in enumerate(ran.cells) if cell.metadata.get("papermill", {}).get("start_time")]
    notice = f"**This chapter stopped here:** {plain(reason)}. The rest of it is missing."
    ran.cells = [*ran.cells[: begun[-1] + 1], cell_of("", notice)] if begun else [cell_of(heading(ran), notice)]
    for cell in ran.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.output_type != "error"]


def labels(notebooks: Iterable[Path], tag: str = "") -> list[str]:
    """The labels that cells (with a `tag`) declare, which a text may refer to even where a cell made nothing."""
    cells = [cell for notebook in notebooks for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    texts = [cell.source for cell in cells if not tag or tag in cell.metadata.get("tags", [])]
    return [value for text in texts for name, value in OPTION.findall(text) if name == "label"]


class Cells(Preprocessor):
    """Takes label and caption out of a cell's `#| key: "value"` comments, and stderr out of its outputs."""

    def preprocess_cell(self, cell, resources, index):
        """One cell at a time, as nbconvert calls it."""
        cell.metadata.setdefault("tags", [])
        if cell.cell_type == "code":
            cell.metadata.update(OPTION.findall(cell.source))
            cell.source = OPTION.sub("", cell.source).strip()
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        return cell, resources


def markdown(notebooks: list[Path], folder: Path) -> str:
    """The executed notebooks as one pandoc Markdown text; their figures are written into `folder`. What proves rather
    than explains, from each notebook's heading "## Appendix: …" on, is gathered in a last chapter."""
    tags = TagRemovePreprocessor(
        remove_cell_tags=["remove-cell", "parameters", "injected-parameters"],
        remove_input_tags=["remove-input"],
        remove_all_outputs_tags=["remove-output"],
    )
    paths = [str(HERE / "markdown"), *MarkdownExporter().template_paths]
    exporter = MarkdownExporter(template_name="markdown", template_paths=paths)
    for step in (Cells(), CoalesceStreamsPreprocessor(), tags):  # what is printed in a row may arrive in pieces
        exporter.register_preprocessor(step, enabled=True)
    texts, proofs = [], []
    for notebook in notebooks:
        names = {"unique_key": notebook.stem, "output_files_dir": "."}
        text, resources = exporter.from_notebook_node(nbformat.read(notebook, 4), names)
        chapter, *appendix = text.split(f"\n{APPENDIX}")
        texts.append(chapter)
        proofs += [f"## {one[0].upper()}{one[1:]}" for one in appendix]
        for name, data in resources["outputs"].items():
            (folder / name).write_bytes(data)
    return "\n\n".join([*texts, *(["# Appendix: tables and proofs"] if proofs else []), *proofs])


def facts(folder: str, machine: Machine) -> dict[str, str]:
    """What the title page says of where a report is from; of rows that no commit has, or without git, no commit."""
    git = ["git", "log", "-1", "--format=%h of %as", "--", f"data/{folder}/[0-9]*.csv"]  # the claims are made of them
    told = shutil.which("git") and subprocess.run(git, cwd=HERE.parent, capture_output=True, text=True).stdout.strip()
    named = {"Device": machine.name + machine.is_cpu * f", {machine.threads} threads", "Measured": machine.date}
    return named | ({"Rows": told} if told else {})


def export(out: Path, machine: Machine, notices: list[tuple[str, str]], declared: list[str], laws: str = ""):
    """build/<device>/report.html and report.pdf from the executed notebooks; both appear, or neither does.

    notices: of the first page, `(look, Markdown)` with look "broken" or "notice"; declared: labels that a text may
    refer to where nothing has them; laws: the script that a calculator asks, from report/calculator.py. Raises
    UserError if raw HTML, a formula or an unknown reference would be lost."""
    import matplotlib
    import pypandoc
    import typst

    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "report.md").write_text(markdown(sorted((out / "notebooks").glob("[0-9]*.ipynb")), work), "utf-8")
    (work / "laws.js").write_text(laws, "utf-8")
    (work / "html").mkdir()
    for figure in work.glob("*.svg"):
        (work / "html" / figure.name).write_text(with_dark_version(figure.read_text("utf-8")), "utf-8")
    about = {"title": "The cost of attention", "subtitle": "Measured, predicted, and explained", "declared": declared}
    about |= {"device": machine.name, "versions": f"PyTorch {machine.torch}, Python {machine.python}", "lang": "en"}
    about |= {"facts": [{"what": what, "text": plain(text)} for what, text in facts(out.name, machine).items()]}
    about |= {"notices": [{"look": look, "text": text} for look, text in notices], "date": machine.date}
    (work / "about.json").write_text(json.dumps(about), "utf-8")
    for to in ("html", "typst"):
        command = [pypandoc.get_pandoc_path(), "report.md", "--from=markdown", f"--to={to}", f"--output=report.{to}"]
        command += [f"--template={HERE / f'template.{to}'}", f"--lua-filter={HERE / 'filter.lua'}"]
        command += ["--metadata-file=about.json", "--standalone", "--fail-if-warnings", "--wrap=none", "--toc"]
        command += ["--toc-depth=2", "--number-sections", f"--resource-path={'html:' * (to == 'html')}.:{HERE}"]
        if to == "html":
            command += ["--mathml", "--embed-resources", f"--css={HERE / 'style.css'}"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.split("stack traceback")[0]  # of the filter, which is of no use to a reader
            raise UserError(f"pandoc could not make the {to}: {' '.join(said.split())}")
    try:
        fonts = [Path(matplotlib.get_data_path()) / "fonts" / "ttf"]  # of the text in figures
        typst.compile(work / "report.typst", output=work / "report.pdf", ignore_system_fonts=True, font_paths=fonts)
    except RuntimeError as error:
        raise UserError(f"typst could not make the PDF: {' '.join(str(error).split())}") from error
    for name in ("report.html", "report.pdf"):
        os.replace(work / name, out / name)
    shutil.rmtree(work)
