"""Runs the notebooks on a device and turns them into build/<device>/report.html and report.pdf.

`python -m report.build measure` runs everything on this machine, `replay --device nvidia-h200` rebuilds the report from
committed data. The Makefile's targets `report` and `replay` call it."""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import torch
from nbclient.exceptions import DeadKernelError
from nbconvert.exporters import MarkdownExporter
from nbconvert.preprocessors import Preprocessor, TagRemovePreprocessor
from traitlets.config import Config

from attnlib.core import Machine, UserError
from attnlib.timing.machine import describe, resolve
from attnlib.timing.worker import Worker, WorkerDied
from report import stored
from report.run import CLAIMS, PROFILES, profile, write

ROOT = Path(__file__).parent.parent
HERE = ROOT / "report"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def execute(notebook: Path, target: Path, parameters: dict):
    """Run a notebook into `target`, which appears only if every cell succeeded.

    Raises UserError with the failing cell's last line, or if the kernel died."""
    draft = target.with_suffix(".partial.ipynb")
    how = {"kernel_name": "python3", "cwd": notebook.parent, "progress_bar": False, "stderr_file": sys.stderr}
    how["config"] = Config({"KernelManager": {"transport_encryption": "auto"}})  # or each kernel prints a warning
    try:
        papermill.execute_notebook(notebook, draft, parameters=parameters, **how)
    except papermill.PapermillExecutionError as error:
        raise UserError(
            f"{notebook.name} failed: {error.ename}: {error.evalue.splitlines()[0] if error.evalue else ''}"
        ) from error
    except DeadKernelError as error:
        raise UserError(f"{notebook.name} failed: its kernel died") from error
    draft.rename(target)


def check_claims(out: Path, folder: str):
    """Write the claims that the notebooks made to data/<folder>/claims.csv. Raises UserError if one does not hold."""
    texts = {path.stem: path.read_text() for path in sorted((out / "notebooks").glob("*.claims"))}
    found = [{"notebook": name, **json.loads(line)} for name, text in texts.items() for line in text.splitlines()]
    columns = ["notebook", "claim", "predicted", "measured", "holds"]
    write(ROOT / "data" / folder / "claims.csv", pd.DataFrame(found, columns=columns).to_csv(index=False))
    if failed := [f"{claim['claim']} ({claim['notebook']})" for claim in found if not claim["holds"]]:
        raise UserError(f"{len(failed)} claim(s) do not hold: {'; '.join(failed)}")


class Cells(Preprocessor):
    """Takes label and caption out of a cell's `#| key: "value"` comments, stderr out of its outputs, and
    joins what was printed in a row, which may arrive in pieces."""

    def preprocess_cell(self, cell, resources, index):
        """One cell at a time, as nbconvert calls it."""
        cell.metadata.setdefault("tags", [])
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            options = [line for line in lines if line.startswith("#|")]
            for line in options:
                name, value = line.removeprefix("#|").split(":", 1)
                cell.metadata[name.strip()] = value.strip().strip('"')
            cell.source = "\n".join(line for line in lines if line not in options).strip()
            outputs, cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"], []
            for output in outputs:
                if output.output_type == "stream" and cell.outputs and cell.outputs[-1].output_type == "stream":
                    cell.outputs[-1].text += output.text
                else:
                    cell.outputs.append(output)
        return cell, resources


def markdown(notebooks: list[Path], folder: Path) -> str:
    """The executed notebooks as one pandoc Markdown text; their figures are written into `folder`."""
    tags = TagRemovePreprocessor(
        remove_cell_tags=["remove-cell", "parameters", "injected-parameters"],
        remove_input_tags=["remove-input"],
        remove_all_outputs_tags=["remove-output"],
    )
    paths = [str(HERE / "markdown"), *MarkdownExporter().template_paths]
    exporter = MarkdownExporter(template_name="markdown", template_paths=paths)
    exporter.register_preprocessor(Cells(), enabled=True)
    exporter.register_preprocessor(tags, enabled=True)
    texts = []
    for notebook in notebooks:
        text, resources = exporter.from_notebook_node(
            nbformat.read(notebook, 4), {"unique_key": notebook.stem, "output_files_dir": "."}
        )
        texts.append(text)
        for name, data in resources["outputs"].items():
            (folder / name).write_bytes(data)
    return "\n\n".join(texts)


def export(out: Path, machine: Machine):
    """build/<device>/report.html and report.pdf from the executed notebooks; both appear, or neither does."""
    import pypandoc
    import typst

    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "report.md").write_text(markdown(sorted((out / "notebooks").glob("[0-9]*.ipynb")), work))
    about = {
        "title": "The cost of attention",
        "subtitle": "Measured, predicted, and explained",
        "device": machine.name,
        "versions": f"PyTorch {machine.torch}, Python {machine.python}",
        "date": machine.date,
        "lang": "en",
    }
    (work / "about.json").write_text(json.dumps(about))
    for to in ("html", "typst"):
        command = [pypandoc.get_pandoc_path(), "report.md", "--from=markdown", f"--to={to}", f"--output=report.{to}"]
        command += [f"--template={HERE / f'template.{to}'}", f"--lua-filter={HERE / 'filter.lua'}"]
        command += ["--metadata-file=about.json", f"--resource-path=.:{HERE}", "--standalone", "--fail-if-warnings"]
        command += ["--toc", "--toc-depth=2", "--number-sections"]
        if to == "html":
            command += ["--mathml", "--embed-resources", f"--css={HERE / 'style.css'}"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"pandoc could not make the {to}: {done.stderr.strip()}")
    typst.compile(work / "report.typst", output=work / "report.pdf", ignore_system_fonts=True)
    for name in ("report.html", "report.pdf"):
        os.replace(work / name, out / name)
    shutil.rmtree(work)


def build(folder: str, machine: Machine, parameters: dict, only: str = ""):
    """Execute every notebook and export the report to build/<folder>/. A report of an earlier run is removed first.

    only: the number of the one notebook that measures ("02"); the others are rebuilt from their data. Raises UserError
    for a number that no notebook has or a parameter that a notebook does not declare, before anything is touched; then
    for a notebook that fails, or a claim that does not hold."""
    if only:
        if not any(notebook.name.startswith(f"{only}_") for notebook in NOTEBOOKS):
            raise UserError(f"no notebook has the number {only!r}")
        stored.machine_of(folder)  # what is not measured must be there to be rebuilt
    for notebook in NOTEBOOKS:
        if unknown := sorted(set(parameters) - set(papermill.inspect_notebook(notebook))):
            raise UserError(f"{notebook.name} has no parameter {', '.join(unknown)}")
    out = ROOT / "build" / folder
    for name in ("report.html", "report.pdf"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "notebooks", ignore_errors=True)
    (out / "notebooks").mkdir(parents=True)
    for notebook in NOTEBOOKS:
        begun = time.monotonic()
        print(f"{notebook.name} on {machine.name} ...", flush=True)
        replayed = {"device": folder, "replay": True} if only and not notebook.name.startswith(f"{only}_") else {}
        os.environ[CLAIMS] = str(out / "notebooks" / f"{notebook.stem}.claims")
        execute(notebook, out / "notebooks" / notebook.name, parameters | replayed)
        print(f"{notebook.name} done in {time.monotonic() - begun:.0f} s", flush=True)
    check_claims(out, folder)
    if missing := [name for name in ("pypandoc", "typst") if not importlib.util.find_spec(name)]:
        print(f"measured, not exported: this Python lacks {', '.join(missing)}; elsewhere: make replay DEVICE={folder}")
        return
    export(out, machine)
    for name in ("report.html", "report.pdf"):
        print((out / name).relative_to(ROOT))


def each_gpu() -> list[str]:
    """The first GPU of each model in this machine. Raises UserError if there is none."""
    models = {}
    with Worker() as worker:
        for index in range(torch.cuda.device_count()):
            models.setdefault(worker.call(describe, f"cuda:{index}").name, f"cuda:{index}")
    if not models:
        raise UserError("DEVICE=all measures every GPU model, and torch sees no GPU")
    return list(models.values())


def main() -> int:
    """The command line; 0 if the report is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("measure", "replay"))
    parser.add_argument("--device", default="auto", help="auto, all, cpu, cuda, cuda:1; for replay a folder of data/")
    parser.add_argument("--profile", default="full", help=" or ".join(PROFILES))
    parser.add_argument("--only", default="", metavar="NN", help="measure this notebook, rebuild the others from data")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # for kernels
    os.environ.setdefault("ATTNLIB_PROGRESS", "bar" if sys.stderr.isatty() else "lines")
    try:
        asked = profile(options.profile)
        if options.command == "replay":
            if options.only:
                raise UserError("--only says what to measure, and a replay measures nothing")
            folder, machine = options.device, stored.machine_of(options.device)
            measured = next(name for name, p in reversed(PROFILES.items()) if folder.endswith(p.suffix))
            build(folder, machine, {"device": folder, "profile": measured, "replay": True})
            return 0
        for device in each_gpu() if options.device == "all" else [resolve(options.device)]:
            with Worker() as worker:
                machine = worker.call(describe, device)
            build(machine.slug + asked.suffix, machine, {"device": device, "profile": options.profile}, options.only)
    except (UserError, WorkerDied, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the next `make report` goes on with the sweep that it was in", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # after an interrupt, Jupyter's unfinished tasks would have their say at a normal exit
