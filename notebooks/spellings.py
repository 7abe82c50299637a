"""What a compiler makes of attention that is spelled in one way or another: fused or not, and what it keeps.

A spelling is Python of q, k, v `[B, H, N, D]` and s = 1/√D on one line: statements, and at last the output."""

import ast
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlib.calling import compiled_for_each_size
from attnlib.core import Shape, dense_reach, oracle
from attnlib.laws import Variant
from attnlib.memory.allocator import account
from attnlib.timing.clock import settle, typical_ms, watched
from attnlib.timing.sweep import Job, Row
from attnlib.variants.naive import NAIVE
from report.accuracy import results_of
from report.skipping import NotMeasured

SIDES = ("", "compiled_")  # of the columns of an eager and of a compiled spelling
ATLAS = [f"{side}{what}" for side in SIDES for what in ("saved_bytes", "peak_bytes", "error")]
TIMES = [f"{side}ms" for side in SIDES]


def future(x: Tensor) -> Tensor:
    """`[N, N]` for scores x: where key j lies after query i."""
    return torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)


def spelled(name: str, text: str) -> Variant:
    """A spelling as a variant without a law; whether it is causal its text decides."""
    *steps, last = map(ast.unparse, ast.parse(text).body)
    body = "".join(f"    {line}\n" for line in ("s = q.shape[-1] ** -0.5", *steps, f"return {last}"))
    known: dict[str, Any] = {"torch": torch, "F": F, "inf": math.inf, "future": future}
    exec(f"def attention(q, k, v, causal=None):\n{body}", known)
    return replace(NAIVE, name=name, fn=known["attention"], law=None, traffic=None, ledgered=False)


def both_sides(name: str, text: str) -> dict[str, Variant]:
    """A spelling as it is, and compiled, forgetting what was compiled before."""
    torch._dynamo.reset()
    plain = spelled(name, text)
    return dict(zip(SIDES, (plain, replace(plain, fn=compiled_for_each_size(plain.fn))), strict=True))


def called(variant: Variant, shape: Shape, device: str, training: bool) -> Callable[[], Any]:
    """A forward pass without a graph or, in training, a forward and a backward pass."""
    inputs = [x.requires_grad_(training) for x in shape.inputs(device)]
    do = torch.randn_like(inputs[0])
    forward = partial(variant.fn, *inputs)
    return (lambda: torch.autograd.grad(forward(), inputs, do)) if training else forward


def error(variant: Variant, shape: Shape, device: str, training: bool) -> float:
    """The largest relative error of the output and, in training, of the gradients."""
    inputs = tuple(x.requires_grad_(training) for x in shape.inputs(device, seed=1))
    do = torch.randn_like(inputs[0])
    exact = results_of(partial(oracle, reach=dense_reach(shape).to(device)), tuple(x.double() for x in inputs), do)
    got = results_of(variant.fn, inputs, do) if training else [variant.fn(*inputs).double().cpu()]
    return max(float((one - want).norm() / want.norm()) for one, want in zip(got, exact, strict=False))


def mapped(name: str, text: str, shape: Shape, training: bool, device: str) -> Row:
    """A row of the atlas: `spelling, training`, the shape's columns and ATLAS; `fused`, the operator of fused attention
    that it became, if any, and `compile_s`."""
    row: Row = {"spelling": name, "training": training, **shape.columns()}
    for side, variant in both_sides(name, text).items():
        call, begun = called(variant, shape, device, training), time.monotonic()
        try:
            call()
        except torch._dynamo.exc.TorchDynamoException as reason:  # a machine without a compiler for its kernels, say
            raise NotMeasured(f"PyTorch's compiler does not work here: {type(reason).__name__}.") from reason
        settle(device)
        row["compile_s"] = time.monotonic() - begun
        inputs = [x.requires_grad_(training) for x in shape.inputs(device)]
        held = account(variant, *inputs, causal=shape.causal, backward=training)
        row[f"{side}saved_bytes"] = held["saved_bytes"]
        row[f"{side}peak_bytes"] = held["backward_peak_bytes" if training else "forward_peak_bytes"]
        row[f"{side}error"] = error(variant, shape, device, training)
    names = (event.name.removeprefix("aten::") for event in watched(call, device).events())
    return row | {"fused": next((one for one in names if one.startswith("_scaled_dot_product")), "")}


def timed(name: str, text: str, shape: Shape, training: bool, device: str) -> Row:
    """`spelling, training`, the shape's columns and TIMES."""
    row: Row = {"spelling": name, "training": training, **shape.columns()}
    sides = both_sides(name, text).items()
    return row | {f"{side}ms": typical_ms(called(one, shape, device, training), device, 0.1) for side, one in sides}


def spelling_jobs(
    function: Callable, spellings: Mapping[str, str], shapes: Iterable[Shape], uses: Iterable[bool], device: str
) -> list[Job]:
    """`mapped` or `timed` of each spelling at each shape, with a mask if its name says so, in training or not."""
    todo = [
        (name, text, replace(shape, causal="causal" in name), use, device)
        for shape, use, (name, text) in product(shapes, uses, spellings.items())
    ]
    return [Job(f"{one[0]} {one[2]} {one[3]}", function, one, process="compiler") for one in todo]
