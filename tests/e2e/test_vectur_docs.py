"""The example of docs/vectur.md runs and does what it says."""

import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[2] / "docs" / "vectur.md"


def test_the_intervention_example_runs(capsys):
    (example,) = re.findall("```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {}
    exec(compile(example, str(DOCS), "exec"), names)
    assert "cells behind" in capsys.readouterr().out
    behind = names["pinned"].trace["vectur0.behind"][0, :, :, 0]
    at_first = torch.arange(12.0)[:, None].expand_as(behind)
    off = (behind - at_first).remainder(torch.arange(1.0, 13.0)[:, None])  # in cells, round the circle
    assert float(torch.minimum(off, torch.arange(1.0, 13.0)[:, None] - off).abs().max()) < 1e-4
    moved = {name: (names[name].logits - names["free"].logits).abs().amax(-1)[0] for name in ("pinned", "swapped")}
    assert float(moved["pinned"].max()) > 1e-4
    assert not bool(moved["swapped"][:6].any())
    assert bool((moved["swapped"][6:] > 0).all())
