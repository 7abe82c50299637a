"""What the calculator of the HTML report knows: the laws of dense variants, which sympy prints as JavaScript."""

import json
from collections.abc import Mapping
from dataclasses import replace

from sympy import Expr, Min, Symbol
from sympy.printing.jscode import jscode

from attnlib import family
from attnlib.core import DTYPES, PHASES, Machine, Shape
from attnlib.laws import ACCOUNTS, LINEAR, SWITCHES, SYMBOLS, UNITS, B, D, H, N, Phases, Variant, c
from attnlib.variants.sdpa import FLASH_FLOPS
from report import stored

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 100, 112, 128, 160, 192, 256, 320)  # those to choose from
PAIRS = (1 - c) * N**2 + c * N * (N + 1) / 2  # that a query and a key are
USEFUL = Phases(4 * B * H * D * PAIRS, 10 * B * H * D * PAIRS)  # laws.useful_flops, as a formula
ONCE = Phases(4 * LINEAR, 8 * LINEAR)  # what a fused kernel moves at the least: q, k, v, o, and all their gradients


def javascript(formulas: Expr | Mapping) -> str:
    """A formula, or an object of formulas by name, as a JavaScript expression."""
    if isinstance(formulas, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {javascript(one)}" for key, one in formulas.items()) + "}"
    return " ".join(jscode(formulas, user_functions={"Splits": "splits"}).split())


def formulas_of(variant: Variant) -> dict:
    """`{account: {operation: {term: bytes}}}`, and `work` and `moved`, `{phase: operations or bytes at least}`: NaN if
    a program writes what no law of its traffic counts."""
    moved = variant.traffic or (ONCE if variant.flops == FLASH_FLOPS else Phases(*[Symbol("NaN")] * 2))
    found: dict = {account: variant.law.moments(account) for account in ACCOUNTS}
    for phase in PHASES:
        own, useful = getattr(variant.flops, phase), getattr(USEFUL, phase)
        # a program that writes N×N matrices computes all of them; a fused one can leave out what a mask hides
        found.setdefault("work", {})[phase] = own if variant.traffic else Min(own, useful)
        found.setdefault("moved", {})[phase] = getattr(moved, phase)
    return found


def refused(variant: Variant, machine: Machine) -> dict:
    """Why a variant does not run, or has no law, `{dtype: {head_dim: reason}}`; nothing where it does."""
    why = lambda shape: variant.needs(shape, machine) or variant.law.unknown(shape, machine)  # noqa: E731
    reasons = {dtype: {d: why(Shape(1, 1, 2, d, dtype)) for d in HEAD_DIMS} for dtype in DTYPES}
    return {dtype: {d: reason for d, reason in by_dim.items() if reason} for dtype, by_dim in reasons.items()}


def laws_in_javascript(machine: Machine) -> str:
    """A script that defines ATTENTION: the machine, and for each dense variant with a law `formulas`, a function of the
    symbols that gives `formulas_of`, what is `refused`, and `rates`, TFLOP/s by dtype where that is what bounds it."""
    known = stored.machines(stored.ROOT / "data" / machine.slug) if machine.slug in stored.devices() else {}
    had = {package for facts in known.values() for package in facts.get("packages", ())}  # by whichever host had them
    machine, rates = replace(machine, packages=(*machine.packages, *had)), machine.ceilings.get("gemm_tflop_s", {})
    about = {"name": machine.name, "memory": machine.memory_bytes, "headDims": HEAD_DIMS}
    about |= {"sizes": {name: dtype.itemsize for name, dtype in DTYPES.items()}}
    about |= {"units": [int(not machine.is_cpu), machine.threads, machine.multiprocessors]}
    about |= {"copy": max(machine.ceilings.get("copy_gb_s", {}).values(), default=None)}
    lines, symbols = [], ", ".join(str(one) for one in (*SYMBOLS, *SWITCHES, *UNITS))
    for name, variant in (family("plain") | family("kernels")).items():
        if variant.law:
            other = {"float32"} if variant.gpu_product and not machine.is_cpu else set()  # multiplied in another type
            bounds = {dtype: rate for dtype, rate in rates.items() if dtype not in other}
            facts = {"refused": refused(variant, machine), "rates": bounds}
            function = f"({symbols}) => ({javascript(formulas_of(variant))})"
            lines.append(f"{json.dumps(name)}: {{formulas: {function}, ...{json.dumps(facts)}}}")
    return f"const ATTENTION = {{...{json.dumps(about)}, variants: {{\n" + ",\n".join(lines) + "}};\n"
