"""Whatever a name contains, a table keeps its shape and runs nothing."""

import csv
import io

import pytest

from stepladder.report import tables

NASTY = "<script>alert(1)</script>|a_b*c`$x$\nnew\r\nrow\x00[l](javascript:x) & \\ % # {} ~^"


def test_markdown_keeps_rows_and_columns():
    text = tables.markdown(("name", "value"), [(NASTY, 1), ("plain", 2)])
    lines = text.splitlines()
    assert len(lines) == 4
    bare = [line.replace("\\\\", "").replace("\\|", "") for line in lines]
    assert {line.count("|") for line in bare} == {3}
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "](javascript" not in text.replace("\\]", "")


def test_csv_round_trips_in_one_row_each():
    rows = list(
        csv.reader(io.StringIO(tables.csv_text(("name", "value"), [(NASTY, 1.5), ('with "quotes", commas', None)])))
    )
    assert len(rows) == 3
    assert rows[1][0] == tables.one_line(NASTY)
    assert rows[2] == ['with "quotes", commas', ""]


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r\n=1"])
def test_csv_formulas_stay_text(text):
    assert tables.escape_csv(text).startswith("'")


def test_csv_numbers_stay_numbers():
    assert tables.escape_csv(-1.5) == -1.5
    assert tables.escape_csv(None) is None
    assert tables.escape_csv("−1.5") == "−1.5"


def test_latex_escapes_every_special_letter():
    assert tables.escape_latex(r"a_b & 5% of $x \ {y} ~^#") == (
        r"a\_b \& 5\% of \$x \textbackslash{} \{y\} \textasciitilde{}\textasciicircum{}\#"
    )
    table = tables.latex(("name", "n"), [(NASTY, "1")])
    assert table.count(r"\\") == 2
    assert table.splitlines()[0] == r"\begin{tabular}{lr}"
    assert "<" not in table


def test_one_line_has_no_control_characters():
    assert tables.one_line("a\nb\x00\x1b[31mc\u2028d\x85e\tf") == "a b [31mc d e f"
