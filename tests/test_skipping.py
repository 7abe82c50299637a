"""A cell that needs rows which a device lacks is left out, and so are those that need it; no other is."""

import ast

import pytest

from report import skipping
from report.skipping import NotMeasured, Skipping, names, plain


@pytest.fixture
def execute(monkeypatch):
    """Execute cells as a notebook does that has a `run`; what they show is kept in `execute.shown`."""
    shown, noted = [], []
    rewrite = Skipping(lambda text: bool(noted.append(text) if execute.built else None) or execute.built)
    monkeypatch.setattr(skipping, "display", lambda value: shown.append(getattr(value, "data", value)))

    class Run:
        @staticmethod
        def rows(there):
            if not there:
                raise NotMeasured("not here")
            return 3

    space = {"run": Run, "_skipping": rewrite}

    def execute(source):
        exec(compile(rewrite.visit(ast.parse(source)), "cell", "exec"), space)
        return space

    execute.shown, execute.missing, execute.noted, execute.built = shown, rewrite.missing, noted, False
    return execute


def test_a_cell_that_fails_is_noted_in_a_build_and_raises_by_hand(execute):
    """What needs it is left out, what does not goes on."""
    with pytest.raises(KeyError):
        execute("one = {}['<two>']")
    execute.built = True
    execute("one = {}['<two>']")
    execute("one + 1")
    assert execute("three = 3")["three"] == 3
    why = "This part failed: KeyError: '<two>'"
    assert execute.noted == [why] and execute.shown == [f"::: notice\n{plain(why)}\n:::"], "as it is, not as Markdown"


def test_what_depends_on_missing_rows_is_left_out_and_nothing_else(execute):
    notice = "::: notice\nnot here\n:::"
    execute("size = 2")
    execute("rows = run.rows(False)\nother = 1")
    execute("more = rows + size")
    execute("def table():\n    return more")
    execute("table()")
    assert execute.shown == [notice], "once, as long as nothing comes between"
    space = execute("size = 5\nrun.rows(True) + size")
    execute("table()")
    assert execute.shown == [notice, 8, notice] and not {"rows", "other", "more", "table"} & {*space}


def test_a_name_that_a_cell_makes_itself_is_not_missing(execute):
    execute("row = run.rows(False)")
    execute("for row in range(3):\n    last = row\n[row for row in range(2)]")
    assert execute("double = 2 * last")["double"] == 4


def test_a_cell_that_is_run_again_with_success_is_there_again(execute):
    execute("there = False")
    execute("rows = run.rows(there)")
    execute("there = True")
    execute("rows = run.rows(there)")
    assert execute("twice = 2 * rows")["twice"] == 6


def test_other_errors_are_errors(execute):
    with pytest.raises(ZeroDivisionError):
        execute("run.rows(True) / 0")


def test_names_are_those_that_a_cell_needs_from_before():
    code = "import os\nx = y = a\nf = lambda z: z + y + b\n[i for i in c]\nrows = rows + 1"
    assert names(compile(code, "cell", "exec")) == ({"a", "b", "c", "rows"}, {"os", "x", "y", "f", "rows"})
