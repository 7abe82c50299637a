"""The ledger: what a variant does, operation by operation, written down without running it."""

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from attnlib.calling import ordinary
from attnlib.core import PHASES, Device, Machine, Shape
from attnlib.laws import Variant, evaluate, law_of

aten = torch.ops.aten
NO_KERNEL = {aten._unsafe_view, aten.empty, aten.empty_like, aten.new_empty}  # beside the views
WRITE_ONLY = {aten.new_zeros, aten.zeros_like, aten.ones_like, aten.randn_like}  # their operand only gives the shape
ON_THE_HOST = {aten._scaled_dot_product_efficient_attention: 2}  # this many last results are no device memory
# what PyTorch's counter leaves out, and what does the same: a product in place, and the CPU's flash kernel
FLASH = "_scaled_dot_product_flash_attention"
ALIKE = {"baddbmm_": "baddbmm", f"{FLASH}_for_cpu": FLASH, f"{FLASH}_for_cpu_backward": f"{FLASH}_backward"}
FLOPS = flop_registry | {getattr(aten, op): flop_registry[getattr(aten, other)] for op, other in ALIKE.items()}


@dataclass(frozen=True)
class Operand:
    """What an operation was given in the place of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Ledger(TorchDispatchMode):
    """Writes a row for each operation: `phase, op, call, flops, traffic_bytes, largest_bytes, alive, alive_bytes`.

    call: the operator and what it was given, an Operand in the place of each tensor; None where none shows.
    traffic_bytes: what the operation reads and writes, each operand once. largest_bytes: its largest operand. alive:
    `{name: bytes}` of the storages alive at its end that were not there when the ledger was opened, each named after
    the operation that made it; alive_bytes: their sum. No ledger sees into a kernel: `hidden`, `{op: bytes}`, tells
    what operations take for themselves, and on a GPU the softmax's backward gets a row for its first step."""

    def __init__(self, machine: Device = "cpu", hidden: dict[str, int] | None = None) -> None:
        super().__init__()
        self.machine, self.hidden, self.phase = Machine.of(machine), hidden or {}, ""
        self.rows: list[dict] = []
        self.alive: dict[str, int] = {}
        self.known, self.made = weakref.WeakSet[Any](), Counter[Any]()

    def know(self, *tensors: torch.Tensor) -> None:
        """Leave out tensors that were there before."""
        self.known.update(tensor.untyped_storage() for tensor in tensors)

    def write(self, op: str, flops: int = 0, sizes: Sequence[int] = (0,), workspace: int = 0, call: Any = None) -> None:
        """Append a row: what moves `sizes` bytes, with what is alive now and a kernel's own `workspace`."""
        alive = self.alive | ({"workspace": workspace} if workspace else {})
        row = {"phase": self.phase, "op": op, "call": call, "flops": flops}
        row |= {"traffic_bytes": sum(sizes), "largest_bytes": max(sizes)}
        self.rows.append({**row, "alive": alive, "alive_bytes": sum(alive.values())})

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation and write its row."""
        kwargs, op = kwargs or {}, func._overloadpacket
        out = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs)), tree_leaves(out)
        given, results = ([leaf for leaf in found if isinstance(leaf, torch.Tensor)] for found in leaves)
        self.know(*results[len(results) - ON_THE_HOST.get(op, 0) :])
        for storage in (result.untyped_storage() for result in results):
            if storage not in self.known:
                self.known.add(storage)
                self.made[op] += 1
                name = f"{op.__name__} {self.made[op]}"
                self.alive[name] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, name)
        if results and not func.is_view and op not in NO_KERNEL:
            operands = results if op in WRITE_ONLY else given + results
            sizes = [min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in operands]
            if op is aten._softmax_backward_data and not self.machine.is_cpu:
                self.write("mul (in softmax's backward)", sizes=[results[0].nbytes] * 3, workspace=results[0].nbytes)
            flops = FLOPS[op](*args, **kwargs, out_val=out) if op in FLOPS else 0
            given_as = tree_map_only(torch.Tensor, lambda x: Operand(x.shape, x.stride(), x.dtype), (args, kwargs))
            self.write(op.__name__, flops, sizes, self.hidden.get(op.__name__, 0), (func, *given_as))
        return out


@ordinary()
def ledger(variant: Variant, shape: Shape, machine: Device = "cpu") -> list[dict]:
    """The rows of a Ledger of one forward and one backward pass on tensors without data: any size, no memory.

    `machine` says whose kernels are accounted for; it need not be there. The tensors are on PyTorch's meta device,
    several times as fast as FakeTensorMode. Where a variant is not `ledgered`, raises what its operations raise there.
    Phases: "forward", whose last row, "return", tells what stays alive; "upstream", which makes do; "backward"."""
    machine, law = Machine.of(machine), law_of(variant, shape, machine)
    hidden = {op: evaluate(nbytes, shape, machine) for op, nbytes in law.hidden.items()} if law else {}
    fn = partial(variant.traced, machine=machine) if variant.traced else variant.fn
    inputs, book = variant.inputs(shape, "meta"), Ledger(machine, hidden)
    book.know(*inputs)
    with book:
        book.phase = "forward"
        o = fn(*inputs, causal=shape.causal)
        book.write("return")
        book.phase = "upstream"
        do = torch.randn_like(o)
        book.phase = "backward"
        torch.autograd.grad(o, inputs, do)
    return book.rows


def reached(rows: list[dict]) -> dict[str, dict]:
    """The row of a ledger at which each of ACCOUNTS is reached; its `alive_bytes` are what the law predicts."""
    phases = {phase: [row for row in rows if row["phase"] == phase] for phase in PHASES}
    peaks = {f"{phase}_peak": max(found, key=lambda row: row["alive_bytes"]) for phase, found in phases.items()}
    return {"saved": phases["forward"][-1], **peaks}
