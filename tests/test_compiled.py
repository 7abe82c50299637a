"""What torch.compile makes of attention: the compiled variant, and the atlas of spellings."""

import pytest
import torch

from attnlib import VARIANTS
from attnlib.core import Shape
from attnlib.laws import ACCOUNTS, law_of
from attnlib.memory.allocator import account
from notebooks.spellings import mapped, spelled
from report.accuracy import RESULTS, compared

FORMULA = "torch.softmax(q @ k.mT * s, -1) @ v"
pytestmark = pytest.mark.ci  # a compiler needs seconds for each shape


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_attention_equals_the_oracle(dtype, causal, device):
    found = compared(VARIANTS["naive_compiled"], Shape(2, 3, 111, 17, dtype, causal), device)
    assert all(found[f"{what}_of_reference"] <= 2 for what in RESULTS)


@pytest.mark.parametrize("size", [(2, 3, 111, 17), (1, 1, 300, 64), (1, 2, 77, 24)])
def test_the_law_of_compiled_attention_is_that_of_the_kernel_it_becomes(size):
    """Unmasked in float32 on a CPU; with a mask it is not fused, and no law is known."""
    variant, shape = VARIANTS["naive_compiled"], Shape(*size)
    inputs = variant.inputs(shape)
    for _ in range(2):
        figures = account(variant, *inputs, causal=False, backward=True)
    assert [figures[f"{one}_bytes"] for one in ACCOUNTS] == [variant.law.bytes(one, shape) for one in ACCOUNTS]
    assert law_of(variant, Shape(*size, causal=True)) is None


def test_a_spelling_is_one_line_and_its_row_says_what_became_of_it():
    shape = Shape(1, 2, 128, 32)
    fused, kept = (
        mapped("one", text, shape, True, "cpu") for text in (FORMULA, "x = q * s; torch.softmax(x @ k.mT, -1) @ v")
    )
    matrix = 2 * 128**2 * 4
    assert fused["fused"] == "_scaled_dot_product_flash_attention_for_cpu" and fused["compiled_saved_bytes"] < matrix
    assert not kept["fused"] and kept["compiled_saved_bytes"] > matrix
    assert fused["compiled_error"] <= 2 * fused["error"] and fused["saved_bytes"] > matrix


def test_a_spelling_may_have_several_statements():
    q, k, v = Shape(1, 1, 8, 4).inputs()
    by_hand = spelled("by hand", "x = q @ k.mT * s; e = x.exp(); e / e.sum(-1, keepdim=True) @ v")
    torch.testing.assert_close(by_hand.fn(q, k, v), spelled("formula", FORMULA).fn(q, k, v))
