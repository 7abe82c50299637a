"""What is written rather than computed: figures with a unit in the notebooks' Markdown."""

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("[0-9][0-9]_*.ipynb"))
UNITS = r"\\?%|ms|µs|us|ns|s|seconds?|minutes?|[KMGT]i?B|bytes|[TG]FLOP/s|[GT]B/s|GFLOP/J|W|J|[MG]Hz|×|times"
FIGURE = re.compile(rf"\d[\d.,]*(?: |~|\\ )?(?:{UNITS})(?![\w/])")
# what the experiment is set to, or how PyTorch's allocator and cuBLAS work, which no row of a device says
CONSTANTS = {
    "512 bytes": "the smallest block of PyTorch's CUDA allocator",
    "1 MiB": "the least rest for which it splits a large block",
    "20 MiB": "a page of its expandable pool",
    "32 MiB": "cuBLAS's workspace on Hopper",
    "8 GiB": "what a process is given where frontiers are searched",
    "0.1 ms": "from which on a pass is compared",
    "8 bytes": "of a position, an integer of PyTorch's",
}
CITED = ("GTX 1080", "A800", "report", "*000*", "*001*", "*002*", "*003*", "*004*")  # somebody else's figures
ALL_CITED = ("07_published",)  # a notebook that is about what others printed


def without_code(text: str) -> str:
    """Markdown without code spans and listings."""
    return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)


def typed(text: str) -> list[str]:
    """The figures with a unit in a Markdown cell, without CONSTANTS and without paragraphs that cite."""
    paragraphs = [one for one in without_code(text).split("\n\n") if not any(word in one for word in CITED)]
    found = [match.group() for one in paragraphs for match in FIGURE.finditer(one)]
    return [figure for figure in found if figure not in CONSTANTS]


@pytest.mark.parametrize("notebook", [one for one in NOTEBOOKS if one.stem not in ALL_CITED], ids=lambda one: one.stem)
def test_no_figure_with_a_unit_is_typed(notebook):
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "markdown"]
    assert [figure for cell in cells for figure in typed(cell.source)] == []


def test_a_typed_figure_is_found():
    told = "It takes 12.5 ms and 3 GiB, 40 % of all, and 1.5× as long; 100 passes, `--memory 24GiB`, N = 16384."
    assert typed(told) == ["12.5 ms", "3 GiB", "40 %", "1.5×"]
    assert typed("The GTX 1080 took 48 ms.") == typed("A block has 512 bytes.") == []


def test_the_constants_are_needed():
    texts = [without_code(cell.source) for one in NOTEBOOKS for cell in nbformat.read(one, 4).cells]
    assert [figure for figure in CONSTANTS if not any(figure in text for text in texts)] == []
