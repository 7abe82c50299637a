"""The public definitions as restated: what they share with the paper's, where they part, and the published table."""

import math

import pandas as pd
import pytest
import torch

from attnlib.core import Shape
from attnlib.dilated import dilated_reference
from attnlib.dilated.attention import dilated_variant
from attnlib.timing.measure import measure
from notebooks.restated import audit, dilated_tables

CONFIG = {"segment_lengths": (16, 32, 64), "dilation_rates": (1, 2, 4)}


def relative(got, want) -> float:
    return float(((got - want).norm() / want.norm()).detach())


def draw(*size):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*size, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
def test_torchscale_is_the_paper_in_output_and_not_in_gradient(causal):
    q, k, v = draw(2, 4, 128, 8)
    theirs = audit.torchscale(q, k, v, **CONFIG, causal=causal, attend=audit.exact_and_lse)
    paper = audit.by_definition(q, k, v, **CONFIG, causal=causal, head_offsets="grouped")
    assert relative(theirs, paper) < 1e-12
    off = [
        relative(a, b)
        for a, b in zip(
            *(torch.autograd.grad(o, (q, k, v), torch.ones_like(o) * q.detach()) for o in (theirs, paper)), strict=True
        )
    ]
    assert off[0] > 0.01 and off[1] > 0.01 and off[2] < 1e-12


def test_torchscale_with_the_flash_kernel_is_the_same():
    q, k, v = (x.float() for x in draw(2, 4, 128, 8))
    want = dilated_reference(q, k, v, **CONFIG, head_offsets="grouped")
    assert relative(audit.torchscale(q, k, v, **CONFIG), want) < 1e-5


def test_zeros_that_pad_take_part_unless_causal():
    q, k, v = draw(1, 4, 100, 8)
    off = [
        relative(
            audit.torchscale(q, k, v, **CONFIG, causal=causal, attend=audit.exact_and_lse),
            audit.by_definition(q, k, v, **CONFIG, causal=causal, head_offsets="grouped"),
        )
        for causal in (False, True)
    ]
    assert off[0] > 1e-3 and off[1] < 1e-12


def test_a_rate_that_does_not_divide_moves_later_segments():
    q, k, v = draw(1, 3, 64, 8)
    config = {"segment_lengths": (16,), "dilation_rates": (3,), "causal": True}
    theirs = audit.torchscale(q, k, v, **config, attend=audit.exact_and_lse)
    paper = audit.by_definition(q, k, v, **config, head_offsets="grouped")
    assert relative(theirs[:, :, :16], paper[:, :, :16]) < 1e-12 and relative(theirs[:, :, 16:], paper[:, :, 16:]) > 0.5


def test_two_equal_branches_give_half_where_groups_divide():
    q, k, v = draw(1, 4, 32, 8)
    config = {"segment_lengths": (32, 32), "dilation_rates": (1, 1)}
    paper = audit.by_definition(q, k, v, **config)
    assert relative(audit.split_heads(q, k, v, **config), paper / 2) < 1e-12
    assert relative(audit.mean_merge(q, k, v, **config), paper) < 1e-12
    assert relative(audit.by_definition(q, k, v, **config, most=1), paper) < 1e-12


def test_the_signed_sum_is_over_the_whole_sequence():
    q, k, v = draw(1, 3, 64, 8)
    o = audit.split_heads(q, k, v, **CONFIG, by_sum=True)
    torch.testing.assert_close(o.sum(2), torch.full_like(o.sum(2), 1 / 3))


def test_the_table_of_definitions_says_what_each_is_off():
    """Small, in float64: the definition that is the paper's in output is so to 12 digits, and no definition sees the
    future that is not said to."""
    rows = pd.DataFrame(audit.audited(Shape(1, 4, 64, 8), *CONFIG.values()))
    assert {*rows["definition"]} == {*audit.PUBLIC_DEFINITIONS} and len(rows) == 2 * len(audit.PUBLIC_DEFINITIONS)
    own = rows[rows["definition"] == "torchscale, its own offsets"]
    assert (own["o_off"] < 1e-12).all() and (own["dq_off"] > 0.01).all() and (own["dv_off"] < 1e-12).all()
    causal = rows[rows["causal"]].set_index("definition")["leak"]
    assert causal["fkodom: sum and groups"] > 1e-3 and (causal.drop("fkodom: sum and groups") < 1e-12).all()


def test_what_is_raced_against_is_measured_like_a_variant(device):
    """Its memory has no law, and it takes what the flash kernel underneath takes."""
    copying = audit.torchscale_variant((16, 32), (1, 2))
    assert copying.law is None
    row = measure(copying, Shape(1, 2, 64, 8, "float16" if device == "cuda" else "float32"), device, budget_s=0.05)
    assert row["status"] == "ok" and row["saved_bytes"] > 0


def labelled(*config):
    return dilated_variant(dilated_tables.label(*config), *config)


def test_the_published_points_are_all_there():
    points = dilated_tables.published_points("float32", 16384, labelled)
    assert len(points) == 17  # of 22 rows, five are of points that other rows have
    for row in dilated_tables.report_004().itertuples():
        shape = Shape(row.batch, row.heads, row.seq_len, row.head_dim)
        assert any(v.name == row.variant and s == shape for v, s in points)


def test_points_that_were_not_measured_have_no_row():
    """In whatever order the rows stand, and whatever else stands there: the counts follow the rows."""
    points = dilated_tables.published_points("float32", 1024, labelled)
    rows = pd.DataFrame([{"variant": v.name, **s.columns(), "forward_peak_bytes": 1} for v, s in points])
    counted = dilated_tables.with_counts(rows, points)
    assert len(counted) == len(points) and (counted["operations"] > 0).all()
    fewer = dilated_tables.with_counts(pd.concat([rows[:0:-1], rows.head(1).assign(variant="another")]), points)
    assert len(fewer) == len(points) - 1 and (fewer["operations"].tolist() == counted["operations"][:0:-1]).all()


def test_shares_of_pairs_by_distance():
    starts, shares = dilated_tables.distances(torch.eye(9) + torch.eye(9).roll(1, 0))
    assert starts == [1, 2, 4, 8] and shares[0] == 0.5 and shares[1:3] == [0, 0] and math.isclose(shares[3], 0.5)


def test_a_remedy_without_a_time_costs_no_other_its_own():
    nan = float("nan")
    rows = pd.DataFrame(
        {
            "variant": ["flash", "window", "strided"],
            "seq_len": 8,
            "status": ["ok", "ok", "oom"],
            "forward_backward_ms": [4.0, 1.0, nan],
            "operations": [80, 10, 20],
        }
    )
    bases = dict.fromkeys(rows["variant"], "flash")
    gained = dilated_tables.gains(rows, bases).set_index("variant")
    assert gained.loc["window", ["ms", "gain", "promised", "kept"]].tolist() == [1.0, 4.0, 8.0, 0.5]
    assert gained.loc["strided", "ms"] == "oom" and math.isnan(gained.loc["strided", "kept"])
    without = dilated_tables.gains(rows.assign(forward_backward_ms=[nan, 1.0, nan]), bases)
    assert without["ms"].tolist() == ["ok", 1.0, "oom"] and without["kept"].isna().all()
