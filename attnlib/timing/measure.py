"""Measuring one point: its memory as the allocator saw it, its times, and how it ended."""

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from attnlib.calling import ordinary
from attnlib.core import PHASES, Shape, UserError
from attnlib.laws import Variant, bytes_needed, law_of
from attnlib.memory.allocator import account
from attnlib.rows import TIMED
from attnlib.timing.clock import FEWEST, PASSES, estimate, fitting, longest_kernel, statistics, time_passes
from attnlib.timing.machine import resolve, state
from attnlib.timing.room import memory_free

# what PyTorch on the CPU, the CUDA driver, and the libraries above it say when memory ran out
RAN_OUT = re.compile(
    r"out.of.memory|not enough memory|can(?:'|no)t allocate memory|unable to allocate|bad_alloc"
    r"|cudaErrorMemoryAllocation|alloc(?:ation)?_failed",
    re.I,
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: PyTorch's own class or Python's, the driver's words, the CPU's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(RAN_OUT.search(str(error)))


def predicted_shortage(variant: Variant, shape: Shape) -> dict | None:
    """On the CPU, where running out of memory would take the machine down: the phase whose law exceeds what is free."""
    if not law_of(variant, shape):
        return None
    free = memory_free("cpu")
    for phase in PHASES:
        need = bytes_needed(variant, shape, "cpu", phase)
        if need > free:
            return {"phase": phase, "reason": f"predicted: {need / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free"}
    return None


def sample_counts(seconds: Mapping[str, float], budget_s: float, patience_s: float) -> dict[str, int]:
    """How often each of TIMED is called, from what one call of each takes: PASSES if these take less than `budget_s` or
    `patience_s` seconds in all, else what fits in a third of the budget, but FEWEST if those fit in the whole."""
    together = sum(seconds.values())
    if PASSES * together < max(budget_s, patience_s):
        return dict.fromkeys(seconds, PASSES)
    least = FEWEST if FEWEST * together < budget_s else 1
    return {phase: max(least, fitting(one, budget_s / len(TIMED))) for phase, one in seconds.items()}


@ordinary()
def measure(
    variant: Variant, shape: Shape, device: str | torch.device = "cpu", budget_s: float = 6.0, patience_s: float = 0.0
) -> dict:
    """Measure one point: memory from the allocator, then the time of forward, of backward, and of both together.

    Times are of the device's clock, as many as `sample_counts` says. Backward gets a random upstream gradient and is
    timed with the graph kept, through torch.autograd.grad, so that no gradient is accumulated. Returns the point's
    columns, the figures that could be had, and `status`, `phase`, `reason`: running out of memory, or a variant that
    cannot run there, is a result, not an error. A forward pass that fits is timed though backward does not. `kernel`
    names what ran longest, unless attention is plain. Raises UserError for a GPU that is not there."""
    row = {"variant": variant.name, **shape.columns(), "status": "ok", "phase": "", "reason": ""}
    if torch.device(device).type == "cuda":
        resolve(str(device))
    if reason := variant.needs(shape, device):
        return {**row, "status": "unsupported", "reason": reason}
    if torch.device(device).type == "cpu" and (shortage := predicted_shortage(variant, shape)):
        return {**row, "status": "oom", **shortage}

    def run(inputs: Sequence) -> torch.Tensor:
        return variant.fn(*inputs, causal=shape.causal)

    def both(inputs: Sequence, do: torch.Tensor) -> tuple:
        return torch.autograd.grad(run(inputs), inputs, do)

    def to_time(phase: str) -> Callable:
        if phase == "backward":
            return partial(torch.autograd.grad, run(inputs), inputs, do, retain_graph=True)
        return partial(run, inputs) if phase == "forward" else partial(both, inputs, do)

    def kernel() -> dict:
        alone = variant.inner or variant
        if alone.traffic:  # made of operations that its formula names: a profiler would take longer than most points
            return {}
        fn = partial(alone.fn, *alone.inputs(shape, device), causal=shape.causal)
        return {"kernel": longest_kernel(fn, device)}

    def guess(phase: str) -> None:
        guesses[phase] = estimate(to_time(phase), device, budget_s / len(TIMED))

    def time(phase: str) -> dict:
        fn, (_, launch_ms) = to_time(phase), guesses[phase]
        if torch.device(device).type == "cuda":
            fn()  # takes from the driver the memory that was given back since, which waits for the device
        return statistics(phase, time_passes(fn, device, counts[phase], launch_ms))

    def fits(phase: str, step: Callable[[], dict | None]) -> bool:
        try:
            row.update(step() or {})
        except (RuntimeError, MemoryError, UserError) as error:  # its traceback holds tensors, until it is left
            lacking = isinstance(error, (NotImplementedError, UserError))  # no such operation here, or it refuses
            if not lacking and not out_of_memory(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            row.update(status="unsupported" if lacking else "oom", phase=phase, reason=reason)
        if row["phase"] == phase:
            gc.collect()
        torch.cuda.empty_cache()  # each step starts from the inputs alone, without what the last one left reserved
        return row["phase"] != phase

    inputs: list[torch.Tensor] = []
    guesses: dict[str, tuple[float, ...]] = {}

    def lay_out() -> None:
        small = variant.inputs(Shape(1, shape.heads, 16, shape.head_dim, shape.dtype, shape.causal), device)
        both(small, torch.randn_like(small[0]))  # so that the libraries' workspaces exist before memory is counted
        inputs.extend(variant.inputs(shape, device))

    seen = partial(account, variant, causal=shape.causal)
    if fits("inputs", lay_out) and fits("forward", lambda: seen(*inputs, backward=False)):
        trains = fits("backward", lambda: seen(*inputs, backward=True))
        do = torch.randn_like(inputs[0]) if trains else None
        for phase in PHASES if trains else PHASES[:1]:
            fits(phase, partial(guess, phase))
        if len(guesses) == len(PHASES):  # together they take about as long as one after the other
            guesses["forward_backward"] = tuple(map(sum, zip(*guesses.values(), strict=True)))
        counts = sample_counts({phase: seconds for phase, (seconds, _) in guesses.items()}, budget_s, patience_s)
        for phase in guesses:
            fits(phase.removeprefix("forward_"), partial(time, phase))
        fits("forward", kernel)
    return {**row, **state(device)}
