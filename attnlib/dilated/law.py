"""The memory law of dilated attention: what its largest branch holds, and what the kernel underneath takes for it.

Each branch is one or more calls of a kernel whose own law is known. Which call holds the most depends on its view, so
the law goes through the views. It is that of contiguous inputs `[B, H, N, D]`; on the CPU, of float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from attnlib.core import PHASES, Machine, Shape, UserError
from attnlib.dilated.packing import packing_of
from attnlib.dilated.views import MAX_GRID_AXIS, Branches, View, all_views, can_fold_batch_into_heads
from attnlib.laws import LINEAR, ROWS, Formula, Law, Terms, evaluate

CALL_TERMS = ("results of one call", "copies made for its kernel", "workspace")
PACKED_TERMS = ("packed rows", "results of calls", "workspace")


@dataclass(frozen=True)
class Workspace:
    """The memory of a flash kernel called by itself."""

    forward: Formula  # bytes it takes beyond its results
    backward: Formula
    copies: int = 0  # how many tensors its backward pass copies where rows are not contiguous
    one_row: Workspace | None = None  # of the kernel that takes single rows in its place, where it refuses them
    at_once: bool = False  # whether one call takes all packed rows

    def of(self, rows: int) -> Workspace:
        """That of the kernel that takes segments of so many rows."""
        return self.one_row if rows == 1 and self.one_row else self


WorkspaceOf = Callable[..., Workspace]  # of shape, machine and packing; raises UserError where there is none known


def refusal(ask: Callable[[Shape, Machine], object], shape: Shape, machine: Machine) -> str | None:
    """The text of the UserError that `ask(shape, machine)` raises, or None."""
    try:
        ask(shape, machine)
    except UserError as error:
        return str(error)
    return None


def held_by(kernel: Workspace, view: View, shape: Shape, phase: str, machine: Machine, joins: bool) -> tuple[int, ...]:
    """CALL_TERMS in bytes for a call on one view in `phase`, of which the results are joined to others or not."""
    (b, heads, n), width = view.size, shape.head_dim
    kernel = kernel.of(n)
    part = Shape(b, heads, n, width, shape.dtype, shape.causal)
    linear, rows = part.input_bytes // 3, 4 * b * heads * n
    if phase == "forward":
        joining = 2 * rows * (joins and machine.is_cpu)  # the weights of the plain merge
        return linear + rows, 0, max(evaluate(kernel.forward, part, machine), joining)
    along_b, along_h, along_n, _ = view.strides((shape.heads * shape.seq_len, shape.seq_len, 1))
    # FlashAttention-2 also takes whole heads in segments as a batch of one head
    orders = [((b, n, heads), (along_b, along_n, along_h)), ((heads, b, n), (along_h, along_b, along_n))]
    orders = [(view.size, (along_b, along_h, along_n)), *orders[: kernel.copies if b * heads <= MAX_GRID_AXIS else 1]]
    as_is, *dense = (torch.empty_strided(*order, device="meta").is_contiguous() for order in orders)
    copies = kernel.copies * linear * (not any(dense)) + rows * (not (as_is or any(dense[1:])))
    return 3 * linear, copies, evaluate(kernel.backward, part, machine)


@lru_cache(4096)
def largest(
    phase: str, first: bool, branches: Branches, head_offsets: str, workspace: WorkspaceOf,
    shape: Shape, machine: Machine,
) -> dict[str, int]:  # fmt: skip
    """CALL_TERMS in bytes of the first call, or of that of all others which holds the most; also "whole tensors", made
    for the first call's results unless these are whole, and what is "left" of them when the last is laid out."""
    kernel = workspace(shape, machine)
    if packing_of(shape, branches, head_offsets, machine):
        return dict.fromkeys((*CALL_TERMS, "whole tensors", "left"), 0)
    if can_fold_batch_into_heads(shape.batch, shape.heads, [rate for _, rate in branches], head_offsets):
        shape = replace(shape, batch=1, heads=shape.batch * shape.heads)
    calls = all_views(shape.batch, shape.heads, shape.seq_len, branches, head_offsets)
    views = calls[:1] if first else calls[1:]
    held = max((held_by(kernel, x, shape, phase, machine, not first) for x in views), key=sum, default=(0, 0, 0))
    apart = math.prod(calls[0].size) < shape.batch * shape.heads * shape.seq_len
    tensors = apart * (1 if phase == "forward" else 3)
    left = held[0] // (tensors or 1)  # laid out one by one, and gone then
    return dict(zip(CALL_TERMS, held, strict=True)) | {"whole tensors": tensors * shape.input_bytes // 3, "left": left}


def held_bytes(held: Callable[..., dict[str, int]], term: str, *how_and_where: Any) -> int:
    """One term of `largest` or of `packed_largest`."""
    return held(*how_and_where)[term]


@lru_cache(4096)
def packed_largest(
    phase: str, branches: Branches, head_offsets: str, workspace: WorkspaceOf, shape: Shape, machine: Machine
) -> dict[str, int]:
    """PACKED_TERMS in bytes of the call that holds the most, and "all results" at the end; 0 where none are packed."""
    packing = packing_of(shape, branches, head_offsets, machine)
    kernel = workspace(shape, machine, packing)
    packing = packing.whole if packing and kernel.at_once else packing
    found, row = [dict.fromkeys(PACKED_TERMS, 0)], shape.head_dim * shape.element_size
    inputs, outputs = (3 * row, row + 4) if phase == "forward" else (5 * row + 4, 3 * row)
    for many, rows in packing.groups if packing else ():
        taken = evaluate(getattr(kernel.of(rows), phase), replace(shape, batch=many, heads=1, seq_len=rows), machine)
        held = inputs * sum(packing.sizes), found[-1]["results of calls"] + outputs * many * rows, taken
        found.append(dict(zip(PACKED_TERMS, held, strict=True)))
    return max(found, key=lambda held: sum(held.values())) | {"all results": found[-1]["results of calls"]}


def dilated_law(branches: Branches, head_offsets: str, workspace: WorkspaceOf) -> Law:
    """The law of these branches. Saved are the output and one log-sum-exp per row, whatever runs underneath."""

    def terms(phase: str, first: bool, names: tuple[str, ...] = CALL_TERMS) -> Terms:
        how = phase, first, branches, head_offsets, workspace
        return {name: partial(held_bytes, largest, name, *how) for name in names}

    def packed_terms(phase: str, *names: str) -> Terms:
        return {x: partial(held_bytes, packed_largest, x, phase, branches, head_offsets, workspace) for x in names}

    saved, laid_out, rest = {"output": LINEAR, "log-sum-exp": ROWS}, "its results laid out", ("left", "whole tensors")
    base = {**saved, "upstream gradient": LINEAR}
    (left, output), (left_back, gradients) = (terms(phase, True, rest).values() for phase in PHASES)
    return Law(
        saved=saved,
        forward_peak={
            "first call": terms("forward", True),
            laid_out: {CALL_TERMS[0]: left, "log-sum-exp": ROWS, "output": output},
            "another call": {**saved, **terms("forward", False)},
            "a call on packed rows": packed_terms("forward", *PACKED_TERMS),
            "packed results joined": {**saved, **packed_terms("forward", "all results")},
        },
        backward_peak={
            "first call": {**base, **terms("backward", True)},
            laid_out: {**base, CALL_TERMS[0]: left_back, "dq, dk, dv": gradients},
            "another call": {**base, "dq, dk, dv": 3 * LINEAR, **terms("backward", False)},
            "a call on packed rows": {**base, **packed_terms("backward", *PACKED_TERMS)},
            "packed results joined": {**base, "dq, dk, dv": 3 * LINEAR, **packed_terms("backward", "all results")},
        },
        unknown=partial(refusal, workspace),
    )
