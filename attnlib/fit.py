"""Will it fit? The largest sequence for a memory, from the laws, and what fills it."""

import re
from bisect import bisect_right
from fractions import Fraction

import pandas as pd
import sympy

from attnlib import VARIANTS, variant
from attnlib.core import DTYPES, AttnError, B, D, H, N, Shape, Variant, c, dense_reach, e, g, h

MULTIPLES = {"B": 1} | {f"{p}{i}B": b**n for i, b in (("", 1000), ("i", 1024)) for n, p in enumerate("KMGTP", 1)}
PHASES = ("forward", "backward")
USES = {"inference": "forward", "training": "backward"}
LONGEST = 10**12  # nobody's sequence; keeps the search finite
M, LENGTH = sympy.symbols("M N", positive=True)  # bytes of memory; N as a number to be solved for


def nbytes(text: str) -> int:
    """The bytes that a text with a unit means: "24GiB" (2**30), "80GB" (10**9).

    Raises AttnError without a number or a unit, for nothing, and for more than 1 PiB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]i?B|B)\s*", text)
    size = Fraction(match[1]) * MULTIPLES[match[2]] if match else 0
    if not 1 <= size <= MULTIPLES["PiB"]:
        raise AttnError(f"memory must be a number with a unit, such as 24GiB or 80GB, up to 1PiB, not {text!r}")
    return int(size)


def need(variant: Variant, shape: Shape, phase: str, device: str = "cuda") -> int:
    """Bytes that a forward pass, or a forward and a backward pass, need at once: the inputs and the highest peak."""
    peaks = PHASES[: PHASES.index(phase) + 1]
    return shape.input_bytes + max(variant.law.bytes(f"{peak}_peak", shape, device) for peak in peaks)


def at_length(shape: Shape, seq_len: int) -> Shape:
    """The same shape with another sequence length."""
    return Shape(**shape.columns() | {"seq_len": seq_len})


def largest_seq_len(variant: Variant, shape: Shape, memory_bytes: int, phase: str, device: str = "cuda") -> int:
    """The largest N at which `need` is at most `memory_bytes`, whatever N `shape` has; 0 if not even N = 1 fits."""
    return bisect_right(
        range(1, LONGEST), memory_bytes, key=lambda n: need(variant, at_length(shape, n), phase, device)
    )


def solutions(variant: Variant, shape: Shape, phase: str, device: str = "cuda") -> dict[str, sympy.Expr]:
    """`{operation: N}` as a formula in M: the N at which the inputs and what is alive at that moment fill M bytes.

    The largest N that fits is the smallest of these, rounded down. It holds for laws that are polynomials in N.
    """
    values = {B: shape.batch, H: shape.heads, D: shape.head_dim, e: shape.element_size}
    values |= {c: int(shape.causal), g: int(device != "cpu"), h: int(shape.dtype != "float32"), N: LENGTH}
    found = {}
    for peak in PHASES[: PHASES.index(phase) + 1]:
        for operation, terms in variant.law.moments(f"{peak}_peak").items():
            total = (3 * B * H * N * D * e + sum(terms.values())).subs(values)
            found[operation] = max(sympy.solve(total - M, LENGTH), key=lambda root: root.subs(M, 2**60))
    return found


def contents(variant: Variant, shape: Shape, phase: str, device: str = "cuda") -> tuple[str, dict[str, int]]:
    """The operation at which most is needed, and what is alive then, `{term: bytes}`, the inputs first."""
    peaks = [f"{name}_peak" for name in PHASES[: PHASES.index(phase) + 1]]
    account = max(peaks, key=lambda peak: variant.law.bytes(peak, shape, device))
    operation, terms = variant.law.at(account, shape, device)
    return operation, {"q, k, v": shape.input_bytes, **terms}


def has_largest(variant: Variant) -> bool:
    """Whether there is one largest N in a memory. Not where what is seen depends on N in steps, so that a longer
    sequence can need less; such a variant computes something else besides, and is no substitute for a dense one."""
    return variant.law is not None and variant.reach is dense_reach


def options(shape: Shape, memory_bytes: int, device: str = "cuda") -> pd.DataFrame:
    """The largest N in a memory of each variant that has one and takes such shapes: `variant, inference, training`."""
    found = [
        {"variant": name} | {use: largest_seq_len(v, shape, memory_bytes, phase, device) for use, phase in USES.items()}
        for name, v in VARIANTS.items()
        if has_largest(v) and not v.needs(at_length(shape, 2), device)
    ]
    return pd.DataFrame(found)


def describe(variant: Variant, shape: Shape, memory_bytes: int, phase: str, device: str = "cuda") -> str:
    """What fits, in words and a table: the largest N, what fills the memory there, and which variant gets further.

    Inference is a forward pass that still records a graph; under torch.no_grad a little more may fit. Raises AttnError
    for a variant that has no law or no largest N, or does not take such shapes.
    """
    if not variant.law:
        raise AttnError(f"{variant.name} has no law: what it needs depends on what runs underneath")
    if not has_largest(variant):
        raise AttnError(f"{variant.name} looks at less, in steps of N: a longer sequence can need less memory")
    if reason := variant.needs(at_length(shape, 2), device):
        raise AttnError(f"{variant.name} cannot run there: {reason}")
    use = next(use for use, named in USES.items() if named == phase)
    mask = ", causal" if shape.causal else ""
    about = f"{variant.name}, batch {shape.batch}, heads {shape.heads}, head_dim {shape.head_dim}, {shape.dtype}{mask}"
    longest = largest_seq_len(variant, shape, memory_bytes, phase, device)
    lines = [f"{about}, {use} on {device}, {memory_bytes / 2**30:,.4g} GiB for tensors"]
    if not longest:
        return f"{lines[0]}: not even N = 1 fits"
    operation, terms = contents(variant, at_length(shape, longest), phase, device)
    total = sum(terms.values())
    lines += [f"largest N: {longest:,}", f"what fills the memory there, at {operation}:"]
    lines += [f"  {size / 2**20:12,.2f} MiB {size / total:6.1%}  {name}" for name, size in terms.items()]
    lines += [f"  {total / 2**20:12,.2f} MiB         in all; N = {longest + 1:,} would need more than there is"]
    further = options(shape, memory_bytes, device).set_index("variant")[use]
    best = further.idxmax()
    if further[best] > longest:
        lines.append(f"take instead: {best}, largest N {further[best]:,}")
    else:
        lines.append("no other variant gets further")
    return "\n".join(lines)


def panel():
    """An interactive panel for JupyterLab: choose memory, sizes, variant and use; see what fits."""
    import ipywidgets

    def show(memory, variant_name, use, dtype, batch, heads, head_dim, causal):
        try:
            shape = Shape(batch, heads, 1, head_dim, dtype, causal)
            print(describe(variant(variant_name), shape, nbytes(memory), USES[use]))
        except AttnError as error:
            print(error)

    number = lambda value: ipywidgets.BoundedIntText(value, 1, 4096)  # noqa: E731
    return ipywidgets.interactive(
        show,
        memory=ipywidgets.Text("24GiB", continuous_update=False),
        variant_name=ipywidgets.Dropdown(options=list(VARIANTS), description="variant"),
        use=list(reversed(USES)),
        dtype=list(DTYPES),
        batch=number(8),
        heads=number(1),
        head_dim=number(64),
        causal=False,
    )
