"""Exact attention over a sequence that several processes share: keys and values of others come while rows are computed.

What a rank computes with the rows of one other is a part of attention. Parts are merged by their log-sum-exp, and each
part's gradients are those of the kernel's own backward pass with the merged output and log-sum-exp, as in dilated
attention. Each rank sends its own rows straight to whoever sees them: nothing is passed on. In the backward pass it
computes one part of its own rows while the first keys come, the other while the last gradients go home.

Tensors are `[B, H, n, D]`, n the rows of this rank. Sources: Liu et al. 2023, "Ring Attention with Blockwise
Transformers for Near-Infinite Context"; the zigzag is that of zhuzilin/ring-flash-attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnlib.calling import checked, differentiable
from attnlib.core import Machine, Shape, UserError
from attnlib.dilated.attention import in_rows
from attnlib.dilated.kernels import Kernel, chosen
from attnlib.dilated.merging import add, merge
from attnlib.dilated.views import View, all_views, scatter_into_zeros
from attnlib.parallel.layout import Layout, Place, place_of
from attnlib.parallel.link import Link, Transfer

Part = tuple[View, View, bool]  # queries, keys, and whether the mask is causal among them


def kernel_for(q: Tensor, causal: bool, name: str | None) -> Kernel:
    """The kernel called `name`, or the first that takes tensors like q. Raises UserError as `kernels.chosen` does."""
    shape = Shape(*q.shape, str(q.dtype).removeprefix("torch."), causal)
    return chosen(name, shape, Machine.of(q.device))


def run_of(batch: int, heads: int, start: int, stop: int) -> View:
    """Rows from `start` to `stop` of all heads."""
    return View((batch, heads, stop - start), (0, 0, start), ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


def own_parts(place: Place, batch: int, heads: int) -> tuple[list[Part], list[Part]]:
    """A rank's own rows in two parts of equal work, for the beginning and the end of the backward pass: under a causal
    mask the two triangles on the diagonal, and the square below them."""
    rows = place.rows[place.at]
    n, half = sum(rows), rows[0] if len(rows) > 1 else -(-sum(rows) // 2)
    if not place.steps or half == n:
        every = run_of(batch, heads, 0, n)
        return [(every, every, place.causal)], []
    every, front, back = (run_of(batch, heads, *ends) for ends in ((0, n), (0, half), (half, n)))
    if not place.causal:
        return [(every, front, False)], [(every, back, False)]
    return [(view, view, True) for view in all_views(batch, heads, n, ((half, 1),), "modulo")], [(back, front, False)]


class Ring:
    """One pass of a rank: the first exchange is under way once it is made."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, place: Place, link: Link, kernel: Kernel) -> None:
        self.q, self.k, self.v = in_rows(q), k.contiguous(), v.contiguous()
        self.place, self.link, self.kernel = place, link, kernel
        self.coming = self.fetch(1)

    def fetch(self, step: int) -> Transfer:
        """Begin the exchange of keys and values of a step, if there is one."""
        place, give, take = self.place, None, None
        if step in place.steps:
            source, target = place.before(step), place.after(step)
            give = (place.members[target], (self.k, self.v)) if place.seen(target, place.at) else None
            take = (place.members[source], self.rows_of(source)) if place.seen(place.at, source) else None
        return self.link.exchange("keys and values", 2 * place.name, give, take)

    def rows_of(self, source: int) -> tuple[Tensor, ...]:
        """Room for the keys and values of a member."""
        batch, heads, _, width = self.k.shape
        return tuple(self.k.new_empty(batch, heads, sum(self.place.rows[source]), width) for _ in range(2))

    def gathered(self, x: Tensor) -> Tensor:
        """x to add to, in float32 where more than two roundings would add up."""
        return x.float() if len(self.place.members) > 2 else x

    def forward(self) -> tuple[Tensor, Tensor]:
        """o and its log-sum-exp `[B, H, n]`."""
        place, (o, lse) = self.place, self.kernel.forward(self.q, self.k, self.v, self.place.causal)
        o, lse = self.gathered(o), lse.contiguous()
        for step in place.steps:
            theirs = self.coming.wait()
            self.coming = self.fetch(step + 1)
            if theirs:
                first, last = place.seen(place.at, place.before(step))
                parts = self.kernel.forward(self.q[:, :, first:], *(x[:, :, :last] for x in theirs), False)
                merge(o[:, :, first:], lse[:, :, first:], *parts)
                del parts
        return o.to(self.q.dtype), lse

    def backward(self, do: Tensor, o: Tensor, lse: Tensor) -> list[Tensor]:
        """dq, dk, dv, with the merged o and log-sum-exp."""
        place, mine = self.place, (in_rows(do), self.q, in_rows(o), lse.contiguous())
        early, late = own_parts(place, *self.q.shape[:2])
        grads: list[Tensor] = []
        for part in early:
            self.own(part, mine, grads)
        grads = [self.gathered(x) for x in grads]
        going = Transfer([], (), [])
        for step in place.steps:
            theirs = self.coming.wait()
            self.coming = self.fetch(step + 1)
            parts = self.with_theirs(step, theirs, mine, grads) if theirs else []
            del theirs
            self.bring_home(step - 1, going, grads)
            going = self.give_back(step, parts)
            del parts
        for part in late:
            self.own(part, mine, grads)
        self.bring_home(len(place.members) - 1, going, grads)
        return [x.to(self.q.dtype) for x in grads]

    def own(self, part: Part, mine: Sequence[Tensor], grads: list[Tensor]) -> None:
        """Add the gradients of a part of this rank's own rows, or begin with them."""
        queries, keys, causal = part
        do, q, o, lse = (queries.of(x) for x in mine)
        found = list(self.kernel.backward(do, q, keys.of(self.k), keys.of(self.v), o, lse, causal))
        views = queries, keys, keys
        if grads:
            add([queries.of(grads[0])], found[:1])
            add([keys.of(x) for x in grads[1:]], found[1:])
        for view in views if not grads else ():
            grads.append(scatter_into_zeros(found.pop(0), view, self.q))

    def with_theirs(
        self, step: int, theirs: Sequence[Tensor], mine: Sequence[Tensor], grads: list[Tensor]
    ) -> list[Tensor]:
        """dk, dv of another's rows; dq is added."""
        first, last = self.place.seen(self.place.at, self.place.before(step))
        (do, q, o, lse), (k, v) = (x[:, :, first:] for x in mine), (x[:, :, :last] for x in theirs)
        dq, *others = self.kernel.backward(do, q, k, v, o, lse, False)
        add([grads[0][:, :, first:]], [dq])
        return [x.contiguous() for x in others]

    def give_back(self, step: int, parts: Sequence[Tensor]) -> Transfer:
        """Begin to send home gradients of another's rows, and to receive those of this rank's own."""
        place, source, target, take = self.place, self.place.before(step), self.place.after(step), None
        give = (place.members[source], parts) if parts else None
        if seen := place.seen(target, place.at):
            size = (*self.k.shape[:2], seen[1], self.k.shape[3])
            take = place.members[target], tuple(self.k.new_empty(size) for _ in range(2))
        return self.link.exchange("gradients going home", 2 * place.name + 1, give, take)

    def bring_home(self, step: int, going: Transfer, grads: list[Tensor]) -> None:
        """Add what another has found for this rank's own rows in a step, when it is there."""
        if received := going.wait():
            _, last = self.place.seen(self.place.after(step), self.place.at)
            add([x[:, :, :last] for x in grads[1:]], received)


def ring_forward(q: Tensor, k: Tensor, v: Tensor, *how: Place | Link | Kernel) -> tuple[Tensor, Tensor]:
    """o and its log-sum-exp, of a rank."""
    return Ring(q, k, v, *how).forward()


def ring_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *how: object) -> list[Tensor]:
    """dq, dk, dv, of a rank."""
    return Ring(q, k, v, *how).backward(do, o, lse)


RING = differentiable("ring attention", ring_forward, ring_backward)


def rank_inputs(q: Tensor, k: Tensor, v: Tensor, layout: Layout, link: Link, causal: bool) -> tuple[Tensor, ...]:
    """q, k, v, `checked`. Raises UserError where the layout has other ranks or rows than there are."""
    q, k, v = checked(q, k, v, causal)
    if len(layout) != link.ranks:
        raise UserError(f"the layout is of {len(layout)} ranks, the group has {link.ranks}")
    if q.shape[2] != (rows := sum(len(run) for run in layout[link.rank])):
        raise UserError(f"rank {link.rank} holds {rows} rows by the layout, not {q.shape[2]}")
    return q, k, v


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, link: Link, *, causal: bool = False, kernel: str | None = None
) -> Tensor:
    """o `[B, H, n, D]` of the n rows that this rank holds by the layout (`layout.shards`; zigzag where causal), over
    all rows that the ranks of the link hold together. Every rank calls it, and its backward pass.

    q, k, v: this rank's rows, of one shape and dtype on all ranks but for n. kernel: which one of dilated.kernels runs
    underneath, by default the first that takes such inputs. Saved are the output and one float32 per row and head.
    Raises UserError for tensors or kernels that cannot be, and for what is not this rank's shard."""
    q, k, v = rank_inputs(q, k, v, layout, link, causal)
    return RING.apply(q, k, v, place_of(layout, link.rank, causal), link, kernel_for(q, causal, kernel))[0]
