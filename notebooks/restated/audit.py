"""Dilated attention as public code defines it, each restated in a few lines, to be audited and to be raced against.

The sources, with the commits that were read: microsoft/torchscale 4d1e0e82 (torchscale/component/dilated_attention.py);
fkodom/dilated-attention-pytorch 87cda757 and its descendant DarcStar-Solutions-Tech/dilated-attention-pytorch 8b036b95,
which published report 004 measures (src/dilated_attention_pytorch/dilated_attention.py); seung7361/longnet 2143586b
(model.py). A boolean mask over LongNet's own pattern was found nowhere, and is the definition that text often suggests.
Tensors are `[B, H, N, D]`, configurations those of dilated.dilated."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlib.core import Shape, dense_reach, oracle
from attnlib.dilated.attention import dilated_variant
from attnlib.dilated.definition import dilated_reach
from attnlib.dilated.kernels import KERNELS
from attnlib.laws import Variant
from report.accuracy import RESULTS, results_of


def flash_and_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Sequence[Tensor]:
    """o and its log-sum-exp by PyTorch's flash kernel, differentiable in o alone."""
    return KERNELS["flash" if q.is_cuda else "cpu"].forward(q, k, v, causal)


def exact_and_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Sequence[Tensor]:
    """The same in float64, without a kernel."""
    seen = dense_reach(Shape(*q.shape, causal=causal))
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    return oracle(q, k, v, seen), torch.logsumexp(scores + seen.log(), -1)


def gathered(x: Tensor, width: int, rate: int) -> Tensor:
    """The kept rows of all segments, copied: `[B · segments, H, ⌈width / rate⌉, D]`, padded with zeros."""
    heads = x.shape[1]
    x = F.pad(x, (0, 0, 0, -x.shape[2] % width)).unflatten(2, (-1, width)).transpose(1, 2).flatten(0, 1)
    x = F.pad(x, (0, 0, 0, -width % rate, 0, -heads % rate))
    kept = x.unflatten(1, (rate, -1)).unflatten(3, (-1, rate)).diagonal(0, 1, 4)  # heads and rows of equal offset
    return kept.movedim(-1, 1).flatten(1, 2)[:, :heads].contiguous()


def scattered(rows: Tensor, rate: int, like: Tensor) -> Tensor:
    """The kept rows back in their places and 0 elsewhere: `[B, H, N, …]`, as long as `like`."""
    (batch, heads, seq_len), count = like.shape[:3], rows.shape[0] // like.shape[0]
    rows = F.pad(rows, (0, 0, 0, 0, 0, -heads % rate)).unflatten(1, (rate, -1))
    whole = torch.diag_embed(rows.movedim(1, -1)).movedim(-2, 1).movedim(-1, 4).flatten(1, 2).flatten(2, 3)
    return whole[:, :heads].unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, :seq_len]


def torchscale(q, k, v, *, segment_lengths, dilation_rates, causal=False, attend: Callable = flash_and_lse) -> Tensor:
    """Gather, flash kernel, scatter, weighted sum. Offsets j // ⌈H/r⌉; the weights are constants to autograd; padding
    takes part in the softmax, and where r does not divide w it moves all later segments."""
    outputs, denominators = [], []
    for width, rate in zip(segment_lengths, dilation_rates, strict=True):
        o, lse = attend(*(gathered(x, min(width, q.shape[2]), rate) for x in (q, k, v)), causal)
        outputs.append(scattered(o, rate, q))
        lse = scattered(lse.detach().unsqueeze(-1), rate, q)
        denominators.append(lse.masked_fill(lse == 0, -1e8))
    weights = torch.stack(denominators).softmax(0).to(outputs[0].dtype)
    return sum(o * weight for o, weight in zip(outputs, weights, strict=True))


def by_definition(q, k, v, *, causal=False, most=None, **branches) -> Tensor:
    """The paper's attention, by the oracle, 0 where no branch keeps a row; a key counts `most` times at most."""
    seen = dilated_reach(Shape(*q.shape, causal=causal), **branches)
    return oracle(q, k, v, seen.clamp(max=most) if most else seen)


def mean_merge(q, k, v, *, segment_lengths, dilation_rates, causal=False) -> Tensor:
    """Every head runs every branch, and their outputs are averaged."""
    branches = zip(segment_lengths, dilation_rates, strict=True)
    alone = [by_definition(q, k, v, segment_lengths=(w,), dilation_rates=(r,), causal=causal) for w, r in branches]
    return torch.stack(alone).mean(0)


def split_heads(q, k, v, *, segment_lengths, dilation_rates, causal=False, by_sum=False) -> Tensor:
    """Each head runs one branch, with offset (branch mod r), and the result is divided by the number of branches; with
    `by_sum` first by its own signed sum over the sequence. (Where the heads are no multiple of the branches, fkodom's
    groups of heads overlap; here, as in its descendant, they do not.)"""
    count, parts = len(segment_lengths), []
    sizes = [q.shape[1] // count + (index < q.shape[1] % count) for index in range(count)]
    groups = zip(*(x.split(sizes, 1) for x in (q, k, v)), segment_lengths, dilation_rates, strict=True)
    for index, (*heads, width, rate) in enumerate(groups):
        # as so many heads that the last one's offset is the group's
        copies = [x.flatten(0, 1).unsqueeze(1).expand(-1, index % rate + 1, -1, -1) for x in heads]
        part = by_definition(*copies, segment_lengths=(width,), dilation_rates=(rate,), causal=causal)[:, -1]
        part = part.unflatten(0, heads[0].shape[:2])
        parts.append(part / part.sum(2, keepdim=True) if by_sum else part)
    return torch.cat(parts, 1) / count


def torchscale_variant(segment_lengths, dilation_rates) -> Variant:
    """`torchscale` as a Variant; its memory has no law."""
    ours = dilated_variant("torchscale", segment_lengths, dilation_rates, "grouped")
    config = {"segment_lengths": tuple(segment_lengths), "dilation_rates": tuple(dilation_rates)}
    return replace(ours, fn=partial(torchscale, **config), law=None)


# name: the definition, and the convention of offsets of the paper's definition that it is held against
PUBLIC_DEFINITIONS = {
    "torchscale": (partial(torchscale, attend=exact_and_lse), "modulo"),
    "torchscale, its own offsets": (partial(torchscale, attend=exact_and_lse), "grouped"),
    "fkodom: sum and groups": (partial(split_heads, by_sum=True), "modulo"),
    "004: groups": (split_heads, "modulo"),
    "mean-merge": (mean_merge, "modulo"),
    "boolean mask": (partial(by_definition, most=1), "modulo"),  # over the set of keys that any branch sees, each once
}


def audited(shape: Shape, segment_lengths, dilation_rates, seed: int = 0) -> Iterator[dict]:
    """How far each of PUBLIC_DEFINITIONS lies from the paper's, in float64 on the CPU, causal or not.

    Rows: `definition, causal`; `<result>_off`, the Frobenius norm of the difference over the paper's; `zero_rows`, of
    the output; `leak`, the relative change of its first half when the second half of the inputs is drawn anew."""
    config = {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates}
    draw, half = torch.Generator().manual_seed(seed), shape.seq_len // 2
    size = shape.batch, shape.heads, shape.seq_len, shape.head_dim
    q, k, v, do, *others = (torch.randn(*size, dtype=torch.float64, generator=draw) for _ in range(7))
    redrawn = [torch.cat([x[:, :, :half], y[:, :, half:]], 2) for x, y in zip((q, k, v), others, strict=True)]
    for causal in (False, True):
        for name, (fn, offsets) in PUBLIC_DEFINITIONS.items():
            theirs = partial(fn, **config, causal=causal)
            found = results_of(theirs, (q, k, v), do)
            paper = partial(by_definition, **config, causal=causal, head_offsets=offsets)
            row = {"definition": name, "causal": causal}
            for what, got, want in zip(RESULTS, found, results_of(paper, (q, k, v), do), strict=True):
                row[f"{what}_off"] = float((got - want).norm() / want.norm())
            early = found[0][:, :, :half]
            row["zero_rows"] = float((found[0] == 0).all(-1).double().mean())
            yield row | {"leak": float((theirs(*redrawn)[:, :, :half] - early).norm() / early.norm())}
