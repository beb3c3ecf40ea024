"""Faults that the ablation ladder's ancestor had (S5, S6, S7), each put to ours and to a miniature that has it.

The miniatures are what was measured there, reduced to a part: so every detector here is seen to fire.
"""

import pytest
import torch
from torch import nn

from stepladder.models.base import Part, leaves
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.mamba2 import chunked, naive
from stepladder.models.zoo import spec

V = 13
THINKING, STATE_SPACE = ("latent", "act"), ("ssm", "ssm_mem")


def stirred(model):
    """In float64, with noise on every weight, so that no gate is shut."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def build(name, **fields):
    torch.manual_seed(0)
    return stirred(spec(name, "tiny", **fields).build(V))


def with_part(part):
    torch.manual_seed(0)
    return stirred(LanguageModel(V, 16, part))


def tokens(batch=3, length=24, seed=0):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def leak_from_later(model):
    """The largest change of earlier logits when later tokens change."""
    text, other = tokens(), tokens()
    other[:, 15:] = (other[:, 15:] + 1) % V
    return float((model(text).logits - model(other).logits)[:, :15].abs().max())


@torch.no_grad()
def leak_from_rows(model):
    """The largest change of a row's logits when the other rows change."""
    text, other = tokens(), tokens()
    other[1:] = (other[1:] + 1) % V
    return float((model(text).logits - model(other).logits)[0].abs().max())


@torch.no_grad()
def whole_against_steps(model):
    """The largest difference between one call and token by token with the state that is carried."""
    text, state, found = tokens(), None, []
    for piece in text.split(1, dim=1):
        out = model(piece, state)
        state = out.state
        found.append(out.logits)
    return float((torch.cat(found, 1) - model(text).logits).abs().max())


class AddedToAll(Part):
    """S5: thought tokens attend to all tokens, and their mean is added at every position."""

    def __init__(self):
        super().__init__()
        self.thoughts = nn.Parameter(torch.randn(4, 16))

    def forward(self, x_BTD, state, ctx):
        heard = (self.thoughts @ x_BTD.mT / 4).softmax(-1) @ x_BTD
        return x_BTD + heard.mean(1, keepdim=True), state


class BatchForTime(Part):
    """S6: a scan that views (T, B) as (B, T), and keeps nothing for the next call."""

    def forward(self, x_BTD, state, ctx):
        return x_BTD + x_BTD.transpose(0, 1).reshape(x_BTD.shape).cumsum(1), state


@pytest.mark.parametrize("name", THINKING)
def test_S5_thoughts_tell_no_token_of_later_ones(name):
    assert leak_from_later(build(name)) == 0
    assert leak_from_later(with_part(AddedToAll())) > 1e-3


@pytest.mark.parametrize("name", STATE_SPACE)
def test_S6_time_and_batch_are_not_mixed_and_steps_equal_the_whole(name):
    model, broken = build(name), with_part(BatchForTime())
    for measure, bound in ((leak_from_later, 0.0), (leak_from_rows, 1e-12), (whole_against_steps, 1e-10)):
        assert measure(model) <= bound, measure.__name__
        assert measure(broken) > 1e-3, measure.__name__


def input_free(u, log_decay, b, c, reset, state):
    """S6: s_t = a_t s_{t-1} + B_t, y_t = <s_t, C_t>: what is scanned never enters, all channels of a head are one."""
    y, after = naive(torch.ones_like(u), log_decay, b, c, reset, state)
    return y, after


@pytest.mark.parametrize("scan", [naive, lambda *args: chunked(*args, 8)], ids=["naive", "chunked"])
def test_S6_what_is_scanned_enters_the_scan(scan):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u, log_decay, b, c = draw(2, 20, 4, 3), -draw(2, 20, 4).abs(), draw(2, 20, 2, 5), draw(2, 20, 2, 5)
    rest = (log_decay, b, c, torch.zeros(2, 20, dtype=torch.bool), torch.zeros(2, 4, 3, 5, dtype=torch.float64))
    for each, alive in ((scan, True), (input_free, False)):
        y = each(u, *rest)[0]
        assert torch.equal(each(u.flip(1), *rest)[0], y) is not alive
        assert (float(y.std(-1).max()) > 1e-3) is alive  # channels of a head differ


class PonderAsFloat(Part):
    """S7: the ponder term is a float, the mass weighs no output, and one decision is made for the whole batch."""

    def __init__(self):
        super().__init__()
        self.core, self.halt = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x_BTD, state, ctx):
        mass_B, ponder, start_BTD = torch.zeros(len(x_BTD), dtype=x_BTD.dtype), 0.0, x_BTD
        for tick in range(1, 9):
            x_BTD = start_BTD + self.core(x_BTD).tanh()
            p_B = (20 * self.halt(x_BTD[:, 0])[:, 0]).sigmoid()
            mass_B, ponder = mass_B + (1 - mass_B) * p_B, ponder + p_B.mean().item()
            if bool((mass_B > 0.9).all()):
                break
        ctx.add_loss("ponder", torch.full_like(x_BTD[..., 0], ponder))
        ctx.note("ticks", torch.full_like(ctx.positions_BT, tick))
        return x_BTD, state


def head_gradient(model, head):
    """The gradient norm of the halting head's parameters under the whole objective; None where there is none."""
    out = model(tokens(), targets=tokens(seed=1))
    (out.nll_BT + out.losses["ponder"]).sum().backward()
    gradients = [parameter.grad for parameter in head.parameters()]
    return None if None in gradients else float(torch.cat([g.flatten() for g in gradients]).norm())


def test_S7_the_halting_head_learns():
    model = build("act")
    assert head_gradient(model, model.core.halting) > 1e-3
    broken = with_part(PonderAsFloat())
    assert head_gradient(broken, broken.core.halt) is None


def test_S7_no_thought_waits_for_a_companion():
    """Rows that stop early beside rows that do not: together as alone, in logits and in executed ticks."""
    model = build("act", ticks=8, epsilon=0.3)
    text = tokens(batch=20, length=5)  # one thought a row
    ours, theirs = [], []
    with torch.no_grad():
        for each, found in ((model, ours), (with_part(PonderAsFloat()), theirs)):
            together = each(text, trace=True)
            for row in range(20):
                alone = each(text[row : row + 1], trace=True)
                found.append(float((alone.logits[0] - together.logits[row]).abs().max()))
                if each is model:
                    assert torch.equal(alone.trace["ticks"][0], together.trace["ticks"][row])
        assert len(model(text, trace=True).trace["ticks"][:, -1].unique()) > 1
    assert max(ours) < 1e-12
    assert max(theirs) > 1e-3


@pytest.mark.parametrize("name", [*THINKING, *STATE_SPACE])
def test_S5_S6_what_is_carried_is_per_row(name):
    with torch.no_grad():
        state = build(name)(tokens(batch=5)).state
    assert {leaf.shape[0] for leaf in leaves(state)} == {5}
