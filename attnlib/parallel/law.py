"""What a rank sends, keeps and holds at most: formulas in the symbols of `laws`, where N is how many rows it has.

Memory is that of contiguous tensors, on the CPU in float32; it depends on who sees whom, so that the law goes through
the steps of a ring."""

from collections.abc import Iterator
from functools import lru_cache, partial

import sympy

from attnlib.core import DTYPES, Machine, Shape
from attnlib.dilated.law import WorkspaceOf, held_by, refusal
from attnlib.laws import LINEAR, ROWS, B, D, Formula, H, Law, Terms, e, evaluate
from attnlib.parallel.branches import Shared
from attnlib.parallel.layout import Layout, Place
from attnlib.parallel.ring import own_parts, stretch
from attnlib.variants.sdpa_laws import KS

ROW = B * D * e  # one row of one head, in all batch entries
HELD = ("output", "log-sum-exp", "upstream gradient", "dq, dk, dv", "keys and values of others")
HELD = (*HELD, "gradients on their way", "results of one call", "copies made for its kernel", "workspace")


def ring_sent(place: Place, heads: int | sympy.Expr = H) -> dict[str, Terms]:
    """Bytes that a rank sends in each phase, `{phase: terms}`."""
    others = [one for one in range(len(place.members)) if one != place.at]
    rows = sum(place.runs[place.at]) * sum(place.seen(one, place.at) is not None for one in others)
    back = sum((place.seen(place.at, one) or (0, 0))[1] for one in others)
    own = {"keys and values": 2 * ROW * heads * rows}
    return {"forward": own, "backward": {**own, "gradients": 2 * ROW * heads * back}}


def branches_sent(shared: list[Shared]) -> dict[str, Terms]:
    """The same of `dilated_attention`, of the segments that a rank shares (see `branches.plan`)."""
    each = [ring_sent(one.place, len(one.heads)) for one in shared]
    names = {"forward": ("keys and values",), "backward": ("keys and values", "gradients")}
    return {phase: {x: sum((one[phase][x] for one in each), sympy.S(0)) for x in own} for phase, own in names.items()}


def ulysses_sent(layout: Layout, rank: int) -> dict[str, Terms]:
    """The same of `ulysses_attention`: q, k, v one way and o the other, and back."""
    ranks, rows = len(layout), [sum(map(len, runs)) for runs in layout]
    out, home = (ROW * H * sympy.Rational(x, ranks) for x in (rows[rank] * (ranks - 1), sum(rows) - rows[rank]))
    return {
        phase: {"rows of heads": (4 - home_times) * out, "heads of rows": home_times * home}
        for phase, home_times in (("forward", 1), ("backward", 3))
    }


def moments(phase: str, place: Place, workspace: WorkspaceOf, shape: Shape, machine: Machine) -> Iterator[list[int]]:
    """What is HELD at each moment that may be the fullest, in bytes, from the last on the left out."""
    kernel, (batch, heads, n, width) = workspace(shape, machine), (shape.batch, shape.heads, shape.seq_len, shape.head_dim)
    row, lse, ranks = batch * heads * width * shape.element_size, 4 * batch * heads, len(place.members)
    wide = max(4, shape.element_size) if ranks > 2 else shape.element_size
    sums = n * row // shape.element_size * wide  # one tensor to be added to
    seen = {step: place.seen(place.at, place.partners(step)[0]) for step in range(ranks)}

    def coming(step: int) -> int:
        return 2 * row * sum(place.runs[place.partners(step)[0]]) if seen.get(step) else 0

    def under_way(step: int) -> int:
        back = place.seen(place.partners(step)[1], place.at) or (0, 0)
        return 2 * row * ((seen[step] or (0, 0))[1] + back[1]) if step else 0

    def taken(queries: int, keys: int) -> int:
        formula = getattr(kernel.of(queries), phase)
        if isinstance(formula, sympy.Basic):
            formula = formula.xreplace({KS: sympy.Min(keys, 512)})
        return evaluate(formula, Shape(batch, heads, queries, width, shape.dtype, shape.causal), machine)

    def call(view, keys, joins=True):
        m, all_rows = view.size[2], view.size[0] * view.size[1] * view.size[2] // (batch * heads)
        _, copies, _ = held_by(kernel, view, shape, phase, machine, joins)
        return all_rows, copies

    if phase == "forward":
        yield [n * row, lse * n, 0, 0, coming(1), 0, 0, 0, taken(n, n)]
        for step in range(1, ranks):
            first, last = seen[step] or (n, 0)
            m = n - first
            if last:
                held = max(taken(m, last), 2 * lse * m * machine.is_cpu)
                yield [sums, lse * n, 0, 0, coming(step) + coming(step + 1), 0, m * (row + lse), 0, held]
        if wide > shape.element_size:
            yield [n * row + sums, lse * n, 0, 0, coming(1), 0, 0, 0, 0]
        return
    saved, (early, late) = [n * row, lse * n, n * row], own_parts(place, batch, heads)
    ...
