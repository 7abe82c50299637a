"""Sparse attention through PyTorch's FlexAttention: a sliding window, a stride, and random blocks.

These are the remedies that reports recommend beside FlashAttention. Each is a rule that says whether query i sees key
j; FlexAttention makes a kernel of it, which skips the blocks of 128 by 128 pairs in which nothing is seen and computes
all other blocks whole. Tensors are `[B, H, N, D]`.
Sources: Beltagy et al. 2020, "Longformer", section 3.1 (window); Child et al. 2019, "Generating Long Sequences with
Sparse Transformers", section 4.3 (stride); Zaheer et al. 2020, "Big Bird", section 2 (random blocks).
"""

from collections.abc import Callable
from functools import cache, partial

import sympy
import torch
import torch._functorch.config
import torch._inductor.config
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnlib.core import AttnError, B, D, H, N, Phases, Shape, Variant, c
from attnlib.sdpa import only_cuda

BLOCK = 128  # queries and keys of a block that FlexAttention computes or skips


def window(width: int, seq_len: int, device) -> Callable:
    """Query i sees the keys at most width / 2 away."""
    return lambda b, h, i, j: (i - j).abs() <= width // 2


def strided(stride: int, seq_len: int, device) -> Callable:
    """Query i sees the keys less than a stride away, and those a multiple of the stride away."""
    return lambda b, h, i, j: ((i - j).abs() < stride) | ((i - j) % stride == 0)


def random_blocks(count: int, seq_len: int, device) -> Callable:
    """Query i sees the block of keys that it lies in, and `count` others, drawn once for each block of queries."""
    blocks = -(-seq_len // BLOCK)
    order = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(blocks)).argsort(-1).argsort(-1)
    table = ((order < count) | torch.eye(blocks, dtype=torch.bool)).to(device)
    return lambda b, h, i, j: table[i // BLOCK, j // BLOCK]


@cache
def rule(pattern: Callable, number: int, seq_len: int, causal: bool, device: str) -> Callable:
    """FlexAttention's `mask_mod` for a pattern, with a causal mask or without."""
    sees = pattern(number, seq_len, device)
    return (lambda b, h, i, j: sees(b, h, i, j) & (i >= j)) if causal else sees


@cache
def block_mask(pattern: Callable, number: int, seq_len: int, causal: bool, device: str):
    """The blocks to compute, made once for each length: that needs the whole `[N, N]` rule."""
    return create_block_mask(
        rule(pattern, number, seq_len, causal, device), None, None, seq_len, seq_len, device, BLOCK
    )


@cache
def compiled() -> Callable:
    """flex_attention as one fused kernel for each rule and size; without compilation it would write the scores."""
    torch._dynamo.config.recompile_limit = 256
    torch._inductor.config.compile_threads = 1  # the worker of a sweep may have no children
    torch._functorch.config.donated_buffer = False  # or a backward pass cannot be run twice, as it is to be timed
    return torch.compile(flex_attention, dynamic=False)


def sparse(q, k, v, *, causal=False, pattern: Callable, number: int):
    """o `[B, H, N, D]` over the keys that `pattern` lets each query see. Raises AttnError where it cannot run."""
    if not q.is_cuda:
        raise AttnError("FlexAttention has a backward pass on a CUDA GPU alone")
    return compiled()(q, k, v, block_mask=block_mask(pattern, number, q.shape[2], causal, str(q.device)))


def inputs(shape: Shape, device="cpu", seed=0, *, pattern: Callable, number: int):
    """Shape.inputs, after the mask has been made: that takes more memory than the attention itself."""
    if device not in ("cpu", "meta"):
        block_mask(pattern, number, shape.seq_len, shape.causal, str(torch.empty(0, device=device).device))
    return shape.inputs(device, seed)


def reach(shape: Shape, *, pattern: Callable, number: int) -> torch.Tensor:
    """`[N, N]`: 1 where query i sees key j, else 0."""
    at = torch.arange(shape.seq_len)
    return rule(pattern, number, shape.seq_len, shape.causal, "cpu")(0, 0, at[:, None], at[None, :]).double()


def needs(shape: Shape, device) -> str | None:
    """FlexAttention trains on CUDA, and takes head_dim from 16 up."""
    narrow = "FlexAttention takes head_dim from 16 up" if shape.head_dim < 16 else None
    return (
        only_cuda(shape, device, ("float32", "bfloat16", "float16"), (8, 0), "FlexAttention's backward pass") or narrow
    )


@cache
def _pairs(at: int, number: int, seq_len: int, causal: bool) -> int:
    """How many pairs a pattern lets see each other, counted in pieces that stay in the cache."""
    sees, keys = rule(PATTERNS[at], number, seq_len, causal, "cpu"), torch.arange(seq_len, dtype=torch.int32)
    return sum(int(sees(0, 0, queries, keys).sum()) for queries in keys[:, None].split(16))


class Pairs(sympy.Function):
    """`_pairs` as a term of a formula."""

    _imp_ = staticmethod(lambda at, number, n, causal: _pairs(at, number, n, bool(causal)))


PATTERNS = (window, strided, random_blocks)


def variant(name: str, pattern: Callable, number: int) -> Variant:
    """A pattern as a Variant; what PyTorch's compiler allocates is its own choice, so there is no law.

    Raises AttnError for a `number` below 1.
    """
    if number < 1:
        raise AttnError(f"{name}: the pattern's number must be at least 1, not {number}")
    pairs = Pairs(PATTERNS.index(pattern), number, N, c)
    how = {"pattern": pattern, "number": number}
    return Variant(
        name=name,
        fn=partial(sparse, **how),
        law=None,
        flops=Phases(4 * B * H * D * pairs, 10 * B * H * D * pairs),
        reach=partial(reach, **how),
        needs=needs,
        inputs=partial(inputs, **how),
        ledgered=False,
    )


WINDOW = variant("window", window, 1024)
STRIDED = variant("strided", strided, 1024)
RANDOM = variant("random_blocks", random_blocks, 8)
