"""The page of samples and its colours, from answers made by hand."""

import re
import subprocess
import sys

import pytest

from stepladder.core.errors import UserError
from stepladder.report.samples import pieces, shades, write

ABOUT = {"run": "a & b", "architecture": "recursive_halting", "step": 7}


def answer(tokens="ab<>", ticks=(1, 2, 3, 1), **other):
    plain = {"prompt": "ab", "text": "<>", "stop": "length", "prompt_tokens": 2, "budget": None, "seed": 0}
    plain |= {"temperature": 0.0, "top_k": None, "top_p": 1.0, "max_new": 2}
    return {**plain, "tokens": list(tokens), "ticks": ticks and list(ticks), **other}


def test_every_token_is_shown_in_the_colour_of_its_ticks(tmp_path):
    page = write([answer(), answer(ticks=(4, 4, 4, 2), stop="eos")], ABOUT, tmp_path / "p.html").read_text()
    shown = re.findall(r'<span class="(t\d)( new)?" title="(\d) ticks?">(.*?)</span>', page)
    assert shown[:4] == [
        ("t0", "", "1", "a"), ("t1", "", "2", "b"), ("t2", " new", "3", "&lt;"), ("t0", " new", "1", "&gt;"),
    ]  # fmt: skip
    assert [each[0] for each in shown[4:]] == ["t3", "t3", "t3", "t1"]
    assert "<b>2.00</b> ticks per token written" in page
    assert "a &amp; b" in page
    assert "<script" not in page
    assert (
        write([answer()], ABOUT, tmp_path / "q.html").read_bytes()
        == write([answer()], ABOUT, tmp_path / "r.html").read_bytes()
    )


def test_colours_grow_darker_with_ticks_and_their_text_stays_readable():
    def light(colour):
        return sum(int(colour[place : place + 2], 16) for place in (1, 3, 5)) / 3

    found = shades([answer(ticks=(1, 2, 3, 9))])
    assert list(found) == [1, 2, 3, 9]
    papers = [light(each.paper) for each in found.values()]
    assert papers == sorted(papers, reverse=True)
    assert len(set(papers)) == 4
    assert all(abs(light(each.paper) - light(each.ink)) > 100 for each in found.values())
    assert len(shades([answer(ticks=(3, 3, 3, 3))])) == 1


def test_a_model_without_ticks_is_refused():
    assert pieces(answer(ticks=None))[0] == ("a", None, False)
    with pytest.raises(UserError, match="reports no ticks"):
        shades([answer(ticks=None)])


def test_drawing_knows_no_torch():
    probe = "import sys; import stepladder.report.samples; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "False\n"
