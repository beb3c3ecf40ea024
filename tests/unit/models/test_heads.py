import pytest
import torch
import torch.nn.functional as F

from stepladder.models.base import IGNORE
from stepladder.models.heads import softmax
from stepladder.models.heads.softmax import SoftmaxHead

B, T, D, V = 3, 7, 8, 29


@pytest.fixture
def head():
    torch.manual_seed(0)
    return SoftmaxHead(D, V).double()


def some(seed=0):
    generator = torch.Generator().manual_seed(seed)
    h_BTD = torch.randn(B, T, D, generator=generator).double().requires_grad_()
    return h_BTD, torch.randint(0, V, (B, T), generator=generator)


def test_likelihood_is_the_cross_entropy_of_the_logits(head):
    h_BTD, targets_BT = some()
    want = F.cross_entropy(head.logits(h_BTD).transpose(1, 2), targets_BT, reduction="none")
    torch.testing.assert_close(head.nll(h_BTD, targets_BT), want, rtol=0, atol=1e-13)


def test_unscored_targets_give_zero_and_no_gradient(head):
    h_BTD, targets_BT = some()
    masked = targets_BT.clone()
    masked[0, :4] = masked[2] = IGNORE
    nll_BT = head.nll(h_BTD, masked)
    assert bool((nll_BT[masked == IGNORE] == 0).all())
    assert bool((nll_BT[masked != IGNORE] > 0).all())
    nll_BT.sum().backward()
    assert bool((h_BTD.grad[masked == IGNORE] == 0).all())
    assert bool((h_BTD.grad[masked != IGNORE] != 0).any(-1).all())


def test_t9_nothing_scored_is_zero_not_nan(head):
    h_BTD, targets_BT = some()
    nll_BT = head.nll(h_BTD, torch.full_like(targets_BT, IGNORE))
    nll_BT.sum().backward()
    assert torch.equal(nll_BT, torch.zeros_like(nll_BT))
    assert torch.equal(h_BTD.grad, torch.zeros_like(h_BTD))


@pytest.mark.parametrize("rows", [1, 4, 5, 20, 21, 100])
def test_likelihood_in_chunks_is_the_whole(head, monkeypatch, rows):
    h_BTD, targets_BT = some()
    want = head.nll(h_BTD, targets_BT)
    want_grad = torch.autograd.grad(want.sum(), [h_BTD, head.own.weight])
    monkeypatch.setattr(softmax, "CHUNK", rows * V)
    got = head.nll(h_BTD, targets_BT)
    got_grad = torch.autograd.grad(got.sum(), [h_BTD, head.own.weight])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=1e-12)


def test_logits_of_all_tokens_never_exist_at_once(head, monkeypatch):
    """Nothing of tokens x vocabulary size is kept for the backward pass, and none is made in it."""
    monkeypatch.setattr(softmax, "CHUNK", 4 * V)
    h_BTD, targets_BT = some()
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        nll_BT = head.nll(h_BTD, targets_BT)
    nll_BT.sum().backward()
    assert sizes
    assert max(sizes) <= max(4 * V, B * T * D)
    assert max(sizes) < B * T * V


def test_unscored_positions_never_reach_the_vocabulary(head, monkeypatch):
    h_BTD, targets_BT = some()
    targets_BT[1:] = IGNORE
    seen, plain = [], head.logits
    monkeypatch.setattr(head, "logits", lambda h: seen.append(h.shape) or plain(h))
    head.nll(h_BTD, targets_BT)
    assert seen == [(T, D)]


def test_a_tied_head_owns_no_parameters():
    embedding = torch.nn.Embedding(V, D)
    head = SoftmaxHead(D, V, embedding)
    assert list(head.parameters()) == []
    assert head.cost().params == 0
    assert head.cost().flops == SoftmaxHead(D, V).cost().flops == 2 * D * V
    h_BTD = torch.randn(B, T, D)
    ratio = head.logits(h_BTD) / F.linear(h_BTD, embedding.weight)
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4, atol=0)


def test_logits_and_likelihood_are_float32_when_hidden_states_are_not():
    head, (h_BTD, targets_BT) = SoftmaxHead(D, V).bfloat16(), some()
    assert head.logits(h_BTD.bfloat16()).dtype == torch.float32
    assert head.nll(h_BTD.bfloat16(), targets_BT).dtype == torch.float32
