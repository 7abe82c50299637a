"""The minimal Transformer block: projections, any attention, a residual connection, LayerNorm; no MLP, no dropout.

A block is measured like a variant: its inputs are the hidden state and the weights, made afresh for each point.
Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.1, the attention half of a layer."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlib.core import DTYPES, Shape
from attnlib.laws import Variant


def transformer_block(
    attention: Callable[..., Tensor],
    x: Tensor, qkv_weight: Tensor, out_weight: Tensor, gain: Tensor, bias: Tensor, *, causal: bool = False,
) -> Tensor:  # fmt: skip
    """LayerNorm(x + attention(q, k, v) W_outᵀ) with q, k, v = x W_qkvᵀ; attention: `(q, k, v, *, causal) -> o`, all
    `[B, H, N, D]`. x: the hidden state `[B, N, H, D]`, the heads kept apart, as is the result; qkv_weight
    `[3·H·D, H·D]`, out_weight `[H·D, H·D]`, gain and bias `[H·D]`."""
    batch, seq_len, heads, head_dim = x.shape
    hidden = x.flatten(2)
    q, k, v = F.linear(hidden, qkv_weight).view(batch, seq_len, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    o = attention(q, k, v, causal=causal).transpose(1, 2).reshape(hidden.shape)
    return F.layer_norm(hidden + F.linear(o, out_weight), hidden.shape[-1:], gain, bias).view(x.shape)


def block_inputs(shape: Shape, device: str | torch.device = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    """x, qkv_weight, out_weight, gain, bias of a block of `shape.heads` times `shape.head_dim` hidden dimensions."""
    generator = torch.Generator("cpu" if torch.device(device).type == "meta" else device).manual_seed(seed)
    width = shape.heads * shape.head_dim
    kind = {"dtype": DTYPES[shape.dtype], "device": device}
    sizes = (shape.batch, shape.seq_len, shape.heads, shape.head_dim), (3 * width, width), (width, width)
    x, *weights = (torch.randn(size, generator=generator, **kind) for size in sizes)
    rest = *(weight / width**0.5 for weight in weights), torch.ones(width, **kind), torch.zeros(width, **kind)
    return tuple(tensor.requires_grad_() for tensor in (x, *rest))


def in_block(variant: Variant) -> Variant:
    """The variant inside a block, under its own name. What is known of its memory holds for the attention alone."""
    fn = partial(transformer_block, variant.fn)
    return replace(variant, fn=fn, inputs=block_inputs, inner=variant, law=None, traffic=None, ledgered=False)
