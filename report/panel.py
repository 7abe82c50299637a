"""Will it fit, as a panel for JupyterLab: choose memory, sizes, variant and use; see what fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnlib import VARIANTS
from attnlib.core import DTYPES, Shape, UserError
from attnlib.memory import fit

if TYPE_CHECKING:
    from ipywidgets import interactive


def panel() -> interactive:
    """The panel, of GPUs, on which what is chosen need not run."""
    import ipywidgets

    def show(memory: str, variant: str, use: str, dtype: str, batch: int, heads: int, head_dim: int, causal: bool):
        try:
            shape = Shape(batch, heads, 1, head_dim, dtype, causal)
            print(fit.explain(VARIANTS[variant], shape, fit.nbytes(memory), use, "cuda", VARIANTS))
        except UserError as error:
            print(error)

    number = lambda value: ipywidgets.BoundedIntText(value, 1, 4096)  # noqa: E731
    return ipywidgets.interactive(
        show,
        memory=ipywidgets.Text("24GiB", continuous_update=False),
        variant=list(VARIANTS),
        use=list(reversed(fit.USES)),
        dtype=list(DTYPES),
        batch=number(8),
        heads=number(1),
        head_dim=number(64),
        causal=False,
    )
