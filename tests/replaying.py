"""Replay notebooks without a kernel: execute their code cells one after the other, and tell what they claimed.

`python tests/replaying.py DEVICE [--bounded] [--inverted] NUMBER …` prints, as JSON, `claims`, a list of
`[notebook, kind, claim, expected, measured, holds]`, `asked`, what was asked of the computer at hand, and `said`, the
text of each notebook as a reader sees it. With `--bounded` most ledgers are taken on trust from their laws, and no
figure is drawn; with `--inverted` every observation has the other outcome. test_replay runs it in a process of its own,
on a copy of the project.
"""

import ast
import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import matplotlib.figure
import nbformat
import torch

from attnlib.laws import ACCOUNTS, law_of
from attnlib.memory import check

SAMPLE = 20  # of so many configurations one ledger is written in a bounded replay
HOST = [
    *((torch, name) for name in ("get_num_threads", "set_num_threads", "get_num_interop_threads")),
    *((torch.cuda, name) for name in ("is_available", "device_count", "get_device_properties", "mem_get_info")),
    (importlib.util, "find_spec"),
]


def callers():
    """Who called, `module.function`, from the innermost to the outermost."""
    frame = sys._getframe(2)
    while frame:
        yield f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_name}"
        frame = frame.f_back


def watch(asked: list):
    """Note who of this project asks the computer at hand for what a machine's record says.

    But for `dilated`, which looks for a kernel that takes the tensors at hand; and other packages may look around.
    """

    def noting(name, real):
        def ask(*arguments, **options):
            mine, who = [], [*callers()]
            if who[0].split(".")[0] in ("attnlib", "report", "notebook"):
                mine = [one for one in who if one.split(".")[0] in ("attnlib", "report", "notebook")]
            if mine and "attnlib.dilated.attention.dilated" not in mine:
                asked.append(f"{' < '.join(mine[:6])} asks {name}")
            return real(*arguments, **options)

        return ask

    for place, name in HOST:
        setattr(place, name, noting(f"{place.__name__}.{name}", getattr(place, name)))


def bound():
    """Most ledgers from their laws, no figure drawn."""
    real, count = check.compare, iter(range(10**9))

    def compare(variant, shape, machine):
        law = law_of(variant, shape, machine)
        if next(count) % SAMPLE == 0 or not law:
            return real(variant, shape, machine)
        sizes = {account: law.bytes(account, shape, machine) for account in ACCOUNTS}
        books = {f"{account}_{what}_bytes": n for account, n in sizes.items() for what in ("law", "ledger")}
        return {"variant": variant.name, **shape.columns(), **books} | {f"{a}_rounding_bytes": 0 for a in ACCOUNTS}

    check.compare = compare
    matplotlib.figure.Figure.savefig = lambda *_, **__: None


def invert():
    """Let every observation come out the other way."""
    from report.run import Run

    real = Run._note
    Run._note = lambda self, kind, *found: real(self, kind, *found[:-1], found[-1] ^ (kind == "observation"))


def replay(notebook: Path, device: str) -> tuple[list[list], list[str]]:
    """The claims of a notebook's cells, and what a reader is told: Markdown cells and what code cells print or say."""
    from IPython.display import Markdown

    from report import run, skipping

    said = []
    show = lambda shown: said.append(shown.data if isinstance(shown, Markdown) else f"[{type(shown).__name__}]")  # noqa: E731
    run.display = skipping.display = show
    space = {"__name__": "notebook", "display": show}
    kind = run.stored.machine_of(device).kind
    for cell in nbformat.read(notebook, 4).cells:
        if {{"cpu": "gpu", "cuda": "cpu"}[kind], "lab"} & {*cell.metadata.get("tags", ())}:
            continue
        if cell.cell_type != "code":
            said.append(cell.source)
            continue
        tree = ast.parse(cell.source)
        if "run" in space:
            skipping_now = space["_skipping"] = space["run"].skipping
            tree = skipping_now.visit(tree)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"{notebook.name}: {cell.source[:60]!r}", "exec"), space)
        said += [text for text in (printed.getvalue(), cell.metadata.get("caption")) if text]
        if "parameters" in cell.metadata.get("tags", ()):
            space |= {"device": device, "profile": "full", "replay": True}
    return [[notebook.stem, *map(str, claim.values())] for claim in space["run"].claims], said


def main():
    """See above."""
    device, *numbers = (word for word in sys.argv[1:] if not word.startswith("--"))
    asked, claims, said = [], [], []
    if "--inverted" in sys.argv:
        invert()
    if "--bounded" in sys.argv:
        bound()
    with contextlib.redirect_stdout(io.StringIO()):
        for at, number in enumerate(numbers):
            (notebook,) = Path("notebooks").glob(f"{number}_*.ipynb")
            if at == 0:
                import report.run  # noqa: F401

                watch(asked)
            found, text = replay(notebook, device)
            claims += found
            said += text
    print(json.dumps({"claims": claims, "asked": sorted(set(asked)), "said": said}))


if __name__ == "__main__":
    main()
