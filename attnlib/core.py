"""The vocabulary: a shape, a machine, an error for the user, and the oracle that defines correctness."""

from __future__ import annotations

import importlib.util
import math
import numbers
import re
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = ("bfloat16", "float16")
PHASES = ("forward", "backward")


class UserError(Exception):
    """Something the user can mend: its text is one clear line, shown without a traceback by the commands."""


@dataclass(frozen=True)
class Shape:
    """The size of one attention call: q, k, v and o are `[batch, heads, seq_len, head_dim]` of `dtype`.

    Raises UserError for a size that is not a positive integer, an unknown dtype, or a `causal` that is not a bool."""

    batch: int
    heads: int
    seq_len: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "seq_len", "head_dim"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
                raise UserError(f"{name} must be a positive integer, not {size!r}")
            object.__setattr__(self, name, int(size))
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if not isinstance(self.causal, (bool, np.bool_)):
            raise UserError(f"causal must be True or False, not {self.causal!r}")
        object.__setattr__(self, "causal", bool(self.causal))

    @property
    def element_size(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize

    @property
    def input_bytes(self) -> int:
        """Bytes of q, k and v together."""
        return 3 * self.batch * self.heads * self.seq_len * self.head_dim * self.element_size

    def inputs(self, device: str | torch.device = "cpu", seed: int = 0) -> tuple[torch.Tensor, ...]:
        """q, k, v `[B, H, N, D]` from a standard normal distribution, requiring gradients; without data on "meta"."""
        generator = torch.Generator("cpu" if torch.device(device).type == "meta" else device).manual_seed(seed)
        kind = {"dtype": DTYPES[self.dtype], "device": device, "generator": generator, "requires_grad": True}
        return tuple(torch.randn(self.batch, self.heads, self.seq_len, self.head_dim, **kind) for _ in range(3))

    def columns(self) -> dict[str, Any]:
        """The columns that name this shape in every table."""
        return asdict(self)


@cache
def packages_here() -> tuple[str, ...]:
    """The packages with attention kernels that this Python has, of those that variants ask for: flash-attn-4."""
    there = importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")
    return ("flash-attn-4",) if there else ()


@cache
def gpu_here(index: int | None) -> dict[str, Any]:
    """`name, multiprocessors, compute_capability` of a GPU of this computer, empty if it is not there."""
    if not torch.cuda.is_available() or (index or 0) >= torch.cuda.device_count():
        return {}
    found = torch.cuda.get_device_properties(index or 0)
    facts = {"name": found.name, "multiprocessors": found.multi_processor_count}
    return facts | {"compute_capability": f"{found.major}.{found.minor}"}


@dataclass(frozen=True)
class Machine:
    """A device as it was, with what ran on it: what data/<device>/machine.json holds. Laws, `needs`, floors and replays
    ask it, never the computer they run on. The defaults are an H100's, for a GPU of which nothing is known."""

    kind: str  # "cpu" or "cuda"
    name: str = ""  # as the maker calls it
    threads: int = 1  # of PyTorch on the CPU
    multiprocessors: int = 132  # of a GPU
    compute_capability: str = "9.0"  # of a GPU
    packages: tuple[str, ...] = ()  # with kernels of their own that were installed
    machine: str = ""  # a digest of lasting facts and of the host's name: rows of one digest may stand in one file
    slug: str = ""  # the folder of its data
    date: str = ""  # on which it was described
    torch: str = ""
    python: str = ""
    triton: str = ""
    cuda: str = ""
    cudnn: int = 0
    memory_bytes: int = 0
    l2_bytes: int = 0
    driver: str = ""  # of a GPU, and what it lets the GPU draw: as far as NVIDIA's library tells
    power_limit_w: float = 0.0
    notes: tuple[str, ...] = field(default=(), compare=False)  # what a reader must know of how it was found, sentences
    ceilings: dict = field(default_factory=dict, compare=False)  # see timing.machine.ceilings

    @classmethod
    def of(cls, device: Device) -> Machine:
        """The machine behind a device of this computer, as far as laws ask; a Machine as it is. A GPU that is not there
        is taken for an H100. Raises UserError for what is neither a CPU nor a CUDA GPU."""
        if isinstance(device, Machine):
            return device
        if not re.fullmatch(r"cpu(:0)?|cuda(:(0|[1-9][0-9]*))?", str(device)):
            raise UserError(f"device must be cpu, cuda or cuda:<index>, not {str(device)!r}")
        found, threads = torch.device(device), torch.get_num_threads()
        if found.type == "cpu":
            return cls("cpu", threads=threads)
        return cls("cuda", threads=threads, packages=packages_here(), **gpu_here(found.index))

    @classmethod
    def from_facts(cls, facts: dict) -> Machine:
        """From a record of machine.json, whatever else stands there and whatever an older one lacks."""
        found = {one.name: facts[one.name] for one in fields(cls) if one.name in facts}
        known: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}
        return cls(**known)

    @property
    def is_cpu(self) -> bool:
        """Whether it is a CPU; else it is a CUDA GPU."""
        return self.kind == "cpu"

    @property
    def capability(self) -> tuple[int, ...]:
        """The compute capability as numbers, (9, 0)."""
        return tuple(int(part) for part in self.compute_capability.split("."))


Device: TypeAlias = Machine | torch.device | str  # what functions about a device take; see Machine.of


def needs_dtype(shape: Shape, machine: Device) -> str | None:
    """The reason why a machine lacks the shape's dtype, or None."""
    machine = Machine.of(machine)
    if shape.dtype == "bfloat16" and not machine.is_cpu and machine.capability < (8, 0):
        return f"{machine.name or 'this GPU'} has no bfloat16 arithmetic (needs compute capability 8.0)"
    return None


def needs_cuda(shape: Shape, machine: Device, dtypes: tuple, capability: tuple[int, int], kernel: str) -> str | None:
    """The reason why a `kernel` cannot run there, by device, compute capability and dtype, or None."""
    machine = Machine.of(machine)
    if machine.is_cpu:
        return f"{kernel} needs a CUDA GPU"
    if machine.capability < capability:
        return f"{kernel} needs compute capability {capability[0]}.{capability[1]}"
    return None if shape.dtype in dtypes else f"{kernel} takes {' and '.join(dtypes)}, not {shape.dtype}"


def dense_reach(shape: Shape) -> torch.Tensor:
    """`[N, N]`: how many times query i sees key j in dense attention: once, or not at all where j > i if causal."""
    ones = torch.ones(shape.seq_len, shape.seq_len, dtype=torch.float64)
    return ones.tril() if shape.causal else ones


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """Attention in float64, the definition every variant is tested against: softmax(q kᵀ/√D + log reach) v.

    q, k, v: `[B, H, N, D]`, any dtype; reach: `[N, N]` or `[H, N, N]`, how many times query i sees key j. Returns o
    `[B, H, N, D]` in float64, differentiable. A query that sees no key gives 0, with gradient 0."""
    q, k, v = (x.double() for x in (q, k, v))
    sees_any = (reach.sum(-1, keepdim=True) > 0).to(q)
    bias = torch.where(sees_any.bool(), reach.to(q).log(), 0.0)
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias, dim=-1)
    return weights * sees_any @ v
