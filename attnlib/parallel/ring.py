"""Exact attention over a sequence that several ranks share: keys and values of others come while rows are computed.

Parts are merged and differentiated as in dilated attention; each rank sends its rows straight to whoever sees them.
Sources: Liu et al. 2023, "Ring Attention with Blockwise Transformers"; for zigzag, zhuzilin/ring-flash-attention."""

from collections.abc import Hashable, Iterator, Sequence

from torch import Tensor

from attnlib.calling import checked, differentiable
from attnlib.core import Machine, Shape, UserError
from attnlib.dilated.attention import dilated_backward, dilated_forward, in_rows
from attnlib.dilated.kernels import Kernel, chosen
from attnlib.dilated.merging import add, merge
from attnlib.parallel.layout import Layout, Place
from attnlib.parallel.link import Link


def space_for(like: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Tensors for so many rows to come in."""
    return [x.new_empty(*x.shape[:2], rows, x.shape[3]) for x in like] if rows else []


def keys_and_values(own: list[Tensor], place: Place, link: Link) -> Iterator[tuple[int, int, list[Tensor]]]:
    """Each step, from which row on this rank sees keys and values, and these, if any: its own, then those of others. By
    then the next are under way, and whoever needs this rank's gets them."""
    came: Sequence[Tensor] = own
    for step in range(len(place.members)):
        source, target = place.partners(step + 1)
        more = step + 1 < len(place.members)
        give = place.members[target], own if more and place.seen(target, place.at) else []
        take = place.members[source], space_for(own, more and place.seen(place.at, source) and sum(place.runs[source]))
        wait = link.begin("keys and values", 2 * place.name, give, take)
        first, last = place.seen(place.at, place.partners(step)[0]) or (0, 0)
        yield step, first, [x[:, :, :last] for x in came]
        came = wait()


def ring_forward(q: Tensor, k: Tensor, v: Tensor, place: Place, link: Link, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """o and its log-sum-exp `[B, H, n]`, of a rank."""
    q, own = in_rows(q), [k.contiguous(), v.contiguous()]
    for step, first, theirs in keys_and_values(own, place, link):
        if step == 0:
            how: tuple = (q.shape[2],), (1,), place.causal, "modulo", kernel.name * (q.shape[2] > 1)
            o, lse = place.widened(dilated_forward(q, *theirs, *how))
        elif theirs:
            merge(o[:, :, first:], lse[:, :, first:], *kernel.forward(q[:, :, first:], *theirs, False))
        del theirs  # or they are there while the next but one are laid out
    return o.to(q.dtype), lse


def ring_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, place: Place, link: Link, kernel: Kernel
) -> list[Tensor]:
    """dq, dk, dv, of a rank, with the merged o and log-sum-exp."""
    mine, own, wait = [in_rows(do), in_rows(q), in_rows(o), lse.contiguous()], [k.contiguous(), v.contiguous()], None

    def part_of(queries: slice, keys: Sequence[Tensor]) -> list[Tensor]:
        do, q, o, lse = (x[:, :, queries] for x in mine)
        dq, *found = kernel.backward(do, q, *keys, o, lse, False)
        add([grads[0][:, :, queries]], [dq])
        return found

    def put_home(found: Sequence[Tensor], start: int = 0) -> None:
        if found:
            add([x[:, :, start : start + found[0].shape[2]] for x in grads[1:]], found)

    for step, first, theirs in keys_and_values(own, place, link):
        if step == 0:  # while keys come, each half of its own rows by itself: dilated attention of one branch
            how: tuple = (place.half,), (1,), place.causal, "modulo", kernel.name * (q.shape[2] > 1)
            grads = place.widened(dilated_backward(*mine[:2], *theirs, *mine[2:], *how))
        else:
            found = part_of(slice(first, None), theirs) if theirs else []
            found = [found.pop(0).contiguous() for _ in range(len(found))]
            put_home(wait() if wait else [])
            del wait  # with what has been sent
            source, target = place.partners(step)
            _, rows = place.seen(target, place.at) or (0, 0)
            ends = (place.members[source], found), (place.members[target], space_for(own, rows))
            wait = link.begin("gradients", 2 * place.name + 1, *ends)
            del found, ends
        del theirs
    halves = slice(None, place.half), slice(place.half, None)  # and while gradients go home, one with the other
    for queries, keys in (halves[::-1], halves)[: 2 - place.causal] if place.half < q.shape[2] else ():
        put_home(part_of(queries, [x[:, :, keys] for x in own]), keys.start or 0)
    put_home(wait() if wait else [])
    return [x.to(q.dtype) for x in grads]


RING = differentiable("ring attention", ring_forward, ring_backward)


def rank_inputs(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, link: Link, causal: bool, kernel: str | None, *more: Hashable
) -> tuple[Tensor, Tensor, Tensor, Kernel]:
    """q, k, v, `checked`, and the kernel. Raises UserError also for rows not of the layout, and ranks that disagree."""
    q, k, v = checked(q, k, v, causal)
    link.agree(tuple(q.shape[:2]), q.shape[3], str(q.dtype), causal, layout, *more)
    held, there = [sum(map(len, runs)) for runs in layout], f"rank {link.rank} of {link.ranks} has {q.shape[2]}"
    if len(held) != link.ranks or held[link.rank] != q.shape[2]:
        raise UserError(f"by the layout {len(held)} ranks hold {', '.join(map(str, held))} rows; {there}")
    sizes: tuple = (*q.shape, str(q.dtype).removeprefix("torch."), causal)
    return q, k, v, chosen(kernel, Shape(*sizes), Machine.of(q.device))


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, link: Link, *, causal: bool = False, kernel: str | None = None
) -> Tensor:
    """o `[B, H, n, D]` of the n rows that this rank holds by the layout (see `shards`; zigzag where causal), over all
    rows of the ranks of a link. Each of them calls it, and its backward pass. q, k, v: its rows, `[B, H, n, D]`.
    kernel: which one of dilated.kernels runs underneath, by default the first that takes such inputs. Saved are the
    output and one float32 per row and head. Raises UserError as `rank_inputs`, and where a kernel cannot run."""
    *inputs, flash = rank_inputs(q, k, v, layout, link, causal, kernel)
    return RING.apply(*inputs, Place.of(layout, link.rank, causal), link, flash)[0]
