"""The fused kernels: pinned means pinned, refusals are clear, layouts do not matter; and the readable one's tiles."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from attnlib import FUSED, VARIANTS, sdpa
from attnlib.core import AttnError, Shape
from attnlib.memory import account
from attnlib.tiled import tiled

# what the profiler calls a backend's forward kernel, on Hopper
KERNELS = {
    "sdpa_flash": "flash_fwd",
    "sdpa_efficient": "fmha_cutlassF",
    "sdpa_cudnn": "cudnn_generated",
    "sdpa_math": "softmax",
}


def gradients(fn, q, k, v, do, causal=False):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = fn(*leaves, causal=causal)
    return [o, *torch.autograd.grad(o, leaves, do)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_the_pinned_kernel_is_the_one_that_runs(name):
    q, k, v = (x.detach() for x in Shape(2, 4, 512, 64, "bfloat16").inputs("cuda"))
    VARIANTS[name].fn(q, k, v)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as seen:
        VARIANTS[name].fn(q, k, v)
        torch.cuda.synchronize()
    names = " ".join(event.name for event in seen.events())
    assert KERNELS[name] in names
    assert not any(kernel in names for other, kernel in KERNELS.items() if other != name)


@pytest.mark.parametrize("name", ["sdpa_efficient", "sdpa_cudnn"])
def test_a_kernel_that_is_not_there_errs_instead_of_falling_back(name):
    q, k, v = Shape(1, 1, 8, 8).inputs()
    with pytest.raises(AttnError, match=name.removeprefix("sdpa_").upper()):
        VARIANTS[name].fn(q, k, v)
    assert "CUDA" in VARIANTS[name].needs(Shape(1, 1, 8, 8), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("sdpa_flash", Shape(1, 1, 64, 64)),
        ("sdpa_flash", Shape(1, 1, 64, 264, "bfloat16")),
        ("sdpa_efficient", Shape(1, 1, 64, 12, "bfloat16")),
        ("sdpa_efficient", Shape(1, 1, 64, 6)),
        ("sdpa_cudnn", Shape(1, 1, 64, 64)),
        ("sdpa_cudnn", Shape(1, 1, 64, 264, "float16")),
        ("sdpa_cudnn", Shape(1, 1, 64, 12, "float16")),
    ],
    ids=str,
)
def test_what_needs_says_is_refused_is_refused(name, shape):
    assert VARIANTS[name].needs(shape, "cuda")
    with pytest.raises(AttnError):
        VARIANTS[name].fn(*shape.inputs("cuda"))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("causal", [False, True])
def test_strides_do_not_matter(name, causal, device):
    """q, k, v as views of one projection `[B, N, 3, H, D]`, with a gradient that is not contiguous either."""
    shape = Shape(2, 3, 100, 32, "bfloat16", causal)
    if reason := VARIANTS[name].needs(shape, device):
        pytest.skip(reason)
    draw = torch.Generator(device).manual_seed(1)
    x = torch.randn(2, 100, 4, 3, 32, device=device, generator=draw).bfloat16()
    q, k, v, do = x.permute(2, 0, 3, 1, 4)
    views = gradients(VARIANTS[name].fn, q, k, v, do, causal)
    copies = gradients(VARIANTS[name].fn, *(y.contiguous() for y in (q, k, v, do)), causal)
    for view, copy in zip(views, copies, strict=True):
        torch.testing.assert_close(view, copy, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["sdpa_math", "sdpa_flash", "sdpa_default", "tiled"])
def test_mixed_inputs_are_refused(name):
    q, k, v = Shape(1, 1, 8, 8).inputs()
    with pytest.raises((AttnError, RuntimeError), match="dtype|device|shape"):
        VARIANTS[name].fn(q, k.half(), v)


@pytest.mark.parametrize(("block_q", "block_k"), [(1, 1), (7, 3), (3, 7), (64, 16), (10_000, 10_000)])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_any_size_give_the_same(block_q, block_k, causal):
    q, k, v = (x.detach() for x in Shape(2, 1, 33, 5).inputs())
    do = torch.randn_like(q)
    expected = gradients(VARIANTS["naive"].fn, q, k, v, do, causal)
    blocks = {"block_q": block_q, "block_k": block_k}
    found = gradients(lambda *qkv, causal: tiled(*qkv, causal=causal, **blocks), q, k, v, do, causal)
    for want, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [0, -1, 2.5, "8"])
def test_tiles_of_no_size_are_refused(block):
    with pytest.raises(AttnError, match="positive integers"):
        tiled(*Shape(1, 1, 8, 8).inputs(), block_q=block)


def test_tiled_refuses_what_is_no_mask_and_no_sequence():
    with pytest.raises(AttnError, match="causal must be True or False, not 'no'"):
        tiled(*Shape(1, 1, 8, 8).inputs(), causal="no")
    with pytest.raises(AttnError, match="no size zero"):
        tiled(*(torch.empty(1, 1, 0, 8) for _ in range(3)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch says it too, at length
def test_a_refusal_names_a_last_axis_that_is_not_contiguous():
    q, k, v = (x.mT.contiguous().mT for x in Shape(2, 3, 37, 11).inputs())
    with pytest.raises(AttnError, match="last axis must be contiguous"):
        sdpa.sdpa_flash(q, k, v)


def test_tiled_needs_memory_linear_in_n():
    """To within what the CPU's allocator counts for scale factors, and far from the 1 GiB that scores would take."""
    shape = Shape(1, 1, 16384, 64)
    seen = account(VARIANTS["tiled"], *shape.inputs(), causal=False, backward=True)
    for which in ("saved", "forward_peak", "backward_peak"):
        law = VARIANTS["tiled"].law.bytes(which, shape)
        assert law <= seen[f"{which}_bytes"] <= law + 64 and law < 64 * 2**20, which


def test_packages_that_are_not_there_say_what_to_install():
    for variant in (sdpa.FA2, sdpa.FA4):
        reason = variant.needs(Shape(1, 1, 8, 8, "bfloat16"), "cuda")
        assert reason is None or "pip install" in reason
        assert variant.needs(Shape(1, 1, 8, 8), "cpu")
