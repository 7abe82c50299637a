"""Sparse attention by PyTorch's FlexAttention, reports' remedy beside FlashAttention: window, stride, random blocks.

Each is a rule that says whether query i sees key j; FlexAttention makes a kernel of it, which skips the blocks of 128
by 128 pairs in which nothing is seen and computes all other blocks whole. Tensors are `[B, H, N, D]`.
Sources: Beltagy et al. 2020, "Longformer", section 3.1 (window); Child et al. 2019, "Generating Long Sequences with
Sparse Transformers", section 4.3 (stride); Zaheer et al. 2020, "Big Bird", section 2 (random blocks)."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from attnlib.calling import cast, compiled_for_each_size
from attnlib.core import DTYPES, Device, Machine, Shape, UserError, needs_cuda
from attnlib.laws import Phases, Variant

FLEX_BLOCK = 128  # queries and keys of a block that FlexAttention computes or skips

Rule = Callable[..., Tensor]  # FlexAttention's mask_mod: (b, h, i, j) -> whether query i sees key j
Pattern = Callable[[int, int, str], Rule]  # (number, seq_len, device) -> its rule without a causal mask


def window(width: int, seq_len: int, device: str) -> Rule:
    """Query i sees the keys at most width / 2 away."""
    return lambda b, h, i, j: (i - j).abs() <= width // 2


def strided(stride: int, seq_len: int, device: str) -> Rule:
    """Query i sees the keys less than a stride away, and those a multiple of the stride away."""
    return lambda b, h, i, j: ((i - j).abs() < stride) | ((i - j) % stride == 0)


def random_blocks(count: int, seq_len: int, device: str) -> Rule:
    """Query i sees the block of keys that it lies in, and `count` others, drawn once for each block of queries."""
    blocks = -(-seq_len // FLEX_BLOCK)
    order = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(blocks)).argsort(-1).argsort(-1)
    table = ((order < count) | torch.eye(blocks, dtype=torch.bool)).to(device)
    return lambda b, h, i, j: table[i // FLEX_BLOCK, j // FLEX_BLOCK]


@cache
def rule(pattern: Pattern, number: int, seq_len: int, causal: bool, device: str) -> Rule:
    """FlexAttention's `mask_mod` for a pattern, with a causal mask or without."""
    sees = pattern(number, seq_len, device)
    return (lambda b, h, i, j: sees(b, h, i, j) & (i >= j)) if causal else sees


@cache
def block_mask(pattern: Pattern, number: int, seq_len: int, causal: bool, device: str) -> Any:
    """FlexAttention's blocks to compute, made once for each length: that needs the whole `[N, N]` rule."""
    from torch.nn.attention.flex_attention import create_block_mask

    sees = rule(pattern, number, seq_len, causal, device)
    return create_block_mask(sees, None, None, seq_len, seq_len, device, FLEX_BLOCK)


def sparse_attention(pattern: Pattern, number: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """o `[B, H, N, D]` over the keys that `pattern` lets each query see. Raises UserError where it cannot run."""
    if not q.is_cuda:
        raise UserError("FlexAttention has a backward pass on a CUDA GPU alone")
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(pattern, number, q.shape[2], causal, str(q.device))
    return compiled_for_each_size(flex_attention)(*cast(q, k, v), block_mask=mask)  # else it would write the scores


def sparse_inputs(
    pattern: Pattern, number: int, shape: Shape, device: str | torch.device = "cpu", seed: int = 0
) -> tuple[Tensor, ...]:
    """Shape.inputs, after the mask has been made: that takes more memory than the attention itself."""
    if torch.device(device).type == "cuda":
        block_mask(pattern, number, shape.seq_len, shape.causal, str(torch.empty(0, device=device).device))
    return shape.inputs(device, seed)


def sparse_reach(pattern: Pattern, number: int, shape: Shape) -> Tensor:
    """`[N, N]`: 1 where query i sees key j, else 0."""
    at = torch.arange(shape.seq_len)
    return rule(pattern, number, shape.seq_len, shape.causal, "cpu")(0, 0, at[:, None], at).double()


def needs_flex(shape: Shape, machine: Device) -> str | None:
    """FlexAttention trains on CUDA, and takes head_dim from 16 up."""
    narrow = "FlexAttention takes head_dim from 16 up" if shape.head_dim < 16 else None
    return needs_cuda(shape, machine, tuple(DTYPES), (8, 0), "FlexAttention's backward pass") or narrow


@cache
def sparse_pairs(pattern: Pattern, number: int, seq_len: int, causal: bool) -> int:
    """How many pairs a pattern lets see each other, counted in pieces that stay in the cache."""
    sees, keys = rule(pattern, number, seq_len, causal, "cpu"), torch.arange(seq_len, dtype=torch.int32)
    return sum(int(sees(0, 0, queries, keys).sum()) for queries in keys[:, None].split(16))


def sparse_flops(pattern: Pattern, number: int, per_pair: int, shape: Shape, machine: Machine) -> int:
    """Floating-point operations, `per_pair` for each pair that is seen and each number of D."""
    per_pair *= shape.batch * shape.heads * shape.head_dim
    return per_pair * sparse_pairs(pattern, number, shape.seq_len, shape.causal)


def sparse_variant(name: str, pattern: Pattern, number: int) -> Variant:
    """A pattern as a Variant, without a law: PyTorch's compiler allocates. Raises UserError for a `number` below 1."""
    if number < 1:
        raise UserError(f"{name}: the pattern's number must be at least 1, not {number}")
    functions: tuple[Callable[..., Any], ...] = sparse_attention, sparse_flops, sparse_reach, sparse_inputs
    fn, flops, reach, inputs = (partial(one, pattern, number) for one in functions)
    phases = Phases(partial(flops, 4), partial(flops, 10))
    return Variant(
        name, fn, None, phases, reach=reach, needs=needs_flex, inputs=inputs, ledgered=False, gpu_product="in_order"
    )


# about a thousand keys for each query
WINDOW = sparse_variant("window", window, 1024)
STRIDED = sparse_variant("strided", strided, 512)
RANDOM_BLOCKS = sparse_variant("random_blocks", random_blocks, 7)
