"""attnlib: attention variants, what is known about each before it runs, and the means to measure them.

Nothing heavy is imported until a variant is asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnlib.laws import Variant

    VARIANTS: dict[str, Variant]

__version__ = "0.1.0"
__all__ = ["FAMILIES", "VARIANTS", "family", "variant"]


# every variant by its name, and where it is defined, "module:CONSTANT": a new one is one more line
FAMILIES = {
    "plain": {
        "naive_custom": "attnlib.variants.naive:NAIVE_CUSTOM",
        "naive": "attnlib.variants.naive:NAIVE",
        "naive_weights_only": "attnlib.variants.naive:NAIVE_WEIGHTS_ONLY",
        "naive_recompute": "attnlib.variants.naive:NAIVE_RECOMPUTE",
    },
    "kernels": {
        "sdpa_math": "attnlib.variants.sdpa:SDPA_MATH",
        "sdpa_efficient": "attnlib.variants.sdpa:SDPA_EFFICIENT",
        "sdpa_flash": "attnlib.variants.sdpa:SDPA_FLASH",
        "sdpa_cudnn": "attnlib.variants.sdpa:SDPA_CUDNN",
        "sdpa_default": "attnlib.variants.sdpa:SDPA_DEFAULT",
        "fa4": "attnlib.variants.sdpa:FA4",
        "tiled": "attnlib.variants.tiled:TILED",
    },
    "compiled": {"naive_compiled": "attnlib.variants.naive_compiled:NAIVE_COMPILED"},
    "sparse": {
        "dilated": "attnlib.dilated.attention:DILATED",
        "window": "attnlib.variants.sparse:WINDOW",
        "strided": "attnlib.variants.sparse:STRIDED",
        "random_blocks": "attnlib.variants.sparse:RANDOM_BLOCKS",
    },
}


@cache
def __getattr__(name: str) -> dict[str, Variant]:
    """VARIANTS `{name: Variant}`, made when it is first asked for."""
    if name != "VARIANTS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return {member: one for members in FAMILIES for member, one in family(members).items()}


def family(name: str) -> dict[str, Variant]:
    """The variants of one of FAMILIES, `{name: Variant}`."""
    places = {member: place.split(":") for member, place in FAMILIES[name].items()}
    try:
        return {member: getattr(import_module(module), constant) for member, (module, constant) in places.items()}
    except AttributeError as error:  # which `from attnlib import VARIANTS` would hide
        raise ImportError(f"FAMILIES[{name!r}]: {error}") from error


def variant(name: str) -> Variant:
    """The variant called `name`. Raises UserError, with the names there are, if there is none."""
    if name not in (known := __getattr__("VARIANTS")):
        from attnlib.core import UserError

        raise UserError(f"variant must be one of {', '.join(known)}, not {name!r}")
    return known[name]
