"""What our functions of q, k, v `[B, H, N, D]` share with PyTorch's: checks, autocast's rule, gradients."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnlib.core import DTYPES, UserError


def one_line(value: object) -> str:
    """What a value prints as, cut short."""
    return " ".join(repr(value).split())[:80]


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for x's kind of device."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as PyTorch's fused attention takes them: under autocast in its type, but for float64 and integers."""
    if not autocasting(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def refuse_unlike(*tensors: Tensor) -> None:
    """Raise UserError, in one line, unless tensors that come with q are as it is, `[B, H, N, D]` of one dtype."""
    first, *others = tensors
    if not all(x.shape == first.shape and x.dtype == first.dtype and x.device == first.device for x in others):
        raise UserError("q, k and v must have the same shape, dtype and device")
    if first.dim() != 4 or first.dtype not in (*DTYPES.values(), torch.float64):
        wanted = "floating-point of 16 bits or more, [B, H, N, D]"
        raise UserError(f"q, k and v must be {wanted}, not {first.dtype} {list(first.shape)}")


def refuse_causal(causal: Any) -> None:
    """Raise UserError, in one line, unless causal is a bool."""
    if not isinstance(causal, bool):
        raise UserError(f"causal must be True or False, not {one_line(causal)}")


def checked(q: Any, k: Any, v: Any, causal: Any) -> tuple[Tensor, ...]:
    """q, k, v, `cast`. Raises UserError, in one line, unless they are then alike in shape, dtype and device, plain
    floating-point tensors `[B, H, N, D]`, and causal is a bool."""
    if not all(isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested for x in (q, k, v)):
        raise UserError("q, k and v must be tensors, neither sparse nor nested")
    q, k, v = cast(q, k, v)
    refuse_unlike(q, k, v)
    if not q.numel():
        raise UserError(f"q, k and v must be [B, H, N, D] with no size zero, not {list(q.shape)}")
    refuse_causal(causal)
    return q, k, v


def wide(x: Tensor) -> Tensor:
    """x in float32, in which a half type is computed; itself where it is that already, or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off for x's kind of device: inside, types are what the function makes them."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else nullcontext()


@contextmanager
def ordinary() -> Iterator[None]:
    """Gradients are recorded, autocast is off, whatever the caller's mode: what is measured is what was asked for."""
    cpu, cuda = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda"))
    with torch.inference_mode(False), torch.enable_grad(), cpu, cuda:
        yield


def folding(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.vmap's rule for a function of tensors whose first axis is a batch: one more axis is a larger batch."""

    def rule(info: Any, in_dims: tuple, *given: Any) -> tuple[Any, Any]:
        def whole(x: Any, at: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            return (x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)).flatten(0, 1)

        found = function(*map(whole, given, in_dims))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0,) * len(found)

    return rule


def differentiable(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], keeps_output: bool = True
) -> Any:
    """Attention called `name` with a backward pass of its own: a class with `apply(q, k, v, *how)`, for torch.autograd,
    and with `gradients.apply`, which can be differentiated no further.

    forward: `(q, k, v, *how)` -> o and other tensors for the backward pass. backward: `(do, q, k, v, o, *others, *how)`
    -> dq, dk, dv; it does without o unless `keeps_output`. Both run without autocast, and their tensors may have any
    strides: hooks on saved tensors may change them. `apply` returns what `forward` does, of which only o has a
    gradient. A second derivative raises UserError. torch.func.grad takes it, and torch.vmap, as a larger batch."""

    def plainly(function: Callable[..., Any]) -> Any:
        def call(first: Tensor, *rest: Any) -> Any:
            with without_autocast(first):
                return tuple(function(first, *rest))

        # torch.autograd.Function asks for it at each call: found once, it costs nothing
        call.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
        return staticmethod(call)

    forth, back = plainly(forward), plainly(backward)

    class Gradients(torch.autograd.Function):
        """A function of its own, so that a second derivative raises instead of being silently wrong."""

        forward = back

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Any) -> None:
            raise UserError(f"{name} has no second derivative")

    class Attention(torch.autograd.Function):
        forward, gradients = forth, Gradients

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.save_for_backward(*inputs[:3], *output[not keeps_output :])
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)  # of what has none
            ctx.how = inputs[3:]

        @staticmethod
        def backward(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            watched = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
            gradients = Gradients.apply if watched else back  # which is faster
            grads = (None,) * 3 if do is None else gradients(do, *ctx.saved_tensors, *ctx.how)
            return *grads, *(None for _ in ctx.how)

    for one in (Gradients, Attention):
        one.vmap = staticmethod(folding(one.apply))
    return Attention


@cache
def compiled_for_each_size(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile(fn) without dynamic sizes: with a head dimension that may vary, attention is not fused."""
    import torch._dynamo.config as tracing
    import torch._functorch.config as differentiation
    import torch._inductor.config as compiling

    tracing.recompile_limit = 256
    compiling.compile_threads = 1  # the worker of a sweep may have no children
    differentiation.donated_buffer = False  # or a backward pass cannot be run twice, as it is to be timed
    return torch.compile(fn, dynamic=False)
