"""Two accounts of what a variant does: the ledger, written without running it, and the allocator's, taken as it ran."""

import argparse
import gc
import os
import sys
import weakref
from collections import Counter
from concurrent.futures import BrokenExecutor
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from attnlib import VARIANTS, variant
from attnlib.core import DTYPES, AttnError, Shape, Variant
from attnlib.device import resolve


def tensors_in(tree) -> list[torch.Tensor]:
    """The tensors among an operation's arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


aten = torch.ops.aten
NO_KERNEL = {aten._unsafe_view, aten.empty, aten.empty_like, aten.new_empty}  # beside the views
WRITE_ONLY = {aten.new_zeros, aten.zeros_like, aten.ones_like, aten.randn_like}  # their operand only gives the shape
# what PyTorch's counter leaves out: the CPU's flash kernel, which does what the GPU's does, and a product in place
FLOPS = flop_registry | {
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
ON_THE_HOST = {aten._scaled_dot_product_efficient_attention: 2}  # this many last results are no device memory


class Ledger(TorchDispatchMode):
    """Writes a row for each operation: `phase, op, flops, traffic_bytes, largest_bytes, alive, alive_bytes`.

    traffic_bytes: what the operation reads and writes, each operand once. largest_bytes: its largest operand. alive:
    `{name: bytes}` of the storages alive at its end that were not there when the ledger was opened, each named after
    the operation that made it; alive_bytes: their sum. What happens inside a kernel is told: `hidden` is `{op: bytes}`
    that operations take for themselves, and for a CUDA `device` the softmax's backward is written down.
    """

    def __init__(self, device: str = "cpu", hidden: dict[str, int] | None = None):
        super().__init__()
        self.device, self.hidden, self.phase, self.rows, self.known = device, hidden or {}, "", [], weakref.WeakSet()
        self.alive, self.made = {}, Counter()

    def know(self, *tensors):
        """Leave out tensors that were there before."""
        self.known.update(tensor.untyped_storage() for tensor in tensors)

    def write(self, op, flops=0, sizes=(0,), workspace=0):
        """Append a row: what moves `sizes` bytes, with what is alive now and a kernel's own `workspace`."""
        alive = self.alive | ({"workspace": workspace} if workspace else {})
        row = {"phase": self.phase, "op": op, "flops": flops, "traffic_bytes": sum(sizes), "largest_bytes": max(sizes)}
        self.rows.append({**row, "alive": alive, "alive_bytes": sum(alive.values())})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results, op = tensors_in(out), func._overloadpacket
        if op in ON_THE_HOST:
            self.know(*results[-ON_THE_HOST[op] :])
        for storage in (result.untyped_storage() for result in results):
            if storage not in self.known:
                self.known.add(storage)
                self.made[op] += 1
                name = f"{op.__name__} {self.made[op]}"
                self.alive[name] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, name)
        if results and not func.is_view and op not in NO_KERNEL:
            operands = results if op in WRITE_ONLY else tensors_in((args, kwargs)) + results
            sizes = [min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in operands]
            if op is aten._softmax_backward_data and self.device != "cpu":
                self.write("mul (in softmax's backward)", sizes=[results[0].nbytes] * 3, workspace=results[0].nbytes)
            flops = FLOPS[op](*args, **kwargs, out_val=out) if op in FLOPS else 0
            self.write(op.__name__, flops, sizes, self.hidden.get(op.__name__, 0))
        return out


def ledger(variant: Variant, shape: Shape, device: str = "cpu") -> list[dict]:
    """The rows of a Ledger of one forward and one backward pass on tensors without data: any size, no memory.

    `device` ("cpu" or "cuda") says whose kernels are accounted for; it need not be there. The tensors are on PyTorch's
    meta device, where an operation computes shapes and nothing else, several times as fast as under FakeTensorMode.

    Phases: "forward", whose last row, "return", tells what stays alive for the backward pass; "upstream", where the
    gradient that arrives at o is made; "backward".
    """
    q, k, v = shape.inputs("meta")
    hidden = variant.law.hidden if variant.law else {}
    book = Ledger(device, {op: shape.evaluate(nbytes, device) for op, nbytes in hidden.items()})
    book.know(q, k, v)
    with book:
        book.phase = "forward"
        fn = partial(variant.traced, device=device) if variant.traced else variant.fn
        o = fn(q, k, v, causal=shape.causal)
        book.write("return")
        book.phase = "upstream"
        do = torch.randn_like(o)
        book.phase = "backward"
        torch.autograd.grad(o, (q, k, v), do)
    return book.rows


def reached(rows: list[dict]) -> dict[str, dict]:
    """The row of a ledger at which each of ACCOUNTS is reached; its `alive_bytes` are what the law predicts."""
    phases = {phase: [row for row in rows if row["phase"] == phase] for phase in ("forward", "backward")}
    peaks = {f"{phase}_peak": max(found, key=lambda row: row["alive_bytes"]) for phase, found in phases.items()}
    return {"saved": phases["forward"][-1], **peaks}


class CudaAllocator:
    """The CUDA caching allocator's own counters, from one mark to the next, in bytes.

    `current` and `peak` are requested bytes above what was there at the start, `current_blocks` and `peak_blocks` the
    same in the blocks it gave out for them; `total` is everything allocated on the device, in blocks; `reserved` is the
    most it held from the driver.
    """

    def __init__(self, device):
        self.device = device
        self.current, self.peak, self.current_blocks, self.peak_blocks = {}, {}, {}, {}
        self.total, self.reserved = {}, {}

    def _stats(self):
        stats = torch.cuda.memory_stats(self.device)
        kinds = (("current", "requested"), ("peak", "requested"), ("current", "allocated"), ("peak", "allocated"))
        return [stats[f"{what}_bytes.all.{when}"] for when, what in kinds]

    def __enter__(self):
        # autograd's own thread lets go of the last gradients in its own time: give it an empty task to wait for
        empty = torch.zeros(0, device=self.device, requires_grad=True)
        torch.autograd.grad(empty * 1, empty, torch.zeros(0, device=self.device))
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        requested, _, allocated, _ = self._stats()
        self.base = (requested, requested, allocated, allocated)
        return self

    def mark(self, phase):
        """Close `phase`: note what is alive and what was the most alive since the mark before."""
        torch.cuda.synchronize(self.device)
        accounts = (self.current, self.peak, self.current_blocks, self.peak_blocks)
        for account, nbytes, base in zip(accounts, self._stats(), self.base, strict=True):
            account[phase] = nbytes - base
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


def observe(variant: Variant, *inputs, causal: bool, backward: bool) -> CudaAllocator | CpuAllocator:
    """One forward pass, and one backward pass if asked for, under the eyes of the allocator of the inputs' device.

    Its marks are "forward" and "backward". Run something small first, so that the libraries' workspaces exist. Raises
    torch.OutOfMemoryError where it does not fit.
    """
    device, collecting = inputs[0].device, gc.isenabled()
    gc.disable()  # garbage of earlier runs must not be freed under our eyes
    try:
        with (CpuAllocator if device.type == "cpu" else CudaAllocator)(device) as seen:
            o = variant.fn(*inputs, causal=causal)
            seen.mark("forward")
            if backward:
                torch.autograd.grad(o, inputs, torch.randn_like(o))
                seen.mark("backward")
    finally:
        if collecting:
            gc.enable()
    return seen


def account(variant: Variant, *inputs, causal: bool, backward: bool) -> dict[str, int]:
    """What the allocator of the inputs' device saw in a forward pass, and in a backward pass if asked for, in bytes.

    `saved_bytes`, `forward_peak_bytes`, `backward_peak_bytes` are above the inputs, as requested;
    `memory_before_backward_bytes` is all that is allocated then, inputs and library workspaces included, as published
    reports print it; `reserved_peak_bytes` is the most the allocator took from the driver (CUDA only). Raises as
    `observe` does.
    """
    seen = observe(variant, *inputs, causal=causal, backward=backward)
    before = sum(x.nbytes for x in inputs) if inputs[0].device.type == "cpu" else 0  # what CpuAllocator has not seen
    figures = {
        "memory_before_backward_bytes": seen.total["forward"] + before,
        "saved_bytes": seen.current["forward"],
        "forward_peak_bytes": seen.peak["forward"],
    }
    if backward:
        figures["backward_peak_bytes"] = seen.peak["backward"]
    if seen.reserved:
        figures["reserved_peak_bytes"] = max(seen.reserved.values())
    return figures


class _Parser(argparse.ArgumentParser):
    """One line for bad input, as everywhere else, instead of the usage and a line."""

    def error(self, message):
        raise AttnError(message)


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m attnlib.memory`; 0 if all is well, 1 for a mismatch or bad input."""
    from attnlib import check, fit  # they build on this module
    from attnlib.sweep import WorkerDied

    parser = _Parser(prog="python -m attnlib.memory", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("check", help="hold law against ledger (on CUDA also against the allocator)")
    checks.add_argument("--seed", type=int, required=True, help="of the random shapes")
    checks.add_argument("--count", type=int, default=60, help="of the random shapes, each in all dtypes, causal or not")
    checks.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    fits = commands.add_parser("fit", help="the largest N that fits a memory, and what fills it")
    fits.add_argument("--memory", required=True, help="for tensors, with its unit: 24GiB, 80GB")
    fits.add_argument("--variant", required=True, help=", ".join(VARIANTS))
    for name, default in (("batch", None), ("heads", 1), ("head-dim", None)):
        fits.add_argument(f"--{name}", type=int, default=default, required=default is None)
    fits.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    fits.add_argument("--causal", action="store_true")
    fits.add_argument("--inference", action="store_true", help="forward pass alone")
    fits.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="whose kernels; it need not be there")
    try:
        options = parser.parse_args(arguments)
        if options.command == "check":
            return check.report(options.seed, options.count, resolve(options.device))
        shape = Shape(options.batch, options.heads, 1, options.head_dim, options.dtype, options.causal)
        phase = "forward" if options.inference else "backward"
        print(fit.describe(variant(options.variant), shape, fit.nbytes(options.memory), phase, options.device))
    except (AttnError, WorkerDied, BrokenExecutor) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
