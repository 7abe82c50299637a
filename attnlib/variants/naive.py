"""Plain attention, softmax(QKᵀ/√D)V, in the four ways people write it. All give the same output and gradients.

The softmax of a half type is computed in float32, as inside torch.softmax: by hand in the half type its error would be
more than twice as large. The variants differ in what is alive when: each lists the N×N matrices it keeps for
the backward pass (law.saved), the most it holds at once (the peaks), its operations (flops) and the bytes those move
(traffic). Tensors are `[B, H, N, D]`. Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnlib.calling import cast, differentiable, wide
from attnlib.laws import LINEAR, MATMUL, ROWS, SCORES, SCORES32, B, H, Law, N, Phases, Variant, c, g, h

CAST = h * (SCORES + SCORES32)  # traffic of converting one to the other
INDICES = 8 * B * H * N  # one int64 per row
MASK = c * N**2  # one bool per pair, shared by batch and heads


def scaled_scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """QKᵀ/√D `[B, H, N, N]`, minus infinity where key j lies after query i if causal."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


def naive_custom(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """o `[B, H, N, D]`, with the softmax written by hand: subtract the row maximum, exponentiate, sum, divide."""
    scores = wide(scaled_scores(q, k, causal))
    exp = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    weights = (exp / exp.sum(dim=-1, keepdim=True)).to(v.dtype)
    return weights @ v


def naive(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """o `[B, H, N, D]`, with torch.softmax."""
    return torch.softmax(scaled_scores(q, k, causal), dim=-1) @ v


def weights_only_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The output and the weights P."""
    weights = torch.softmax(scaled_scores(q, k, causal), dim=-1)
    return weights @ v, weights


def weights_only_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, by dS = P ∘ (dP − rowsum(dP ∘ P))."""
    dv = weights.transpose(-2, -1) @ do
    ds = wide(do @ v.transpose(-2, -1))  # dP, turned into dS in place; where a mask made P = 0, dS is 0 as well
    ds.sub_((ds * weights).sum(dim=-1, keepdim=True)).mul_(weights).mul_(q.shape[-1] ** -0.5)
    ds = ds.to(v.dtype)
    return ds @ k, ds.transpose(-2, -1) @ q, dv


WEIGHTS_ONLY = differentiable("naive_weights_only", weights_only_forward, weights_only_backward, keeps_output=False)


def naive_weights_only(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """o `[B, H, N, D]`, from an autograd function that keeps only the attention weights beside q, k, v."""
    return WEIGHTS_ONLY.apply(*cast(q, k, v), causal)[0]


def naive_recompute(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """o `[B, H, N, D]`, keeping no N×N matrix: torch.utils.checkpoint runs `naive` again when backward needs it."""
    return checkpoint(naive, q, k, v, causal=causal, use_reentrant=False, preserve_rng_state=False)


_FLOPS = Phases(2 * MATMUL, 4 * MATMUL)
_PER_ROW = {"row sums": ROWS, "index of the row maximum": INDICES, "mask": MASK}
_SCORES_EXP = {"scores": SCORES32, "exp": SCORES32}
_RESULT = {"weights": SCORES, "output": LINEAR}
_GRADIENTS = {"output": LINEAR, "upstream gradient": LINEAR, "dv": LINEAR}
_LAST_PRODUCT = {"gradient of the scores": SCORES, **_GRADIENTS, "dq": LINEAR, "dk": LINEAR}
# exp / sums: autograd takes the gradient of the sums first, as -dP * ((exp / sums) / sums)
_EXP_BACKWARD = {"exp": SCORES32, "gradient of the weights": SCORES32}
_SUM_BACKWARD = {"four steps of the gradient of the row sums": 4 * SCORES32}

NAIVE_CUSTOM_LAW = Law(
    saved={"exp": SCORES32, **_RESULT, **_PER_ROW},
    forward_peak={
        "weights @ v": {**_SCORES_EXP, **_RESULT, **_PER_ROW},
        "weights.to(v.dtype)": {**_SCORES_EXP, "weights in float32": h * SCORES32, "weights": SCORES, **_PER_ROW},
    },
    backward_peak={
        "gradient of the division": {**_EXP_BACKWARD, **_SUM_BACKWARD, **_GRADIENTS, **_PER_ROW},
        "gradient of q @ kᵀ": _LAST_PRODUCT,
    },
)
NAIVE_CUSTOM_TRAFFIC = Phases(
    4 * SCORES + 8 * SCORES32 + 2 * CAST + 4 * LINEAR + 4 * ROWS + INDICES + c * 2 * SCORES + 4 * MASK,
    6 * SCORES + 26 * SCORES32 + 2 * CAST + 8 * LINEAR + 7 * ROWS + INDICES + c * 2 * SCORES + MASK,
)
NAIVE_CUSTOM = Variant("naive_custom", naive_custom, NAIVE_CUSTOM_LAW, _FLOPS, NAIVE_CUSTOM_TRAFFIC)

_FORWARD_TRAFFIC = 6 * SCORES + 4 * LINEAR + c * 2 * SCORES + 4 * MASK
_STEP = {"scores": SCORES, "the same, one step on": SCORES, "mask": MASK}
# no graph keeps the mask, so it dies with the scores it was filled into
_UNSAVED_MASK = {"scaling, masking, softmax": _STEP, "weights @ v": _RESULT}
# On CUDA the kernel behind torch.softmax's backward first writes dP ∘ P into a matrix of its own
# (softmax_backward_cuda_out in aten/src/ATen/native/cuda/SoftMax.cu); the CPU's kernel does not.
_WORKSPACE = {"workspace of the softmax's backward kernel": g * SCORES}
_SOFTMAX = {"weights": SCORES, "gradient of the weights": SCORES, "gradient of the scores": SCORES, **_WORKSPACE}
_SOFTMAX_BACKWARD = {
    "softmax's backward": {**_SOFTMAX, **_GRADIENTS, "mask": MASK},
    "gradient of q @ kᵀ": _LAST_PRODUCT,
}
_PRODUCT = {"its product with the weights": SCORES32, "row sums of the product": ROWS}
_WRITTEN_OUT = {
    "rowsum(dP ∘ P)": {"weights": SCORES, "gradient of the weights": SCORES32, **_PRODUCT, **_GRADIENTS},
    "gradient of q @ kᵀ": {"weights": SCORES, **_LAST_PRODUCT},
}

NAIVE_LAW = Law(
    saved={**_RESULT, "mask": MASK},
    forward_peak={"scaling, masking, softmax": _STEP, "weights @ v": {**_RESULT, "mask": MASK}},
    backward_peak=_SOFTMAX_BACKWARD,
)
NAIVE_TRAFFIC = Phases(_FORWARD_TRAFFIC, 9 * SCORES + 8 * LINEAR + g * 3 * SCORES + c * 2 * SCORES + MASK)
NAIVE = Variant("naive", naive, NAIVE_LAW, _FLOPS, NAIVE_TRAFFIC)

WEIGHTS_ONLY_TRAFFIC = Phases(_FORWARD_TRAFFIC, 6 * SCORES + 9 * SCORES32 + 2 * CAST + 8 * LINEAR + 2 * ROWS)
NAIVE_WEIGHTS_ONLY = Variant(
    "naive_weights_only", naive_weights_only, Law(_RESULT, _UNSAVED_MASK, _WRITTEN_OUT), _FLOPS, WEIGHTS_ONLY_TRAFFIC
)

RECOMPUTE_LAW = Law({"output": LINEAR}, _UNSAVED_MASK, _SOFTMAX_BACKWARD)
RECOMPUTE_FLOPS = Phases(2 * MATMUL, 5 * MATMUL)  # QKᵀ once more; checkpoint stops before it would repeat PV
RECOMPUTE_TRAFFIC = Phases(_FORWARD_TRAFFIC, 14 * SCORES + 10 * LINEAR + g * 3 * SCORES + c * 4 * SCORES + 5 * MASK)
NAIVE_RECOMPUTE = Variant("naive_recompute", naive_recompute, RECOMPUTE_LAW, RECOMPUTE_FLOPS, RECOMPUTE_TRAFFIC)
