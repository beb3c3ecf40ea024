"""The page of a trace, from arrays made by hand."""

import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from stepladder.core.errors import UserError
from stepladder.core.files import write_json
from stepladder.report.trace import _random_share, _reads, write

TOKENS = ["⟨bos⟩", "<b>", "$x_1$", "a", "&"]
COUNT = len(TOKENS)


def recording(home, **arrays):
    """A recording of five tokens with ``arrays`` in it."""
    about = {
        "schema": 1, "run": "a & b", "architecture": "vectur", "step": 7, "text": "<script>x</script>",
        "tokens": TOKENS, "ticks": None, "key": 0,
    }  # fmt: skip
    write_json(home / "trace.json", about)
    plain = {"token": np.arange(COUNT), "nll": np.array([1, 2, 3, 4, np.nan]), "ticks": np.array([1, 2, 3, 2, 1])}
    save_file(plain | arrays, home / "trace.safetensors")
    return home


def machine(rng):
    """What a machine of 2 heads and 3 ticks notes."""
    return {
        "m0.angle": rng.normal(size=(COUNT, 4, 2)),
        "m0.behind": rng.normal(size=(COUNT, 4, 2)),
        "m0.gate": rng.random((COUNT, 3)),
        "m0.cell": rng.integers(-2, COUNT, size=(COUNT, 4, 4)),
        "m0.share": rng.normal(size=(COUNT, 4, 4)),
    }


def test_every_array_is_drawn_or_named(tmp_path):
    arrays = {**machine(np.random.default_rng(0)), "m0.deep": np.zeros((COUNT, 2, 2, 2)), "n0.new": np.ones((COUNT, 9))}
    page = write(recording(tmp_path, **arrays)).read_text()
    titles = re.findall("<h[23]>(.*?)</h[23]>", page)
    model, m0, n0 = ["The model", "ticks", "nll"], ["m0", "behind", "reads", "random", "angle", "gate"], ["n0", "new"]
    assert titles == [*model, *m0, *n0, "Files"]
    assert page.count("<svg") == 8
    assert "m0.deep 5 × 2 × 2 × 2" in page
    assert "Tokens × 9" in page
    assert "<b>2.500</b> nats per token" in page
    assert "<b>1.80</b> ticks per token" in page


def test_the_page_needs_nothing_and_takes_nothing_for_markup(tmp_path):
    page = write(recording(tmp_path, **machine(np.random.default_rng(0)))).read_text()
    assert "<script" not in page
    assert "a &amp; b" in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert "$x_1$" in page  # text, not mathematics


def test_equal_files_give_equal_bytes(tmp_path):
    pages = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pages.append(write(recording(tmp_path / name, **machine(np.random.default_rng(0)))).read_bytes())
    assert pages[0] == pages[1]


def test_a_map_of_reads_adds_up_what_falls_on_one_cell():
    cell, share = np.array([[0, 0, -1], [1, 0, 1], [2, 1, 5]]), np.array([[0.5, 0.25, 9], [1, 2, 3], [4, -5, 9]])
    table = _reads(cell, share, ["a", "b", "c"]).axes[0].images[0].get_array()
    want = np.array([[0.75, np.nan, np.nan], [2, 4, np.nan], [0, -5, 4]])
    np.testing.assert_array_equal(table.filled(np.nan), want)
    np.testing.assert_allclose(_random_share(cell, share), [9 / 9.75, 0, 0])


@pytest.mark.parametrize("count", [2, 97, 300])
def test_short_and_long_texts(tmp_path, count):
    about = {"schema": 1, "run": "r", "architecture": "x", "step": 1, "text": "t", "ticks": 4, "key": 0}
    write_json(tmp_path / "trace.json", {**about, "tokens": ["⟨bos⟩", *["zebra"] * (count - 1)]})
    rng = np.random.default_rng(0)
    arrays = {"nll": np.full(count, 1.0), "m.gate": np.zeros((count, 3)), "m.behind": rng.normal(size=(count, 4, 2))}
    save_file(arrays, tmp_path / "trace.safetensors")
    page = write(tmp_path).read_text()
    assert page.count("<svg") == 3
    assert ("zebra" in page) == (count < 97)
    assert "tick budget <b>4</b>" in page


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    recording(tmp_path, **{"m0.gate": np.zeros((COUNT + 1, 3))})
    with pytest.raises(UserError, match="do not belong together"):
        write(tmp_path)
    (tmp_path / "trace.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="record it again"):
        write(tmp_path)
    (tmp_path / "trace.safetensors").unlink()
    with pytest.raises(UserError, match="record it again"):
        write(tmp_path)


def test_drawing_knows_no_torch():
    probe = "import sys; import stepladder.report.trace; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "False\n"
