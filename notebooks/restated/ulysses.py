"""Heads for sequence: each rank gets all rows of some of the heads, runs any attention on them, and gives rows back.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses"."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnlib.core import UserError
from attnlib.dilated.attention import dilated
from attnlib.parallel.layout import Layout, shard_of, whole_of
from attnlib.parallel.link import Link
from attnlib.parallel.ring import rank_inputs


def all_to_all(link: Link, what: str, given: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Send each rank its tensor, and return what each has sent, of these sizes."""
    link.sent[what] += sum(x.nbytes for rank, x in enumerate(given) if rank != link.rank)
    flat, counts = torch.cat([x.flatten() for x in given]), [torch.Size(one).numel() for one in sizes]
    received = flat.new_empty(sum(counts))
    dist.all_to_all_single(received, flat, counts, [x.numel() for x in given], group=link.group)
    return [x.view(*one) for x, one in zip(received.split_with_sizes(counts), sizes, strict=True)]


def to_heads(tensors: Sequence[Tensor], layout: Layout, link: Link) -> list[Tensor]:
    """Of tensors `[B, H, n, D]`, this rank's rows of all heads, `[B, H/ranks, N, D]`, all rows of its heads."""
    batch, heads, _, width = tensors[0].shape
    share = heads // link.ranks
    given = [torch.stack([x[:, at : at + share] for x in tensors]) for at in range(0, heads, share)]
    sizes = [(len(tensors), batch, share, sum(map(len, runs)), width) for runs in layout]
    return list(whole_of(all_to_all(link, "rows of heads", given, sizes), layout).unbind())


def to_rows(tensors: Sequence[Tensor], layout: Layout, link: Link) -> list[Tensor]:
    """The way back."""
    given = [torch.stack([shard_of(x, layout, rank) for x in tensors]) for rank in range(link.ranks)]
    parts = all_to_all(link, "heads of rows", given, [given[link.rank].shape] * link.ranks)
    return list(torch.cat(parts, 2).unbind())


class Exchange(torch.autograd.Function):
    """`to_heads` or `to_rows` of several tensors; each is the other's backward pass."""

    @staticmethod
    def forward(ctx: Any, way: Callable, back: Callable, layout: Layout, link: Link, *tensors: Tensor) -> Any:
        """The tensors, exchanged."""
        ctx.how = back, way, layout, link
        return tuple(way(tensors, layout, link))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Their gradients, back where they belong."""
        return (None,) * 4 + Exchange.apply(*ctx.how, *grads)


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, link: Link, *, causal: bool = False, kernel: str | None = None
) -> Tensor:
    """As `ring.ring_attention`, by an exchange of heads for rows, a kernel on whole sequences, and the way back. All
    rows of this rank's heads are kept for the backward pass. Raises UserError also where ranks do not divide heads."""
    *inputs, flash = rank_inputs(q, k, v, layout, link, causal, kernel)
    if q.shape[1] % link.ranks:
        raise UserError(f"{link.ranks} ranks cannot share {q.shape[1]} heads equally, as ulysses_attention wants")
    of_heads = Exchange.apply(to_heads, to_rows, layout, link, *inputs)
    o = dilated(*of_heads, segment_lengths=(2**62,), dilation_rates=(1,), causal=causal, kernel=flash.name)
    return Exchange.apply(to_rows, to_heads, layout, link, o)[0]
