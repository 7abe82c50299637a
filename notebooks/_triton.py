"""A Triton kernel that does nothing but exponentials, in a module of its own that is imported when it first runs."""

import triton
import triton.language as tl


@triton.jit
def only_exponentials(numbers, ROUNDS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(numbers + at)
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(numbers + at, x)
