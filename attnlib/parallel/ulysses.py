"""Heads for sequence: each rank gets all rows of some of the heads, runs any attention on them, and gives rows back.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses"."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnlib.core import UserError
from attnlib.dilated.attention import dilated
from attnlib.parallel.layout import Layout, shard_of, whole_of
from attnlib.parallel.link import Link
from attnlib.parallel.ring import rank_inputs


def to_heads(tensors: Sequence[Tensor], layout: Layout, link: Link) -> list[Tensor]:
    """Of tensors `[B, H, n, D]`, this rank's rows of all heads, `[B, H/ranks, N, D]`, all rows of its heads."""
    batch, heads, _, width = tensors[0].shape
    share = heads // link.ranks
    given = [torch.stack([x[:, at : at + share] for x in tensors]) for at in range(0, heads, share)]
    rows = [sum(len(run) for run in runs) for runs in layout]
    sizes = [(len(tensors), batch, share, n, width) for n in rows]
    parts = link.all_to_all("rows of heads", given, [torch.Size(one).numel() for one in sizes])
    return list(whole_of([x.view(one) for x, one in zip(parts, sizes, strict=True)], layout).unbind())


def to_rows(tensors: Sequence[Tensor], layout: Layout, link: Link) -> list[Tensor]:
    """The way back."""
    given = [torch.stack([shard_of(x, layout, rank) for x in tensors]) for rank in range(link.ranks)]
    parts = link.all_to_all("heads of rows", given, [given[link.rank].numel()] * link.ranks)
    return list(torch.cat([x.view(given[link.rank].shape) for x in parts], 2).unbind())


class Exchange(torch.autograd.Function):
    """`to_heads` or `to_rows` of several tensors; each is the other's backward pass."""

    @staticmethod
    def forward(ctx: Any, way: Callable, back: Callable, layout: Layout, link: Link, *tensors: Tensor) -> Any:
        """The tensors, exchanged."""
        ctx.how = way, back, layout, link
        return tuple(way(tensors, layout, link))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Their gradients, back where they belong."""
        way, back, layout, link = ctx.how
        return (None,) * 4 + Exchange.apply(back, way, layout, link, *grads)


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, link: Link, *, causal: bool = False,
    kernel: str | None = None, attention: Callable[..., Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """As `ring.ring_attention`, by two exchanges of heads for rows and, in between, the kernel on whole sequences, or
    another `attention(q, k, v, causal=…)`. It keeps all rows of this rank's heads for the backward pass.

    Raises UserError as that does, and where the ranks do not divide the heads."""
    q, k, v = rank_inputs(q, k, v, layout, link, causal)
    if q.shape[1] % link.ranks:
        raise UserError(f"{link.ranks} ranks cannot share {q.shape[1]} heads: ulysses_attention gives each as many")
    of_heads = Exchange.apply(to_heads, to_rows, layout, link, q, k, v)
    how = {"segment_lengths": (sum(len(run) for runs in layout for run in runs),), "dilation_rates": (1,)}
    o = attention(*of_heads, causal=causal) if attention else dilated(*of_heads, **how, causal=causal, kernel=kernel)
    return Exchange.apply(to_rows, to_heads, layout, link, o)[0]
