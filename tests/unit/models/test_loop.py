import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Cost, Sink
from stepladder.models.channels.swiglu import SwiGLU
from stepladder.models.mixers.attention import Attention
from stepladder.models.recurrences.loop import Loop
from stepladder.models.recurrences.once import Once
from stepladder.models.stack import Residual, Stack

B, T, D = 2, 5, 8


def context(ticks=None, trace=True):
    positions_BT = torch.arange(T).expand(B, T)
    keys_B = torch.tensor([5, 6])
    sink = Sink(trace={} if trace else None)
    return Context(torch.zeros_like(positions_BT), positions_BT, False, ticks, keys_B, 0, False, sink)


def core(dropout=0.0):
    return Stack([Residual(D, Attention(D, 2, 2, None, 1.0), dropout), Residual(D, SwiGLU(D, 12, 1.0), dropout)])


@pytest.fixture
def loop():
    torch.manual_seed(0)
    return Loop(core(), D, ticks=3, inject=True).double()


def test_ticks_compose_the_one_core_with_the_input_added_again(loop):
    x_BTD = torch.randn(B, T, D).double()
    h_BTD = x_BTD
    for ticks in (1, 2, 3, 4, 5):
        h_BTD, _ = loop.core(loop.norm(h_BTD) + x_BTD @ loop.inject.weight.T, None, context())
        got, state = loop(x_BTD, None, context(ticks))
        torch.testing.assert_close(got, h_BTD, rtol=0, atol=1e-13)
        assert len(state) == ticks


def test_without_injection_only_the_carried_state_goes_in():
    torch.manual_seed(0)
    loop = Loop(core(), D, ticks=1, inject=False).double()
    x_BTD = torch.randn(B, T, D).double()
    torch.testing.assert_close(loop(x_BTD, None, context())[0], loop.core(loop.norm(x_BTD), None, context())[0])
    assert loop.inject is None


def test_own_ticks_unless_asked_and_reported_per_token(loop):
    for asked, executed in ((None, 3), (1, 1), (7, 7)):
        ctx = context(asked)
        loop(torch.randn(B, T, D).double(), None, ctx)
        assert ctx.sink.trace["ticks"].tolist() == [[executed] * T] * B


@pytest.mark.parametrize("ticks", [0, -1])
def test_less_than_one_tick_is_refused(loop, ticks):
    with pytest.raises(UserError, match=f"ticks={ticks}"):
        loop(torch.randn(B, T, D).double(), None, context(ticks))


def test_a_sequence_goes_on_with_the_ticks_it_was_begun_with(loop):
    x_BTD = torch.randn(B, T, D).double()
    _, state = loop(x_BTD, None, context(2))
    with pytest.raises(UserError, match="begun with 2 ticks and cannot go on with 3"):
        loop(x_BTD, state, context())
    assert len(loop(x_BTD, state, context(2))[1]) == 2


def test_preallocated_state_has_one_entry_per_tick(loop):
    for ticks, count in ((None, 3), (5, 5)):
        state = loop.init_state(B, 16, torch.device("cpu"), torch.float64, ticks)
        assert len(state) == count
        assert state[0][0].k_BSGK.shape == (B, 16, 2, 4)


def test_cost_counts_weights_once_and_work_per_tick(loop):
    one, four = loop.cost(T, 1), loop.cost(T, 4)
    assert one.params == four.params == sum(p.numel() for p in loop.parameters())
    inject = 2 * D * D
    assert four.flops - inject == 4 * (one.flops - inject)
    assert four.state_bytes == 4 * one.state_bytes
    assert loop.cost(T) == loop.cost(T, 3)


def test_every_tick_has_noise_of_its_own():
    """With one mask for all ticks, dropping the same channels each time, the loop would be another model."""
    torch.manual_seed(0)
    part = Residual(D, SwiGLU(D, 12, 1.0), 0.5).train()
    seen = []
    part.dropout.register_forward_hook(lambda module, args, out: seen.append(out == 0))
    Loop(part, D, ticks=3, inject=False)(torch.randn(B, T, D), None, context())
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_once_applies_its_core_once_and_refuses_ticks():
    once, x_BTD = Once(core()), torch.randn(B, T, D)
    for ticks in (None, 1):
        ctx = context(ticks)
        assert torch.equal(once(x_BTD, None, ctx)[0], once.core(x_BTD, None, ctx)[0])
        assert ctx.sink.trace["ticks"].tolist() == [[1] * T] * B
    with pytest.raises(UserError, match="has no loop, so ticks=2 means nothing"):
        once(x_BTD, None, context(2))
    assert once.cost(T) == once.core.cost(T)


def test_cost_adds_up():
    assert Cost(1, 2.0, 3.0) + Cost(10, 20.0, 30.0) == Cost(11, 22.0, 33.0)
    assert Cost(1, 2.0, 3.0).repeated(2.5) == Cost(1, 5.0, 7.5)
