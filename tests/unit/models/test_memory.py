"""The segment-recurrent memory against its definition, one document and one segment at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Sink, map_state
from stepladder.models.mixers.memory import Remembered, SegmentMemory
from stepladder.models.noise import row_keys
from stepladder.models.zoo import spec

ROWS, WIDTH = 3, 8


def build(segment: int, memory: int = 3) -> SegmentMemory:
    torch.manual_seed(0)
    part = SegmentMemory(WIDTH, 2, memory, segment, 1.0).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return part


def context(positions_BT: Tensor) -> Context:
    keys = row_keys(0, len(positions_BT), positions_BT.device)
    return Context(torch.zeros_like(positions_BT), positions_BT, True, None, keys, 0, False, Sink())


def positions(starts: Tensor) -> Tensor:
    """Positions in documents that begin where ``starts`` (B, T) says, the first token included."""
    index = torch.arange(starts.shape[1])
    return index - torch.where(starts | (index == 0), index, 0).cummax(1).values


def attend(part: SegmentMemory, query: Tensor, key_value: Tensor) -> Tensor:
    """Softmax attention of (Q, D) to (S, 2D), head by head."""
    found = []
    for q, k, v in zip(*(x.chunk(part.heads, -1) for x in (query, *key_value.chunk(2, -1))), strict=True):
        found.append(torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v)
    return torch.cat(found, -1)


def reference(part: SegmentMemory, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
    """What the docstring of SegmentMemory says: documents and segments in plain loops."""
    rows = []
    for x_TD, place_T in zip(x_BTD, positions_BT, strict=True):
        found = []
        for document in x_TD.tensor_split((place_T == 0).nonzero()[:, 0][1:]):
            memory = None
            for piece in document.split(part.segment):
                if memory is None:
                    found.append(0 * piece)
                else:
                    heard = attend(part, part.read_query(piece), part.read_key_value(memory))
                    found.append(part.gate * part.read_out(heard))
                before = part.first_MD if memory is None else memory
                heard = attend(part, part.write_query(before), part.write_key_value(piece))
                memory = part.norm(before + part.write_out(heard))
        rows.append(torch.cat(found))
    return torch.stack(rows)


def gradients(part: SegmentMemory, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Of a fixed random functional of y, with respect to x and all parameters; 0 where nothing depends on them."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    named = {"x": x, **dict(part.named_parameters())}
    found = torch.autograd.grad((y * weights).sum(), list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("segment", [1, 2, 4, 16])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 33])
def test_it_is_its_definition(segment, tokens):
    part = build(segment)
    for chance in (0.0, 0.05, 0.4):
        place = positions(torch.rand(ROWS, tokens) < chance)
        x = torch.randn(ROWS, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
        y, _ = part(x, None, context(place))
        want = reference(part, x, place)
        assert torch.allclose(y, want, atol=1e-12, rtol=0)
        got, expected = gradients(part, y, x), gradients(part, want, x)
        for name in expected:
            assert torch.allclose(got[name], expected[name], atol=1e-10, rtol=0), name


@pytest.mark.parametrize("segment", [1, 4, 7])
def test_rows_at_different_places_of_their_documents_go_on_from_a_state(segment):
    part, tokens = build(segment), 30
    place = positions(torch.rand(ROWS, tokens) < torch.tensor([[0.0], [0.06], [0.2]]))
    x = torch.randn(ROWS, tokens, WIDTH, dtype=torch.float64)
    want = reference(part, x, place)
    for sizes in ([1] * 30, [2, 9, 1, 18], [29, 1]):
        state, found = None, []
        for piece, where in zip(x.split(sizes, 1), place.split(sizes, 1), strict=True):
            y, state = part(piece, state, context(where))
            found.append(y)
        assert torch.allclose(torch.cat(found, 1), want, atol=1e-12, rtol=0)


def test_a_token_reads_finished_segments_and_nothing_else():
    """Gradients of every output with respect to every input: causal, and blind to the reader's own segment."""
    part, tokens, segment = build(4), 19, 4
    x = torch.randn(1, tokens, WIDTH, dtype=torch.float64)
    place = torch.arange(tokens)[None]
    moved = torch.autograd.functional.jacobian(lambda x: part(x, None, context(place))[0].sum(-1)[0], x)
    heard = moved[:, 0].abs().sum(-1) > 1e-12
    reader, writer = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    want = (writer // segment < reader // segment) | ((writer == reader) & (reader >= segment))
    assert torch.equal(heard, want)


@pytest.mark.parametrize("tokens", [1, 3, 11])
def test_what_is_out_of_force_may_hold_anything(tokens):
    """NaN in the memory and the tokens of a finished document, which the windows of rows without an event touch."""
    part, place = build(4), torch.arange(tokens).expand(ROWS, -1)
    x = torch.randn(ROWS, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    clean, _ = part(x, None, context(place))
    state = part.init_state(ROWS, 0, x.device, x.dtype, None)
    poisoned = map_state(lambda leaf: torch.full_like(leaf, torch.nan), state)
    seen, after = part(x, poisoned, context(place))
    assert torch.equal(seen, clean)
    assert bool(after.memory_BMD.isfinite().all())
    for name, gradient in gradients(part, seen, x).items():
        assert bool(gradient.isfinite().all()), name


def test_state_and_memory_stay_bounded_over_a_thousand_tokens():
    part = build(4)
    place = torch.arange(1000).expand(ROWS, -1)
    x = 10 * torch.randn(ROWS, 1000, WIDTH, dtype=torch.float64)
    _, early = part(x[:, :40], None, context(place[:, :40]))
    _, late = part(x[:, 40:], early, context(place[:, 40:]))
    assert isinstance(late, Remembered)
    assert map_state(lambda leaf: leaf.shape, late) == map_state(lambda leaf: leaf.shape, early)
    assert late.memory_BMD.detach().square().mean().sqrt() < 2 * part.norm.weight.detach().abs().max()


def test_before_training_the_model_is_ssm_itself():
    """The gate starts at 0, so the memory is a factor that training may take up; then the gate gets a gradient."""
    torch.manual_seed(0)
    memory = spec("ssm_mem", "tiny").build(11)
    plain = spec("ssm", "tiny").build(11)
    weights = {name: value for name, value in memory.state_dict().items() if ".2." not in name}
    plain.load_state_dict(
        {name.replace("parts.3", "parts.2").replace("parts.4", "parts.3"): w for name, w in weights.items()}
    )
    ids = torch.randint(0, 11, (2, 40))
    out = memory(ids, targets=ids)
    assert torch.equal(out.nll_BT, plain(ids, targets=ids).nll_BT)
    out.nll_BT.sum().backward()
    assert float(memory.core.core.parts[2].part.gate.grad.abs()) > 0


@pytest.mark.parametrize("context_length", [1, 8, 63, 64, 65, 300])
def test_declared_flops_are_the_counted_ones_at_the_default_segment(context_length):
    model = spec("ssm_mem", width=16, depth=1, head_width=8).build(11)
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(torch.zeros(2, context_length, dtype=torch.int64))
    declared = 2 * context_length * model.cost(context_length).flops
    # One key and one query are an elementwise product to torch, hence the allowance at a context of 1.
    assert counter.get_total_flops() == pytest.approx(declared, rel=0.005 if context_length == 1 else 1e-12)


def test_cost_is_linear_in_the_context_and_the_state_constant():
    model = spec("ssm_mem").build(11)
    near, far = model.cost(2**12), model.cost(2**18)
    assert far.flops == pytest.approx(near.flops, rel=0.01)
    assert far.state_bytes == near.state_bytes


@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "bfloat16 weights"])
def test_low_precision_trains(mixed):
    torch.manual_seed(0)
    model = spec("ssm_mem", "tiny").build(11)
    ids = torch.randint(0, 11, (2, 40))
    with torch.no_grad():
        model.core.core.parts[2].part.gate.fill_(1.0)
        want = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        low = (model if mixed else model.bfloat16())(ids[:, :21], targets=ids[:, :21])
        rest = model(ids[:, 21:], low.state)
    low.nll_BT.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert 0 < (rest.logits.detach() - want[:, 21:]).abs().max() < 0.1 * want.abs().max()


def test_heads_must_divide():
    with pytest.raises(UserError, match="choose a divisor"):
        spec("ssm_mem", width=64, heads=5).build(11)


def test_softmax_attention_is_torchs():
    """The reference's own attention, so that the tests above lean on nothing unchecked."""
    part = build(4)
    q, kv = torch.randn(5, WIDTH, dtype=torch.float64), torch.randn(7, 2 * WIDTH, dtype=torch.float64)
    k, v = (x.unflatten(-1, (2, -1)).transpose(0, 1) for x in kv.chunk(2, -1))
    want = F.scaled_dot_product_attention(q.unflatten(-1, (2, -1)).transpose(0, 1), k, v).transpose(0, 1).flatten(1)
    assert torch.allclose(attend(part, q, kv), want, atol=1e-12, rtol=0)
