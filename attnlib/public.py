"""Dilated attention as public code computes it, restated in a few lines each, to be measured and to be audited."""

import torch

from attnlib.core import AttnError
from attnlib.dilated import check

aten = torch.ops.aten


def flash(q, k, v, causal):
    """o and its log-sum-exp by PyTorch's flash kernel, differentiable in o alone."""
    if q.is_cuda:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def gathered(x, width, rate):
    """The kept rows of each segment, copied: `[B, H, N, …]` to `[B · segments, H, width / rate, …]`."""
    b, heads, n = x.shape[:3]
    rows = x.reshape(b, heads // rate, rate, n // rate, rate, *x.shape[3:]).diagonal(0, 2, 4)
    rows = rows.movedim(-1, 2).reshape(b, heads, n // width, width // rate, *x.shape[3:])
    return rows.transpose(1, 2).flatten(0, 1)


def scattered(rows, like, width, rate, empty):
    """The opposite: a tensor like `like`, `empty` wherever no row was kept."""
    b, heads, n = like.shape[:3]
    rows = (
        rows.unflatten(0, (b, n // width)).transpose(1, 2).reshape(b, heads // rate, rate, n // rate, *rows.shape[3:])
    )
    whole = rows.new_full((b, heads // rate, rate, n // rate, rate, *rows.shape[4:]), empty)
    whole.diagonal(0, 2, 4).copy_(rows.movedim(2, -1))
    return whole.reshape(b, heads, n, *rows.shape[4:])


def gather_flash_scatter(q, k, v, *, segment_lengths, dilation_rates, causal=False):
    """o `[B, H, N, D]` as torchscale's dilated_attention.py computes it: gather, flash kernel, scatter, weighted sum.

    The weights of the sum are constants to autograd there. Offsets j mod r. Raises AttnError where a width does not
    divide N or a rate does not divide H and the width: there public code pads.
    """
    check(q, k, v, segment_lengths, dilation_rates, "modulo")
    outputs, denominators = [], []
    for width, rate in zip(segment_lengths, dilation_rates, strict=True):
        if q.shape[2] % width or width % rate or q.shape[1] % rate:
            raise AttnError(f"a width of {width} and a rate of {rate} do not divide {list(q.shape)}")
        o, lse = flash(*(gathered(x, width, rate) for x in (q, k, v)), causal)
        outputs.append(scattered(o, q, width, rate, 0.0))
        denominators.append(scattered(lse.detach(), q, width, rate, -1e8))
    weights = torch.stack(denominators).softmax(0).to(q.dtype).unsqueeze(-1)
    return sum(weight * o for weight, o in zip(weights, outputs, strict=True))
