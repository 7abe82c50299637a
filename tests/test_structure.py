"""The house: one direction of imports, few levels, small files, one meaning for a name, no notebook in the library."""

import ast
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import attnlib
from attnlib import FAMILIES

ROOT = Path(__file__).parent.parent
PACKAGES = {"attnlib": 4250, "report": 2560, "notebooks": 3050}  # lines of Python that each may have
LONGEST_FILE, MOST_LEVELS = 250, 8
UPWARDS = {("attnlib", "report"), ("attnlib", "notebooks"), ("report", "notebooks")}  # no import goes that way
# names that stand in more than one module, each with the reason
AGAIN: dict[str, str] = {
    "main": "of each command, as `python -m` knows it",
    "aten": "PyTorch's operators, by the name that PyTorch gives them",
    "ROOT": "the folder of the project, which tests move in each module by itself",
}
# what somebody who installs attnlib need not have
REPORT_ONLY = {
    "report",
    "notebooks",
    "pandas",
    "matplotlib",
    "seaborn",
    "IPython",
    "ipywidgets",
    "papermill",
    "nbconvert",
}


@cache
def modules() -> dict[str, Path]:
    """`{dotted name: file}` of both packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            *folders, name = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(folders if name == "__init__" else (*folders, name))] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    """A module, parsed."""
    return ast.parse(modules()[name].read_text())


def only_for_types(node: ast.If) -> bool:
    """Whether a condition is `if TYPE_CHECKING`."""
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(name: str, *, of_us: bool = True) -> set[str]:
    """What a module imports, inside functions as well: modules of ours, or the packages of others.

    Without what is for a type checker alone, which never runs. The table of variants is made of texts: they are imports
    too.
    """
    found, todo = set(), [tree(name)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and only_for_types(node):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    if not of_us:
        return {one.split(".")[0] for one in found}
    if name == "attnlib":
        found |= {place.split(":")[0] for members in FAMILIES.values() for place in members.values()}
    ours = set()
    for one in found:  # `from attnlib.core import Shape` names a module and something in it, or a package and a module
        while one and one not in modules():
            one = one.rpartition(".")[0]
        ours |= {one} if one else set()
    return ours - {name}


def levels() -> dict[str, int]:
    """The level of each module: one more than the highest that it imports. Fails with the circle, if there is one."""
    found: dict[str, int] = {}

    def level(name: str, above: tuple = ()) -> int:
        assert name not in above, f"a circle: {' imports '.join((*above[above.index(name) :], name))}"
        if name not in found:
            found[name] = 1 + max((level(one, (*above, name)) for one in imported(name)), default=0)
        return found[name]

    for name in modules():
        level(name)
    return found


def test_imports_form_no_circle_and_few_levels():
    found = levels()
    beyond = [name for name, level in found.items() if level > MOST_LEVELS + name.startswith("notebooks.")]
    assert not beyond, f"more than {MOST_LEVELS} levels, and one of notebooks: {beyond}"


def test_no_package_imports_what_lies_above_it():
    """core ← laws ← variants, dilated ← parallel, memory ← timing ← the commands ← report ← notebooks."""
    order = ["core", "laws", "variants", "dilated", "parallel", "memory", "timing"]
    for name in modules():
        package, part, *_ = (*name.split("."), "")
        for one in imported(name):
            there, other, *_ = (*one.split("."), "")
            assert (package, there) not in UPWARDS, f"{name} imports {one}"
            if part in order and package == there:
                assert other, f"{name} imports the table of variants: it is to be handed them"
                assert other not in order or order.index(other) <= order.index(part), f"{name} imports {one}"


def test_the_library_needs_no_notebook():
    for name in modules():
        if name.split(".")[0] == "attnlib":
            assert not imported(name, of_us=False) & REPORT_ONLY, name


def test_the_library_needs_what_pyproject_says_and_no_more():
    """Beside the standard library; triton comes with torch, and flash-attn-4 is asked for by a text, if it is there."""
    needed = set.union(*(imported(name, of_us=False) for name in modules() if name.startswith("attnlib")))
    others = needed - {*sys.stdlib_module_names} - {"attnlib", "__future__", "triton"}
    declared = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]\n")[0]
    assert others and all(f'"{one}' in declared for one in others), others


@pytest.mark.parametrize(("package", "most"), PACKAGES.items())
def test_files_are_small_and_few_lines_in_all(package, most):
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    mine = {name: count for name, count in lines.items() if name.split(".")[0] == package}
    assert {name: count for name, count in mine.items() if count > LONGEST_FILE} == {}
    assert sum(mine.values()) <= most


def names_of(name: str) -> set[str]:
    """What a module defines at its top level: functions, classes, constants; not what it imports."""
    found = set()
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if hasattr(node, "target") else []
        found |= {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return {one for one in found if not one.startswith("_")}


def test_a_name_means_one_thing():
    """No name of a module stands in another, or is the name of a module or a package. (One that is named after what it
    is for, with that function in it, is one thing.)"""
    places = defaultdict(list)
    for name in modules():
        for one in names_of(name) - {*AGAIN}:
            places[one].append(name)
    assert {one: there for one, there in places.items() if len(there) > 1} == {}
    called = {name.rpartition(".")[2]: name for name in modules()}
    clashes = {one: there[0] for one, there in places.items() if one in called}
    assert {one: there for one, there in clashes.items() if not f"{there}.".startswith(f"{called[one]}.")} == {}


def test_the_exceptions_are_needed():
    found = [one for name in modules() for one in names_of(name)]
    assert {one for one in AGAIN if found.count(one) < 2} == set()


def is_public(node: ast.AST) -> bool:
    """Whether a definition is part of what others use."""
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")


def test_public_functions_of_the_library_say_what_they_take_and_do():
    """A docstring and a type for every parameter and result; a kernel of Triton's is written in its own language, and
    one of several functions of one signature, each a few lines, is documented where the signature is."""
    lacking = []
    for name in modules():
        if not name.startswith("attnlib") or "_triton" in name:
            continue
        public = [node for node in tree(name).body if is_public(node)]
        public += [one for node in public if isinstance(node, ast.ClassDef) for one in node.body if is_public(one)]
        for node in public:
            if not ast.get_docstring(node) and not name.endswith("dilated.kernels"):
                lacking.append(f"{name}.{node.name}: no docstring")
            if isinstance(node, ast.FunctionDef):
                given = node.args
                parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
                untyped = [one.arg for one in parameters if not one.annotation and one.arg not in ("self", "cls")]
                lacking += [f"{name}.{node.name}: {one} has no type" for one in untyped]
                lacking += [f"{name}.{node.name}: no type of the result"] * (node.returns is None)
    assert not lacking


def test_every_variant_is_where_the_table_says_under_its_own_name():
    """So that adding one is a file and a line: the table names a module and a constant."""
    assert [*attnlib.VARIANTS] == [name for members in FAMILIES.values() for name in members]
    assert all(one.name == name for name, one in attnlib.VARIANTS.items())
    assert attnlib.family("plain").keys() == FAMILIES["plain"].keys()
    assert {*attnlib.__all__} >= {"VARIANTS", "variant"} and attnlib.__version__
