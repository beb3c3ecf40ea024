"""Mamba-2: two implementations, one function; and the function is the paper's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stepladder.core.errors import UserError
from stepladder.models.base import map_state
from stepladder.models.mixers import mamba2
from stepladder.models.mixers.mamba2 import chunked, naive, spans
from stepladder.models.zoo import spec
from stepladder.run import TrainConfig
from stepladder.train.optim import adamw

LENGTHS = (1, 63, 64, 65, 1000)
FIELDS = {"width": 16, "depth": 1, "head_width": 8, "groups": 2, "state": 4}


def scan_inputs(tokens: int, resets: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """u, log decays, B, C, resets, first state: two rows, four heads in two groups; steps as wide as training makes."""
    g = torch.Generator().manual_seed(tokens)
    u, b, c = (torch.randn(2, tokens, *shape, generator=g, dtype=dtype) for shape in ((4, 3), (2, 5), (2, 5)))
    log_decay = -torch.rand(2, tokens, 4, generator=g, dtype=dtype).square() * torch.tensor([0.01, 0.1, 1, 20])
    reset = torch.rand(2, tokens, generator=g) < resets
    state = torch.randn(2, 4, 3, 5, generator=g, dtype=dtype)
    return [u, log_decay.to(dtype), b, c, reset, state]


def results(run, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, last state, and the gradient of a fixed random functional of both with respect to every input."""
    inputs = [each.clone().requires_grad_(each.is_floating_point()) for each in inputs]
    y, state = run(*inputs)
    g = torch.Generator().manual_seed(0)
    weights = (torch.randn(each.shape, generator=g, dtype=torch.float64).to(each) for each in (y, state))
    loss = sum((each * weight).sum() for each, weight in zip((y, state), weights, strict=True))
    loss.backward()
    named = dict(zip(("u", "log_decay", "b", "c", "reset", "state"), inputs, strict=True))
    grads = {f"gradient of {name}": each.grad for name, each in named.items() if each.requires_grad}
    return {"y": y.detach(), "state": state.detach(), **grads}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value; NaN counts as infinite."""
    assert got.keys() == want.keys()
    moved = [(got[n] - want[n]).abs().max() / want[n].abs().max().clamp(min=1.0) for n in got]
    return float(torch.stack(moved).nan_to_num(torch.inf).max())


@pytest.mark.parametrize("resets", [0.0, 0.03, 0.5])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_chunks_equal_the_recurrence(tokens, resets):
    inputs = scan_inputs(tokens, resets)
    assert worst(results(lambda *a: chunked(*a, 64), inputs), results(naive, inputs)) < 1e-10


@pytest.mark.parametrize("chunk", [1, 2, 7, 200])
def test_any_chunk_length_and_several_spans_equal_the_recurrence(chunk):
    inputs = scan_inputs(300, 0.01)  # with chunks of 1 and 2: more than one span
    assert worst(results(lambda *a: chunked(*a, chunk), inputs), results(naive, inputs)) < 1e-10


def test_spans_cover_a_sequence_without_padding():
    for tokens in (1, 63, 64, 65, 4096, 4097, 10_000):
        found = list(spans(tokens, 64))
        assert sum(count * size for count, size in found) == tokens
        assert max(count for count, _ in found) <= mamba2.SPAN


def test_the_recurrence_is_the_closed_form():
    """y_i = sum_j (C_i . B_j) exp(sum of log a over j+1..i) u_j + C_i S_0: written without a recurrence or a mask."""
    u, log_decay, b, c, reset, state = scan_inputs(9, 0.0)
    y, _ = naive(u, log_decay, b, c, reset, state)
    for row, head, i in ((0, 0, 0), (0, 1, 5), (1, 3, 8), (1, 2, 4)):
        group = head // 2
        want = log_decay[row, : i + 1, head].sum().exp() * state[row, head] @ c[row, i, group]
        for j in range(i + 1):
            weight = log_decay[row, j + 1 : i + 1, head].sum().exp() * (c[row, i, group] @ b[row, j, group])
            want = want + weight * u[row, j, head]
        assert torch.allclose(y[row, i, head], want, atol=1e-12, rtol=0)
    doubled, _ = naive(2 * u, log_decay, b, c, reset, 2 * state)
    assert torch.allclose(doubled, 2 * y, atol=1e-12, rtol=0)  # the input is multiplied in: the ancestor's was not


def test_float32_chunks_stay_close_to_a_float64_recurrence():
    got = results(lambda *a: chunked(*a, 64), scan_inputs(1000, 0.01, torch.float32))
    exact = [each.double() if each.is_floating_point() else each for each in scan_inputs(1000, 0.01, torch.float32)]
    want = results(naive, exact)
    assert worst(got, want) < 1e-4


def test_decays_beyond_the_floating_range_leave_no_nan():
    inputs = scan_inputs(130, 0.05)
    inputs[1] = inputs[1] * 1e4  # exp of the difference of two sums would overflow if it were not masked first
    assert worst(results(lambda *a: chunked(*a, 64), inputs), results(naive, inputs)) < 1e-10


@pytest.mark.parametrize("run", [naive, lambda *a: chunked(*a, 64)], ids=["naive", "chunked"])
def test_a_neighbouring_document_does_not_matter_by_a_single_bit(run):
    inputs = scan_inputs(130, 0.0)
    reset = torch.zeros(2, 130, dtype=torch.bool)
    reset[:, 70] = True
    other = [each.clone() for each in scan_inputs(131, 0.0)]
    mixed = [torch.cat((o[:, :70], i[:, 70:]), 1) for o, i in zip(other[:4], inputs[:4], strict=True)]
    base, seen = run(*inputs[:4], reset, inputs[5]), run(*mixed, reset, other[5])
    assert torch.equal(seen[0][:, 70:], base[0][:, 70:])
    assert torch.equal(seen[1], base[1])
    assert not torch.equal(seen[0][:, :70], base[0][:, :70])


def model_results(model, tokens: Tensor, state=None, **call) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(tokens, state, targets=tokens.roll(1, 1), **call)
    out.nll_BT.sum().backward()
    found = {"nll": out.nll_BT.detach()}
    map_state(lambda leaf: found.update({f"state {len(found)}": leaf.detach()}), out.state.core)
    return found | {f"gradient of {name}": p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tokens", LENGTHS)
def test_whole_models_agree_with_random_documents_and_a_state(tokens):
    torch.manual_seed(0)
    plain = spec("ssm", scan="naive", **FIELDS).build(11).double()
    fast = spec("ssm", **FIELDS).build(11).double()
    fast.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 11, (2, tokens + 9))
    documents = (torch.rand(2, tokens + 9) < 0.05).cumsum(1)
    begun = plain(ids[:, :9], documents=documents[:, :9]).state
    begun = map_state(lambda leaf: leaf.detach(), begun)
    call = {"state": begun, "documents": documents[:, 9:]}
    assert worst(model_results(fast, ids[:, 9:], **call), model_results(plain, ids[:, 9:], **call)) < 1e-10


@pytest.mark.parametrize("scan", ["naive", "chunked"])
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_a_poisoned_state_does_not_reach_a_new_document(scan, tokens):
    torch.manual_seed(0)
    model = spec("ssm", scan=scan, **FIELDS).build(11).double()
    ids, new = torch.randint(0, 11, (2, tokens)), torch.ones(2, tokens, dtype=torch.int64)
    fresh = model_results(model, ids, documents=new)
    clean = model(ids[:, :1], documents=0 * new[:, :1]).state
    poisoned = map_state(lambda leaf: torch.full_like(leaf, torch.nan) if leaf.is_floating_point() else leaf, clean)
    seen = model_results(model, ids, poisoned, documents=new)
    if tokens < 3:  # the inputs of the convolution are carried whoever they belong to; positions mask them
        for found in (fresh, seen):
            found.pop("state 1")
    assert worst(seen, fresh) < 1e-12


def test_the_part_is_the_papers_block():
    """The whole part against its equations, with the convolution by torch's own operator."""
    torch.manual_seed(0)
    model = spec("ssm", **FIELDS).build(11).double()
    part = model.core.core.parts[0].part
    ids = torch.randint(0, 11, (2, 20))
    seen = {}
    part.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out[0]))
    model(ids)
    z, u, dt = part.project(seen["x"]).split((32, 32 + 16, 4), dim=-1)
    weight = part.conv.flip(0).T[:, None]  # torch's kernels run from the oldest token to the newest
    u = F.silu(F.conv1d(F.pad(u.transpose(1, 2), (3, 0)), weight, groups=48)).transpose(1, 2)
    x, b, c = u[..., :32].unflatten(-1, (4, 8)), u[..., 32:40].unflatten(-1, (2, 4)), u[..., 40:].unflatten(-1, (2, 4))
    dt = F.softplus(dt + part.dt_bias)
    decay, state, found = torch.exp(-dt * part.A_log.exp()), torch.zeros(2, 4, 8, 4, dtype=torch.float64), []
    for t in range(20):
        outer = dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, t].repeat_interleave(2, 1)[:, :, None]
        state = decay[:, t, :, None, None] * state + outer
        y = (state * c[:, t].repeat_interleave(2, 1)[:, :, None]).sum(-1) + part.D[:, None] * x[:, t]
        found.append(y.flatten(1))
    y = torch.stack(found, 1) * F.silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * part.norm.weight
    assert torch.allclose(part.out(y), seen["y"], atol=1e-12, rtol=0)


def test_initial_rates_and_steps_are_the_papers_and_do_not_decay():
    torch.manual_seed(0)
    model = spec("ssm", width=512, depth=1, head_width=8).build(11)
    part = model.core.core.parts[0].part
    rates, steps = part.A_log.detach().exp(), F.softplus(part.dt_bias.detach())
    assert 1 <= float(rates.min()) < 2 < 15 < float(rates.max()) <= 16.001
    assert 1e-3 <= float(steps.min()) * 1.001 < 2e-3 < 5e-2 < float(steps.max()) <= 0.1001
    assert 0.005 < float(steps.median()) < 0.02  # log-uniform: the median is the geometric mean of the ends
    decayed, kept = adamw(model, TrainConfig(steps=1)).param_groups
    for parameter in (part.A_log, part.dt_bias, part.D):
        assert any(parameter is each for each in kept["params"])
        assert not any(parameter is each for each in decayed["params"])
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("scan", ["naive", "chunked"])
@pytest.mark.parametrize("context", [1, 8, 64, 65, 200])
def test_declared_flops_are_the_counted_ones_at_the_default_chunk(scan, context):
    model = spec("ssm", scan=scan, **FIELDS).build(11)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(torch.zeros(2, context, dtype=torch.int64))
    assert counter.get_total_flops() == pytest.approx(2 * context * model.cost(context).flops, rel=1e-12)
    carried = out.state.core[0]
    held = sum(leaf[0].numel() * leaf.element_size() for leaf in (carried.inputs_BKU, carried.state_BHPN))
    assert model.cost(context).state_bytes == held + 3 * 8


def test_cost_is_linear_in_the_context():
    model = spec("ssm").build(11)
    assert model.cost(2**18).flops == pytest.approx(model.cost(2**12).flops, rel=1e-3)


@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "bfloat16 weights"])
def test_low_precision_keeps_the_state_in_float32(mixed):
    torch.manual_seed(0)
    model = spec("ssm", **FIELDS).build(11)
    ids = torch.randint(0, 11, (2, 100))
    want = model(ids).logits.detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        low = (model if mixed else model.bfloat16())(ids, targets=ids)
        logits = model(ids).logits.detach()
    low.nll_BT.sum().backward()
    assert low.state.core[0].state_BHPN.dtype == torch.float32
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert 0 < float((logits - want).abs().max()) < 0.1 * float(want.abs().max())


@pytest.mark.parametrize(
    "fields", [{"width": 24, "head_width": 32}, {"width": 16, "head_width": 8, "groups": 3}], ids=["heads", "groups"]
)
def test_heads_and_groups_must_divide(fields):
    with pytest.raises(UserError, match="choose divisors"):
        spec("ssm", **fields).build(11)


def test_a_convolution_of_one_token_sees_the_token_alone():
    torch.manual_seed(0)
    model = spec("ssm", conv=1, **FIELDS).build(11).double()
    ids = torch.randint(0, 11, (2, 70))
    first = model(ids[:, :30])
    rest = model(ids[:, 30:], first.state)
    assert first.state.core[0].inputs_BKU.shape == (2, 0, 48)
    assert torch.allclose(torch.cat((first.logits, rest.logits), 1), model(ids).logits, atol=1e-12, rtol=0)
