"""Measuring one point: its memory as the allocator saw it, its times, and how it ended."""

import gc

import torch

from attnlib import device as dev
from attnlib.core import Shape, Variant
from attnlib.memory import account

STATUSES = ("ok", "oom", "unsupported", "crash", "timeout")
PHASES = ("forward", "backward", "forward_backward")
STATISTICS = ("", "_p20", "_p80", "_mean", "_std", "_count")
POINT = ["variant", "batch", "heads", "seq_len", "head_dim", "dtype", "causal"]
FIGURES = [
    *(f"{phase}_ms{statistic}" for phase in PHASES for statistic in STATISTICS),
    *("memory_before_backward_bytes", "saved_bytes", "forward_peak_bytes", "backward_peak_bytes"),
    *("reserved_peak_bytes", "clock_mhz", "power_w", "temperature_c"),
]
COLUMNS = [*POINT, *FIGURES, "status", "phase", "reason", "kernel", "machine", "torch"]


def statistics(phase: str, times_ms: list[float]) -> dict:
    """The columns of one timed phase: median, 20th and 80th percentile, mean, standard deviation, number of samples."""
    times = torch.tensor(times_ms, dtype=torch.float64)
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    figures = (p50, p20, p80, times.mean().item(), times.std(correction=0).item(), len(times_ms))
    return {f"{phase}_ms{name}": figure for name, figure in zip(STATISTICS, figures, strict=True)}


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out: PyTorch's own on CUDA, the driver's, or the CPU's allocation."""
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error).lower() for w in ("alloc", "out of memory"))


def predicted_shortage(variant: Variant, shape: Shape) -> dict | None:
    """On the CPU, where running out of memory would take the machine down: the phase whose law exceeds what is free."""
    if variant.law is None:
        return None
    free = dev.memory_free("cpu")
    for phase in ("forward", "backward"):
        need = shape.input_bytes + variant.law.bytes(f"{phase}_peak", shape)
        if need > free:
            return {"phase": phase, "reason": f"predicted: {need / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free"}
    return None


def measure(variant: Variant, shape: Shape, device: str = "cpu", budget_s: float = 6.0) -> dict:
    """Measure one point: memory from the allocator, then the time of forward, of backward, and of both together.

    Each of the three is given a third of `budget_s` seconds. Backward gets a random upstream gradient and is timed with
    the graph kept, through torch.autograd.grad, so that no gradient is accumulated. Returns the point's columns, the
    figures that could be had, and `status`, `phase`, `reason`: running out of memory, or a variant that cannot run
    there, is a result, not an error. A forward pass that fits is timed though backward does not. `kernel` is the name
    of what ran longest in the attention: of a pinned backend, its kernel.
    """
    row = {"variant": variant.name, **shape.columns(), "status": "ok", "phase": "", "reason": ""}
    if reason := variant.needs(shape, device):
        return {**row, "status": "unsupported", "reason": reason}
    if device == "cpu" and (shortage := predicted_shortage(variant, shape)):
        return {**row, "status": "oom", **shortage}

    def run(inputs):
        return variant.fn(*inputs, causal=shape.causal)

    def both(inputs, do):
        return torch.autograd.grad(run(inputs), inputs, do)

    def backward(inputs, do):
        o = run(inputs)
        return lambda: torch.autograd.grad(o, inputs, do, retain_graph=True)

    def memory(backward):
        return account(variant, *inputs, causal=shape.causal, backward=backward)

    def kernel():
        attention = variant.inner or variant
        alone = attention.inputs(shape, device)
        return {"kernel": dev.kernel(lambda: attention.fn(*alone, causal=shape.causal), device)}

    def time(phase, fn):
        return statistics(phase, dev.time_passes(fn, device, budget_s / len(PHASES)))

    def fits(phase, step):
        try:
            row.update(step())
        except RuntimeError as error:  # the tensors that its traceback holds must be gone before anything is cleaned up
            lacking = isinstance(error, NotImplementedError)  # an operation that this device has not got for this dtype
            if not lacking and not out_of_memory(error):
                raise
            row.update(status="unsupported" if lacking else "oom", phase=phase, reason=str(error).splitlines()[0])
        if row["phase"] == phase:
            gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()  # each step starts from the inputs alone, without what the last one left reserved
        return row["phase"] != phase

    small = variant.inputs(Shape(1, shape.heads, 16, shape.head_dim, shape.dtype, shape.causal), device)
    both(small, torch.randn_like(small[0]))  # so that the libraries' workspaces exist before memory is counted
    inputs = []
    if fits("inputs", lambda: inputs.extend(variant.inputs(shape, device)) or {}) and fits(
        "forward", lambda: memory(False)
    ):
        trains = fits("backward", lambda: memory(True))
        fits("forward", lambda: time("forward", lambda: run(inputs)))
        fits("forward", kernel)
        if trains:
            do = torch.randn_like(inputs[0])
            fits("backward", lambda: time("backward", backward(inputs, do)))
            fits("backward", lambda: time("forward_backward", lambda: both(inputs, do)))
    return {**row, **dev.state(device)}
