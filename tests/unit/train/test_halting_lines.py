"""What metric lines say of a model that decides its ticks, against the model's own trace."""

import numpy as np
import pytest
import torch

from stepladder.core.files import read_lines
from stepladder.data.stream import Stream
from stepladder.models.base import IGNORE
from stepladder.models.noise import row_keys
from stepladder.train.optim import adamw
from stepladder.train.session import build, train
from stepladder.train.step import HALTING, gradient_step


@pytest.mark.parametrize("kind", ["recursive_halting", "act"])
@pytest.mark.parametrize("micro", [None, 1])
def test_a_steps_figures_are_means_over_supervised_tokens(tiny, tmp_path, kind, micro):
    run = tiny(kind=kind, model={"dropout": 0.0}, micro=micro)
    stream = Stream(run.data, run.seed, tmp_path)
    model = build(run, stream.tokenizer.vocab)
    batch = stream.batch(0, np.arange(4), 4)
    tokens, targets, documents = (torch.from_numpy(a) for a in (batch.tokens, batch.targets, batch.documents))
    trace = model(tokens, documents=documents, key=row_keys(9, 4, tokens.device), trace=True).trace
    taken = gradient_step(model, adamw(model, run.train), batch, run.train, lr=0.0, noise=9)
    scored = targets != IGNORE
    assert tuple(taken.halting) == HALTING
    inner, expected, executed = (value / taken.supervised for value in taken.halting.values())
    assert inner == pytest.approx(int(trace["ticks"].max()))
    assert expected == pytest.approx(float(trace["ponder"].detach()[scored].mean()), rel=1e-5)
    assert executed == pytest.approx(float(trace["ticks"][scored].double().mean()), rel=1e-5)


def test_lines_have_window_means_and_other_models_have_none(tiny, tmp_path):
    lines = read_lines(train(tiny(kind="recursive_halting"), tmp_path / "a", quiet=True) / "metrics.jsonl")
    steps = [line for line in lines if "losses" in line]
    assert len(steps) == 3
    for line in steps:
        assert 1 <= line["act_expected_steps"] <= line["act_executed_steps"] <= line["act_inner_steps"] <= 3
        assert not set(HALTING) & set(line["losses"])
        assert set(line["losses"]) == {"ponder", "deep"}
    for kind in ("transformer", "latent"):
        lines = read_lines(train(tiny(kind=kind), tmp_path / kind, quiet=True) / "metrics.jsonl")
        assert not any(set(HALTING) & set(line) for line in lines)
