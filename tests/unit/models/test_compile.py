"""torch.compile: every architecture is one graph, and the graph computes what the model does."""

import pytest
import torch
import torch._dynamo.testing

from stepladder.models.base import IGNORE
from stepladder.models.noise import row_keys
from stepladder.models.zoo import ARCHITECTURES, spec

VOCAB = 11


def _inputs(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (3, 20), generator=generator)
    targets = tokens.roll(-1, 1).masked_fill(torch.rand(3, 20, generator=generator) < 0.3, IGNORE)
    cuts = torch.rand(3, 20, generator=generator) < 0.2
    return tokens, {"targets": targets, "documents": cuts.cumsum(1), "key": row_keys(step, 3, tokens.device)}


def _step(model, call, step):
    tokens, options = _inputs(step)
    model.zero_grad()
    output = call(tokens, **options)
    loss = output.nll_BT.sum() + sum(term.sum() for term in output.losses.values())
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_training_is_one_graph_of_the_same_function(name):
    torch.manual_seed(0)
    model = spec(name, "tiny").build(VOCAB).double().train()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(3):
        ours, theirs = _step(model, compiled, step), _step(model, model, step)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert counter.frame_count == 1  # no second compilation for other values


def test_a_break_in_the_graph_shows():
    class Broken(torch.nn.Module):
        def forward(self, x):
            return x + 1 if bool(x.sum() > 0) else x - 1

    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(Broken(), backend="eager", fullgraph=True)(torch.ones(2))
