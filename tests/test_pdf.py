"""The PDF as a reader sees it, page by page: no hole, nothing severed, and what a document says of itself."""

import io
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pymupdf
import pytest
from conftest import COMMITTED

from report import plots, stored
from report.export import export
from report.tables import table

ROOT = Path(__file__).parent.parent
TOP, BOTTOM = 66, 72  # points of A4 that running head and page number take, with the room beside the text
MOST_EMPTY = 1 / 3  # of a page
MOST_PAGES, MOST_BYTES = 40, 3e6  # of the main text, chapters 0 to 6, of one device; of the file
WORDS = "Attention compares every position of a sequence with every other and pays for each pair that it looks at. "
ROWS = {"short": 8, "middle": 20, "tall": 34, "long": 70}  # kinds of tables, and how many rows they have


def code(source: str, *outputs: dict, **options: str):
    """A code cell that ran, which is printed if it has a `source`; options: its `#| key: "value"` lines."""
    lines = [f'#| {key}: "{value}"\n' for key, value in options.items()]
    ran = [nbformat.v4.new_output("display_data", data=one) for one in outputs]
    return nbformat.v4.new_code_cell("".join(lines) + source, outputs=ran)


def frame(kind: str, number: int) -> str:
    """A table as pandas shows it, whose cells say which they are."""
    rows = [[f"{kind}{number}row{at}", at, at / 7] for at in range(ROWS[kind])]
    return table(pd.DataFrame(rows, columns=[f"{kind}{number}head", "N", "the kernel's ms"])).to_html()


def drawing() -> str:
    """A figure as the notebooks draw it."""
    plots.style()
    figure, axes = plots.panels(["forward", "backward"], xs=[1024, 4096], ylabel="written as text")
    figure.set_figheight(3.9)  # with its caption it is half a page
    for ax in axes:
        plots.line(ax, [1024, 4096], [1, 16], "#0173b2", "naive")
    text = io.StringIO()
    plots.legend(figure, axes[0]).savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue()


LISTING = "\n".join([f"first_{{0}} = {WORDS.split()!r}[{{0}}]", *["x = 1"] * 18, "last_{0} = 1"])


def chapters() -> dict[str, nbformat.NotebookNode]:
    """Notebooks in which tables, figures, formulas and listings come at every height of a page, each with a lead-in."""
    cells, figure = {}, drawing()
    for chapter in (1, 2):
        mine = cells[f"0{chapter}_test"] = [nbformat.v4.new_markdown_cell(f"# Chapter called {chapter}\n\nIt's said.")]
        for at in range(12):
            number = 100 * chapter + at
            text = f"## Section s{number}\n\n{WORDS * (1 + 3 * at % 7)}\n\nLead to t{number}:"
            kind = [*ROWS][at % len(ROWS)]
            mine += [nbformat.v4.new_markdown_cell(text)]
            shown = {"text/html": frame(kind, number)}
            mine += [code("show(it)" * (at % 2), shown, label=f"tbl-{number}", caption=f"Words c{number}.")]
            mine += [nbformat.v4.new_markdown_cell(f"{WORDS * (at % 4)}\n\nLead to l{number}:")]
            mine += [code(LISTING.format(number))]
            breaks = "\n\n" if at % 2 else " "
            told = (
                f"The card's clock, of @fig-{number} and @tbl-{number}.\n\nform{number}:{breaks}$$a_{{{number}}} = b$$"
            )
            mine += [code("", {"image/svg+xml": figure}, label=f"fig-{number}", caption=f"A figure's f{number}.")]
            mine += [code("", {"text/markdown": told})]
        mine += [nbformat.v4.new_markdown_cell(f"## Appendix: what proves {chapter}\n\n{WORDS * 4}")]
    cells["01_test"].insert(
        1, nbformat.v4.new_markdown_cell("| a | b |\n|:--|--:|\n| c | 1 |\n\n: A table of Markdown's.")
    )
    cells["02_test"].insert(1, nbformat.v4.new_markdown_cell("::: broken\n**Broken law.** One is two.\n:::"))
    return {name: nbformat.v4.new_notebook(cells=mine) for name, mine in cells.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pymupdf.Document:
    """The PDF of these chapters."""
    out = tmp_path_factory.mktemp("pdf")
    (out / "notebooks").mkdir()
    for name, notebook in chapters().items():
        nbformat.write(notebook, out / "notebooks" / f"{name}.ipynb")
    export(out, stored.machine_of("nvidia-h200"), [("notice", "The card isn\\'t alone.")], [])
    return pymupdf.open(out / "report.pdf")


@pytest.fixture(scope="module")
def texts(made) -> list[str]:
    """The text of each page."""
    return [page.get_text() for page in made]


def pages_with(texts: list[str], what: str) -> list[int]:
    """The pages, behind the contents, on which these words stand."""
    return [at for at, text in enumerate(texts) if at > 1 and what in text.split("\n") or f"{what} " in text and at > 1]


def emptiest(page: pymupdf.Page) -> float:
    """The share of a page's height that its widest gap takes, between or below what is printed on it."""
    boxes = [block[1::2][:2] for block in page.get_text("blocks")]
    boxes += [(one["rect"].y0, one["rect"].y1) for one in page.get_drawings()]
    boxes += [pymupdf.Rect(one["bbox"]).round()[1::2] for one in page.get_image_info()]
    top, bottom = page.rect.y0 + TOP, page.rect.y1 - BOTTOM
    at, widest = top, 0
    for begin, end in sorted((max(a, top), min(b, bottom)) for a, b in boxes if a < bottom and b > top):
        at, widest = max(at, end), max(widest, begin - at)
    return max(widest, bottom - at) / (bottom - top)


def last_of_chapters(document: pymupdf.Document) -> set[int]:
    """The last page of each chapter and of the document, the title page and the contents: they may end anywhere."""
    begins = {at for level, _, at in document.get_toc() if level == 1}
    return {0, 1, len(document) - 1} | {at - 2 for at in begins}


def holes(document: pymupdf.Document) -> dict[int, float]:
    """The pages that are emptier than they may be, counted from 1."""
    shares = {at: emptiest(page) for at, page in enumerate(document) if at not in last_of_chapters(document)}
    return {at + 1: round(share, 2) for at, share in shares.items() if share > MOST_EMPTY}


def test_no_page_has_a_hole(made):
    assert len(made) > 20 and holes(made) == {}


def test_a_hole_is_seen():
    """In the middle of a page, and at its end."""
    document = pymupdf.open()
    for lines in ([80, 700], [80, 200], range(80, 770, 20)):
        page = document.new_page(width=595, height=842)
        for y in lines:
            page.insert_text((80, y), "words")
    assert [emptiest(page) > MOST_EMPTY for page in document] == [True, True, False]


@pytest.mark.parametrize("number", [100 * chapter + at for chapter in (1, 2) for at in range(12)])
def test_nothing_is_severed(texts, number):
    """Heading, lead-in, caption, head and first row of a table; a lead-in and its listing, whole; a label and its
    formula; the head of a table that goes on, on each page that it goes on to."""
    kind = [*ROWS][number % 100 % len(ROWS)]
    rows = [page for at in range(ROWS[kind]) for page in pages_with(texts, f"{kind}{number}row{at}")]
    assert pages_with(texts, f"Lead to t{number}:") == rows[:1] and len(rows) == ROWS[kind]
    assert f"Words c{number}." in texts[rows[0]]
    assert pages_with(texts, f"{kind}{number}head") == sorted({*rows})
    assert len({*rows}) == 1 or kind != "short"
    (heading,) = [at for at, text in enumerate(texts) if at > 1 and f"Section s{number}\n" in text]
    assert WORDS.split()[0] in texts[heading].split(f"Section s{number}\n")[1]
    listing = [pages_with(texts, f"{word}_{number} =") for word in ("first", "last")]
    assert listing[0] == listing[1] == pages_with(texts, f"Lead to l{number}:")
    (label,) = pages_with(texts, f"form{number}:")
    assert str(number) in texts[label].split(f"form{number}:\n")[1]


def test_references_name_the_number_that_is_printed(texts):
    """A table of Markdown's is counted as well."""
    whole = " ".join(" ".join(texts).split())
    referred = [int(found) for found in re.findall(r"and Table (\d+)\.", whole)]
    printed = [int(found) for found in re.findall(r"Table (\d+): Words c\d+\.", whole)]
    assert len(printed) == 24 and sorted(referred) == sorted(printed) and min(printed) == 2


def test_figures_float_in_order_with_their_captions(texts):
    numbers = [100 * chapter + at for chapter in (1, 2) for at in range(12)]
    places = [(at, text.index(f"f{n}.")) for n in numbers for at, text in enumerate(texts) if f"figure’s f{n}." in text]
    assert len(places) == len(numbers) and places == sorted(places)
    said = [at for n in numbers for at, text in enumerate(texts) if at > 1 and f"form{n}:\n" in text]
    assert all(abs(at - page) <= 2 for (at, _), page in zip(places, said, strict=True)), "close to their text"


def test_long_lines_break_between_words(texts):
    shown = [*dict.fromkeys(repr(word) for word in WORDS.split())]
    listing = texts[pages_with(texts, "first_100 =")[0]].split("first_100 =")[1].split("last_100")[0]
    assert [word for word in shown if word not in listing] == []
    lines = listing.split("x = 1")[0].strip().splitlines()
    assert len(lines) > 1 and all(line.rstrip().endswith(",") for line in lines[:-1])


def test_apostrophes_are_apostrophes(texts):
    """In Markdown, in what a cell says, in a notice, in a caption, in a table."""
    whole = " ".join(" ".join(texts).split())
    for words in ("It’s said.", "The card’s clock", "The card isn’t alone.", "figure’s f100", "kernel’s ms"):
        assert words in whole


def test_the_document_says_what_it_is(made, texts):
    machine = stored.machine_of("nvidia-h200")
    assert made.metadata["title"] == f"The cost of attention on {machine.name}" and not made.metadata["author"]
    assert made.xref_get_key(made.pdf_catalog(), "Lang")[1].startswith("en")
    entries = [(level, title.lstrip("0123456789. ")) for level, title, _ in made.get_toc()]
    chapter = [(1, "Chapter called 1"), *((2, f"Section s{100 + at}") for at in range(12)), (1, "Chapter called 2")]
    assert entries[: len(chapter)] == chapter
    proofs = ["Appendix: tables and proofs", "What proves 1", "What proves 2"]
    assert [title for _, title, _ in made.get_toc()][-3:] == proofs, "without numbers"
    assert all(fact in texts[0] for fact in (machine.name, machine.date, machine.torch))
    assert "Contents" in texts[1] and "Section s211" in texts[1], "on one page"


def test_running_heads_name_the_chapter(made):
    heads = [page.get_text(clip=(0, 0, 595, TOP)) for page in made]
    begins = [at - 1 for level, _, at in made.get_toc() if level == 1]
    assert "Chapter called 1" in heads[begins[0] + 1] and "Chapter called 2" in heads[begins[1] + 1]
    assert all("NVIDIA H200" in head for head in heads[1:])


def test_a_broken_law_is_red_and_text_in_figures_is_text(made):
    blocks = [block for page in made for block in page.get_text("dict")["blocks"]]
    spans = [one for block in blocks for line in block.get("lines", ()) for one in line["spans"]]
    assert {one["color"] for one in spans if "One is two" in one["text"]} == {0xB3261E}
    written = {one["font"].split("+")[-1] for one in spans if one["text"] == "written as text"}
    assert written == {"DejaVuSans"}, "of the font that matplotlib measured it with"


@pytest.mark.ci
@pytest.mark.parametrize("device", COMMITTED)
def test_the_report_of_a_device(device):
    """Of the replay that .ci/run has just made."""
    path = ROOT / "build" / device / "report.pdf"
    if not path.exists():
        pytest.skip(f"make replay DEVICE={device} comes first")
    document = pymupdf.open(path)
    assert holes(document) == {} and path.stat().st_size < MOST_BYTES
    begins = {title: at for level, title, at in document.get_toc() if level == 1}
    main = min(at for title, at in begins.items() if title.startswith("Appendix")) - min(begins.values()) + 1
    tables = re.findall(r"^Table\s\d+:", "".join(document[at].get_text() for at in range(main)), re.M)
    assert 10 < len(tables) <= 25
    assert main <= MOST_PAGES
