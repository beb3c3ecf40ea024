"""Neural memories: gradients against autograd, chunks against the recurrence, and what the recurrence reduces to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepladder.models.base import Context, Sink, detach_state, leaves
from stepladder.models.fast.fast_weights import errors, recall
from stepladder.models.mixers.delta import naive as delta_rule
from stepladder.models.mixers.neural_memory import FastMemory
from stepladder.models.mixers.titans import NeuralMemory
from stepladder.models.noise import row_keys
from stepladder.models.zoo import spec

WIDTH, HEADS, CHUNK = 8, 2, 4
PLAIN = {
    "layers": 2,
    "expand": 2,
    "conv": 2,
    "rate": 0.5,
    "momentum": True,
    "forget": True,
    "bound": 4.0,
    "horizon": 0,
    "scan": "chunked",
    "chunk": CHUNK,
}


def build(**fields) -> NeuralMemory:
    torch.manual_seed(0)
    fields = PLAIN | fields
    memory = FastMemory(WIDTH, HEADS, WIDTH // HEADS, **{name: fields[name] for name in fields if name != "conv"})
    part = NeuralMemory(WIDTH, memory, fields["conv"], gain=1.0).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return part


def context(positions_BT: Tensor, packed: bool = True) -> Context:
    keys = row_keys(0, len(positions_BT), positions_BT.device)
    return Context(torch.zeros_like(positions_BT), positions_BT, packed, None, keys, 0, False, Sink())


def everything(part: NeuralMemory, x: Tensor, positions_BT: Tensor, state=None, packed: bool = True) -> list[Tensor]:
    """Output, memory after it, and the gradients of both with respect to all parameters and the input."""
    x = x.clone().requires_grad_()
    y, after = part(x, state, context(positions_BT, packed))
    total = (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum()
    total = total + sum(leaf.sin().sum() for leaf in leaves(after))
    grads = torch.autograd.grad(total, [x, *part.parameters()], materialize_grads=True)
    return [y.detach(), *(leaf.detach() for leaf in leaves(after)), *grads]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_errors_make_up_the_gradient_of_the_inner_loss(layers):
    weights = [w[0].detach().requires_grad_() for w in build(layers=layers).memory.first]
    k, v = torch.randn(2, 1, 1, 1, WIDTH // HEADS, dtype=torch.float64)
    batched = tuple(w[None, None] for w in weights)
    loss = 0.5 * (recall(batched, k) - v).square().sum()
    heard, deltas = errors(batched, k, v, bound=1e9)
    for want, a, delta in zip(torch.autograd.grad(loss, weights), heard, deltas, strict=True):
        torch.testing.assert_close(delta[0, 0].mT @ a[0, 0], want)


@pytest.mark.parametrize("tokens", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 21])
@pytest.mark.parametrize("fields", [{}, {"layers": 1}, {"momentum": False}, {"forget": False}, {"horizon": 2}])
def test_chunks_are_the_recurrence_in_outputs_gradients_and_memory(tokens, fields):
    fast, plain = build(**fields), build(**fields, scan="naive")
    x = torch.randn(3, tokens, WIDTH, dtype=torch.float64)
    index = torch.arange(tokens)
    whole = index.expand(3, -1)
    many = index - torch.where((torch.rand(3, tokens) < 0.2) | (index == 0), index, 0).cummax(1).values
    for places, packed in ((whole, False), (whole, True), (many, True)):
        got, want = (everything(part, x, places, packed=packed) for part in (fast, plain))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    # Rows that go on from different places of their chunks, some into a new document.
    begun = detach_state(
        plain(torch.randn(3, 9, WIDTH, dtype=torch.float64), None, context(torch.arange(9).expand(3, -1)))[1]
    )
    for offsets in ([9, 9, 9], [9, 10, 0]):
        places = whole + torch.tensor(offsets)[:, None]
        got, want = (everything(part, x, places, begun) for part in (fast, plain))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_matrix_without_momentum_and_forgetting_is_the_delta_rule():
    part = build(layers=1, momentum=False, forget=False, chunk=1)
    with torch.no_grad():
        part.memory.first[0].zero_()
    x, places = torch.randn(2, 7, WIDTH, dtype=torch.float64), torch.arange(7).expand(2, -1)
    ctx, memory = context(places), part.memory
    u, told = memory.project(x).split(memory.sizes, dim=-1)
    tokens = memory.told(part.conv(u, None, ctx)[0], told)
    q, k, v = (each.transpose(1, 2) for each in (tokens.q, tokens.k, tokens.v))
    beta = tokens.rate.transpose(1, 2)
    start = torch.zeros(2, HEADS, WIDTH // HEADS, WIDTH // HEADS, dtype=torch.float64)
    want, state = delta_rule(q, k, v, beta, 0 * beta, places == 0, start)
    for scan in ("chunked", "naive"):
        memory.scan = scan
        got, after = memory.run(tokens, None, ctx, "norm")
        torch.testing.assert_close(got.transpose(1, 2), want)
        torch.testing.assert_close(after.now[0], state)


def test_with_larger_chunks_gradients_are_those_at_the_chunks_start():
    """By autograd: the memory behind a chunk without gates is M_0 less the summed gradient of the chunk's loss."""
    part = build(momentum=False, forget=False, bound=1e9)
    x, places = torch.randn(1, CHUNK, WIDTH, dtype=torch.float64), torch.arange(CHUNK)[None]
    ctx, memory = context(places), part.memory
    u, told = memory.project(x).split(memory.sizes, dim=-1)
    tokens = memory.told(part.conv(u, None, ctx)[0], told)
    first = tuple(w.detach()[None].requires_grad_() for w in memory.first)
    loss = (0.5 * tokens.rate * (recall(first, tokens.k) - tokens.v).square().sum(-1)).sum()
    want = [w - g for w, g in zip(first, torch.autograd.grad(loss, first), strict=True)]
    torch.testing.assert_close(list(memory.run(tokens, None, ctx, "norm")[1].now), want)


@pytest.mark.parametrize("scan", ["chunked", "naive"])
def test_the_horizon_cuts_gradients_between_chunks_and_nowhere_else(scan):
    places = torch.arange(3 * CHUNK)[None]

    def heard(horizon: int) -> Tensor:
        part = build(conv=1, horizon=horizon, scan=scan)
        x = torch.randn(1, 3 * CHUNK, WIDTH, dtype=torch.float64, requires_grad=True)
        part(x, None, context(places))[0][:, -1].sum().backward()
        return x.grad[0].abs().sum(-1).gt(0)

    assert heard(0).all()
    assert heard(1).tolist() == [False] * 2 * CHUNK + [True] * CHUNK
    assert heard(2).tolist() == [False] * 2 * CHUNK + [True] * CHUNK
    assert heard(3).all()


def test_a_memory_that_diverges_stays_finite():
    """Equal keys and a large step: without the bound the error grows by a factor every chunk."""
    places = torch.arange(2048)[None]
    x = torch.randn(1, 1, WIDTH).expand(-1, 2048, -1)
    for bound, finite in ((4.0, True), (1e30, False)):
        part = build(rate=30.0, bound=bound).float()
        assert bool(part(x, None, context(places, packed=False))[0].isfinite().all()) == finite


def test_recomputation_keeps_less_and_changes_nothing():
    def run(recompute: bool) -> tuple[int, list[Tensor]]:
        torch.manual_seed(0)
        model, tokens = (
            spec("titans_lmm", width=16, depth=1, heads=2, chunk=8).build(11).double(),
            torch.arange(128) % 11,
        )
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens[None], targets=tokens[None], recompute=recompute).nll_BT.sum()
        loss.backward()
        return kept, [p.grad for p in model.parameters()]

    (plain, want), (less, got) = run(False), run(True)
    torch.testing.assert_close(got, want)
    assert less < plain / 3


@pytest.mark.parametrize(
    "name",
    ["gated_deltanet", "titans_lmm", "titans_mac", "titans_mag", "titans_mal", "hope_attention", "hope_selfmod"],
)
def test_memories_are_float32_under_mixed_precision(name):
    torch.manual_seed(0)
    model, tokens = spec(name, "tiny").build(11), torch.arange(22).view(2, 11) % 11
    documents = (tokens > 7).long()
    exact = model(tokens, targets=tokens, documents=documents)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, targets=tokens, documents=documents)
        again = model(tokens, out.state, targets=tokens)
    torch.testing.assert_close(out.nll_BT, exact.nll_BT, rtol=0.05, atol=0.05)
    again.nll_BT.mean().backward()
    carried = [state for state in again.state.core if hasattr(state, "memory")]
    carried += [state[1] for state in again.state.core if isinstance(state, tuple)]  # of a gate or a chain
    carried = [state.memory for state in carried if hasattr(state, "memory")]
    assert carried or name in ("gated_deltanet", "titans_mal")
    assert {leaf.dtype for memory in carried for leaf in leaves(memory)} <= {torch.float32}
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
