"""Dilated attention as its paper defines it, to be read and tested against: branches, the reference, who sees whom.

Branch (w, r) cuts the sequence into segments of w positions. Of each, head j keeps the rows s_j, s_j + r, s_j + 2r, …
and attends within them; the branches are mixed, for each query and head, by their softmax denominators.
Source: Ding et al. 2023, "LongNet: Scaling Transformers to 1,000,000,000 Tokens", sections 2.2 and 2.3."""

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attnlib.calling import checked, one_line, wide, without_autocast
from attnlib.core import Shape, UserError
from attnlib.dilated import views
from attnlib.dilated.views import Branches


def integers(name: str, values: Any) -> tuple[int, ...]:
    """`values` as positive integers. Raises UserError, in one line, if they are none, or have no order."""
    try:
        given = None if isinstance(values, (str, bytes, set, frozenset, dict)) else list(values)
        found = tuple(operator.index(x) for x in given)
    except (TypeError, RuntimeError):  # the latter from a tensor without data
        raise UserError(f"{name} must be a list of positive integers, not {one_line(values)}") from None
    if bad := [x for x, n in zip(given, found, strict=True) if isinstance(x, bool) or n < 1]:
        raise UserError(f"{name} must be positive integers, not {one_line(bad[0])}")
    return found


def branches_of(segment_lengths: Any, dilation_rates: Any, head_offsets: Any) -> Branches:
    """The branches `(w, r)` in the order given. Raises UserError, in one line, for lists that are empty, unequal or not
    of positive integers, a rate above its segment, or another head_offsets."""
    widths, rates = integers("segment_lengths", segment_lengths), integers("dilation_rates", dilation_rates)
    if not widths or len(widths) != len(rates):
        raise UserError("segment_lengths and dilation_rates must be lists of the same length, and not empty")
    branches = tuple(zip(widths, rates, strict=True))
    for width, rate in branches:
        if rate > width:
            raise UserError(f"a dilation rate of {rate} exceeds its segment of {width}")
    if not isinstance(head_offsets, str) or head_offsets not in views.HEAD_OFFSETS:
        raise UserError(f"head_offsets must be one of {', '.join(views.HEAD_OFFSETS)}, not {one_line(head_offsets)}")
    return branches


def dilated_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    segment_lengths: Iterable[int], dilation_rates: Iterable[int], causal: bool = False, head_offsets: str = "modulo",
) -> Tensor:  # fmt: skip
    """o `[B, H, N, D]`, as the paper defines it, one segment of one head at a time: to be read, on any device. Its
    parameters are those of `dilated`. Raises UserError for what `checked` and `branches_of` refuse."""
    q, k, v = checked(q, k, v, causal)
    branches = branches_of(segment_lengths, dilation_rates, head_offsets)
    (heads, seq_len), parts = q.shape[1:3], []
    entries = torch.arange(q.shape[0], device=q.device)[:, None]
    with without_autocast(q):
        for width, rate in branches:
            o, lse = torch.zeros_like(v), wide(torch.full_like(q[..., 0], -math.inf))
            for head in range(heads):
                for start in range(0, seq_len, width):
                    first = start + views.offset(head, heads, rate, head_offsets)
                    end = max(first, min(start + width, seq_len))
                    kept = torch.arange(first, end, min(rate, seq_len), device=q.device)
                    q_kept, k_kept, v_kept = (x[:, head, kept] for x in (q, k, v))
                    scores = wide(q_kept @ k_kept.mT * q.shape[-1] ** -0.5)
                    if causal:
                        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
                    where = entries, torch.tensor(head, device=q.device), kept
                    o = o.index_put(where, torch.softmax(scores, -1).to(v.dtype) @ v_kept)
                    lse = lse.index_put(where, torch.logsumexp(scores, -1))
            parts.append((o, lse))
        o, lse = (torch.stack(part) for part in zip(*parts, strict=True))
        seen = lse.amax(0) > -math.inf
        weights = torch.softmax(torch.where(seen, lse, 0.0), dim=0) * seen
        return (weights.to(v.dtype).unsqueeze(-1) * o).sum(0)


def dilated_reach(
    shape: Shape, *, segment_lengths: Iterable[int], dilation_rates: Iterable[int], head_offsets: str = "modulo"
) -> Tensor:
    """`[H, N, N]`: in how many branches query i sees key j."""
    heads, at = shape.heads, torch.arange(shape.seq_len)
    counts = torch.zeros(heads, shape.seq_len, shape.seq_len, dtype=torch.float64)
    for width, rate in zip(segment_lengths, dilation_rates, strict=True):
        together = (at[:, None] // width) == (at // width)
        for head in range(heads):
            after = at % width - views.offset(head, heads, rate, head_offsets)
            kept = (after >= 0) & (after % rate == 0)
            counts[head] += together & kept[:, None] & kept
    return counts.tril() if shape.causal else counts
