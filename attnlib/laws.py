"""What a variant should cost: the symbols of the formulas, the terms that many share, Law, and Variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias

import sympy
import torch

from attnlib.core import Device, Machine, Shape, UserError, dense_reach, needs_dtype

# B batch, H heads, N sequence length, D head dimension, e bytes per element; c is 1 with a causal mask and 0 without;
# g is 1 on a CUDA GPU and 0 on the CPU, whose kernels take other workspaces; h is 1 for bfloat16 and float16, which
# some steps convert to float32, and 0 for float32; t is the number of CPU threads, m of a GPU's multiprocessors.
B, H, N, D, e = SYMBOLS = sympy.symbols("B H N D e", positive=True, integer=True)
c, g, h = SWITCHES = sympy.symbols("c g h", nonnegative=True, integer=True)
t, m = UNITS = sympy.symbols("t m", positive=True, integer=True)

SCORES = B * H * N**2 * e  # bytes of one N×N matrix per batch entry and head
SCORES32 = 4 * B * H * N**2  # the same in float32
LINEAR = B * H * N * D * e  # one tensor of the shape of q
LINEAR32 = 4 * B * H * N * D  # the same in float32
ROWS = 4 * B * H * N  # one float32 per row
MATMUL = 2 * B * H * N**2 * D  # floating-point operations of QKᵀ, of PV and of each of their gradients

ACCOUNTS = ("saved", "forward_peak", "backward_peak")
USES = {"inference": "forward", "training": "backward"}  # what it is for, and the phase with which that ends

# a number of bytes or operations: a formula in the symbols above, or, where there is none to print, a function
Formula: TypeAlias = sympy.Expr | Callable[[Shape, Machine], int]
Terms: TypeAlias = dict[str, Formula]  # {name: bytes}


def round_up(size: sympy.Expr, multiple: sympy.Expr | int) -> sympy.Expr:
    """`size` rounded up to a multiple."""
    return multiple * sympy.ceiling(size / multiple)


@cache
def compiled(formula: sympy.Expr) -> Callable[..., int]:
    """A formula as a function of the values of its symbols, in the order B, H, N, D, e, c, g, h, t, m."""
    return sympy.lambdify((*SYMBOLS, *SWITCHES, *UNITS), formula, "math")


def evaluate(formula: Formula | int, shape: Shape, machine: Device = "cpu") -> int:
    """The value of a formula at a shape on a machine, an exact integer."""
    machine = Machine.of(machine)
    if not isinstance(formula, sympy.Basic):
        return formula(shape, machine) if callable(formula) else int(formula)
    sizes = (shape.batch, shape.heads, shape.seq_len, shape.head_dim, shape.element_size)
    switches = (int(shape.causal), int(not machine.is_cpu), int(shape.dtype != "float32"))
    return int(compiled(formula)(*sizes, *switches, machine.threads, machine.multiprocessors))


@dataclass(frozen=True)
class Phases:
    """One formula for the forward pass and one for the backward pass."""

    forward: Formula
    backward: Formula


def known_everywhere(shape: Shape, machine: Machine) -> str | None:
    """None: the law holds there."""
    return None


@dataclass(frozen=True)
class Law:
    """Bytes above the inputs, as named terms `{name: formula}`, at every shape."""

    # alive between forward and backward, the output included
    saved: Terms
    # {operation: terms}: the moments at which that phase can hold the most, the backward one with the upstream
    # gradient. Which of them does depends on the sizes (the score matrices decide where N exceeds D, the linear tensors
    # where it does not), so that the peak is the largest of these sums
    forward_peak: dict[str, Terms]
    backward_peak: dict[str, Terms]
    # {operation: bytes} that its kernel takes for itself while it runs, which no ledger can see and each is told; they
    # are among the terms of the peaks
    hidden: Terms = field(default_factory=dict)
    # (shape, machine) -> None, or the reason why the law does not hold there
    unknown: Callable[[Shape, Machine], str | None] = known_everywhere

    def moments(self, account: str) -> dict[str, Terms]:
        """The candidates for `account`, one of ACCOUNTS: `{operation: terms}`."""
        return {"between the phases": self.saved} if account == "saved" else getattr(self, account)

    def at(self, account: str, shape: Shape, machine: Device = "cpu") -> tuple[str, dict[str, int]]:
        """The operation at which `account` is reached, and what is alive then, `{term: bytes}`, without empty terms."""
        machine = Machine.of(machine)
        sizes = {
            operation: {name: evaluate(formula, shape, machine) for name, formula in terms.items()}
            for operation, terms in self.moments(account).items()
        }
        operation = max(sizes, key=lambda one: sum(sizes[one].values()))
        return operation, {name: nbytes for name, nbytes in sizes[operation].items() if nbytes}

    def bytes(self, account: str, shape: Shape, machine: Device = "cpu") -> int:
        """The bytes of `account`, one of ACCOUNTS, at `shape`, on a machine."""
        return sum(self.at(account, shape, machine)[1].values())


@dataclass(frozen=True)
class Variant:
    """One way to compute attention, with all that is known about it before it runs."""

    name: str  # the word used everywhere
    fn: Callable[..., torch.Tensor]  # (q, k, v, *, causal) -> o, all [B, H, N, D]
    law: Law | None  # its memory; None where that depends on what PyTorch picks
    flops: Phases  # floating-point operations of its matrix products, a multiply-add counted as two
    # bytes that its operations read and write, each operand once per operation; None where only the ledger counts them
    traffic: Phases | None = None
    # (shape) -> [N, N] or [H, N, N], how many times query i sees key j
    reach: Callable[[Shape], torch.Tensor] = dense_reach
    # (shape, machine) -> None, or the reason why it cannot run there
    needs: Callable[[Shape, Device], str | None] = needs_dtype
    # (q, k, v, *, causal, machine) -> o, what the ledger runs in place of fn where fn leaves the choice of an operator
    # to the tensors' device, and tensors without data have none
    traced: Callable[..., torch.Tensor] | None = None
    ledgered: bool = True  # whether a ledger can run it
    # (shape, device, seed) -> the tensors that fn takes, the first of o's shape
    inputs: Callable[..., tuple[torch.Tensor, ...]] = Shape.inputs
    inner: Variant | None = None  # the attention inside, where fn is more than that
    gpu_product: str = ""  # how a GPU kernel may multiply in float32, if not plainly: of accuracy.PRODUCTS


def law_of(variant: Variant, shape: Shape, machine: Device = "cpu") -> Law | None:
    """The law of a variant at that shape on that machine, None where none is known."""
    law = variant.law
    return None if law is None or law.unknown(shape, Machine.of(machine)) else law


def peaks_until(phase: str) -> tuple[str, ...]:
    """The ACCOUNTS that decide what fits up to `phase`: "forward", "backward" or one of USES. Raises UserError for any
    other word."""
    peaks = {"forward": ACCOUNTS[1:2], "backward": ACCOUNTS[1:]}
    if (known := USES.get(phase, phase)) not in peaks:
        raise UserError(f"phase must be one of {', '.join((*peaks, *USES))}, not {phase!r}")
    return peaks[known]


def bytes_needed(variant: Variant, shape: Shape, machine: Device, phase: str = "backward") -> int:
    """Bytes that inputs and the highest peak need at once; phase: see `peaks_until`. Raises UserError without a law."""
    if variant.law is None:
        raise UserError(f"{variant.name} has no law: what it needs depends on what runs underneath")
    return shape.input_bytes + max(variant.law.bytes(peak, shape, machine) for peak in peaks_until(phase))


def useful_flops(shape: Shape, phase: str) -> int:
    """Floating-point operations by the convention of FlashAttention's benchmarks: two products over N² pairs, masked
    N(N + 1)/2, in "forward", five in "backward", where a fused kernel computes QKᵀ again; a multiply-add is two."""
    pairs = shape.seq_len * (shape.seq_len + 1) // 2 if shape.causal else shape.seq_len**2
    return {"forward": 4, "backward": 10}[phase] * shape.batch * shape.heads * shape.head_dim * pairs


def work(variant: Variant, shape: Shape, phase: str) -> int:
    """The useful operations of a variant in "forward" or "backward": `useful_flops` if it is dense, else its own."""
    own = getattr(variant.flops, phase)
    return useful_flops(shape, phase) if variant.reach is dense_reach else evaluate(own, shape)
