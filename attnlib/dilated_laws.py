"""The memory law of dilated attention: what its largest branch holds, and what the kernel underneath takes for it.

Each branch is one or more calls of a kernel whose own law is known. Which call holds the most depends on its view, so
the law goes through the views. It is that of contiguous inputs `[B, H, N, D]`; on the CPU, of float32.
"""

from dataclasses import replace
from functools import cache

import sympy
import torch

from attnlib.core import AttnError, B, D, H, Law, N, Shape, c, g, h
from attnlib.kernels import KERNELS, Kernel, chosen
from attnlib.naive import LINEAR, ROWS
from attnlib.views import HEAD_OFFSETS, MOST, View, all_views, fits_one_batch

PHASES = ("forward", "backward")
TERMS = ("results of one call", "copies made for its kernel", "workspace")


def is_dense(size: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor of this size and these strides is contiguous."""
    return torch.empty_strided(size, strides, device="meta").is_contiguous()


def terms_of(kernel: Kernel, view: View, shape: Shape, phase: str, device: str, joins: bool) -> tuple[int, int, int]:
    """TERMS in bytes for a kernel's call on one view in `phase`, of which the results are joined to others or not."""
    (b, heads, n), width = view.size, shape.head_dim
    if n == 1 and kernel.name == "cudnn":
        kernel = KERNELS["flash"]
    part = Shape(b, heads, n, width, shape.dtype, shape.causal)
    linear, rows = part.input_bytes // 3, 4 * b * heads * n
    if phase == "forward":
        joining = 2 * rows * (joins and device == "cpu")  # the weights of the plain merge
        workspace = max(part.evaluate(kernel.forward_bytes, device), joining)
        return linear + rows, 0, workspace
    along_b, along_h, along_n, _ = view.strides((shape.heads * shape.seq_len, shape.seq_len, 1))
    # FlashAttention-2 also takes whole heads in segments as a batch of one head
    orders = [((b, n, heads), (along_b, along_n, along_h)), ((heads, b, n), (along_h, along_b, along_n))]
    dense = [is_dense(*order) for order in orders[: kernel.copies if b * heads <= MOST else 1]]
    copies = 0 if any(dense) else kernel.copies * linear
    lse = 0 if any(dense[1:]) or is_dense(view.size, (along_b, along_h, along_n)) else rows
    return 3 * linear, copies + lse, part.evaluate(kernel.backward_bytes, device)


@cache
def _largest(of_first: bool, phase: str, kernel: str | None, shape: Shape, device: str, offsets: str, *config: int):
    """`terms_of` for the first call, or for that of all others which holds the most, and whether the first call's
    results are the whole tensors."""
    half = len(config) // 2
    underneath = KERNELS[kernel] if kernel else chosen(None, shape, device)
    if underneath.forward_bytes is None:
        raise AttnError(f"the memory of the {underneath.name} kernel on views is not known")
    if fits_one_batch(shape.batch, shape.heads, config[half:], offsets):
        shape = replace(shape, batch=1, heads=shape.batch * shape.heads)
    branches = tuple(zip(config[:half], config[half:], strict=True))
    calls = all_views(shape.batch, shape.heads, shape.seq_len, branches, offsets)
    rest = calls[:1] if of_first else calls[1:]
    found = [terms_of(underneath, view, shape, phase, device, not of_first) for view in rest]
    b, heads, n = calls[0].size
    return max(found, key=sum, default=(0, 0, 0)), b * heads * n == shape.batch * shape.heads * shape.seq_len


class Call(sympy.Function):
    """`_largest` as a term of a formula, of numbers alone: what is asked for, the sizes, the configuration."""

    @staticmethod
    def _imp_(term, phase, of_first, kernel, offsets, *sizes):
        *size, causal, gpu, half = sizes[:7]
        shape = Shape(*size, "bfloat16" if half else "float32", bool(causal))
        name = [None, *KERNELS][kernel]
        device = "cuda" if gpu else "cpu"
        found, whole = _largest(bool(of_first), PHASES[phase], name, shape, device, HEAD_OFFSETS[offsets], *sizes[7:])
        return (*found, int(whole), found[0] // 3)[term]  # the last: one of a backward call's three results


def law(segment_lengths, dilation_rates, head_offsets: str, kernel: str | None) -> Law | None:
    """The law of these branches, None for a kernel whose own is not known. Saved are the output and one log-sum-exp per
    row, whatever runs underneath."""
    if kernel and KERNELS[kernel].forward_bytes is None:
        return None
    names = [None, *KERNELS]

    def how(phase, of_first):
        asked = (PHASES.index(phase), int(of_first), names.index(kernel), HEAD_OFFSETS.index(head_offsets))
        return *asked, B, H, N, D, c, g, h, *segment_lengths, *dilation_rates

    def call(phase, of_first):
        terms = {name: Call(at, *how(phase, of_first)) for at, name in enumerate(TERMS)}
        return terms, 1 - Call(len(TERMS), *how(phase, of_first))

    saved = {"output": LINEAR, "log-sum-exp": ROWS}
    results, part = TERMS[0], Call(len(TERMS) + 1, *how("backward", True))
    first, spread = call("forward", True)
    laid_out = {results: first[results], "log-sum-exp": ROWS, "output": spread * LINEAR}
    first_back, spread_back = call("backward", True)
    left = first_back[results] - 2 * spread_back * part  # of three results, two are gone by then
    base = {**saved, "upstream gradient": LINEAR}
    return Law(
        saved=saved,
        forward_peak={
            "first call": first,
            "its results laid out": laid_out,
            "another call": {**saved, **call("forward", False)[0]},
        },
        backward_peak={
            "first call": {**base, **first_back},
            "its results laid out": {**base, results: left, "dq, dk, dv": 3 * spread_back * LINEAR},
            "another call": {**base, "dq, dk, dv": 3 * LINEAR, **call("backward", False)[0]},
        },
    )
