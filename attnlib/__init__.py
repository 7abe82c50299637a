"""attnlib: attention variants, what is known about each before it runs, and the means to measure them."""

from attnlib import naive
from attnlib.core import AttnError, Variant

VARIANTS = {variant.name: variant for variant in (naive.CUSTOM, naive.NAIVE, naive.WEIGHTS_ONLY, naive.RECOMPUTE)}


def variant(name: str) -> Variant:
    """The variant called `name`. Raises AttnError, with the names there are, if there is none."""
    if name not in VARIANTS:
        raise AttnError(f"variant must be one of {', '.join(VARIANTS)}, not {name!r}")
    return VARIANTS[name]
