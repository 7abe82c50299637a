"""For somebody who installs it: what an import costs, and a wheel that works without the repository beside it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch._dynamo", "torch._inductor", "triton", "pandas", "matplotlib", "IPython", "ipywidgets")


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh Python has after `statement`, beyond those that `import torch` brings itself."""
    code = f"import sys, torch; before = {{*sys.modules}}\n{statement}\nprint(*({{*sys.modules}} - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


def test_importing_the_package_costs_nothing():
    """Not even the formulas' sympy, nor any variant: whoever wants one word of it pays for that."""
    found = loaded_by("import attnlib; assert attnlib.__version__")
    assert "attnlib" in found and not {one for one in found if one.startswith("attnlib.")}
    assert not found & {*HEAVY, "sympy"}


def test_the_table_of_variants_does_not_bring_the_compiler():
    """FlexAttention's compiler and Triton come when a kernel is first compiled, not when a variant is named; nothing of
    a report comes at all. The old table cost 1.6 s beyond torch's own import."""
    found = loaded_by("from attnlib import VARIANTS; assert VARIANTS")
    assert {"attnlib.variants.sparse", "sympy"} <= found and not found & {*HEAVY}


def test_a_shape_needs_no_variant():
    found = loaded_by("from attnlib.core import Shape; from attnlib.dilated import dilated")
    assert "attnlib.variants.naive" not in found and not found & {*HEAVY}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package installed from a wheel, and nothing else; the wheel."""
    out, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", out, ROOT], check=True)
    (wheel,) = out.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target, wheel


# an isolated Python sees the installed packages and no current folder; the copy to be tested stands before all others,
# and an editable install of the project behind it must not help out
ISOLATED = """
import sys
sys.path.insert(0, {target!r})
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path = [path for path in sys.path if path != {root!r}]
"""


def isolated(installed, where, code):
    """What `code` prints, run beside nothing of the repository."""
    start = ISOLATED.format(target=str(installed[0]), root=str(ROOT))
    command = [sys.executable, "-I", "-c", start + code]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ci
def test_the_wheel_holds_the_library_alone(installed):
    names = zipfile.ZipFile(installed[1]).namelist()
    assert {"attnlib/py.typed", "attnlib/core.py", "attnlib/memory/fit.py"} <= {*names}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"attnlib"}


def readme_code() -> str:
    """The lines of Python that the README shows to whoever installs the library."""
    lines = (ROOT / "README.md").read_text().splitlines()
    first = lines.index("    import torch")
    last = next(at for at in range(first, len(lines)) if lines[at] and not lines[at].startswith("    "))
    return "\n".join(line[4:] for line in lines[first:last])


@pytest.mark.ci
def test_a_newcomer_gets_what_the_readme_promises(installed, tmp_path):
    """Its ten lines as they stand: attention, a law and one measured point, from the installed copy."""
    code = readme_code()
    assert "dilated(" in code and "measure(" in code and len(code.splitlines()) <= 12
    told = isolated(
        installed, tmp_path, f"{code}\nimport attnlib\nprint(attnlib.__file__, attnlib.__version__, o.shape)"
    )
    *_, law, measured, where = told.splitlines()
    assert int(law.split()[0]) > 2**31 and float(measured.removesuffix(" ms")) > 0
    assert Path(where.split()[0]).is_relative_to(installed[0]) and where.endswith("torch.Size([1, 8, 4096, 64])")


@pytest.mark.ci
@pytest.mark.parametrize("program", ["attnlib", "attnlib.memory"])
def test_the_commands_work_under_both_names(installed, tmp_path, program):
    start = f"import runpy; sys.argv = ['x', *{{}}]; runpy.run_module({program!r}, run_name='__main__')"
    fit = ["fit", "--memory", "24GiB", "--variant", "naive", "--batch", "8", "--head-dim", "64"]
    assert "largest N: " in isolated(installed, tmp_path, start.format(fit))
    check = ["check", "--seed", "7", "--count", "1"]
    assert "law = ledger for" in isolated(installed, tmp_path, start.format(check))


@pytest.mark.ci
def test_the_old_addresses_still_lead_there(installed, tmp_path):
    """What people already call."""
    code = """
from attnlib import VARIANTS, variant
from attnlib.core import Shape
from attnlib.dilated import dilated, dilated_reference
print(variant("naive") is VARIANTS["naive"])
"""
    assert isolated(installed, tmp_path, code) == "True\n"
