"""What chapter 2 draws and names: tensors of the ledgers, and the one for which there was no room."""

import pytest

from attnlib import VARIANTS, family
from attnlib.core import Machine, Shape
from notebooks import alive

PLAIN = family("plain")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PLAIN)
def test_every_matrix_of_a_ledger_has_a_name_in_the_text(name, kind):
    shape = Shape(2, 1, 512, 8)
    matrix = shape.batch * shape.seq_len**2 * shape.element_size
    for row in alive.book_of(PLAIN[name], shape, Machine(kind)):
        large = [tensor for tensor, nbytes in row["alive"].items() if nbytes >= matrix]
        assert not [tensor for tensor in large if alive.tensor_named(PLAIN[name], tensor) == tensor], row["op"]


@pytest.mark.parametrize(
    "name, last", [("naive", "dP∘P"), ("naive_custom", "−dP∘E/ℓ²"), ("naive_weights_only", "dP∘P")]
)
def test_what_was_held_when_a_run_failed_names_the_tensor_that_found_no_room(name, last):
    """Whatever was held just before the largest moment, to the byte; and a few bytes more."""
    shape, machine = Shape(8, 1, 777, 64), Machine("cuda")
    matrix = shape.batch * shape.seq_len**2 * shape.element_size
    most = max(row["alive_bytes"] for row in alive.book_of(VARIANTS[name], shape, machine))
    rest = 4 * shape.batch * shape.seq_len if name == "naive_weights_only" else 0  # the row sums, which follow
    held = most - matrix - rest
    assert alive.asked_last(VARIANTS[name], shape, machine, held) == (last, 0)
    assert alive.asked_last(VARIANTS[name], shape, machine, held + 512) == (last, 512)


def test_a_timeline_ends_with_the_tensor_that_was_one_too_many():
    figure = alive.timelines(PLAIN, 2**28, Machine("cuda"))
    written = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert [sum("one too many" in text for text in texts) for texts in written] == [1] * len(PLAIN)
    assert any("−dP∘E/ℓ²" in text for text in written[0])


def test_a_frontier_is_drawn_with_and_without_tries():
    assert len(alive.tries(PLAIN, {"a card": "8GiB"}, None, "a device").axes) == 1
