"""The fused kernels: pinned means pinned, refusals are clear, layouts do not matter; and the readable one's tiles."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from attnlib import VARIANTS, family
from attnlib.core import Machine, Shape, UserError
from attnlib.laws import ACCOUNTS
from attnlib.memory.allocator import account
from attnlib.memory.check import wrapped_scalars
from attnlib.variants.tiled import tiled

# what the profiler calls a backend's forward kernel, on Hopper
KERNELS = {
    "sdpa_flash": "flash_fwd",
    "sdpa_efficient": "fmha_cutlassF",
    "sdpa_cudnn": "cudnn_generated",
    "sdpa_math": "softmax",
}


def gradients(fn, q, k, v, do, causal=False):
    """The output and dq, dk, dv."""
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
    with pytest.raises(UserError, match=name.removeprefix("sdpa_").upper()):
        VARIANTS[name].fn(q, k, v)
    assert "CUDA" in VARIANTS[name].needs(Shape(1, 1, 8, 8), "cpu")


REFUSED = [
    ("sdpa_flash", Shape(1, 1, 64, 64)),
    ("sdpa_flash", Shape(1, 1, 64, 264, "bfloat16")),
    ("sdpa_efficient", Shape(1, 1, 64, 12, "bfloat16")),
    ("sdpa_efficient", Shape(1, 1, 64, 6)),
    ("sdpa_cudnn", Shape(1, 1, 64, 64)),
    ("sdpa_cudnn", Shape(1, 1, 64, 264, "float16")),
    ("sdpa_cudnn", Shape(1, 1, 64, 12, "float16")),
]


@pytest.mark.parametrize(("name", "shape"), REFUSED, ids=str)
def test_what_a_kernel_needs_is_said_before_it_runs(name, shape):
    assert VARIANTS[name].needs(shape, Machine("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape"), REFUSED, ids=str)
def test_what_needs_says_is_refused_is_refused(name, shape):
    with pytest.raises(UserError):
        VARIANTS[name].fn(*shape.inputs("cuda"))


def test_cudnn_takes_wider_heads_on_hopper_than_elsewhere():
    """The widest head depends on the compute capability of the machine that is asked about."""
    wide = Shape(1, 1, 64, 256, "float16")
    assert VARIANTS["sdpa_cudnn"].needs(wide, Machine("cuda", compute_capability="9.0")) is None
    assert "up to 128" in VARIANTS["sdpa_cudnn"].needs(wide, Machine("cuda", compute_capability="8.0"))


@pytest.mark.parametrize("causal", [False, True])
def test_strides_do_not_matter(causal, device):
    """q, k, v as views of one projection `[B, N, 3, H, D]`, with a gradient that is not contiguous either."""
    shape = Shape(2, 3, 100, 32, "bfloat16", causal)
    draw = torch.Generator(device).manual_seed(1)
    x = torch.randn(2, 100, 4, 3, 32, device=device, generator=draw).bfloat16()
    q, k, v, do = x.permute(2, 0, 3, 1, 4)
    for name, variant in family("kernels").items():
        if variant.needs(shape, device):
            continue
        views = gradients(variant.fn, q, k, v, do, causal)
        copies = gradients(variant.fn, *(y.contiguous() for y in (q, k, v, do)), causal)
        for what, view, copy in zip(("o", "dq", "dk", "dv"), views, copies, strict=True):
            torch.testing.assert_close(
                view, copy, rtol=0.02, atol=0.02, msg=lambda text, at=(name, what): f"{at}: {text}"
            )


@pytest.mark.parametrize("name", ["sdpa_math", "sdpa_flash", "sdpa_default", "tiled"])
def test_mixed_inputs_are_refused(name):
    q, k, v = Shape(1, 1, 8, 8).inputs()
    with pytest.raises((UserError, RuntimeError), match="dtype|device|shape"):
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
    with pytest.raises(UserError, match="positive integers"):
        tiled(*Shape(1, 1, 8, 8).inputs(), block_q=block)


def test_tiled_refuses_what_is_no_mask_and_no_sequence():
    with pytest.raises(UserError, match="causal must be True or False, not 'no'"):
        tiled(*Shape(1, 1, 8, 8).inputs(), causal="no")
    with pytest.raises(UserError, match="no size zero"):
        tiled(*(torch.empty(1, 1, 0, 8) for _ in range(3)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch says it too, at length
def test_a_refusal_names_a_last_axis_that_is_not_contiguous():
    q, k, v = (x.mT.contiguous().mT for x in Shape(2, 3, 37, 11).inputs())
    with pytest.raises(UserError, match="last axis must be contiguous"):
        VARIANTS["sdpa_flash"].fn(q, k, v)


def test_tiled_needs_memory_linear_in_n():
    """To within what the CPU's allocator counts for scale factors, and far from the 144 MiB that scores would take."""
    shape = Shape(1, 1, 6144, 64)
    seen = account(VARIANTS["tiled"], *shape.inputs(), causal=False, backward=True)
    for which in ACCOUNTS:
        law = VARIANTS["tiled"].law.bytes(which, shape)
        assert law <= seen[f"{which}_bytes"] <= law + wrapped_scalars("cpu") and law < 32 * 2**20, which


@pytest.mark.skipif("flash-attn-4" in Machine.of("cuda").packages, reason="flash-attn-4 is installed")
def test_a_package_that_is_not_there_says_what_to_install():
    shape = Shape(1, 1, 8, 8, "bfloat16")
    assert "pip install" in VARIANTS["fa4"].needs(shape, "cuda") and VARIANTS["fa4"].needs(shape, "cpu")
    with pytest.raises(UserError, match="pip install"):
        VARIANTS["fa4"].fn(*shape.inputs())
