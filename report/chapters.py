"""One chapter: a notebook run by a kernel of this very Python, what it says on stderr, what is kept if it stops."""

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import TextIO

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from traitlets.config import Config

from report.export import cut
from report.stored import write

KERNEL = ["--log-level=CRITICAL", "--IPKernelApp.exec_lines=import report"]  # the second: see report/__init__.py


class Once:
    """Where kernels' stderr goes: each line once, since each of them warns anew. A progress bar passes as it is."""

    def __init__(self, to: TextIO):
        self.to, self.seen, self.rest, self.in_bar = to, {""}, "", False

    def write(self, text: str):
        """Write what is whole and new; the rest waits for its end."""
        if "\r" in text:
            self.to.write(text)
            self.in_bar = True
            return
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if self.in_bar or line not in self.seen:
                self.to.write(f"{line}\n")
            self.seen.add(line)
            self.in_bar = False

    def flush(self):
        """As a file."""
        self.to.flush()


class Keeping(NBClientEngine):
    """Papermill's engine, which leaves what ran in `ran`, however that ended. (Papermill itself writes the notebook at
    each cell, which takes as long as most cells do, or loses it where a kernel dies.)"""

    ran: nbformat.NotebookNode

    @classmethod
    def execute_managed_notebook(cls, nb_man, *arguments, **options):
        """As the engine it extends."""
        cls.ran = nb_man.nb
        super().execute_managed_notebook(nb_man, *arguments, **options)


papermill_engines.register("keeping", Keeping)


def execute(
    notebook: Path, target: Path, parameters: dict, kind: str, stderr: Once | TextIO | None = None
) -> str | None:
    """Run a notebook into `target`, without cells for the other kind of device or for JupyterLab. Why it stopped, or
    None; what ran before is kept, and a notice stands in place of the rest."""
    draft, errors = target.with_suffix(".partial.ipynb"), stderr or sys.stderr
    given, other = nbformat.read(notebook, 4), "gpu" if kind == "cpu" else "cpu"
    given.cells = [cell for cell in given.cells if not {other, "lab"} & {*cell.metadata.get("tags", [])}]
    nbformat.write(given, draft)
    how = {"kernel_name": "python3", "cwd": notebook.parent, "progress_bar": False, "stderr_file": errors}
    how |= {"extra_arguments": KERNEL, "engine_name": "keeping", "request_save_on_cell_execute": False}
    how["execution_timeout"] = 900 if parameters.get("replay") else 7200  # seconds, of a cell: a kernel may fall silent
    how["config"] = Config({"KernelManager": {"transport_encryption": "auto"}})  # or each kernel prints a warning
    Keeping.ran = given
    reason = None
    try:
        papermill.execute_notebook(draft, draft, parameters=parameters, **how)
    except papermill.PapermillExecutionError as error:
        reason = ": ".join(filter(None, (error.ename, *error.evalue.strip().splitlines()[:1])))
    except DeadKernelError:
        reason = "its kernel died"
    except Exception as error:  # a kernel that does not start, does not answer, sends what is no message
        reason = f"{type(error).__name__}: {error}"
    ran = papermill.execute.remove_error_markers(Keeping.ran)  # cells of its own around one that failed
    if not reason and any(cell.metadata.get("papermill", {}).get("exception") for cell in ran.cells):
        reason = "it was left before its end"  # by sys.exit(), which papermill takes for a success
    if reason:
        reason = textwrap.shorten(reason, 300, placeholder=" …")
        cut(ran, reason)
    nbformat.write(ran, draft)
    draft.rename(target)
    return reason


def own_kernel(folder: Path) -> None:
    """Let "python3" be this interpreter, whatever kernel has that name elsewhere: Jupyter looks into `folder` first."""
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python 3", "language": "python"}
    write(folder / "kernels" / "python3" / "kernel.json", json.dumps(spec))
    others = [path for path in os.environ.get("JUPYTER_PATH", "").split(os.pathsep) if path not in ("", str(folder))]
    os.environ["JUPYTER_PATH"] = os.pathsep.join([str(folder), *others])
