"""Faults that an architecture may have (T1, T2, T4, T9, D9), on every architecture of the zoo.

The laws hold most of these in general; here each fault is put plainly, on the backends and types that laws leave out.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepladder.core.errors import UserError
from stepladder.models.base import IGNORE, Context, Sink, leaves
from stepladder.models.mixers.attention import Attention, Cache
from stepladder.models.zoo import ARCHITECTURES, spec

NAMES = ARCHITECTURES.names()
V = 19
every_architecture = pytest.mark.parametrize("name", NAMES)


def build(name, dtype=torch.float64, seed=0, **fields):
    """The tiny model with noise on every weight, so that nothing is switched off."""
    torch.manual_seed(seed)
    model = spec(name, "tiny", **fields).build(V).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens_of(batch, length, seed=0):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


@every_architecture
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 5])
def test_T1_no_future_leaks_on_any_backend(name, backend, dtype, padding):
    """bfloat16 runs as training does: float32 weights under autocast."""
    model, tokens = build(name, torch.float32), tokens_of(2, 40)
    documents = (torch.arange(40) >= padding).long().expand(2, -1) if padding else None
    with torch.no_grad(), sdpa_kernel(backend), torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        base = model(tokens, documents=documents).logits
        for place in (padding + 1, 17, 39):
            other = tokens.clone()
            other[:, place:] = (other[:, place:] + 3) % V
            moved = model(other, documents=documents).logits
            assert torch.equal(moved[:, :place], base[:, :place])
            assert not torch.equal(moved[:, place], base[:, place])


@every_architecture
def test_T1_no_gradient_flows_from_the_past_to_the_future(name):
    """The loss at one token has no derivative, none at all, by the embedding of a later one."""
    model, tokens = build(name).train(), tokens_of(1, 12)
    seen = []
    handle = model.embed.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad_()) or out)
    nll_BT = model(tokens, targets=tokens).nll_BT
    handle.remove()
    for place in (0, 5, 11):
        (slope,) = torch.autograd.grad(nll_BT[0, place], seen[0], retain_graph=True)
        assert bool((slope[0, place + 1 :] == 0).all())
        assert bool((slope[0, place] != 0).any())


@every_architecture
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_T2_a_batch_of_one_is_a_row_of_sixty_four(name, dtype, bound):
    model, tokens = build(name, dtype), tokens_of(64, 24)
    with torch.no_grad():
        keys = torch.arange(64)  # of its own noise
        batch = model(tokens, key=keys).logits
        for row in (0, 1, 37, 63):
            alone = model(tokens[row : row + 1], key=keys[row : row + 1]).logits[0]
            assert float((alone - batch[row]).abs().max() / batch[row].abs().max()) <= bound


@every_architecture
def test_T2_no_gradient_flows_between_rows(name):
    model, tokens = build(name).train(), tokens_of(5, 9)
    seen = []
    handle = model.embed.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad_()) or out)
    nll_BT = model(tokens, targets=tokens).nll_BT
    handle.remove()
    (slope,) = torch.autograd.grad(nll_BT[2].sum(), seen[0])
    assert bool((slope[2] != 0).any())
    assert bool((slope[[0, 1, 3, 4]] == 0).all())


AFTER_A_DETACHED_READER = {
    # Halting heads read their hidden state detached (the page docs/thoughts.md says why), so what comes before one
    # has, on purpose, not the slope of the loss. The head itself and all that comes after it have.
    "act": ("core.halting.", "core.gate", "core.reader_norm.", "core.read.", "coda.", "norm.", "head."),
    "recursive_halting": ("core.halting.", "core.norm_out.", "head."),
}


@every_architecture
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("packed", [False, True])
def test_T4_gradients_are_finite_differences(name, length, packed):
    """By all parameters, through a carried state: the last third of the sequence is a second chunk."""
    slopes_are_differences(build(name), AFTER_A_DETACHED_READER.get(name, ("",)), length, packed)


@pytest.mark.parametrize("policy", ["fixed", {"kind": "convergence", "threshold": 0.3}], ids=["fixed", "convergence"])
def test_T4_a_body_without_a_halting_head_has_all_of_its_slope(policy):
    slopes_are_differences(build("recursive_halting", policy=policy), ("",), 65, True)


def slopes_are_differences(model, exact, length, packed):
    """By the parameters whose names begin with one of ``exact``."""
    stream = tokens_of(2, length + 1)
    tokens, targets = stream[:, :-1], stream[:, 1:]  # not contiguous
    documents = torch.arange(length).expand(2, -1) // 5 if packed else None
    cut = max(1, 2 * length // 3)

    def likelihood():
        total, state = torch.zeros((), dtype=torch.float64), None
        for chunk in (slice(cut), slice(cut, None))[: 1 if cut == length else 2]:
            inside = None if documents is None else documents[:, chunk]
            out = model(tokens[:, chunk], state, targets=targets[:, chunk], documents=inside)
            total, state = total + out.nll_BT.square().sum(), out.state
        return total

    likelihood().backward()
    parameters = [p for n, p in model.named_parameters() if n.startswith(exact)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        # Every parameter moves by the same length, so that none hides behind a large one.
        direction = [torch.randn(p.shape, generator=generator).double() for p in parameters]
        direction = [d / (d.norm() * len(direction) ** 0.5) for d in direction]
        ends = []
        with torch.no_grad():
            for shift in (1e-5, -2e-5, 1e-5):  # up, down, and back
                torch._foreach_add_(parameters, direction, alpha=shift)
                ends.append(likelihood().item())
        # The difference is off by 1e-10/6 x third derivative, and by rounding: 1e-16 x value (1e3) / 1e-5 = 1e-8.
        pairs = zip(parameters, direction, strict=True)
        found = sum((p.grad * d).sum().item() for p, d in pairs if p.grad is not None)  # None: must not move the loss
        assert found == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("heads", [1, 4])
def test_T4_attention_is_differentiable_by_input_and_initial_state(length, heads):
    """Every entry, not a random projection: heads of width one, an input that is not contiguous, a given cache."""
    torch.manual_seed(0)
    part = Attention(4, heads, heads, None, 1.0).double()
    past = 3
    positions_BT = (past + torch.arange(length)).repeat(2, 1)
    positions_BT[1] -= 1  # the second row's document began one token later
    ctx = Context(positions_BT, positions_BT, True, None, torch.zeros(2, dtype=torch.int64), 0, False, Sink())
    x_TBD = torch.randn(length, 2, 4).double().requires_grad_()
    k, v = (torch.randn(2, past, heads, 4 // heads).double().requires_grad_() for _ in range(2))

    def apply(x_TBD, k, v):
        y_BTD, state = part(x_TBD.transpose(0, 1), Cache(k, v), ctx)
        return y_BTD, state.k_BSGK

    assert torch.autograd.gradcheck(apply, (x_TBD, k, v))


@every_architecture
@pytest.mark.parametrize("cut", [1, 2, 7, 12])
def test_D9_a_packed_document_does_not_see_the_one_before_it(name, cut):
    model, tokens = build(name), tokens_of(3, 13)
    documents = (torch.arange(13) >= cut).long().expand(3, -1)
    other = tokens.clone()
    other[:, :cut] = (other[:, :cut] + 4) % V
    with torch.no_grad():
        base, moved = (model(t, targets=tokens, documents=documents).nll_BT for t in (tokens, other))
        alone = model(tokens[:, cut:], targets=tokens[:, cut:]).nll_BT
    assert torch.equal(base[:, cut:], moved[:, cut:])
    assert not torch.equal(base[:, :cut], moved[:, :cut])
    torch.testing.assert_close(base[:, cut:], alone, rtol=0, atol=1e-10)


@every_architecture
def test_D9_no_gradient_flows_between_packed_documents(name):
    model, tokens = build(name).train(), tokens_of(1, 12)
    seen = []
    handle = model.embed.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad_()) or out)
    nll_BT = model(tokens, targets=tokens, documents=(torch.arange(12) >= 5).long()[None]).nll_BT
    handle.remove()
    (slope,) = torch.autograd.grad(nll_BT[0, 5:].sum(), seen[0])
    assert bool((slope[0, :5] == 0).all())
    assert bool((slope[0, 5:] != 0).any(-1).all())


@every_architecture
@pytest.mark.parametrize("fixed", [False, True])
def test_D9_a_new_document_in_a_later_chunk_forgets_the_earlier_ones(name, fixed):
    model, tokens = build(name), tokens_of(2, 12)
    state = model.init_state(2, 12) if fixed else None
    with torch.no_grad():
        state = model(tokens[:, :5], state, documents=torch.zeros(2, 5, dtype=torch.int64)).state
        later = model(tokens[:, 5:], state, documents=torch.ones(2, 7, dtype=torch.int64)).logits
        alone = model(tokens[:, 5:]).logits
    torch.testing.assert_close(later, alone, rtol=0, atol=1e-10)


@every_architecture
def test_T9_a_row_of_padding_scores_zero_and_hurts_nobody(name):
    model, tokens = build(name, torch.float32).train(), tokens_of(3, 8)
    targets = tokens.clone()
    tokens[1], targets[1] = 0, IGNORE
    keys = torch.arange(3)
    out = model(tokens, targets=targets, key=keys)
    assert out.nll_BT[1].tolist() == [0.0] * 8
    out.nll_BT.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(g.isfinite().all()) for g in gradients)
    with torch.no_grad():
        others = model(tokens[[0, 2]], targets=targets[[0, 2]], key=keys[[0, 2]]).nll_BT
    torch.testing.assert_close(out.nll_BT[[0, 2]].detach(), others, rtol=1e-5, atol=1e-5)


@every_architecture
def test_T9_nothing_to_score_is_zero_with_zero_gradients(name):
    model, tokens = build(name, torch.float32).train(), tokens_of(2, 8)
    nll_BT = model(tokens, targets=torch.full_like(tokens, IGNORE)).nll_BT
    nll_BT.sum().backward()
    assert nll_BT.tolist() == [[0.0] * 8] * 2
    assert all(not bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


@every_architecture
def test_T9_one_token_is_a_sequence(name):
    model, tokens = build(name), tokens_of(3, 1)
    out = model(tokens, targets=tokens)
    out.nll_BT.sum().backward()
    assert bool((out.nll_BT > 0).all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert model(tokens, out.state, logits_at="last").logits.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if "max_positions" in ARCHITECTURES.get(name).model_fields])
def test_T9_longer_than_the_learned_positions_is_refused_also_while_decoding(name):
    model, tokens = build(name, positions="learned", max_positions=8), tokens_of(2, 9)
    with pytest.raises(UserError, match="a document of 9 tokens does not fit the 8 learned positions"):
        model(tokens)
    state = model(tokens[:, :8]).state
    with pytest.raises(UserError, match="a document of 9 tokens"):
        model(tokens[:, 8:], state)
    shorter = torch.tensor([[0] * 4 + [1] * 5] * 2)
    assert model(tokens, documents=shorter).logits.isfinite().all()


@every_architecture
def test_T9_longer_than_the_preallocated_state_is_refused_or_right(name):
    model, tokens = build(name), tokens_of(2, 9)
    with torch.no_grad():
        want = model(tokens).logits
        if any(leaf.dim() > 1 and leaf.shape[1] == 8 for leaf in leaves(model.init_state(2, 8))):
            with pytest.raises(UserError, match="9 tokens exceed the state's capacity of 8"):
                model(tokens, model.init_state(2, 8))
        else:  # nothing in the state grows with the sequence
            got = model(tokens, model.init_state(2, 8)).logits
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
