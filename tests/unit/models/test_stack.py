import torch

from stepladder.models.base import Context, Cost, Sink
from stepladder.models.channels.swiglu import SwiGLU
from stepladder.models.mixers.attention import Attention
from stepladder.models.stack import Residual, Stack

B, T, D = 2, 6, 8


def context(recompute=False, sink=None):
    positions_BT = torch.arange(T).expand(B, T)
    sink = sink or Sink()
    return Context(torch.zeros_like(positions_BT), positions_BT, False, None, torch.tensor([1, 2]), 0, recompute, sink)


def stack(depth, dropout=0.0):
    torch.manual_seed(0)
    blocks = [(Attention(D, 2, 2, 10.0, 1.0), SwiGLU(D, 12, 1.0)) for _ in range(depth)]
    return Stack([Residual(D, part, dropout) for block in blocks for part in block]).double()


def test_residual_adds_the_part_of_the_normed_input():
    part = Residual(D, SwiGLU(D, 12, 1.0)).double()
    torch.nn.init.normal_(part.norm.weight)
    x_BTD = 10 * torch.randn(B, T, D).double()
    scale = (x_BTD.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    normed = x_BTD * scale * part.norm.weight
    want = x_BTD + part.part(normed, None, context())[0]
    torch.testing.assert_close(part(x_BTD, None, context())[0], want, rtol=0, atol=1e-13)
    assert part.cost(T) == Cost(D) + part.part.cost(T)


def test_swiglu_is_gate_times_value():
    part, x_BTD = SwiGLU(D, 12, 1.0).double(), torch.randn(B, T, D).double()
    gate, up = (x_BTD @ weight.T for weight in part.up.weight.split(12))
    want = (gate * gate.sigmoid() * up) @ part.out.weight.T
    torch.testing.assert_close(part(x_BTD, None, context())[0], want, rtol=0, atol=1e-13)
    assert part.cost(1) == Cost(3 * D * 12, 6 * D * 12)


def test_parts_run_in_order_and_keep_their_own_states():
    parts, x_BTD = stack(2), torch.randn(B, T, D).double()
    y_BTD, states = parts(x_BTD, None, context())
    h_BTD = x_BTD
    for part, state in zip(parts.parts, states, strict=True):
        h_BTD, own = part(h_BTD, None, context())
        assert (own is None) == (state is None)
    assert torch.equal(h_BTD, y_BTD)
    assert [state is None for state in states] == [False, True, False, True]


def test_an_empty_stack_passes_through():
    x_BTD = torch.randn(B, T, D)
    y_BTD, states = Stack([])(x_BTD, None, context())
    assert y_BTD is x_BTD
    assert states == ()
    assert Stack([]).cost(9) == Cost()


def gradients(parts, x_BTD, recompute):
    parts.zero_grad()
    sink = Sink()
    y_BTD, _ = parts(x_BTD, None, context(recompute, sink))
    sink.open = False
    y_BTD.square().sum().backward()
    return y_BTD.detach(), [p.grad.clone() for p in parts.parameters()]


def test_s1_recomputation_uses_each_parts_own_weights():
    parts, x_BTD = stack(3, dropout=0.2).train(), torch.randn(B, T, D).double()
    plain, recomputed = (gradients(parts, x_BTD, flag) for flag in (False, True))
    assert torch.equal(plain[0], recomputed[0])
    for want, got in zip(plain[1], recomputed[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_recomputation_saves_fewer_activations():
    """Otherwise the flag is a promise without effect."""

    def saved(recompute):
        elements = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: elements.append(t.numel()) or t, lambda t: t):
            parts(x_BTD, None, context(recompute))
        return sum(elements)

    parts, x_BTD = stack(3), torch.randn(B, T, D).double().requires_grad_()
    assert saved(True) < saved(False) / 3


def test_losses_are_left_once_when_activations_are_recomputed():
    class Noisy(SwiGLU):
        def forward(self, x_BTD, state, ctx):
            ctx.add_loss("size", x_BTD.square().mean(-1))
            return super().forward(x_BTD, state, ctx)

    parts, sink = Stack([Noisy(D, 12, 1.0), Noisy(D, 12, 1.0)]), Sink()
    x_BTD = torch.randn(B, T, D)
    y_BTD, _ = parts(x_BTD, None, context(True, sink))
    sink.open = False
    before = sink.losses["size"].clone()
    (y_BTD.sum() + sink.losses["size"].sum()).backward()
    assert torch.equal(sink.losses["size"], before)
    want = x_BTD.square().mean(-1) + parts.parts[0](x_BTD, None, context())[0].square().mean(-1)
    torch.testing.assert_close(before, want)
