"""The pictures of chapter 1: exponents of exact powers, predictions beside rows."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from attnlib.core import PHASES
from notebooks import sweep_figures
from report import plots, stored
from report.predicted import with_floors, with_laws


def test_the_exponent_of_a_power_is_its_own():
    """Also where a time is missing, and whatever the order of rows."""
    lengths = np.array([4096, 256, 1024])
    rows = pd.DataFrame({"variant": "naive", "seq_len": lengths, "forward_ms": lengths**2.0, "backward_ms": np.nan})
    rows = rows.assign(**{f"{phase}_floor_ms": lengths**1.5 for phase in PHASES})
    found = sweep_figures.exponents(rows.assign(**{f"{phase}_regime": ["c", "a", "b"] for phase in PHASES}))
    assert found[["from_seq_len", "seq_len"]].to_numpy().tolist() == [[256, 1024], [1024, 4096]]
    assert found["exponent"].tolist() == pytest.approx([2, 2]) and found["of_floor"].tolist() == pytest.approx(
        [1.5] * 2
    )
    assert found["phase"].tolist() == ["forward"] * 2 and found["regime"].tolist() == ["b-bound", "c-bound"]


@pytest.mark.parametrize("device", ["nvidia-h200", "amd-epyc"])
def test_every_point_and_every_loss_is_in_the_pictures(device):
    """Each measured figure is a dot; where memory ran out there is a cross, at what was predicted."""
    plots.style()
    machine = stored.machine_of(device, "01_naive_sweep")
    rows = stored.load(device, "01_naive_sweep").query("head_dim == 64").reset_index(drop=True)
    rows = with_floors(with_laws(rows, machine), machine)
    lost = int((rows["status"] == "oom").sum())
    for figure, seen in (
        (sweep_figures.against_floors(rows, machine), "forward_backward_ms"),
        (sweep_figures.in_matrices(rows, machine), "backward_peak_bytes"),
    ):
        drawn = figure.axes[-1].get_lines()
        dots = [np.isfinite(line.get_ydata()).sum() for line in drawn if line.get_marker() == "o"]
        crosses = [len(line.get_ydata()) for line in drawn if line.get_marker() == "x"]
        assert sum(dots) == rows[seen].notna().sum() and sum(crosses) == lost
        told = [text.get_text().split("\n")[0] for text in figure.axes[-1].texts]
        assert {*", ".join(told).split(", ")} == {*rows["variant"]}
        plt.close(figure)
