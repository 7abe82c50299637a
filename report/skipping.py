"""Cells that need rows which a device lacks are left out, with a word in their place, and so are those that need them.

So data that are older than an experiment still make a report, and what needs a GPU may stand in a notebook that runs on
a CPU. A Run rewrites each cell before it is executed. In a build a cell that fails is left out as well, and noted."""

import ast
import dis
import re
from collections.abc import Callable
from textwrap import shorten
from types import CodeType

from IPython import get_ipython
from IPython.display import Markdown, display

from attnlib.core import UserError

LOADS, STORES = {"LOAD_NAME", "LOAD_GLOBAL"}, {"STORE_NAME", "STORE_GLOBAL"}


class NotMeasured(UserError):
    """What a cell asks for is not to be had on this device; the text says what, for the reader."""


def plain(text: str) -> str:
    """Any text as Markdown of one line that shows it as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def names(code: CodeType) -> tuple[set[str], set[str]]:
    """The names that a cell needs from those before it, and those that it makes."""
    needed, made = set(), set()
    for step in dis.get_instructions(code):
        if step.opname in LOADS and step.argval not in made:
            needed.add(step.argval)
        elif step.opname in STORES:
            made.add(step.argval)
        elif isinstance(step.argval, CodeType):  # a function of the cell's own
            needed |= names(step.argval)[0] - made
    return needed, made


class Skipping(ast.NodeTransformer):
    """What was left out so far; as one of IPython's `ast_transformers`, it rewrites each cell."""

    def __init__(self, note: Callable[[str], bool]):
        self.note = note  # takes the text of an error: whether it is noted for a build, or else to be raised
        self.missing: dict[str, str] = {}  # the names that cells left out would have made, and why they were
        self.told = ""  # the reason that was told last, if every cell since was left out for it

    def install(self):
        """Rewrite all cells that follow, where this runs in a notebook, in place of an earlier Run's."""
        if shell := get_ipython():
            shell.ast_transformers[:] = [one for one in shell.ast_transformers if not isinstance(one, Skipping)]
            shell.ast_transformers.append(self)
            shell.user_ns["_skipping"] = self

    def visit(self, tree: ast.Module) -> ast.Module:
        """The cell, in a form that may be left out; nothing, if it needs what was left out."""
        needed, made = names(compile(tree, "cell", "exec"))
        if lacking := sorted(needed & {*self.missing}):
            why = self.missing[lacking[0]]
            self.missing |= dict.fromkeys(made, why)
            if why != self.told:
                self.tell(why)
            return ast.Module([], [])
        self.told = ""
        self.missing = {name: why for name, why in self.missing.items() if name not in made}
        if not tree.body:
            return tree
        if isinstance(last := tree.body[-1], ast.Expr):
            last.value = ast.Call(ast.parse("_skipping.show", mode="eval").body, [last.value], [])
        frame = ast.parse(f"try:\n    pass\nexcept Exception as error:\n    _skipping.left_out(error, {sorted(made)})")
        frame.body[0].body = tree.body
        return ast.fix_missing_locations(frame)

    def show(self, value: object):
        """What a cell ends with, shown as it would be; the outcome of an observation has been told."""
        if value is not None and not isinstance(value, bool):
            display(value)

    def left_out(self, error: Exception, made: list[str]):
        """Say why, in place of what the cell makes. Raises an error as it came where there is no build to note it."""
        why = " ".join(str(error).split())
        if not isinstance(error, NotMeasured):
            why = shorten(f"This part failed: {type(error).__name__}: {why}", 300)
            if not self.note(why):
                raise error
            why = plain(why)
        self.missing |= dict.fromkeys(made, why)
        self.tell(why)

    def tell(self, why: str):
        """Say why something is missing, in its place."""
        self.told = why
        display(Markdown(f"::: notice\n{why}\n:::"))
