"""The minimal Transformer block: projections, any attention, a residual connection, LayerNorm; no MLP, no dropout.

A block is measured like a variant: its inputs are the hidden state and the weights, made afresh for each point.
Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.1, the attention half of a layer.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from attnlib.core import DTYPES, Shape, Variant


def block(attention, x, qkv_weight, out_weight, gain, bias, *, causal=False):
    """LayerNorm(x + attention(q, k, v) W_outᵀ) with q, k, v = x W_qkvᵀ, all of x's shape.

    x: the hidden state `[B, N, H, D]`, the heads kept apart; qkv_weight `[3·H·D, H·D]`; out_weight `[H·D, H·D]`; gain
    and bias `[H·D]`. attention: `(q, k, v, *, causal) -> o`, all `[B, H, N, D]`.
    """
    batch, seq_len, heads, head_dim = x.shape
    hidden = x.flatten(2)
    projected = F.linear(hidden, qkv_weight).view(batch, seq_len, 3, heads, head_dim)
    q, k, v = projected.permute(2, 0, 3, 1, 4)
    o = attention(q, k, v, causal=causal).transpose(1, 2).reshape(hidden.shape)
    return F.layer_norm(hidden + F.linear(o, out_weight), hidden.shape[-1:], gain, bias).view(x.shape)


def block_inputs(shape: Shape, device="cpu", seed=0) -> tuple[torch.Tensor, ...]:
    """x, qkv_weight, out_weight, gain, bias of a block of `shape.heads` times `shape.head_dim` hidden dimensions."""
    generator = torch.Generator(device).manual_seed(seed)
    width, kind = shape.heads * shape.head_dim, {"dtype": DTYPES[shape.dtype], "device": device}
    draw = partial(torch.randn, generator=generator, **kind)
    x = draw(shape.batch, shape.seq_len, shape.heads, shape.head_dim)
    weights = draw(3 * width, width) / width**0.5, draw(width, width) / width**0.5
    return tuple(t.requires_grad_() for t in (x, *weights, torch.ones(width, **kind), torch.zeros(width, **kind)))


def in_block(variant: Variant) -> Variant:
    """The variant inside a block, under its own name. What is known of its memory holds for the attention alone."""
    fn = partial(block, variant.fn)
    return replace(variant, fn=fn, inputs=block_inputs, inner=variant, law=None, traffic=None, ledgered=False)
