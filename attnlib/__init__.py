"""attnlib: attention variants, what is known about each before it runs, and the means to measure them."""

from attnlib import dilated, naive, sdpa, sparse, tiled
from attnlib.core import AttnError, Variant

NAIVE = {variant.name: variant for variant in (naive.CUSTOM, naive.NAIVE, naive.WEIGHTS_ONLY, naive.RECOMPUTE)}
FUSED = {
    variant.name: variant
    for variant in (
        sdpa.MATH,
        sdpa.EFFICIENT,
        sdpa.FLASH,
        sdpa.CUDNN,
        sdpa.DEFAULT,
        sdpa.FA2,
        sdpa.FA4,
        tiled.TILED,
    )
}
SPARSE = {variant.name: variant for variant in (dilated.DILATED, sparse.WINDOW, sparse.STRIDED, sparse.RANDOM)}
VARIANTS = NAIVE | FUSED | SPARSE


def variant(name: str) -> Variant:
    """The variant called `name`. Raises AttnError, with the names there are, if there is none."""
    if name not in VARIANTS:
        raise AttnError(f"variant must be one of {', '.join(VARIANTS)}, not {name!r}")
    return VARIANTS[name]
