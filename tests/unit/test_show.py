"""The table of costs: what it measures, how it is written, and what it says of contexts that cannot be."""

import io

import pytest
from rich.console import Console

from stepladder import show
from stepladder.core.errors import UserError
from stepladder.models.zoo import spec
from stepladder.run import TrainConfig
from stepladder.train.memory import decoding, training

VOCAB = 259


def printed(table):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def cells(text, context):
    """The row of a context, without units."""
    row = next(line for line in text.splitlines() if line.split()[:1] == [context])
    return [word for word in row.split() if word[0].isdigit()]


def test_a_row_has_the_measured_bytes():
    update = training(spec("act", "tiny"), VOCAB, 3, 64, TrainConfig(steps=1, precision="bf16"))
    reading = decoding(spec("act", "tiny"), VOCAB, 3, 64)
    found = cells(printed(show.costs(spec("act", "tiny"), VOCAB, "64", 3, precision="bf16")), "64")
    memory = (update.saved, update.peak, reading.state, reading.peak)
    assert found[-4:] == [show.size(count).split()[0] for count in memory]


def test_the_table_fits_a_terminal_of_80_columns():
    text = printed(show.costs(spec("shared_loop"), VOCAB, "128,4096", 1023, 8))
    assert "…" not in text
    assert len(cells(text, "4,096")) == 8
    assert "8 ticks" in text


def test_a_context_that_does_not_fit_has_an_empty_row_and_a_reason():
    text = printed(show.costs(spec("nano_absolute", "tiny"), VOCAB, "128,300", 1))
    assert len(cells(text, "128")) == 8
    assert cells(text, "300") == ["300"]
    assert "300: a context of 300 does not fit the 256 learned positions" in text


def test_a_table_with_no_row_is_refused():
    with pytest.raises(UserError, match="does not fit the 256 learned positions"):
        show.costs(spec("nano_absolute", "tiny"), VOCAB, "300,400", 1)
    with pytest.raises(UserError, match="no loop"):
        show.costs(spec("identity", "tiny"), VOCAB, "8", 1, ticks=2)


def test_counts_and_bytes_in_words():
    assert [show.size(count) for count in (0, 999, 1023, 1024**2, 1500 * 2**40)] == [
        "0 B",
        "999 B",
        "0.999 KiB",
        "1 MiB",
        "1.465 PiB",
    ]
    assert [show.quantity(count) for count in (1, 12345, 2e9, 3e12, 4e15)] == ["1", "12.3 k", "2 G", "3 T", "4 P"]
