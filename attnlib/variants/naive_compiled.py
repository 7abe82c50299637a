"""Plain attention as PyTorch's compiler has it: where it knows the spelling, one of PyTorch's fused kernels."""

from dataclasses import replace

from torch import Tensor

from attnlib.calling import cast, compiled_for_each_size
from attnlib.core import Machine, Shape
from attnlib.laws import MATMUL, Phases, Variant
from attnlib.variants.naive import naive
from attnlib.variants.sdpa_laws import FLASH_LAW


def naive_compiled(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """o `[B, H, N, D]`: `naive`, compiled."""
    return compiled_for_each_size(naive)(*cast(q, k, v), causal=causal)


def not_fused(shape: Shape, machine: Machine) -> str | None:
    """The law is that of the CPU's flash kernel, which takes the place of an unmasked softmax(QKᵀ/√D)V."""
    known = machine.is_cpu and not shape.causal and shape.head_dim > 1 < shape.seq_len
    return None if known else "what the compiler makes of it, and which kernel PyTorch picks, is not known here"


LAW, COUNTS = replace(FLASH_LAW, unknown=not_fused), Phases(2 * MATMUL, 5 * MATMUL)
NAIVE_COMPILED = Variant("naive_compiled", naive_compiled, LAW, COUNTS, ledgered=False)
