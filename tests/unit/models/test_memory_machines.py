"""lstm, ntm, dnc: two implementations, one function; documents, precision, cost, and what compilers see."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stepladder.experiments.match import count, match_params, sized
from stepladder.models.base import Context, Sink, leaves, map_state
from stepladder.models.kernels.replay import USES, Replayed
from stepladder.models.noise import row_keys
from stepladder.models.zoo import spec

ROWS, WIDTH = 3, 8
FIELDS = {
    "lstm": {"inner": 6},
    "ntm": {"inner": 6, "slots": 7, "slot_width": 4, "read_heads": 2, "write_heads": 2, "shift": 2, "chunk": 8},
    "dnc": {"inner": 6, "slots": 7, "slot_width": 4, "read_heads": 2, "chunk": 8},
}
every_machine = pytest.mark.parametrize("name", FIELDS)


def build(name: str, scan: str = "fused", loud: float = 0.3, **fields):
    """The mixer of a one-layer model, with noise on every weight."""
    torch.manual_seed(0)
    model = spec(name, width=WIDTH, depth=1, scan=scan, **{**FIELDS[name], **fields}).build(11).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(loud * torch.randn_like(parameter))
    return model.core.core.parts[0].part


def context(positions_BT: Tensor, trace: bool = False) -> Context:
    keys = row_keys(0, len(positions_BT), positions_BT.device)
    return Context(
        torch.zeros_like(positions_BT), positions_BT, True, None, keys, 0, False, Sink({}, {} if trace else None)
    )


def positions(tokens: int, chance: float, first: int = 0) -> Tensor:
    """Of documents that begin at random; ``first`` is where the first one stands, 0 for its beginning."""
    begin = torch.rand(ROWS, tokens, generator=torch.Generator().manual_seed(tokens)) < chance
    index, begin[:, 0] = torch.arange(tokens), False
    start = torch.where(begin, index, -1).cummax(1).values
    return torch.where(start >= 0, index - start, index + first)


def results(part, x: Tensor, positions_BT: Tensor, state=None) -> dict[str, Tensor]:
    """Outputs, last state, and gradients of a fixed random functional of both by parameters, input and first state."""
    part.zero_grad()
    x = x.clone().requires_grad_()
    before = [] if state is None else [leaf.requires_grad_() for leaf in leaves(map_state(torch.clone, state))]
    given = None if state is None else map_state(lambda _, it=iter(before): next(it), state)
    y, after = part(x, given, context(positions_BT))
    found = {"y": y, **{f"state {n}": leaf for n, leaf in enumerate(leaves(after))}}
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(value.shape, generator=g, dtype=value.dtype).to(value.device) for value in found.values()]
    sum((value * weight).sum() for value, weight in zip(found.values(), weights, strict=True)).backward()
    slopes = {"x": x.grad, **{f"state {n}": leaf.grad for n, leaf in enumerate(before)}}
    slopes |= {n: p.grad for n, p in part.named_parameters()}
    slopes = {f"gradient of {n}": torch.zeros(1) if slope is None else slope for n, slope in slopes.items()}
    return {name: value.detach() for name, value in (found | slopes).items()}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value; NaN counts as infinite."""
    assert got.keys() == want.keys()
    moved = [(got[n] - want[n]).abs().max().double() / want[n].abs().max().clamp(min=1.0).double() for n in got]
    return float(torch.stack(moved).nan_to_num(torch.inf).max())


@every_machine
@pytest.mark.parametrize("chance", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65])
def test_fused_is_naive(name, tokens, chance):
    naive, fused = build(name, "naive"), build(name)
    x = torch.randn(ROWS, tokens, WIDTH, dtype=torch.float64)
    place = positions(tokens, chance)
    assert worst(results(fused, x, place), results(naive, x, place)) < 1e-10


@every_machine
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_fused_is_naive_from_a_carried_state(name, tokens):
    """Documents that go on, in some rows; gradients by every number of the state."""
    naive, fused = build(name, "naive"), build(name)
    x = torch.randn(ROWS, tokens + 9, WIDTH, dtype=torch.float64)
    _, state = naive(x[:, :9], None, context(positions(9, 0.1)))
    state = map_state(torch.Tensor.detach, state)
    place = positions(tokens, 0.1, first=4)
    place[0] -= place[0, 0].clone()  # one row begins a document
    found, want = (results(part, x[:, 9:], place, state) for part in (fused, naive))
    assert worst(found, want) < 1e-10
    assert all(bool(slope[1:].any()) for n, slope in want.items() if n.startswith("gradient of state"))


@every_machine
def test_fused_is_naive_where_gates_are_saturated(name):
    """Weights forty times as large: strengths beyond where softplus is linear, weights that underflow to 0."""
    naive, fused = build(name, "naive", loud=12.0), build(name, loud=12.0)
    x = torch.randn(ROWS, 20, WIDTH, dtype=torch.float64)
    assert worst(results(fused, x, positions(20, 0.1)), results(naive, x, positions(20, 0.1))) < 1e-7
    low = results(fused.float(), x.float(), positions(20, 0.1))
    assert all(bool(value.isfinite().all()) for value in low.values())


@pytest.mark.parametrize("name", ["ntm", "dnc"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_copies_may_be_kept_as_seldom_as_one_likes(name, chunk):
    x, place = torch.randn(ROWS, 30, WIDTH, dtype=torch.float64), positions(30, 0.1)
    assert worst(results(build(name, chunk=chunk), x, place), results(build(name), x, place)) < 1e-12


@every_machine
@pytest.mark.parametrize("scan", ["naive", "fused"])
@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_nothing_of_a_finished_document_reaches_the_next_one(name, scan, tokens):
    """Neither from a state of NaN, nor, by a single bit, from a neighbour in the row."""
    part = build(name, scan)
    x, place = torch.randn(ROWS, tokens, WIDTH, dtype=torch.float64), positions(tokens, 0.1)
    fresh = results(part, x, place)
    _, state = part(x[:, :1], None, context(place[:, :1]))
    poisoned = results(part, x, place, map_state(lambda leaf: torch.full_like(leaf, torch.nan), state))
    assert all(not bool(poisoned.pop(n).any()) for n in list(poisoned) if n.startswith("gradient of state"))
    assert worst(poisoned, fresh) < 1e-12
    both = torch.cat((place, place), 1)
    y, _ = part(torch.cat((x, x), 1), None, context(both))
    other, _ = part(torch.cat((9 * x.flip(1), x), 1), None, context(both))
    assert torch.equal(y[:, tokens:], other[:, tokens:])


@every_machine
@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "bfloat16 weights"])
def test_low_precision_keeps_the_state_in_float32(name, mixed):
    torch.manual_seed(0)
    model = spec(name, "tiny").build(11)
    ids = torch.randint(0, 11, (2, 40))
    want = model(ids).logits.detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        low = (model if mixed else model.bfloat16())(ids[:, :21], targets=ids[:, :21])
        rest = model(ids[:, 21:], low.state)
    (low.nll_BT.sum() + rest.logits.float().square().sum()).backward()
    assert {leaf.dtype for leaf in leaves(low.state.core)} == {torch.float32}
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert 0 < float((rest.logits.detach() - want[:, 21:]).abs().max()) < 0.1 * float(want.abs().max())


@every_machine
@pytest.mark.parametrize("scan", ["naive", "fused"])
def test_declared_flops_are_the_counted_ones_at_the_default_size(name, scan):
    model = spec(name, depth=1, scan=scan).build(11)
    for context_length in (1, 9):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, context_length, dtype=torch.int64))
        declared = 2 * context_length * model.cost(context_length).flops
        assert counter.get_total_flops() == pytest.approx(declared, rel=1e-12)


@every_machine
def test_to_a_compiler_the_loop_is_one_operator(name):
    """Its graph is no larger for a longer sequence."""
    sizes = []

    def backend(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    for tokens in (3, 40):
        torch._dynamo.reset()
        model = spec(name, "tiny", depth=1).build(11)
        ids = torch.randint(0, 11, (2, tokens))
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(ids, targets=ids).nll_BT.sum().backward()
    torch._dynamo.reset()
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]


@every_machine
def test_without_gradients_the_same_bits_come_out(name):
    """Then arrays for one token are used again and again, where training keeps those of all tokens."""
    model = spec(name, "tiny", depth=1).build(11)
    ids = torch.randint(0, 11, (2, 50))
    want = model(ids)
    with torch.no_grad():
        got = model(ids)
    assert torch.equal(got.logits, want.logits)
    assert all(torch.equal(a, b) for a, b in zip(leaves(got.state), leaves(want.state), strict=True))


@every_machine
def test_parameters_meet_a_transformers(name):
    control = count(spec("transformer", "nano"), 512)
    found = match_params(spec(name, "nano"), control, 512)
    assert abs(found.residual) < 0.01
    assert found.spec.hidden == pytest.approx(spec("transformer", "nano").hidden_width, rel=0.05)  # it is as it was
    for size, number in (("50M", 50e6), ("125M", 125e6), ("1B", 1e9)):
        chosen = sized(name, size, 32_000)
        assert abs(count(chosen, 32_000) / number - 1) < 0.05
        assert chosen.hidden > chosen.width


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_machine
def test_a_gpu_computes_what_a_cpu_does(name):
    """At first kernel by kernel; from the third call on recordings are replayed, each time on new numbers."""
    part, on_gpu = build(name), build(name).cuda()
    for call in range(5):
        x, place = torch.randn(ROWS, 40, WIDTH, dtype=torch.float64), positions(40, 0.1)
        want, got = results(part, x, place), results(on_gpu, x.cuda(), place.cuda())
        assert worst({n: value.cpu() for n, value in got.items()}, want) < 1e-10, call


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recording_is_replayed_on_new_numbers_and_its_results_stay():
    calls = []

    def function(x, times):
        calls.append(times)
        return x * times, x.sum()[None]

    replayed, xs = Replayed(function), [torch.randn(5, device="cuda") for _ in range(6)]
    found = [replayed(x, 3) for x in xs]
    assert len(calls) == USES + 1  # and the recording
    assert all(torch.equal(a, x * 3) and torch.equal(b, x.sum()[None]) for x, (a, b) in zip(xs, found, strict=True))
    assert torch.equal(replayed(xs[0], 2)[0], xs[0] * 2)  # another number is another call
    assert len(calls) == USES + 2


def test_a_cpu_records_nothing():
    calls = []
    replayed = Replayed(lambda x: (calls.append(1), x)[1:])
    assert all(torch.equal(replayed(torch.ones(2) * n)[0], torch.ones(2) * n) for n in range(5))
    assert len(calls) == 5
