"""A replay asks the data alone: not the computer it runs on, and not the table of variants."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import COMMITTED

from attnlib import FAMILIES, VARIANTS
from attnlib.core import Machine, Shape
from attnlib.laws import ACCOUNTS
from attnlib.rows import shape_of
from report import stored
from report.floor import floor
from report.run import Run

ROOT = Path(__file__).parent.parent
NEW = """
from dataclasses import replace

from attnlib.variants.naive import NAIVE

"""


def sdpa_flash_rows():
    """Committed points of the H200 at which the allocator saw `sdpa_flash`, `(machine, row, {account: bytes})`."""
    folder = ROOT / "data" / "nvidia-h200"
    machines = {
        one: Machine.from_facts(facts) for one, facts in json.loads((folder / "machine.json").read_text()).items()
    }
    for path in sorted(folder.glob("0[1-5]_*.csv")):
        rows = pd.read_csv(path)
        if "variant" not in rows or path.stem == "03_block":  # a block holds more than its attention
            continue
        for row in rows[rows["variant"] == "sdpa_flash"].to_dict("records"):
            for kind in ("bytes", "requested_bytes"):
                figures = {account: row.get(f"{account}_{kind}") for account in ACCOUNTS}
                if all(figure is not None and figure == figure for figure in figures.values()):
                    yield machines[row["machine"]], row, figures


def agreeing(points):
    """How many of `(machine, row, figures)` agree with the law to the byte."""
    law = VARIANTS["sdpa_flash"].law
    return sum(
        all(law.bytes(a, shape_of(row), machine) == figures[a] for a in ACCOUNTS) for machine, row, figures in points
    )


def test_committed_rows_agree_with_their_laws_on_any_host(monkeypatch):
    """FlashAttention-2 cuts its keys by the number of multiprocessors: of the GPU that measured, not of another that
    happens to be here, with another count, threads of its own, and no bfloat16."""

    class Other:
        name, multi_processor_count, major, minor, total_memory = "another GPU", 108, 7, 5, 2**34

    points = [*sdpa_flash_rows()]
    assert len(points) > 100 and agreeing(points) == len(points)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Other)
    assert agreeing(points) == len(points)
    elsewhere = [(replace(machine, multiprocessors=108), row, figures) for machine, row, figures in points]
    assert agreeing(elsewhere) < len(points), "it does depend on the GPU that is asked about"


def test_what_can_run_and_how_fast_is_asked_of_the_machine_too(monkeypatch):
    machine, shape = stored.machine_of("nvidia-h200"), Shape(1, 2, 512, 64, "bfloat16")
    before = [VARIANTS[name].needs(shape, machine) for name in VARIANTS], floor(VARIANTS["sdpa_flash"], shape, machine)

    def refuse(*_):
        raise AssertionError("the host was asked")

    for place, name in (
        (torch, "get_num_threads"),
        (torch.cuda, "is_available"),
        (torch.cuda, "get_device_properties"),
    ):
        monkeypatch.setattr(place, name, refuse)
    after = [VARIANTS[name].needs(shape, machine) for name in VARIANTS], floor(VARIANTS["sdpa_flash"], shape, machine)
    assert before == after and VARIANTS["sdpa_cudnn"].needs(shape, machine) is None
    Run("01_naive_sweep", "nvidia-h200", "full", True)


def with_new_variants(target: Path) -> Path:
    """A copy of the project with a variant more in each family, added as the README tells: a file, and a line each."""
    ignore = shutil.ignore_patterns(".*", "build", "*-quick", "__pycache__", "*.egg-info", "tests")
    root = Path(shutil.copytree(ROOT, target / "project", ignore=ignore))
    table, made = (root / "attnlib" / "__init__.py").read_text(), NEW
    for family, members in FAMILIES.items():
        made += f'NEW_{family.upper()} = replace(NAIVE, name="new_{family}")\n'
        first = f'"{next(iter(members))}": '
        assert table.count(first) == 1
        new = f'"new_{family}": "attnlib.variants.throwaway:NEW_{family.upper()}",\n        '
        table = table.replace(first, new + first)  # before all others: whatever depends on the order shows
    (root / "attnlib" / "__init__.py").write_text(table)
    (root / "attnlib" / "variants" / "throwaway.py").write_text(made)
    return root


def replayed(root: Path, device: str, *numbers: str) -> dict:
    """What replaying.py tells of notebooks of the copy, in a process of its own."""
    command = [sys.executable, ROOT / "tests" / "replaying.py", device, *numbers]
    environment = {**os.environ, "PYTHONPATH": str(root), "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_replay(root: Path, device: str, *numbers: str):
    """The claims are the committed ones, word for word, and nothing was asked of this computer."""
    found = replayed(root, device, *numbers)
    kept = pd.read_csv(ROOT / "data" / device / "claims.csv", dtype=str, keep_default_na=False)
    kept = kept[kept["notebook"].str[:2].isin(numbers)]
    assert found["claims"] == kept[["notebook", "kind", "claim", "expected", "measured", "holds"]].to_numpy().tolist()
    assert found["asked"] == []


@pytest.mark.parametrize("device", COMMITTED)
def test_new_variants_and_a_foreign_host_change_no_committed_claim(tmp_path, device):
    """A row that was not measured is a row that is not there: chapters 1 to 3 of every committed device, their tables,
    figures and claims, with most ledgers taken on trust."""
    check_replay(with_new_variants(tmp_path), device, "--bounded", "01", "02", "03")


@pytest.mark.ci
@pytest.mark.parametrize("device", COMMITTED)
def test_new_variants_and_a_foreign_host_change_nothing_in_a_full_replay(tmp_path, device):
    """All chapters, with every ledger and every figure, which must be the committed ones to the byte."""
    root = with_new_variants(tmp_path)
    check_replay(root, device, "00", "01", "02", "03", "04", "05", "06")
    made = {path.name: path.read_bytes() for path in (root / "build" / device / "figures").glob("*.svg")}
    assert made == {path.name: path.read_bytes() for path in (ROOT / "figures" / device).glob("*.svg")}


def made_older(root: Path, device: str):
    """Turn the data of a copy into what a GPU of compute capability 7.5 would have left: float16 for bfloat16, no fused
    kernel but the efficient one, and no counters."""
    folder, gone = root / "data" / device, ("sdpa_flash", "sdpa_cudnn", "fa4", "dilated_flash", "dilated_fa4")
    for path in folder.glob("0[1-5]_*.csv"):
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        if "dtype" in rows:
            rows = rows[rows["dtype"] != ("float16" if path.stem != "04_published" else "")]
            rows["dtype"] = rows["dtype"].replace("bfloat16", "float16")
        for column in {"variant", "first", "second"} & {*rows}:
            # rows of the kernels that are gone stand for those of the efficient one where it was not measured
            stands_for = {"sdpa_flash": "sdpa_efficient"} if column == "second" else {}
            if path.stem.startswith("04"):
                stands_for = {"sdpa_cudnn": "sdpa_efficient", "dilated_cudnn": "dilated_efficient"}
            rows[column] = rows[column].replace(stands_for)
            rows = rows[~rows[column].isin(gone)]
        rows.to_csv(path, index=False)
    (folder / "03_traffic.csv").unlink()
    facts = json.loads((folder / "machine.json").read_text())
    for one in facts.values():
        one |= {"compute_capability": "7.5", "packages": [], "rows": {}}
    (folder / "machine.json").write_text(json.dumps(facts))


@pytest.mark.ci
def test_a_gpu_without_flash_kernels_has_a_report_too(tmp_path):
    """Every sentence finds what it talks about, or is not there."""
    root = with_new_variants(tmp_path)
    made_older(root, "nvidia-h200")
    found = replayed(root, "nvidia-h200", "--bounded", "00", "01", "02", "03", "04", "05", "06")
    assert not any("bfloat16 " in text and "Observed" in text for text in found["said"])


@pytest.mark.ci
@pytest.mark.parametrize("device", COMMITTED)
def test_prose_follows_the_outcome_of_every_observation(tmp_path, device):
    """With all of them inverted the laws stay, and no sentence is left that claims the other outcome."""
    root = with_new_variants(tmp_path)
    kept, found = (
        replayed(root, device, "--bounded", *how, "00", "01", "02", "03", "04", "05", "06")
        for how in ((), ("--inverted",))
    )
    outcomes = [[(kind, claim[:20], holds) for _, kind, claim, *_, holds in one["claims"]] for one in (kept, found)]
    flipped = {"True": "False", "False": "True"}
    assert outcomes[1] == [(k, c, flipped[h] if k == "observation" else h) for k, c, h in outcomes[0]]
    assert sum(kind == "observation" for kind, *_ in outcomes[0]) >= 5
