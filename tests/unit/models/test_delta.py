"""The delta rule in chunks against its recurrence, and the recurrence against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stepladder.models.mixers.delta import chunked, naive

ROWS, HEADS, WIDTH = 2, 3, 4


def given(tokens: int, resets: float = 0.0) -> tuple[torch.Tensor, ...]:
    """q, k, v, beta, log decay, resets, and a first state; float64, with gradients."""
    g = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, ROWS, tokens, HEADS, WIDTH, generator=g, dtype=torch.float64)
    beta, step = torch.rand(2, ROWS, tokens, HEADS, generator=g, dtype=torch.float64)
    state = torch.randn(ROWS, HEADS, WIDTH, WIDTH, generator=g, dtype=torch.float64)
    reset = torch.rand(ROWS, tokens, generator=g) < resets
    state = state.masked_fill(reset[:, 0, None, None, None], 0.0)
    made = (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, -step, reset, state)
    return tuple(each.requires_grad_() if each.is_floating_point() else each for each in made)


def gradients(y: torch.Tensor, state: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    total = (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum() + state.sin().sum()
    return list(torch.autograd.grad(total, [each for each in inputs if each.requires_grad]))


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("resets", [0.0, 0.2])
def test_chunks_are_the_recurrence_in_outputs_gradients_and_state(tokens, resets):
    inputs = given(tokens, resets)
    want, got = naive(*inputs), chunked(*inputs, 8)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients(*got, inputs), gradients(*want, inputs), rtol=1e-9, atol=1e-10)


def test_the_recurrence_is_its_definition():
    q, k, v, beta, log_decay, _, state = (each[0] for each in given(5))
    y, after = naive(*(each[:1] for each in given(5)))
    for head in range(HEADS):
        s = state[head]
        for t in range(5):
            erased = torch.eye(WIDTH) - beta[t, head] * torch.outer(k[t, head], k[t, head])
            s = log_decay[t, head].exp() * s @ erased + beta[t, head] * torch.outer(v[t, head], k[t, head])
            torch.testing.assert_close(y[0, t, head], s @ q[t, head])
        torch.testing.assert_close(after[0, head], s)


def test_a_key_asked_again_brings_back_its_value():
    """beta = 1 and no decay: what was last written under a key is what it answers, whatever was written before."""
    k = torch.eye(WIDTH, dtype=torch.float64)[[0, 1, 0]].expand(1, HEADS, -1, -1).transpose(1, 2)
    v = torch.randn(1, 3, HEADS, WIDTH, dtype=torch.float64)
    one, reset = torch.ones(1, 3, HEADS, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.bool)
    y, state = chunked(k, k, v, one, 0 * one, reset, torch.zeros(1, HEADS, WIDTH, WIDTH, dtype=torch.float64), 8)
    torch.testing.assert_close(y, v)
    torch.testing.assert_close(state[0, :, :, 0], v[0, 2])
