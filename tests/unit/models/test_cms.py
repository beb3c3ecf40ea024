"""Continuum memory: gradients against autograd, updates at their periods and nowhere else, the rules by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepladder.models.base import Context, Sink
from stepladder.models.channels.cms import BETA, ContinuumMemory, Levels
from stepladder.models.fast.fast_weights import Tokens
from stepladder.models.noise import row_keys
from stepladder.models.zoo import spec

WIDTH, LEVELS, CHUNK, FACTOR = 6, 3, 2, 2


def build(rule: str = "sgd", bound: float = 4.0, rate: float = 0.5, horizon: int = 0) -> ContinuumMemory:
    torch.manual_seed(0)
    levels = Levels(WIDTH, 5, LEVELS, CHUNK, FACTOR, rule, rate, bound, horizon, 1.0)
    return ContinuumMemory(WIDTH, levels, learn=True).double()


def context(positions_BT: Tensor) -> Context:
    keys = row_keys(0, len(positions_BT), positions_BT.device)
    return Context(torch.zeros_like(positions_BT), positions_BT, True, None, keys, 0, False, Sink(trace={}))


def chain(weights: list[Tensor], x: Tensor) -> Tensor:
    """z_K, as the page has it."""
    for into, out in zip(weights[::2], weights[1::2], strict=True):
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        x = x + torch.nn.functional.silu(normed @ into.mT) @ out.mT
    return x


def reference(part: ContinuumMemory, x_TD: Tensor, rule: str) -> tuple[Tensor, list[list[int]]]:
    """One document, token by token, gradients by autograd; and the tokens behind which each level changed."""
    weights = [w[0].detach().clone().requires_grad_() for w in part.levels.first]
    sums, glide = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    changed: list[list[int]] = [[] for _ in range(LEVELS)]
    found = []
    for t, x in enumerate(x_TD):
        found.append((chain(weights, x) - x).detach())
        if t:
            taps: list[tuple[Tensor, Tensor]] = []
            z = x_TD[t - 1]
            for into, out in zip(weights[::2], weights[1::2], strict=True):
                normed = z / (z.square().mean() + 1e-6).sqrt()
                hidden = torch.nn.functional.silu(into @ normed)
                z = z + out @ hidden
                taps += [(normed, into @ normed), (hidden, out @ hidden)]
            loss = 0.5 * (z - (part.teach.weight @ x).detach()).square().sum()
            for i, (gradient, w) in enumerate(zip(torch.autograd.grad(loss, weights), weights, strict=True)):
                heard, said = taps[i]
                extra = torch.outer(said, heard) if rule == "dgd" else 0.0
                period = CHUNK * FACTOR ** (i // 2)
                sums[i] += (
                    (gradient + extra).detach() * part.levels.rate_log[i // 2].exp().detach() / period / w.shape[1]
                )
        for i, w in enumerate(weights):
            if (t + 1) % (CHUNK * FACTOR ** (i // 2)) == 0:
                glide[i] = BETA * glide[i] - sums[i] if rule == "momentum" else -sums[i]
                weights[i], sums[i] = (w + glide[i]).detach().requires_grad_(), torch.zeros_like(w)
                if i % 2 and bool(glide[i].any()):
                    changed[i // 2].append(t)
    return torch.stack(found), changed


@pytest.mark.parametrize("rule", ["sgd", "momentum", "dgd"])
def test_it_is_its_definition(rule):
    part = build(rule, bound=1e9)
    x = torch.randn(2, 19, WIDTH, dtype=torch.float64)
    places = torch.arange(19).repeat(2, 1)
    places[1, 7:] -= 7  # the second row has two documents
    got = part(x, None, context(places))[0]
    torch.testing.assert_close(got[0], reference(part, x[0], rule)[0])
    torch.testing.assert_close(got[1, :7], reference(part, x[1, :7], rule)[0])
    torch.testing.assert_close(got[1, 7:], reference(part, x[1, 7:], rule)[0])


def test_levels_change_at_their_periods_only_and_the_trace_shows_it():
    """A token's trace is of the weights it met: they change behind a period's last token, in one call as in many."""
    part, state, seen = build(), None, []
    x, places = torch.randn(1, 17, WIDTH, dtype=torch.float64), torch.arange(17)[None]
    for t in range(17):
        ctx = context(places[:, t : t + 1])
        _, state = part(x[:, t : t + 1], state, ctx)
        seen.append(ctx.sink.trace["cms0.moved"])
    moved = torch.cat(seen, 1)[0]
    changed = [((moved[1:] != moved[:-1])[:, level].nonzero()[:, 0]).tolist() for level in range(LEVELS)]
    assert changed == [[1, 3, 5, 7, 9, 11, 13, 15], [3, 7, 11, 15], [7, 15]]
    assert changed == reference(part, x[0], "sgd")[1]
    for state in (None, part.init_state(1, 17, x.device, x.dtype, None)):
        ctx = context(places)
        part(x, state, ctx)
        torch.testing.assert_close(ctx.sink.trace["cms0.moved"][0], moved)


def test_rows_are_the_gradient_through_the_whole_chain():
    part = build(bound=1e9)
    levels = part.levels
    k, v = torch.randn(2, 1, 1, 1, WIDTH, dtype=torch.float64)
    weights = tuple(w.detach()[None].requires_grad_() for w in levels.first)
    loss = 0.5 * (levels.chain(weights, k)[0] - v).square().sum()
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    heard, deltas = levels.rows(weights, Tokens(k, k, v, one, 0 * one, None, one[0].bool()))
    for place, gradient in enumerate(torch.autograd.grad(loss, weights)):
        step = levels.rate_log[place // 2].exp() / levels.period(place // 2) / gradient.shape[-1]
        torch.testing.assert_close(deltas[place].mT @ heard[place], step * gradient)


def test_without_a_step_it_is_the_chain():
    part = build(rate=1e-300)
    x = torch.randn(1, 20, WIDTH, dtype=torch.float64)
    got = part(x, None, context(torch.arange(20)[None]))[0]
    torch.testing.assert_close(got, part.levels.chain(tuple(part.levels.first), x[:, None])[0][:, 0] - x)


def test_the_control_has_as_many_parameters():
    sizes = [
        sum(p.numel() for p in spec(name, width=96).build(50).parameters())
        for name in ("transformer", "hope_attention", "cms_transformer")
    ]
    assert max(sizes) / min(sizes) < 1.01
