"""Attention called as PyTorch's own is: differentiated twice, under autocast, by compilers, transforms and hooks."""

import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from attnlib import VARIANTS
from attnlib.calling import checked, wide
from attnlib.core import Shape, UserError, oracle
from attnlib.dilated import dilated, dilated_reference
from attnlib.dilated.definition import dilated_reach
from attnlib.memory.ledger import ledger
from attnlib.timing.measure import measure
from report.accuracy import compared

CONFIG = {"segment_lengths": (8, 16, 64), "dilation_rates": (1, 2, 5)}
OURS = {name: VARIANTS[name].fn for name in ("naive_custom", "naive", "naive_weights_only", "naive_recompute", "tiled")}
OURS |= {"dilated": partial(dilated, **CONFIG), "dilated_reference": partial(dilated_reference, **CONFIG)}
REFUSED = ("naive_weights_only", "tiled", "dilated")  # a backward pass of their own, which is differentiated no further
every = pytest.mark.parametrize("name", OURS)


def doubles(*size):
    return [torch.randn(*size, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@every
@pytest.mark.parametrize("causal", [False, True])
def test_float64_is_computed_in_float64(name, causal):
    inputs = doubles(1, 2, 40, 4)
    shape = Shape(1, 2, 40, 4, causal=causal)
    reach = dilated_reach(shape, **CONFIG) if "dilated" in name else VARIANTS[name].reach(shape)
    torch.testing.assert_close(OURS[name](*inputs, causal=causal), oracle(*inputs, reach), rtol=1e-12, atol=1e-12)
    small = doubles(1, 1, 3, 2)
    assert gradcheck(partial(OURS[name], causal=causal), small)


@every
def test_second_derivatives_are_right_or_refused(name):
    """Wherever the upstream gradient comes from, and not before they are asked for. In float64 dilated attention is its
    readable definition, which has one."""
    if name in REFUSED:
        inputs = Shape(1, 2, 16, 4).inputs()
        (dq,) = grad(OURS[name](*inputs).sum(), inputs[0], create_graph=True)
        for other in inputs:
            with pytest.raises(UserError, match=r"^[^\n]* has no second derivative$"):
                grad(dq.sum(), other, retain_graph=True)
    if name not in ("naive_weights_only", "tiled"):
        assert gradgradcheck(OURS[name], doubles(1, 1, 3, 2))


@every
@pytest.mark.parametrize("outside", [False, True], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "v in bfloat16"])
def test_autocast_is_that_of_the_fused_call(name, outside, mixed, device):
    """The result is in autocast's type and that of the same call on inputs of this type; gradients are in each input's
    own type."""
    inputs = Shape(1, 2, 48, 8).inputs(device)
    if mixed:
        inputs = (*inputs[:2], inputs[2].detach().bfloat16().requires_grad_())
    do = torch.randn(1, 2, 48, 8, device=device).bfloat16()
    with torch.autocast(device, torch.bfloat16):
        o = OURS[name](*inputs)
        assert o.dtype == F.scaled_dot_product_attention(*inputs).dtype == torch.bfloat16
        grads = None if outside else grad(o, inputs, do)
    grads = grads or grad(o, inputs, do)
    assert [x.dtype for x in grads] == [x.dtype for x in inputs]
    same = [x.detach().bfloat16().requires_grad_() for x in inputs]
    want = OURS[name](*same)
    for found, expected in zip((o, *grads), (want, *grad(want, same, do)), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.03, atol=0.03)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in checked(*doubles(1, 1, 3, 2), False)} == {torch.float64}
    assert [wide(torch.ones(1, dtype=t)).dtype for t in (torch.float16, torch.float32, torch.float64)] == [
        torch.float32, torch.float32, torch.float64
    ]  # fmt: skip


def strided_along_d(x):
    """The same numbers, in memory with D outermost."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


@every
def test_backward_trusts_no_layout_of_saved_tensors(name, device):
    """Hooks, such as those that offload or compress, may hand back other strides than were saved."""
    found = []
    for change in (lambda x: x, strided_along_d):
        inputs = Shape(2, 3, 40, 8).inputs(device)
        with torch.autograd.graph.saved_tensors_hooks(change, lambda x: x):
            o = OURS[name](*inputs)
        found.append([o, *grad(o, inputs, torch.ones_like(o))])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@every
def test_transforms_are_right_or_refused(name, device):
    """torch.func.grad and vmap; checkpointing refuses the first, or both, by a line of PyTorch's own."""
    q, k, v = (torch.randn(3, 2, 2, 24, 4, device=device) for _ in range(3))
    fn = OURS[name]
    want = torch.stack([fn(*each) for each in zip(q, k, v, strict=True)])
    shared = torch.stack([fn(one, k[0], other) for one, other in zip(q, v, strict=True)])
    try:
        torch.testing.assert_close(torch.vmap(fn)(q, k, v), want, rtol=1e-4, atol=1e-5)
        found = torch.vmap(fn, in_dims=(0, None, 1))(q, k[0], v.movedim(0, 1))
        torch.testing.assert_close(found, shared, rtol=1e-4, atol=1e-5)
    except RuntimeError as refused:  # by the checkpointing of PyTorch 2.11
        assert name == "naive_recompute" and "does not have vmap support" in str(refused)
    of_q = torch.func.grad(lambda q, k, v: (fn(q, k, v) ** 2).sum())
    if name == "naive_recompute":
        with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
            of_q(q[0], k[0], v[0])
        return
    leaf = q.clone().requires_grad_()
    (dq,) = grad((torch.stack([fn(*each) for each in zip(leaf, k, v, strict=True)]) ** 2).sum(), leaf)
    torch.testing.assert_close(of_q(q[0], k[0], v[0]), dq[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.vmap(of_q)(q, k, v), dq, rtol=1e-4, atol=1e-5)


def test_operators_are_what_pytorchs_compiler_expects(device):
    given = *Shape(2, 3, 40, 8).inputs(device), [8, 16], [1, 5], True, "modulo", ""
    o, lse = torch.ops.attnlib.dilated(*given)
    torch.library.opcheck(torch.ops.attnlib.dilated.default, given)
    inputs = [x.detach() for x in (torch.randn_like(o), *given[:3], o, lse)]
    torch.library.opcheck(torch.ops.attnlib.dilated_backward.default, (*inputs, *given[3:]))
    torch.testing.assert_close(o, dilated(*given[:3], segment_lengths=(8, 16), dilation_rates=(1, 5), causal=True))


BAD_CALLS = [
    (lambda q, other: (q, other[:, :, :30], other[:, :, :30]), {}, "same shape"),
    (lambda q, other: (q, other, other), {}, "same shape"),
    (lambda q, other: (q, q, q.bfloat16()), {}, "same shape, dtype"),
    (lambda q, other: (q[0], q[0], q[0]), {}, r"\[B, H, N, D\]"),
    (lambda q, other: (q, q, q), {"causal": 1}, "causal must be"),
]


@pytest.mark.parametrize(("tensors", "how", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_an_operator_refuses_what_the_function_refuses(tensors, how, message):
    """Also where a compiler calls it: what does not fit must not be read beyond its end."""
    given = tensors(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 80, 8))
    with pytest.raises(UserError, match=message):
        dilated(*given, **CONFIG, **how)
    if not how:
        with pytest.raises(UserError, match=message):
            torch.ops.attnlib.dilated(*given, [8, 16], [1, 2], False, "modulo", "")
    compiled = torch.compile(partial(dilated, **CONFIG, **how), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=message):
        compiled(*given)


def test_tracers_see_one_operator_that_is_right_at_other_lengths():
    fn = partial(dilated, **CONFIG)
    example, other = (torch.randn(1, 2, n, 8) for n in (40, 64))
    traces = [torch.jit.trace(lambda x: fn(x, x, x), example, check_trace=False)]
    traces.append(make_fx(lambda x: fn(x, x, x), tracing_mode="symbolic")(example))
    for trace in traces:
        torch.testing.assert_close(trace(other), fn(other, other, other))


def test_tensors_made_of_others_are_taken_apart():
    """Each of two inner tensors has its own result: nothing is allocated that forgets what it stands for."""
    pairs = [TwoTensor(torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8)) for _ in range(3)]
    for name, fn in OURS.items():
        o = fn(*pairs)
        for half in ("a", "b"):
            want = fn(*(getattr(x, half) for x in pairs))
            torch.testing.assert_close(getattr(o, half), want, rtol=1e-4, atol=1e-5, msg=name)


def test_a_module_that_is_loaded_again_works():
    """As JupyterLab's autoreload does it."""
    code = (
        "import importlib, torch, attnlib.dilated.attention as m; importlib.reload(m); x = torch.randn(1, 2, 16, 4)\n"
    )
    code += (
        "print(torch.ops.attnlib.dilated(x, x, x, [4], [1], False, 'modulo', '')[0].shape, m.DILATED.fn(x, x, x).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("[1, 2, 16, 4]") == 2, done.stderr


def test_transforms_of_the_operator_are_refused_in_a_line():
    q = torch.randn(1, 2, 16, 4)
    with pytest.raises(NotImplementedError, match=r"^torch.func.grad takes `dilated` outside[^\n]*$"):
        torch.func.grad(lambda q: torch.ops.attnlib.dilated(q, q, q, [4], [1], False, "modulo", "")[0].sum())(q)


@every
def test_the_future_does_not_reach_back(name):
    """Whatever it is: an infinite or undefined key after a query is not seen by it."""
    for bad in (float("inf"), float("nan")):
        q, k, v = (torch.randn(1, 1, 32, 4) for _ in range(3))
        k[0, 0, 20] = bad
        assert OURS[name](q, k, v, causal=True)[0, 0, :16].isfinite().all()


MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "autocast": partial(torch.autocast, "cpu")}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_measured_does_not_depend_on_the_callers_mode(mode):
    shape, naive = Shape(1, 1, 32, 8), VARIANTS["naive"]
    saved = measure(naive, shape, "cpu", 0.01)["saved_bytes"]
    with MODES[mode]():
        row = measure(naive, shape, "cpu", 0.01)
        assert row["status"] == "ok" and row["saved_bytes"] == saved
        assert len(ledger(naive, shape)) > 10 and compared(naive, shape, "cpu")["dq_error"] > 0


@pytest.mark.ci
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_whole_at_any_length(mode, device):
    """One graph, recompiled for lengths in general at most once; segments that follow the length are no reason for
    another one."""
    torch.compiler.reset()

    def attend(q, k, v, causal):
        n = q.shape[2]
        return dilated(q, k, v, segment_lengths=(8, 16, n // 2), dilation_rates=(1, 2, 5), causal=causal) * 2

    graphs = CompileCounterWithBackend("inductor")
    how = {"backend": graphs} if mode == "default" else {"mode": mode}
    compiled = torch.compile(attend, fullgraph=True, **how)
    for seq_len in (64, 80, 96, 100):
        for causal in (False, True):
            shape = Shape(1, 2, seq_len, 8, causal=causal)
            inputs = shape.inputs(device)
            do = torch.randn_like(inputs[0])
            reach = dilated_reach(shape, segment_lengths=(8, 16, seq_len // 2), dilation_rates=(1, 2, 5)).to(device)
            want = oracle(*inputs, reach) * 2
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = compiled(*inputs, causal)
                grads = grad(found, inputs, do)
            for got, expected in zip((found, *grads), (want, *grad(want, inputs, do.double())), strict=True):
                torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-4)
    assert graphs.frame_count <= 4, "with a mask and without: for the first length, and for any"
