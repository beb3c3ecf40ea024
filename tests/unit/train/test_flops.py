"""The account of FLOPs: in training what is declared is executed, halted places included; without gradients less is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepladder.core.files import read_json
from stepladder.data.stream import Stream
from stepladder.models.zoo import spec
from stepladder.train.optim import adamw
from stepladder.train.session import build, train
from stepladder.train.step import gradient_step

FIELDS = {"width": 32, "heads": 2, "depth": 2, "chunk": 4, "ticks": 6, "thoughts": 4}


def counted(function):
    """FLOPs of matrix products while ``function`` runs; attention by its plain formula."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def at_tick_one(model):
    """Every place stops at its first tick."""
    with torch.no_grad():
        model.core.halting.bias.fill_(30.0)
    return model


def test_a_forward_with_gradients_executes_all_ticks_and_one_without_those_that_are_needed():
    torch.manual_seed(0)
    model = at_tick_one(spec("act", **FIELDS).build(20))
    tokens = torch.randint(0, 20, (2, 64))
    with torch.no_grad():
        assert model(tokens, trace=True).trace["ticks"].max() == 1
        without = counted(lambda: model(tokens)) / tokens.numel()
    with_gradients = counted(lambda: model(tokens)) / tokens.numel()
    assert with_gradients == pytest.approx(model.cost(64).flops, rel=0.01)
    assert without == pytest.approx(model.cost(64, 1).flops, rel=0.01)
    assert without < 0.6 * with_gradients


@pytest.mark.parametrize("kind", ["transformer", "latent", "act"])
def test_a_training_step_executes_three_forwards_of_declared_flops(tiny, tmp_path, kind):
    """Backward costs twice the forward, less what the first layer's input and the embedding need not know."""
    fields = FIELDS if kind != "transformer" else {"width": 32, "heads": 2, "depth": 2}
    run = tiny(kind=kind, model=fields)
    stream = Stream(run.data, run.seed, tmp_path)
    model = build(run, stream.tokenizer.vocab)
    if kind == "act":
        at_tick_one(model)
    batch = stream.batch(0, np.arange(4), 4)
    optimizer = adamw(model, run.train)
    executed = counted(lambda: gradient_step(model, optimizer, batch, run.train, lr=1e-3, noise=0))
    declared = 3 * model.cost(run.data.sequence).flops * batch.tokens.size
    assert executed == pytest.approx(declared, rel=0.05)


def test_the_summary_states_what_was_executed(tiny, tmp_path):
    run = tiny(kind="act", model=FIELDS)
    flops = []
    real = gradient_step

    def step(*args, **kwargs):
        found = []
        flops.append(counted(lambda: found.append(real(*args, **kwargs))))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepladder.train.loop.gradient_step", step)
        home = train(run, tmp_path, quiet=True)
    stated = read_json(home / "summary.json")["train_flops"]
    assert len(flops) == 6
    assert stated == pytest.approx(sum(flops), rel=0.05)
