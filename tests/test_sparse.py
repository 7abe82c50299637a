"""Sparse attention: what each pattern lets a query see, and what is refused. (VARIANTS are tested in test_variants.)"""

import pytest
import torch

from attnlib import family
from attnlib.core import Shape, UserError
from attnlib.laws import evaluate
from attnlib.variants.sparse import FLEX_BLOCK, sparse_variant, window

PATTERNS = {name: variant for name, variant in family("sparse").items() if name != "dilated"}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq_len", [1, 127, 128, 1500, 3001])
def test_pairs_are_those_that_are_seen(name, causal, seq_len):
    shape = Shape(2, 3, seq_len, 16, causal=causal)
    seen = PATTERNS[name].reach(shape)
    assert evaluate(PATTERNS[name].flops.forward, shape) == 4 * 2 * 3 * 16 * int(seen.sum())
    assert (seen.diagonal() == 1).all() and (not causal or seen.triu(1).sum() == 0)


def test_patterns_are_what_their_names_say():
    seen = {name: variant.reach(Shape(1, 1, 4096, 16)) for name, variant in PATTERNS.items()}
    assert seen["window"][2000].nonzero().squeeze().tolist() == list(range(2000 - 512, 2000 + 513))
    assert seen["strided"][4000, [4000 - 1024, 4000 - 1025, 4000 - 511]].tolist() == [1, 0, 1]
    per_block = seen["random_blocks"][::FLEX_BLOCK, ::FLEX_BLOCK].sum(-1)
    assert set(per_block.tolist()) <= {7, 8}, "seven others, or six where its own block was drawn"


@pytest.mark.parametrize("name", PATTERNS)
def test_what_cannot_run_is_refused(name):
    assert "CUDA" in PATTERNS[name].needs(Shape(1, 1, 64, 16), "cpu")
    assert "head_dim" in PATTERNS[name].needs(Shape(1, 1, 64, 8), "cuda")
    with pytest.raises(UserError, match="CUDA"):
        PATTERNS[name].fn(*Shape(1, 1, 64, 16).inputs(), causal=False)


def test_a_pattern_of_nothing_is_refused():
    with pytest.raises(UserError, match="must be at least 1, not 0"):
        sparse_variant("empty", window, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PATTERNS)
def test_the_kernel_is_fused(name):
    """Without compilation FlexAttention writes the scores: far more than this would be held then."""
    shape = Shape(1, 2, 4096, 64, "bfloat16")
    inputs = PATTERNS[name].inputs(shape, "cuda")
    PATTERNS[name].fn(*inputs, causal=False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    PATTERNS[name].fn(*inputs, causal=False)
    assert torch.cuda.max_memory_allocated() - before < 4 * shape.input_bytes
