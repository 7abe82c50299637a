"""The rows that a measurement writes: their columns, their schema, and what is no row that was written."""

import math
from collections.abc import Iterable, Mapping

from attnlib.core import PHASES, Shape

SCHEMA = 2  # of the rows written now; rows of another are refused
STATUSES = ("ok", "oom", "unsupported", "crash", "timeout")
TIMED = (*PHASES, "forward_backward")
STATISTICS = ("", "_p20", "_p80", "_mean", "_std", "_count")
SIZES = ("batch", "heads", "seq_len", "head_dim", "dtype", "causal")
POINT = ("variant", *SIZES)
FIGURES = (
    *(f"{phase}_ms{statistic}" for phase in TIMED for statistic in STATISTICS),
    *("memory_before_backward_bytes", "saved_bytes", "forward_peak_bytes", "backward_peak_bytes"),
    *("reserved_peak_bytes", "clock_mhz", "power_w", "temperature_c"),
)
ORIGIN = ("machine", "torch", "schema")  # of every row, whatever was measured
COLUMNS = (*POINT, *FIGURES, "status", "phase", "reason", "kernel", *ORIGIN)


def shape_of(row: Mapping) -> Shape:
    """The Shape of a row, `{column: value}`. Raises UserError where that is none."""
    return Shape(**{column: row[column] for column in SIZES})


def is_missing(figure: object) -> bool:
    """Whether a cell holds no figure: nothing, or NaN."""
    return figure is None or figure == "" or (isinstance(figure, float) and math.isnan(figure))


def lacking(row: Mapping, figures: Iterable[str] = FIGURES) -> list[str]:
    """The columns in which a row whose status is "ok" lacks one of its `figures`; of a point, times and saved bytes."""
    asked = figures if figures is not FIGURES else [f"{phase}_ms" for phase in TIMED] + ["saved_bytes"]
    return [column for column in asked if row.get("status", "ok") == "ok" and is_missing(row.get(column))]
