"""Dilated attention as public code defines it, each restated in a few lines, to be audited and to be raced against.

The sources, with the commits that were read: microsoft/torchscale 4d1e0e82 (torchscale/component/dilated_attention.py);
fkodom/dilated-attention-pytorch 87cda757 and its descendant DarcStar-Solutions-Tech/dilated-attention-pytorch 8b036b95,
which published report 004 measures (src/dilated_attention_pytorch/dilated_attention.py); seung7361/longnet 2143586b
(model.py). A boolean mask over LongNet's own pattern was found nowhere, and is the definition that text often suggests.
Tensors are `[B, H, N, D]`, configurations those of dilated.dilated.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from attnlib import dilated
from attnlib.core import Shape, Variant, oracle
from attnlib.dilated import check, reach

aten = torch.ops.aten


def flash(q, k, v, causal):
    """o and its log-sum-exp by PyTorch's flash kernel, differentiable in o alone."""
    if q.is_cuda:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def exact(q, k, v, causal):
    """The same in float64, without a kernel."""
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.float64)
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    seen = seen.tril() if causal else seen
    return oracle(q, k, v, seen), torch.logsumexp(scores + seen.log(), -1)


def gathered(x, width: int, rate: int):
    """The kept rows of all segments, copied: `[B · segments, H, ⌈width / rate⌉, D]`, padded with zeros."""
    heads = x.shape[1]
    x = F.pad(x, (0, 0, 0, -x.shape[2] % width)).unflatten(2, (-1, width)).transpose(1, 2).flatten(0, 1)
    x = F.pad(x, (0, 0, 0, -width % rate, 0, -heads % rate))
    kept = x.unflatten(1, (rate, -1)).unflatten(3, (-1, rate)).diagonal(0, 1, 4)  # heads and rows of equal offset
    return kept.movedim(-1, 1).flatten(1, 2)[:, :heads].contiguous()


def scattered(rows, rate: int, like):
    """The kept rows back in their places and 0 elsewhere: `[B, H, N, …]`, as long as `like`."""
    (batch, heads, seq_len), count = like.shape[:3], rows.shape[0] // like.shape[0]
    rows = F.pad(rows, (0, 0, 0, 0, 0, -heads % rate)).unflatten(1, (rate, -1))
    whole = torch.diag_embed(rows.movedim(1, -1)).movedim(-2, 1).movedim(-1, 4).flatten(1, 2).flatten(2, 3)
    return whole[:, :heads].unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, :seq_len]


def torchscale(q, k, v, *, segment_lengths, dilation_rates, causal=False, attend: Callable = flash):
    """Gather, flash kernel, scatter, weighted sum. Offsets j // ⌈H/r⌉; the weights are constants to autograd; padding
    takes part in the softmax, and where r does not divide w it moves all later segments."""
    outputs, denominators = [], []
    for width, rate in check(q, k, v, causal, segment_lengths, dilation_rates, "grouped"):
        o, lse = attend(*(gathered(x, min(width, q.shape[2]), rate) for x in (q, k, v)), causal)
        outputs.append(scattered(o, rate, q))
        lse = scattered(lse.detach().unsqueeze(-1), rate, q)
        denominators.append(lse.masked_fill(lse == 0, -1e8))
    weights = torch.stack(denominators).softmax(0).to(outputs[0].dtype)
    return sum(o * weight for o, weight in zip(outputs, weights, strict=True))


def branch(q, k, v, width: int, rate: int, causal: bool, head_offsets="modulo"):
    """One branch alone, in float64, 0 where it keeps no row."""
    shape = Shape(*q.shape, causal=causal)
    return oracle(q, k, v, reach(shape, segment_lengths=(width,), dilation_rates=(rate,), head_offsets=head_offsets))


def split_heads(q, k, v, *, segment_lengths, dilation_rates, causal=False, by_sum=False):
    """Each head runs one branch, with offset (branch mod r), and the result is divided by the number of branches; with
    `by_sum` first by its own signed sum over the sequence. (Where the heads are no multiple of the branches, fkodom's
    groups of heads overlap; here, as in its descendant, they do not.)"""
    count, parts = len(segment_lengths), []
    sizes = [q.shape[1] // count + (index < q.shape[1] % count) for index in range(count)]
    groups = zip(*(x.split(sizes, 1) for x in (q, k, v)), segment_lengths, dilation_rates, strict=True)
    for index, (*heads, width, rate) in enumerate(groups):
        # as so many heads that the last one's offset is the group's
        copies = [x.flatten(0, 1).unsqueeze(1).expand(-1, index % rate + 1, -1, -1) for x in heads]
        part = branch(*copies, width, rate, causal)[:, -1].unflatten(0, heads[0].shape[:2])
        parts.append(part / part.sum(2, keepdim=True) if by_sum else part)
    return torch.cat(parts, 1) / count


def mean_merge(q, k, v, *, segment_lengths, dilation_rates, causal=False):
    """Every head runs every branch, and their outputs are averaged."""
    parts = [branch(q, k, v, w, r, causal) for w, r in zip(segment_lengths, dilation_rates, strict=True)]
    return torch.stack(parts).mean(0)


def boolean_mask(q, k, v, *, segment_lengths, dilation_rates, causal=False):
    """One softmax over the set of keys that any branch sees, each once."""
    shape = Shape(*q.shape, causal=causal)
    return oracle(q, k, v, reach(shape, segment_lengths=segment_lengths, dilation_rates=dilation_rates).clamp(max=1))


def paper(q, k, v, *, segment_lengths, dilation_rates, causal=False, head_offsets="modulo"):
    """The definition, by the oracle."""
    config = {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates, "head_offsets": head_offsets}
    return oracle(q, k, v, reach(Shape(*q.shape, causal=causal), **config))


def variant(name: str, fn: Callable, segment_lengths, dilation_rates) -> Variant:
    """One of these functions as a Variant; its memory has no law."""
    config = {"segment_lengths": tuple(segment_lengths), "dilation_rates": tuple(dilation_rates)}
    ours = dilated.variant(name, *config.values(), "grouped")
    return replace(ours, fn=partial(fn, **config), law=None)


# name: the definition, and the convention of offsets of the paper's definition that it is held against
PUBLIC = {
    "torchscale": (partial(torchscale, attend=exact), "modulo"),
    "torchscale, its own offsets": (partial(torchscale, attend=exact), "grouped"),
    "fkodom: sum and groups": (partial(split_heads, by_sum=True), "modulo"),
    "004: groups": (split_heads, "modulo"),
    "mean-merge": (mean_merge, "modulo"),
    "boolean mask": (boolean_mask, "modulo"),
}


def audit(shape: Shape, segment_lengths, dilation_rates, seed: int = 0) -> Iterator[dict]:
    """How far each of PUBLIC lies from the paper's definition, in float64 on the CPU, causal or not.

    Rows: `definition, causal`; `<result>_off`, the Frobenius norm of the difference over the paper's; `zero_rows`, the
    share of rows of the output that are 0; `leak`, by how much the first half of the output changes, relative to its
    norm, when the second half of the inputs is drawn anew.
    """
    config = {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates}
    draw = torch.Generator().manual_seed(seed)
    half = shape.seq_len // 2
    q, k, v, do, *others = (
        torch.randn(shape.batch, shape.heads, shape.seq_len, shape.head_dim, dtype=torch.float64, generator=draw)
        for _ in range(7)
    )
    redrawn = [torch.cat([x[:, :, :half], y[:, :, half:]], 2) for x, y in zip((q, k, v), others, strict=True)]

    def results(fn):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = fn(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    for causal in (False, True):
        for name, (fn, offsets) in PUBLIC.items():
            theirs = partial(fn, **config, causal=causal)
            found = results(theirs)
            want = results(partial(paper, **config, causal=causal, head_offsets=offsets))
            row = {"definition": name, "causal": causal}
            for what, got, exactly in zip(("o", "dq", "dk", "dv"), found, want, strict=True):
                row[f"{what}_off"] = float((got - exactly).norm() / exactly.norm())
            early = found[0][:, :, :half]
            row["zero_rows"] = float((found[0] == 0).all(-1).double().mean())
            yield row | {"leak": float((theirs(*redrawn)[:, :, :half] - early).norm() / early.norm())}
