"""Plain attention, softmax(QKᵀ/√D)V, in the four ways people write it. All give the same output and gradients.

The softmax is computed in float32 whatever the inputs are, as the kernel of torch.softmax does inside: by hand in
bfloat16 or float16 its error would be more than twice as large. The variants differ in what is alive when: each lists
the N×N matrices it keeps for the backward pass (law.saved), the most it holds at once (the peaks), the operations it
does (flops) and the bytes those move (traffic). Tensors are `[B, H, N, D]`.
Source of the definition: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
"""

import torch
from torch.utils.checkpoint import checkpoint

from attnlib.core import B, D, H, Law, N, Phases, Variant, c, e, g, h

SCORES = B * H * N**2 * e  # one N×N matrix per batch entry and head
SCORES32 = 4 * B * H * N**2  # the same in float32
CAST = h * (SCORES + SCORES32)  # traffic of converting one to the other
LINEAR = B * H * N * D * e  # one tensor of the shape of q
ROWS = 4 * B * H * N  # one float32 per row
INDICES = 8 * B * H * N  # one int64 per row
MASK = c * N**2  # one bool per pair, shared by batch and heads
MATMUL = 2 * B * H * N**2 * D  # floating-point operations of QKᵀ, of PV and of each of their gradients


def scaled_scores(q, k, causal):
    """QKᵀ/√D `[B, H, N, N]`, minus infinity where key j lies after query i if causal."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


def naive_custom(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, with the softmax written by hand: subtract the row maximum, exponentiate, sum, divide."""
    scores = scaled_scores(q, k, causal).float()
    exp = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    weights = (exp / exp.sum(dim=-1, keepdim=True)).to(v.dtype)
    return weights @ v


def naive(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, with torch.softmax."""
    return torch.softmax(scaled_scores(q, k, causal), dim=-1) @ v


class _WeightsOnly(torch.autograd.Function):
    """Keeps q, k, v and the weights P alone; the backward pass is written out, dS = P ∘ (dP − rowsum(dP ∘ P))."""

    @staticmethod
    def forward(ctx, q, k, v, causal):
        weights = torch.softmax(scaled_scores(q, k, causal), dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx, do):
        q, k, v, weights = ctx.saved_tensors
        dv = weights.transpose(-2, -1) @ do
        ds = (do @ v.transpose(-2, -1)).float()  # dP, turned into dS in place; where a mask made P = 0, dS is 0 as well
        ds.sub_((ds * weights).sum(dim=-1, keepdim=True)).mul_(weights).mul_(q.shape[-1] ** -0.5)
        ds = ds.to(v.dtype)
        return ds @ k, ds.transpose(-2, -1) @ q, dv, None


def naive_weights_only(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, from an autograd function that keeps only the attention weights beside q, k, v."""
    return _WeightsOnly.apply(q, k, v, causal)


def naive_recompute(q, k, v, *, causal=False):
    """o `[B, H, N, D]`, keeping no N×N matrix: torch.utils.checkpoint runs `naive` again when backward needs it."""
    return checkpoint(naive, q, k, v, causal=causal, use_reentrant=False, preserve_rng_state=False)


_ROW_TERMS = {"row sums": ROWS, "index of the row maximum": INDICES, "mask": MASK}
_GRADIENTS = {"output": LINEAR, "upstream gradient": LINEAR, "dv": LINEAR}
_LAST_PRODUCT = {"gradient of the scores": SCORES, **_GRADIENTS, "dq": LINEAR, "dk": LINEAR}

CUSTOM = Variant(
    name="naive_custom",
    fn=naive_custom,
    law=Law(
        saved={"exp": SCORES32, "weights": SCORES, "output": LINEAR, **_ROW_TERMS},
        forward_peak={
            "weights @ v": {"scores": SCORES32, "exp": SCORES32, "weights": SCORES, "output": LINEAR, **_ROW_TERMS},
            "weights.to(v.dtype)": {
                "scores": SCORES32,
                "exp": SCORES32,
                "weights in float32": h * SCORES32,
                "weights": SCORES,
                **_ROW_TERMS,
            },
        },
        backward_peak={
            "gradient of the division": {
                "exp": SCORES32,
                "gradient of the weights": SCORES32,
                "gradient of exp": SCORES32,
                "three steps of the gradient of the row sums": 3 * SCORES32,
                **_GRADIENTS,
                **_ROW_TERMS,
            },
            "gradient of q @ kᵀ": _LAST_PRODUCT,
        },
    ),
    flops=Phases(2 * MATMUL, 4 * MATMUL),
    traffic=Phases(
        4 * SCORES + 8 * SCORES32 + 2 * CAST + 4 * LINEAR + 4 * ROWS + INDICES + c * 2 * SCORES + 4 * MASK,
        6 * SCORES + 26 * SCORES32 + 2 * CAST + 8 * LINEAR + 7 * ROWS + INDICES + c * 2 * SCORES + MASK,
    ),
)

_FORWARD_TRAFFIC = 6 * SCORES + 4 * LINEAR + c * 2 * SCORES + 4 * MASK
_STEP = {"scores": SCORES, "the same, one step on": SCORES, "mask": MASK}
# On CUDA the kernel behind torch.softmax's backward first writes dP ∘ P into a matrix of its own
# (softmax_backward_cuda_out in aten/src/ATen/native/cuda/SoftMax.cu); the CPU's kernel does not.
_SOFTMAX_BACKWARD = {
    "softmax's backward": {
        "weights": SCORES,
        "gradient of the weights": SCORES,
        "gradient of the scores": SCORES,
        "workspace of the softmax's backward kernel": g * SCORES,
        **_GRADIENTS,
        "mask": MASK,
    },
    "gradient of q @ kᵀ": _LAST_PRODUCT,
}

NAIVE = Variant(
    name="naive",
    fn=naive,
    law=Law(
        saved={"weights": SCORES, "output": LINEAR, "mask": MASK},
        forward_peak={
            "scaling, masking, softmax": _STEP,
            "weights @ v": {"weights": SCORES, "output": LINEAR, "mask": MASK},
        },
        backward_peak=_SOFTMAX_BACKWARD,
    ),
    flops=Phases(2 * MATMUL, 4 * MATMUL),
    traffic=Phases(_FORWARD_TRAFFIC, 9 * SCORES + 8 * LINEAR + g * 3 * SCORES + c * 2 * SCORES + MASK),
)

_UNSAVED_MASK = {  # no graph keeps the mask, so it dies with the scores it was filled into
    "scaling, masking, softmax": _STEP,
    "weights @ v": {"weights": SCORES, "output": LINEAR},
}

WEIGHTS_ONLY = Variant(
    name="naive_weights_only",
    fn=naive_weights_only,
    law=Law(
        saved={"weights": SCORES, "output": LINEAR},
        forward_peak=_UNSAVED_MASK,
        backward_peak={
            "rowsum(dP ∘ P)": {
                "weights": SCORES,
                "gradient of the weights": SCORES32,
                "its product with the weights": SCORES32,
                "row sums of the product": ROWS,
                **_GRADIENTS,
            },
            "gradient of q @ kᵀ": {"weights": SCORES, **_LAST_PRODUCT},
        },
    ),
    flops=Phases(2 * MATMUL, 4 * MATMUL),
    traffic=Phases(_FORWARD_TRAFFIC, 6 * SCORES + 9 * SCORES32 + 2 * CAST + 8 * LINEAR + 2 * ROWS),
)

RECOMPUTE = Variant(
    name="naive_recompute",
    fn=naive_recompute,
    law=Law(saved={"output": LINEAR}, forward_peak=_UNSAVED_MASK, backward_peak=_SOFTMAX_BACKWARD),
    flops=Phases(2 * MATMUL, 5 * MATMUL),  # QKᵀ once more; checkpoint stops before it would repeat PV
    traffic=Phases(_FORWARD_TRAFFIC, 14 * SCORES + 10 * LINEAR + g * 3 * SCORES + c * 4 * SCORES + 5 * MASK),
)
