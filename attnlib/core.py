"""The vocabulary: a shape, a variant, the symbols of its formulas, and the oracle that defines correctness."""

import math
import numbers
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache

import sympy
import torch

# B batch, H heads, N sequence length, D head dimension, e bytes per element; c is 1 with a causal mask and 0 without;
# g is 1 on a CUDA GPU and 0 on the CPU, whose kernels take other workspaces; h is 1 for bfloat16 and float16, which
# some steps convert to float32, and 0 for float32; t is the number of CPU threads, m of a GPU's multiprocessors.
B, H, N, D, e = SYMBOLS = sympy.symbols("B H N D e", positive=True, integer=True)
c, g, h = SWITCHES = sympy.symbols("c g h", nonnegative=True, integer=True)
t, m = UNITS = sympy.symbols("t m", positive=True, integer=True)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ACCOUNTS = ("saved", "forward_peak", "backward_peak")

Terms = dict[str, sympy.Expr]  # {name: formula in bytes}


@cache
def compiled(expression: sympy.Expr) -> Callable[..., int]:
    """A formula in the symbols above as a function of their values, in the order B, H, N, D, e, c, g, h, t, m."""
    return sympy.lambdify((*SYMBOLS, *SWITCHES, *UNITS), expression, "math")


@cache
def multiprocessors(device: str) -> int:
    """A GPU's number of multiprocessors; where there is none to ask, that of the H100 and H200, 132."""
    there = device != "cpu" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if there else 132


class AttnError(Exception):
    """Something the user can mend: its text is one clear line, shown without a traceback by the commands."""


@dataclass(frozen=True)
class Shape:
    """The size of one attention call: q, k, v and o are `[batch, heads, seq_len, head_dim]` of `dtype`.

    Raises AttnError for a size that is not a positive integer, an unknown dtype, or a `causal` that is not a bool.
    """

    batch: int
    heads: int
    seq_len: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False

    def __post_init__(self):
        for name in ("batch", "heads", "seq_len", "head_dim"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
                raise AttnError(f"{name} must be a positive integer, not {size!r}")
            object.__setattr__(self, name, int(size))
        if self.dtype not in DTYPES:
            raise AttnError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if not isinstance(self.causal, bool):
            raise AttnError(f"causal must be True or False, not {self.causal!r}")

    @property
    def element_size(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize

    @property
    def input_bytes(self) -> int:
        """Bytes of q, k and v together."""
        return 3 * self.batch * self.heads * self.seq_len * self.head_dim * self.element_size

    def inputs(self, device="cpu", seed=0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v `[B, H, N, D]` from a standard normal distribution, requiring gradients; without data on "meta"."""
        generator = torch.Generator("cpu" if device == "meta" else device).manual_seed(seed)
        size = (self.batch, self.heads, self.seq_len, self.head_dim)
        draw = lambda: torch.randn(size, dtype=DTYPES[self.dtype], device=device, generator=generator)  # noqa: E731
        return tuple(draw().requires_grad_() for _ in range(3))

    def evaluate(self, expression, device: str = "cpu") -> int:
        """The value of a formula in the symbols above at this shape on this device, an exact integer."""
        sizes = (self.batch, self.heads, self.seq_len, self.head_dim, self.element_size)
        switches = (int(self.causal), int(device != "cpu"), int(self.dtype != "float32"))
        units = (torch.get_num_threads(), multiprocessors(device))
        return int(compiled(sympy.sympify(expression))(*sizes, *switches, *units))

    def columns(self) -> dict:
        """The columns that name this shape in every table."""
        return asdict(self)


@dataclass(frozen=True)
class Phases:
    """One formula for the forward pass and one for the backward pass, in the symbols above."""

    forward: sympy.Expr
    backward: sympy.Expr


@dataclass(frozen=True)
class Law:
    """Bytes above the inputs, as named terms `{name: formula}`, at every shape.

    saved: alive between forward and backward, the output included. forward_peak and backward_peak: `{operation:
    terms}`, the moments at which that phase can hold the most, the backward one with the upstream gradient. Which of
    them does depends on the sizes (the score matrices decide where N exceeds D, the linear tensors where it does not),
    so that the peak is the largest of these sums. hidden: `{operation: bytes}` that its kernel takes for itself while
    it runs, which no ledger can see and each is told; they are among the terms of the peaks.
    """

    saved: Terms
    forward_peak: dict[str, Terms]
    backward_peak: dict[str, Terms]
    hidden: Terms = field(default_factory=dict)

    def moments(self, account: str) -> dict[str, Terms]:
        """The candidates for `account`, one of ACCOUNTS: `{operation: terms}`."""
        return {"between the phases": self.saved} if account == "saved" else getattr(self, account)

    def at(self, account: str, shape: Shape, device: str = "cpu") -> tuple[str, dict[str, int]]:
        """The operation at which `account` is reached, and what is alive then, `{term: bytes}`, without empty terms."""

        def total(moment):
            return shape.evaluate(sum(moment[1].values()), device)

        operation, terms = max(self.moments(account).items(), key=total)
        sizes = {name: shape.evaluate(formula, device) for name, formula in terms.items()}
        return operation, {name: nbytes for name, nbytes in sizes.items() if nbytes}

    def bytes(self, account: str, shape: Shape, device: str = "cpu") -> int:
        """The bytes of `account`, one of ACCOUNTS, at `shape`."""
        return max(shape.evaluate(sum(terms.values()), device) for terms in self.moments(account).values())


def useful_flops(shape: Shape, phase: str) -> int:
    """The floating-point operations that attention is worth, by the convention of FlashAttention's benchmarks.

    Two products over the pairs that are seen in the "forward" phase, five in "backward", where a fused kernel computes
    QKᵀ again; a multiply-add is two. With a causal mask N(N + 1)/2 pairs are seen, else N².
    """
    pairs = shape.seq_len * (shape.seq_len + 1) // 2 if shape.causal else shape.seq_len**2
    return {"forward": 4, "backward": 10}[phase] * shape.batch * shape.heads * shape.head_dim * pairs


def dense_reach(shape: Shape) -> torch.Tensor:
    """`[N, N]`: how many times query i sees key j in dense attention: once, or not at all where j > i if causal."""
    ones = torch.ones(shape.seq_len, shape.seq_len, dtype=torch.float64)
    return ones.tril() if shape.causal else ones


def older_than(capability: tuple[int, int], device: torch.device) -> bool:
    """Whether `device` is a GPU of a lower compute capability; a GPU that is not there is taken for a new one."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability(device) < capability


def needs_dtype(shape: Shape, device: torch.device) -> str | None:
    """The reason why `device` lacks the shape's dtype, or None."""
    device = torch.device(device)
    if shape.dtype == "bfloat16" and older_than((8, 0), device):
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic (needs compute capability 8.0)"
    return None


@dataclass(frozen=True)
class Variant:
    """One way to compute attention, with all that is known about it before it runs.

    name: the word used everywhere. fn: `(q, k, v, *, causal) -> o`, all `[B, H, N, D]`. reach: `(shape) -> [N, N]` or
    `[H, N, N]`, how many times query i sees key j. law: its memory, None where that depends on what PyTorch picks.
    flops: floating-point operations of its matrix products (a multiply-add is two). traffic: bytes its operations read
    and write, each operand once per operation, None where only the ledger counts them. needs: `(shape, device) ->
    None`, or the reason why it cannot run there. traced: `(q, k, v, *, causal, device) -> o`, what the ledger runs in
    its place where fn leaves the choice of an operator to the tensors' device, and tensors without data have none.
    ledgered: whether a ledger can run it. inputs: `(shape, device) -> tensors`, what fn takes, the first of o's shape.
    inner: the attention inside, where fn is more than that.
    """

    name: str
    fn: Callable
    law: Law | None
    flops: Phases
    traffic: Phases | None = None
    reach: Callable = dense_reach
    needs: Callable = needs_dtype
    traced: Callable | None = None
    ledgered: bool = True
    inputs: Callable = Shape.inputs
    inner: "Variant | None" = None


def oracle(q, k, v, reach):
    """Attention in float64, the definition every variant is tested against: softmax(q kᵀ/√D + log reach) v.

    q, k, v: `[B, H, N, D]`, any dtype; reach: `[N, N]` or `[H, N, N]`, how many times query i sees key j. Returns o
    `[B, H, N, D]` in float64, differentiable. A query that sees no key gives 0, with gradient 0.
    """
    q, k, v = (x.double() for x in (q, k, v))
    sees_any = (reach.sum(-1, keepdim=True) > 0).to(q)
    bias = torch.where(sees_any.bool(), reach.to(q).log(), 0.0)
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias, dim=-1)
    return weights * sees_any @ v
