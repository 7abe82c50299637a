"""The HTML report in a browser, on a desktop and on a phone, light and dark: a small document, which holds what broke
before and is made by the real exporter, and the reports of the committed devices where a build has left them."""

import base64
import io
import json
import math
import os
import random
import re
import select
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import COMMITTED, CPU_DATA
from PIL import Image

from attnlib import VARIANTS
from attnlib.core import DTYPES, PHASES, Shape
from attnlib.laws import ACCOUNTS, USES, evaluate, useful_flops
from attnlib.memory.fit import largest_seq_len
from report import plots, stored
from report.calculator import HEAD_DIMS, formulas_of, laws_in_javascript
from report.dark import CONTRASTS, PAGE, contrast, on_dark, with_dark_version
from report.export import export

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run")
VIEWS = [(1280, False), (1280, True), (390, False), (390, True)]  # the window's width, and whether dark is preferred
NAMES = [f"{'dark' if dark else 'light'}-{width}" for width, dark in VIEWS]
MOST_BYTES = 5 * 10**6
LINE, HEAT = "#de8f05", "#8c0800"  # data, of which the second is too dark for dark paper where it is a line
LONG = "a_name_of_one_very_long_token_" * 6


class Browser:
    """A page of headless Chromium, driven over a pipe by the DevTools protocol."""

    def __init__(self, executable: str, folder: Path):
        theirs, self.commands = os.pipe()
        self.answers, back = os.pipe()
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{back}', executable, *FLAGS]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        self.process = subprocess.Popen(command, pass_fds=(theirs, back), stderr=subprocess.DEVNULL)
        os.close(theirs), os.close(back)
        self.number, self.rest, self.events, self.session = 0, b"", [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def receive(self) -> dict:
        """The next message."""
        while b"\0" not in self.rest:
            assert select.select([self.answers], [], [], 120)[0], "the browser does not answer"
            got = os.read(self.answers, 2**20)
            assert got, "the browser is gone"
            self.rest += got
        one, self.rest = self.rest.split(b"\0", 1)
        return json.loads(one)

    def call(self, method: str, **parameters) -> dict:
        """The result of a command; what happens meanwhile is kept in `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, dark: bool = False):
        """Load a page anew in a window of that width, a phone's if it is narrow."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def ask(self, script: str):
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def pixels(self, element: str) -> np.ndarray:
        """`[height, width, 3]`, what an element looks like."""
        script = (
            f"(() => {{const r = {element}.getBoundingClientRect(); return [r.x, r.y + scrollY, r.width, r.height]}})()"
        )
        area = dict(zip(("x", "y", "width", "height"), self.ask(script), strict=True))
        shot = self.call("Page.captureScreenshot", clip={**area, "scale": 1}, captureBeyondViewport=True)["data"]
        return np.array(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")).astype(int)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """The browser that there is."""
    found = [one for one in map(shutil.which, BROWSERS) if one]
    if not found:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    browser = Browser(found[0], tmp_path_factory.mktemp("browser"))
    yield browser
    browser.process.terminate()
    browser.process.wait(60)


def drawn(label: str, draw) -> nbformat.NotebookNode:
    """A cell that drew a figure."""
    plots.style()
    figure, ax = plt.subplots(figsize=(plots.WIDTH, plots.HEIGHT))
    draw(ax)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    return cell_with({"image/svg+xml": text.getvalue()}, label)


def cell_with(data: dict, label: str) -> nbformat.NotebookNode:
    """A cell with an output, a label and a caption that is wider than a phone."""
    source = f'#| label: {label}\n#| caption: "{"What is seen, in a caption of many words. " * 6}"\nshow()'
    outputs = [nbformat.v4.new_output("display_data", data)]
    return nbformat.v4.new_code_cell(source, outputs=outputs, metadata={"tags": ["remove-input"]})


def heats(ax):
    """A heat map, dark where it is most."""
    ax.pcolormesh([[0, 1], [1, 0]], cmap=plt.matplotlib.colors.ListedColormap(["#f7fbff", HEAT]))
    ax.set(title="heats")


def boxes(ax):
    """A light patch with a word upon it, as large as the axes."""
    ax.add_patch(plt.Rectangle((0, 0), 1, 1, fc="#dce8f2"))
    ax.text(0.5, 0.5, "MMMMMM", ha="center", va="center", fontsize=22, weight="bold")


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A report of one notebook: a wide table, a long caption, a wide formula, figures, a long listing, a long token."""
    out = tmp_path_factory.mktemp("report")
    wide = pd.DataFrame({f"column {n}": [f"{n:,}.25 GiB"] * 3 for n in range(15)}).to_html()
    listing = f"def long(listing):\n    # {'a comment ' * 30}\n    return '{LONG}'"
    cells = [
        nbformat.v4.new_markdown_cell(
            f"# A chapter\n\n## A section\n\nInline `{LONG}`, {LONG}.\n\n$$ {' + '.join('xyz' * 30)} $$"
        ),
        nbformat.v4.new_markdown_cell(
            "| word | meaning |\n|---|---|\n| *N* | " + "many words " * 20 + "|\n\n: What words mean."
        ),
        nbformat.v4.new_code_cell(listing),
        cell_with({"text/html": wide}, "tbl-wide"),
        drawn("fig-lines", lambda ax: ax.plot([1, 2], [1, 2], color=LINE, lw=4)),
        drawn("fig-heats", heats),
        drawn("fig-boxes", boxes),
        nbformat.v4.new_markdown_cell("::: calculator\nInstead, @tbl-wide.\n:::"),
    ]
    hidden = {"tags": ["hide-input"]}
    cells += [nbformat.v4.new_code_cell(text, metadata=hidden) for text in ("first = 1", "second = 2")]
    printed = nbformat.v4.new_output("stream", text="def printed(x):\n    return x\n")
    cells += [nbformat.v4.new_code_cell("print(it)", outputs=[printed])]
    (out / "notebooks").mkdir()
    summary = [nbformat.v4.new_markdown_cell("# Summary {.unnumbered}\n\nIn short.")]
    summary += [nbformat.v4.new_code_cell("hidden = 0", metadata=hidden)]
    nbformat.write(nbformat.v4.new_notebook(cells=summary), out / "notebooks" / "00_summary.ipynb")
    nbformat.write(nbformat.v4.new_notebook(cells=cells), out / "notebooks" / "01_small.ipynb")
    machine = stored.machine_of("nvidia-h200")
    export(out, machine, [("notice", "A word.")], [], laws_in_javascript(machine))
    return out / "report.html"


@pytest.fixture(
    params=["small", *(pytest.param(device, marks=pytest.mark.ci) for device in COMMITTED)], scope="session"
)
def page(request) -> Path:
    """The small report, and in CI those of the devices."""
    if request.param == "small":
        return request.getfixturevalue("small")
    path = ROOT / "build" / request.param / "report.html"
    return path if path.exists() else pytest.skip(f"needs a report: make replay DEVICE={request.param}")


@pytest.fixture(params=VIEWS, ids=NAMES, scope="session")
def view(request, browser, page) -> Browser:
    """The page in each view; `width` and `dark` say which."""
    browser.width, browser.dark = request.param
    browser.open(page, *request.param)
    return browser


def test_the_page_asks_for_nothing_and_complains_of_nothing(view, page):
    asked = [x["params"]["request"]["url"] for x in view.events if x.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed")
    assert [event for event in view.events if event.get("method") in complaints] == []


def test_the_page_does_not_scroll_sideways(view):
    assert view.ask("document.documentElement.scrollWidth") <= view.width


def test_captions_wrap_to_the_window(view):
    found = view.ask("""[...document.querySelectorAll('figcaption')].map(
        x => [x.getBoundingClientRect().right, x.scrollWidth - x.clientWidth])""")
    assert found and all(right <= view.width and hidden <= 0 for right, hidden in found)
    assert view.ask("document.querySelectorAll('caption').length") == 0  # which would be as wide as its table


def test_a_table_scrolls_in_its_box_and_its_first_column_stays(view):
    script = """[...document.querySelectorAll('.wide > table')].map(table => {
        const box = table.parentElement;
        box.scrollLeft = 1e4;
        const moved = box.scrollLeft, left = box.getBoundingClientRect().left;
        const cells = [...table.querySelectorAll('tr > :first-child')].filter(x => x.colSpan == 1 && x.offsetParent);
        const apart = Math.max(...cells.map(x => Math.abs(x.getBoundingClientRect().left - left)));
        const share = cells[0].offsetWidth / box.clientWidth;
        box.scrollLeft = 0;
        return [moved, apart, share]
    })"""
    found = view.ask(script)
    assert any(moved for moved, *_ in found)  # the case
    assert all(apart < 1 for _, apart, _ in found)
    assert all(share < 0.6 for moved, _, share in found if moved)  # or there is no room for what scrolls


def test_a_table_of_few_rows_and_many_words_is_stacked_on_a_phone(view, small, page):
    if page == small:
        boxes = "[...document.querySelectorAll('figure.words .wide')]"
        assert view.ask(f"{boxes}.length") == 1
        assert view.ask(f"{boxes}.every(x => x.scrollWidth <= x.clientWidth)")
        first, second = view.ask(
            f"[...{boxes}[0].querySelectorAll('tbody tr > *')].map(x => x.getBoundingClientRect().x)"
        )
        assert (first == second) == (view.width < 600)
        assert "meaning" in view.ask(f"{boxes}[0].querySelectorAll('td')[1].dataset.label")


def test_neighbouring_listings_are_one_and_a_summary_shows_none(small):
    """And what a cell prints that is a program is highlighted."""
    html = small.read_text("utf-8")
    text = re.sub("<[^>]*>", "", html)
    assert html.count("<details>") == 1 and "first = 1" in text and "second = 2" in text and "hidden = 0" not in text
    assert re.search(r'<span class="kw">def</span> printed', html)


def test_a_formula_scrolls_in_its_box(view, small, page):
    found = view.ask("""[...document.querySelectorAll('.formula')].map(
        x => [x.getBoundingClientRect().right, x.scrollWidth - x.clientWidth])""")
    assert all(right <= view.width for right, _ in found)
    assert page != small or all(hidden > 0 for _, hidden in found)
    assert (
        view.ask("[...document.querySelectorAll('math[display=block]')].filter(x => !x.closest('.formula')).length")
        == 0
    )


def test_listings_and_long_tokens_end_in_the_page(view):
    script = (
        "[...document.querySelectorAll('pre, :not(pre, td, th) > code, p')].map(x => x.getBoundingClientRect().right)"
    )
    found = view.ask(f"Math.max(...{script})")
    assert found <= view.width


def test_listings_are_highlighted(view):
    parts = "[...document.querySelectorAll('pre code, pre code .kw, pre code .co')]"
    assert view.ask(f"new Set({parts}.map(x => getComputedStyle(x).color)).size") >= 3


def test_contents_are_folded_on_a_phone_and_beside_the_text_on_a_desktop(view):
    is_open, right, left = view.ask("""[document.querySelector('nav details').open,
        document.querySelector('nav').getBoundingClientRect().right,
        document.querySelector('main').getBoundingClientRect().left]""")
    assert is_open == (view.width > 600)
    assert view.width < 600 or right <= left


def near(pixels: np.ndarray, colour: str) -> float:
    """The share of pixels that have a colour, or nearly."""
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return float((abs(pixels - wanted).max(axis=-1) <= 6).mean())


def test_a_figure_has_the_paper_and_ink_of_its_page_and_keeps_its_data(browser, small):
    seen = {}
    for dark in (False, True):
        browser.open(small, 1280, dark)
        assert browser.ask("getComputedStyle(document.body).backgroundColor") == (
            f"rgb{tuple(int(PAGE[at : at + 2], 16) for at in (1, 3, 5))}" if dark else "rgb(255, 255, 255)"
        )
        seen[dark] = [browser.pixels(f"document.querySelectorAll('figure img')[{n}]") for n in (0, 1)]
    for dark, (lines, heats) in seen.items():
        assert near(lines, PAGE if dark else "#ffffff") > 0.5
        assert near(lines, LINE) > 0.005
        assert near(heats, HEAT) > 0.3 and near(heats, "#f7fbff") > 0.3
        title = lines[:, : lines.shape[1] // 20]  # where there is nothing but labels and paper
        assert (title.max() > 180) if dark else (title.min() < 80)


def test_a_text_on_a_patch_can_be_read_on_dark_paper(browser, small):
    """The lightest and the darkest of the pixels of a box with a word in it."""
    for dark in (False, True):
        browser.open(small, 1280, dark)
        figure = browser.pixels("document.querySelectorAll('figure img')[2]")
        high, wide, _ = figure.shape
        inside = figure[int(0.2 * high) : int(0.6 * high), int(0.3 * wide) : int(0.7 * wide)].reshape(-1, 3)
        ends = [inside[at(inside.sum(axis=1))] for at in (np.argmin, np.argmax)]
        assert contrast(*("#" + "".join(f"{part:02x}" for part in end) for end in ends)) > 4.5
        assert np.median(inside.sum(axis=1)) < 380 if dark else np.median(inside.sum(axis=1)) > 380


def test_colours_on_dark_paper():
    assert on_dark("#ffffff") == PAGE and on_dark("#de8f05") == "#de8f05"
    for colour in (*plots.COLOURS.values(), *plots.SPARE):
        for what, (other, least) in CONTRASTS.items():
            grey = what == "line" and len({colour[1:3], colour[3:5], colour[5:]}) == 1
            assert contrast(on_dark(colour, what), other) >= least or grey
    assert contrast(on_dark("#262626"), PAGE) > 7 > 2.5 > contrast(on_dark("#cccccc"), PAGE) > 1.3  # text, and a grid
    for box in ("#dce8f2", "#f2e6d8", "#ececec"):
        assert contrast(on_dark("#262626", "text"), on_dark(box, "area")) > 4.5
    svg = '<svg><style>*{}</style><path style="fill: #ffffff"/><path style="stroke: #de8f05"/></svg>'
    assert with_dark_version(svg).count("#ffffff") == 3 and "#de8f05" not in with_dark_version(svg).split("</style>")[0]


def random_shapes(count: int, device: str) -> list[tuple[str, Shape]]:
    """Variants and shapes that they take."""
    draw, machine, found = random.Random(7), stored.machine_of(device), []
    script = laws_in_javascript(machine)
    known = [name for name in VARIANTS if f'"{name}": {{formulas' in script]
    while len(found) < count:
        sizes = draw.randint(1, 40), draw.randint(1, 40), draw.randint(2, 9000), draw.choice(HEAD_DIMS)
        shape = Shape(*sizes, draw.choice([*DTYPES]), draw.random() < 0.5)
        name = draw.choice(known)
        if not VARIANTS[name].needs(shape, machine):
            found.append((name, shape))
    assert len({name for name, _ in found}) >= 7
    return found


def calculated(browser: Browser, device: str, calls: list[str]) -> list:
    """What the calculator's functions say on a device."""
    scripts = laws_in_javascript(stored.machine_of(device)) + (ROOT / "report" / "calculator.js").read_text()
    return browser.ask(f"(() => {{{scripts}\nreturn [{', '.join(calls)}]}})()")


def as_javascript(shape: Shape) -> str:
    """A shape as calculator.js takes it."""
    names = ("batch", "heads", "seqLen", "headDim", "dtype", "causal")
    return json.dumps(dict(zip(names, shape.columns().values(), strict=True)))


@pytest.mark.parametrize("device", ["nvidia-h200", CPU_DATA])
def test_the_calculator_gives_the_bytes_of_the_laws_and_the_time_of_the_ceilings(browser, device):
    browser.call("Page.navigate", url="about:blank")
    machine, drawn = stored.machine_of(device), random_shapes(330, device)
    found = calculated(browser, device, [f'bill("{name}", {as_javascript(shape)})' for name, shape in drawn])
    copy, products = max(machine.ceilings["copy_gb_s"].values()), machine.ceilings["gemm_tflop_s"]
    formulas = {name: formulas_of(VARIANTS[name]) for name in {name for name, _ in drawn}}
    for (name, shape), bill in zip(drawn, found, strict=True):
        variant = VARIANTS[name]
        expected = [variant.law.bytes(account, shape, machine) for account in ACCOUNTS]
        assert [bill["saved"], bill["forward"], bill["backward"]] == expected, (name, shape)
        assert bill["training"] == shape.input_bytes + max(expected[1:])
        in_another_type = variant.gpu_product and shape.dtype == "float32" and not machine.is_cpu
        for phase in PHASES:
            asked = [formulas[name][one][phase] for one in ("work", "moved")]
            work, moved = (math.nan if str(one) == "NaN" else evaluate(one, shape, machine) for one in asked)
            assert work <= max(useful_flops(shape, phase), evaluate(getattr(variant.flops, phase), shape))
            least = max(work / products[shape.dtype] / 1e9, moved / copy / 1e6)
            unknown = in_another_type or name in ("sdpa_math", "tiled")
            assert bill["fastest"][phase] == (None if unknown else pytest.approx(least))


def test_the_calculator_refuses_by_what_any_host_of_the_device_had():
    machine = replace(stored.machine_of("nvidia-h200"), packages=())
    assert "flash-attn-4" not in laws_in_javascript(machine)
    assert "flash-attn-4" in laws_in_javascript(replace(machine, slug="another"))


def test_the_calculators_table_is_whole_on_a_desktop(browser, small):
    browser.open(small, 1280)
    box = "document.querySelector('.calculator .wide')"
    assert browser.ask(f"{box}.scrollWidth - {box}.clientWidth") <= 0


def test_the_calculator_finds_the_largest_sequence(browser):
    browser.call("Page.navigate", url="about:blank")
    drawn, memory, machine = random_shapes(44, "nvidia-h200"), 24 * 2**30, stored.machine_of("nvidia-h200")
    calls = [f'largest("{name}", {as_javascript(shape)}, "{use}", {memory})' for name, shape in drawn for use in USES]
    expected = [largest_seq_len(VARIANTS[name], shape, memory, use, machine) for name, shape in drawn for use in USES]
    assert calculated(browser, "nvidia-h200", calls) == expected


def test_the_calculator_answers_on_the_page_and_can_be_used_by_keyboard(browser, small):
    browser.open(small, 390)
    fields = "[...document.querySelectorAll('.calculator input, .calculator select')]"
    assert browser.ask(f"{fields}.every(x => x.labels.length == 1 && x.tabIndex == 0)")
    row = "[...document.querySelectorAll('.calculator tbody tr')].find(x => x.cells[0].textContent == 'naive')"
    expected = VARIANTS["naive"].law.bytes("saved", Shape(8, 1, 16384, 64), stored.machine_of("nvidia-h200")) / 2**30
    assert browser.ask(f"{row}.cells[1].textContent") == f"{expected:.4g} GiB"
    change = "document.querySelector('[name={0}]').value = '{1}'; document.forms[0].dispatchEvent(new Event('input'))"
    browser.ask(change.format("dtype", "bfloat16"))
    assert browser.ask(f"{row}.cells[1].textContent") == f"{expected / 2:.4g} GiB"
    assert "sdpa_cudnn" in browser.ask("document.querySelector('.calculator tbody').textContent")
    browser.ask(change.format("variant", "sdpa_flash"))
    assert "dq in float32" in browser.ask("document.querySelector('.terms').textContent")
    browser.ask(change.format("dtype", "float32"))
    machine = stored.machine_of("nvidia-h200")
    most = largest_seq_len(VARIANTS["naive"], Shape(8, 1, 2, 64), machine.memory_bytes, "training", machine)
    assert browser.ask(f"{row}.cells[5].textContent") == f"{most:,}", "of all bytes, not of those that are shown"
    for wrong in ("-1", "", "1.5", "1"):
        browser.ask(change.format("seqLen", wrong))
        assert "Whole numbers" in browser.ask("document.querySelector('.calculator output').textContent")
        assert browser.ask("document.querySelectorAll('.calculator tbody tr, .terms li').length") == 0


def test_without_script_and_on_paper_a_sentence_stands_in_the_place_of_the_calculator(browser, small):
    shown = "[...document.querySelectorAll('.calculator > *')].filter(x => x.offsetHeight).map(x => x.tagName)"
    browser.open(small, 1280)
    assert browser.ask(shown) == ["FORM"]
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.ask(shown) == ["P"]
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(small, 1280)
        assert browser.ask(shown) == ["P"]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_page_names_no_other_and_is_small(page):
    html = page.read_text("utf-8")
    assert len(html.encode()) < MOST_BYTES
    assert not [
        part
        for part in html.split("<")[1:]
        if part.startswith(("img", "script", "link", "iframe")) and "http" in part[:200]
    ]
