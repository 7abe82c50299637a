"""Two accounts of what a variant does: the ledger, written without running it, and the allocator's, taken as it ran."""

import os
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from attnlib.core import Shape, Variant


def tensors_in(tree) -> list[torch.Tensor]:
    """The tensors among an operation's arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


aten = torch.ops.aten
NO_KERNEL = {aten._unsafe_view, aten.empty, aten.empty_like, aten.new_empty}  # beside the views
WRITE_ONLY = {aten.new_zeros, aten.zeros_like, aten.ones_like, aten.randn_like}  # their operand only gives the shape


class Ledger(TorchDispatchMode):
    """Writes a row for each operation: `phase, op, flops, traffic_bytes, largest_bytes, alive_bytes`.

    traffic_bytes: what the operation reads and writes, each operand once. largest_bytes: its largest operand.
    alive_bytes: the storages alive at its end that were not there when the ledger was opened. On a CUDA `device` what
    is known to happen inside a kernel is written down as well.
    """

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device, self.phase, self.rows, self.alive, self.known = device, "", [], 0, weakref.WeakSet()

    def know(self, *tensors):
        """Leave out tensors that were there before."""
        self.known.update(tensor.untyped_storage() for tensor in tensors)

    def _forget(self, nbytes):
        self.alive -= nbytes

    def write(self, op, flops=0, sizes=(0,), workspace=0):
        """Append a row: what moves `sizes` bytes, with what is alive now and a kernel's own `workspace`."""
        row = {"phase": self.phase, "op": op, "flops": flops, "traffic_bytes": sum(sizes), "largest_bytes": max(sizes)}
        self.rows.append({**row, "alive_bytes": self.alive + workspace})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results, op = tensors_in(out), func._overloadpacket
        for storage in (result.untyped_storage() for result in results):
            if storage not in self.known:
                self.known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        if results and not func.is_view and op not in NO_KERNEL:
            operands = results if op in WRITE_ONLY else tensors_in((args, kwargs)) + results
            sizes = [min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in operands]
            if op is aten._softmax_backward_data and self.device != "cpu":
                self.write("mul (in softmax's backward)", sizes=[results[0].nbytes] * 3, workspace=results[0].nbytes)
            flops = flop_registry[op](*args, **kwargs, out_val=out) if op in flop_registry else 0
            self.write(op.__name__, flops, sizes)
        return out


def ledger(variant: Variant, shape: Shape, device: str = "cpu") -> list[dict]:
    """The rows of a Ledger of one forward and one backward pass on fake tensors: no device, no memory, any size.

    `device` ("cpu" or "cuda") says whose kernels are accounted for; it need not be there.

    Phases: "forward", whose last row, "return", tells what stays alive for the backward pass; "upstream", where the
    gradient that arrives at o is made; "backward".
    """
    with FakeTensorMode():
        q, k, v = shape.inputs()
        book = Ledger(device)
        book.know(q, k, v)
        with book:
            book.phase = "forward"
            o = variant.fn(q, k, v, causal=shape.causal)
            book.write("return")
            book.phase = "upstream"
            do = torch.randn_like(o)
            book.phase = "backward"
            torch.autograd.grad(o, (q, k, v), do)
    return book.rows


class CudaAllocator:
    """The CUDA caching allocator's own counters, from one mark to the next, in bytes.

    `current` and `peak` are requested bytes above what was there at the start; `total` is everything allocated on the
    device, in the allocator's rounding; `reserved` is the most it held from the driver.
    """

    def __init__(self, device):
        self.device = device
        self.current, self.peak, self.total, self.reserved = {}, {}, {}, {}

    def _requested(self, which):
        return torch.cuda.memory_stats(self.device)[f"requested_bytes.all.{which}"]

    def __enter__(self):
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.base = self._requested("current")
        return self

    def mark(self, phase):
        """Close `phase`: note what is alive and what was the most alive since the mark before."""
        torch.cuda.synchronize(self.device)
        self.current[phase] = self._requested("current") - self.base
        self.peak[phase] = self._requested("peak") - self.base
        self.total[phase] = torch.cuda.memory_allocated(self.device)
        self.reserved[phase] = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(self, *_):
        pass


class CpuAllocator:
    """The same account of the CPU's allocator, from torch.profiler's record of each allocation and release.

    The figures are there after the `with` block. The CPU has no pool: `reserved` stays empty; `total` counts from the
    start of the block.
    """

    def __init__(self, device):
        self.current, self.peak, self.total, self.reserved = {}, {}, {}, {}
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes two lines to stderr each time
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)

    def __enter__(self):
        self.profiler.__enter__()
        return self

    def mark(self, phase):
        """Close `phase`."""
        with record_function(f"mark {phase}"):
            pass

    def __exit__(self, *error):
        self.profiler.__exit__(*error)
        alive = highest = 0
        for event in sorted(self.profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                alive += event.nbytes()
                highest = max(highest, alive)
            elif event.name().startswith("mark "):
                phase = event.name().removeprefix("mark ")
                self.current[phase], self.peak[phase], self.total[phase] = alive, highest, alive
                highest = alive


def account(variant: Variant, q, k, v, *, causal: bool, backward: bool) -> dict[str, int]:
    """What the allocator of q's device saw in one forward pass, and in one backward pass if asked for, in bytes.

    `saved_bytes`, `forward_peak_bytes`, `backward_peak_bytes` are above the inputs, as requested;
    `memory_before_backward_bytes` is all that is allocated then, inputs and library workspaces included, as published
    reports print it; `reserved_peak_bytes` is the most the allocator took from the driver (CUDA only). Run something
    small first, so that the libraries' workspaces exist. Raises torch.OutOfMemoryError where it does not fit.
    """
    inputs = sum(x.nbytes for x in (q, k, v))
    with (CudaAllocator if q.is_cuda else CpuAllocator)(q.device) as seen:
        o = variant.fn(q, k, v, causal=causal)
        seen.mark("forward")
        if backward:
            torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
            seen.mark("backward")
    figures = {
        "memory_before_backward_bytes": seen.total["forward"] + (0 if q.is_cuda else inputs),
        "saved_bytes": seen.current["forward"],
        "forward_peak_bytes": seen.peak["forward"],
    }
    if backward:
        figures["backward_peak_bytes"] = seen.peak["backward"]
    if seen.reserved:
        figures["reserved_peak_bytes"] = max(seen.reserved.values())
    return figures
