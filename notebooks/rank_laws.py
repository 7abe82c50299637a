"""What a rank sends, keeps, and holds at most: formulas in the symbols of `laws`, where N is how many rows it has."""

import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any

import sympy

from attnlib.core import Machine, Shape
from attnlib.dilated.law import Workspace, dilated_law, held_by
from attnlib.dilated.views import View
from attnlib.laws import LINEAR, LINEAR32, ROWS, B, D, Formula, H, Law, N, Terms, e, g
from attnlib.parallel.layout import Layout, Place
from attnlib.variants.sdpa_laws import COPIED, KS

PHASED = dict[str, Terms]  # {phase: terms}
ROW = 2 * B * D * e  # a row of K and one of V, of one head in all batch entries


def ring_sent(place: Place, heads: int | sympy.Symbol = H) -> PHASED:
    """Bytes that a rank sends in a ring: its keys and values to whoever sees them, in either phase, and in the backward
    pass their gradients to those whose rows it sees."""
    others = [one for one in range(len(place.members)) if one != place.at]
    rows = sum(place.runs[place.at]) * sum(place.seen(one, place.at) is not None for one in others)
    back = sum((place.seen(place.at, one) or (0, 0))[1] for one in others)
    own = {"keys and values": ROW * heads * rows}
    return {"forward": own, "backward": {**own, "gradients": ROW * heads * back}}


def branches_sent(shared: Iterable[Any]) -> PHASED:
    """The same of dilated attention, of the segments that a rank shares (see `shared.plan`)."""
    found: PHASED = {"forward": {}, "backward": {}}
    for (phase, terms), one in itertools.product(found.items(), shared):
        for what, nbytes in ring_sent(one.place, len(one.heads))[phase].items():
            terms[what] = terms.get(what, 0) + nbytes
    return found


def ulysses_sent(layout: Layout, rank: int) -> PHASED:
    """Bytes that a rank sends where heads are exchanged for rows: q, k, v out and o home, and back."""
    rows, ranks = [sum(map(len, runs)) for runs in layout], len(layout)
    out, home = (ROW * H * sympy.Rational(x, 2 * ranks) for x in (rows[rank] * (ranks - 1), sum(rows) - rows[rank]))
    times = {"forward": (3, 1), "backward": (1, 3)}
    return {phase: {"rows of heads": a * out, "heads of rows": b * home} for phase, (a, b) in times.items()}


def own_rows(kernel: Workspace, phase: str, parts: int, shape: Shape, machine: Machine) -> int:
    """What a rank holds when it attends to its own rows, in one or two parts, K and V of others aside."""
    law = dilated_law(((shape.seq_len // parts, 1),), "modulo", lambda *_: kernel)
    return law.bytes(f"{phase}_peak", shape, machine)


def copied(kernel: Workspace, share: sympy.Rational, shape: Shape, machine: Machine) -> int:
    """What the kernel's backward pass copies of the last rows, a share of all."""
    rows = int(share * shape.seq_len)
    view = View((shape.batch, shape.heads, rows), (0, 0, 0), ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    return held_by(kernel, view, shape, "backward", machine, True)[1]


def ring_law(ranks: int, rank: int, causal: bool, kernel: Workspace) -> Law:
    """The memory of a rank in zigzag over a kernel, its two runs equally long: output and log-sum-exp are saved; beside
    them are keys and values of another and those of the next, and what has been found for them goes home. Of contiguous
    tensors, on the CPU in float32."""
    half, sums, last = sympy.Rational(1, 2), LINEAR32 if ranks > 2 else LINEAR, ranks - 1
    saved, keys = {"output": LINEAR, "log-sum-exp": ROWS}, sympy.Symbol("M")
    base = {**saved, "upstream gradient": LINEAR, "dq, dk, dv": 3 * sums}
    coming = [2 * LINEAR * ((step > 0) + (step < last)) for step in range(ranks)]
    # of a step: which share of its queries sees which share of another's keys, and which share of its own others see
    shares = [
        (1, half) if causal and 0 < step <= rank else (half if causal and step else 1, 1) for step in range(ranks)
    ]
    own_seen = [half if causal and 0 < step <= last - rank else 1 for step in range(ranks)]
    ways = [0, *(2 * LINEAR * (k + seen) for (_, k), seen in zip(shares[1:], own_seen[1:], strict=True))]

    def taken(formula: Formula, q: sympy.Expr, k: sympy.Expr) -> Formula:
        return sympy.sympify(formula).xreplace({KS: keys}).subs(N, q * N).subs(keys, sympy.Min(k * N, 512))

    def held(q: sympy.Expr, k: sympy.Expr) -> Terms:
        part = {"results of one call": (q + 2 * k) * LINEAR, "copies": partial(copied, kernel, q)}
        return {**base, **part, "workspace": taken(kernel.backward, q, k)}

    own = partial(own_rows, kernel, "forward", 1), partial(own_rows, kernel, "backward", 1 + (ranks > 1))
    forward, backward = ({"own rows": {"coming": coming[0], "all else": one}} for one in own)
    for step, (q, k) in enumerate(shares[1:], 1):
        joining = sympy.Max(taken(kernel.forward, q, k), 2 * (1 - g) * q * ROWS)
        part = {"results of one call": q * (LINEAR + ROWS), "workspace": joining}
        forward[f"step {step}"] = {"output": sums, "log-sum-exp": ROWS, "coming": coming[step], **part}
        other = {"coming": coming[step], "going home": ways[step - 1]}
        backward[f"step {step}"] = {**held(q, k), **other}
        # dk and dv are sent in one piece: a kernel that lays out [b, n, h, D] has them copied, one after the other
        sent = {"dk, dv of another": 2 * k * LINEAR, "copies": k * LINEAR * COPIED * int(kernel.copies > 0)}
        backward[f"step {step}, sent"] = {**base, **other, **sent}
    if ranks > 1:
        backward["own rows, one half with the other"] = {**held(half, half), "going home": ways[-1]}
    return Law(saved, forward, backward)
