"""Low-rank adapters: on every matrix of every architecture, without effect at the start, and gone when merged."""

import copy

import pytest
import torch
from torch import nn

from stepladder.core.errors import UserError
from stepladder.models.adapters import adapted_matrices, add_adapters, merge_adapters
from stepladder.models.weights import load_weights, named_weights, save_weights
from stepladder.models.zoo import ARCHITECTURES, spec

VOCAB = 11


def _model(name, **fields):
    """As a trained model is: no gate, bias or memory is at its initial zero any more."""
    torch.manual_seed(0)
    model = spec(name, "tiny", **fields).build(VOCAB).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _places(model):
    return [(module, name) for module in model.modules() for name in getattr(module, "parametrizations", ())]


def _tokens(step):
    return torch.randint(VOCAB, (3, 24), generator=torch.Generator().manual_seed(step))


def _loss(model, step):
    tokens = _tokens(step)
    output = model(tokens, targets=tokens.roll(-1, 1), key=step)
    return output.nll_BT.mean() + sum(term.mean() for term in output.losses.values())


def _tune(model, steps=4):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        _loss(model, step).backward()
        optimizer.step()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, p in trained if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_every_matrix_learns_and_the_base_stays(name):
    model = _model(name)
    plain = copy.deepcopy(model)
    matrices = {
        name for name, p in plain.named_parameters() if p.ndim >= 2 and not name.startswith(("embed.", "head."))
    }
    frozen = {name: p.detach().clone() for name, p in plain.named_parameters()}
    torch.manual_seed(1)
    add_adapters(model, rank=2, scale=1.5)
    assert torch.equal(_loss(model, 0), _loss(plain, 0))

    adapted = {name.replace("parametrizations.", "").removesuffix(".0.up") for name, _ in model.named_parameters()}
    assert matrices <= adapted
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(matrices)
    assert _tune(model) == []  # none without a gradient
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            original = name.replace("parametrizations.", "").removesuffix(".original")
            assert torch.equal(parameter, frozen[original]), original

    model.eval()
    with torch.no_grad():
        logits = model(_tokens(9)).logits
        assert not torch.equal(logits, plain.eval()(_tokens(9)).logits)
        weights = {place: getattr(*place).clone() for place in _places(model)}
        merge_adapters(model)
        assert all(torch.equal(getattr(*place), weight) for place, weight in weights.items())
        # torch multiplies in another order where a weight wants a gradient.
        torch.testing.assert_close(model(_tokens(9)).logits, logits, rtol=1e-12, atol=1e-12)
    assert set(named_weights(model)) == set(named_weights(plain))
    assert all(p.requires_grad for p in model.parameters())


def test_tied_weights_and_shared_matrices_stay_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight
            self.head = nn.Linear(8, 5)

    model = Twice()
    assert [len(places) for _, places in adapted_matrices(model)] == [2]
    add_adapters(model, 2, 1.0)
    nn.init.normal_(model.first.parametrizations.weight[0].up)
    assert torch.equal(model.first.weight, model.second.weight)
    changed = model.first.weight.detach().clone()
    merge_adapters(model)
    assert model.first.weight is model.second.weight
    assert torch.equal(model.first.weight, changed)

    tied = _model("transformer", tied=True)
    assert all(not isinstance(module, nn.Embedding) for _, places in adapted_matrices(tied) for module, _ in places)


def test_adapters_load_strictly(tmp_path):
    model, other = _model("transformer"), _model("transformer")
    add_adapters(model, 2, 1.0)
    save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"extra .*parametrizations"):
        load_weights(other, tmp_path / "w.safetensors")
    add_adapters(other, 3, 1.0)
    with pytest.raises(UserError, match="reshaped"):
        load_weights(other, tmp_path / "w.safetensors")


@pytest.mark.parametrize("tied", [False, True])
def test_with_the_vocabulary_embeddings_and_head_learn_too(tied):
    model = _model("transformer", tied=tied)
    add_adapters(model, 2, 1.0, vocabulary=True)
    plain = {n for n, p in model.named_parameters() if p.requires_grad and not n.endswith((".up", ".down"))}
    assert plain == {"embed.tokens.weight"} | ({"head.own.weight"} if not tied else set())
    assert _tune(model) == []


def test_a_rank_that_saves_nothing_is_refused():
    with pytest.raises(UserError, match="no smaller than this model's matrices"):
        add_adapters(_model("transformer"), 64, 1.0)


def test_training_with_adapters_is_one_graph():
    torch._dynamo.reset()
    model = _model("transformer")
    add_adapters(model, 2, 1.0)
    tokens = _tokens(0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    eager = model(tokens, targets=tokens).nll_BT
    torch.testing.assert_close(compiled(tokens, targets=tokens).nll_BT, eager, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_mixed_precision_changes_the_weight_in_its_own_type():
    model = _model("transformer")
    add_adapters(model, 2, 1.0)
    module, name = _places(model)[0]
    nn.init.normal_(module.parametrizations[name][0].up)
    plain = getattr(module, name)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(getattr(module, name), plain)
