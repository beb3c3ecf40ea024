"""VecTur against a reference that runs one machine over one prefix at a time, on a tape it really writes to."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.experiments.match import count, match_params
from stepladder.laws import LAWS, check
from stepladder.laws.cost import counted
from stepladder.laws.law import Subject
from stepladder.laws.repeat import conditioning
from stepladder.models.base import Context, Sink, leaves, map_state
from stepladder.models.mixers.machine import Explicit, Places, RankOne, address, overlap, wrapped
from stepladder.models.mixers.vectur import VecTur, document_sums
from stepladder.models.noise import row_keys
from stepladder.models.zoo import spec

VOCAB, B, T = 11, 2, 19


def tokens(seed: int = 0, batch: int = B, length: int = T) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def build(kind: str = "vectur", seed: int = 0, stir: float = 0.3, dtype: torch.dtype = torch.float64, **fields):
    """A tiny model whose parameters are stirred, so that machines move, write and halt in different ways."""
    torch.manual_seed(seed)
    model = spec(kind, "tiny", **fields).build(VOCAB).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=stir)
    return model


def mixers(model) -> list[VecTur]:
    return [part for part in model.modules() if isinstance(part, VecTur)]


def context(positions_BT: Tensor, ticks: int | None = None, key: int = 3, packed: bool = True) -> Context:
    keys = row_keys(key, len(positions_BT), positions_BT.device)
    return Context(positions_BT * 0, positions_BT, packed, ticks, keys, 0, False, Sink(trace={}))


# ------------------------------------------------------------------------------------------------ the reference


def mlp(inside, outside, x):
    return F.silu(x @ inside.T) @ outside.T


def machine(part: VecTur, x_ND: Tensor, symbols_NM: Tensor | None, ticks: int) -> tuple[Tensor, int]:
    """One machine over one sequence, cell by cell, head by head: its row of the output and the ticks it executed.

    Written from the equations in mixers.machine; shares no code with it.
    """
    m, own = part.machine, len(x_ND) - 1
    tape = x_ND @ part.write.weight.T
    if symbols_NM is not None:
        tape = torch.cat((tape, symbols_NM))
    n, k = len(tape), m.heads
    seen = torch.cat((x_ND[-1], x_ND.mean(0)))
    q = m.start_control.weight @ seen
    a, v = (m.start_heads.weight @ seen).chunk(2)
    kappa = F.softplus(mlp(m.decay_in.weight, m.decay_out.weight, q) + m.decay_bias)[0]
    cell = 2 * math.pi / n
    theta, w = [], []
    for i in range(k):
        share = i / (k - 1) if k > 1 else 0.0
        home = cell * (1 / cell) ** share * m.behind[i]
        stride = min(1.0, cell * (1 / cell) ** (m.spread * share))
        theta.append(home + stride * math.pi * torch.tanh(a[i] / math.pi))
        w.append((1 + 2 * torch.tanh(v[i] / 2)) / k)

    def heads_on(tape: Tensor) -> tuple[Tensor, Tensor]:
        j = torch.zeros(n, dtype=tape.dtype)
        for i in range(k):
            u = n * theta[i] / (2 * math.pi)
            back = math.floor(float(u))
            e = torch.zeros(n, dtype=tape.dtype)
            e[(own - back) % n] += 1 - (u - back)
            e[(own - back - 1) % n] += u - back
            j = j + w[i] * e
        return j, j @ tape

    executed = 0
    hidden = m.hidden
    for t in range(ticks):
        j, s = heads_on(tape)
        distance = (q - m.target).square().mean()
        g = (torch.sigmoid(-kappa * t / (1 + distance)) - m.halt).clamp(min=0) / (1 - 2 * m.halt)
        if float(g) == 0:
            break  # halted: test before the tick, as in the paper
        executed += 1
        sq = torch.cat((s, q))
        first = m.first.weight.split(hidden)
        moved = torch.tanh(mlp(first[0], m.control_out.weight, sq))
        written = torch.tanh(mlp(first[1], m.write_out.weight, sq))
        tape = tape + g * torch.outer(j, written)
        turned, weighed = [], []
        for i in range(k):
            # One concatenated input and one matrix: the split of the first layer is exact.
            full = torch.cat((first[2], m.head_in.weight), dim=1)
            f = torch.cat((sq, torch.stack((torch.sin(theta[i]), torch.cos(theta[i]), w[i]))))
            d_theta, d_w = mlp(full, m.head_out.weight, f)
            turned.append(theta[i] + g * min(1.0, 2 * m.reach * cell) * torch.tanh(d_theta))
            weighed.append(w[i] + g * torch.tanh(d_w) / k)
        theta, w, q = turned, weighed, q + g * moved
    _, s = heads_on(tape)
    joined = torch.cat((tape[own], s, q))
    joined = joined / (joined.square().mean() + 1e-6).sqrt() * part.norm.weight
    return part.out.weight @ joined, executed


def symbols_of(part: VecTur, ctx: Context) -> Tensor | None:
    if part.random is None:
        return None
    return part._cells(torch.zeros(*ctx.positions_BT.shape, part.out.out_features, dtype=torch.float64), ctx)[1]


def prefixes(part: VecTur, x_BTD: Tensor, ctx: Context, ticks: int) -> tuple[Tensor, Tensor]:
    """Every position's machine, run over the tokens of its document up to it and nothing else."""
    y_BTD, ticks_BT, symbols = torch.zeros_like(x_BTD), torch.zeros_like(ctx.positions_BT), symbols_of(part, ctx)
    for b in range(len(x_BTD)):
        for t, p in enumerate(ctx.positions_BT[b].tolist()):
            prefix = slice(t - p, t + 1)
            random = None if symbols is None else symbols[b, prefix]
            y_BTD[b, t], ticks_BT[b, t] = machine(part, x_BTD[b, prefix], random, ticks)
    return y_BTD, ticks_BT


VARIANTS = [
    {},
    {"heads": 1, "ticks": 2},
    {"heads": 4, "ticks": 6, "halt": 0.3, "reach": 4.0, "spread": 1.0},
    {"inner": 3, "expand": 1, "spread": 0.0},
]


@pytest.mark.parametrize("kind", ["vectur", "vecstur"])
@pytest.mark.parametrize("fields", VARIANTS)
@torch.no_grad()
def test_prefix_is_the_machine_run_prefix_by_prefix(kind, fields):
    """Float64, 1e-10, for packed documents and at any budget; and with machines that halt at different ticks."""
    part = mixers(build(kind, seed=1, **fields))[0]
    x_BTD = torch.randn(B, T, part.out.out_features, dtype=torch.float64)
    positions_BT = torch.stack([torch.arange(T) % size for size in (T, 7)])
    for budget in (None, 1, 9):
        ctx = context(positions_BT, budget)
        got, _ = part(x_BTD, None, ctx)
        want, ticks = prefixes(part, x_BTD, ctx, budget or part.ticks)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        assert torch.equal(ctx.sink.trace["ticks"], ticks)
    assert len(ticks.unique()) > 1  # of nine ticks, machines took different numbers


@torch.no_grad()
def test_prefix_is_the_last_row_of_the_original_on_every_prefix():
    """y_j = V(x_0..x_j)[j], V the machine whose whole tape is given back; its other rows hear the future."""
    part = mixers(build(seed=2))[0]
    x_BTD = torch.randn(B, T, 16, dtype=torch.float64)
    got, _ = part(x_BTD, None, context(torch.arange(T).expand(B, T)))
    part.form = "bidirectional"
    for j in range(T):
        whole, _ = part(x_BTD[:, : j + 1], None, context(torch.arange(j + 1).expand(B, -1), packed=False))
        torch.testing.assert_close(got[:, j], whole[:, j], rtol=0, atol=1e-10)
    assert float((got - whole)[:, :-1].abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["vectur", "vecstur"])
@torch.no_grad()
def test_chunk_gives_every_token_the_latest_finished_chunks_machine(kind):
    part = mixers(build(kind, form="chunk", chunk=4))[0]
    x_BTD = torch.randn(B, T, 16, dtype=torch.float64)
    positions_BT = torch.stack([torch.arange(T) % size for size in (T, 7)])
    ctx = context(positions_BT)
    got, _ = part(x_BTD, None, ctx)
    every, every_ticks = prefixes(part, x_BTD, ctx, part.ticks)
    for b in range(B):
        for t, p in enumerate(positions_BT[b].tolist()):
            back = (p + 1) % 4
            want = every[b, t - back] if p >= 3 else torch.zeros(16, dtype=torch.float64)
            torch.testing.assert_close(got[b, t], want, rtol=0, atol=1e-10)
            assert ctx.sink.trace["ticks"][b, t] == (every_ticks[b, t - back] if p >= 3 else 1)


@torch.no_grad()
def test_stream_keeps_what_it_wrote_until_the_ring_comes_round():
    """A token's write reaches tokens within the ring through the tape; past it, and past a document, through nothing.

    The fading mean of the control is cut off by hand, so that the tape is the only way.
    """
    part = mixers(build(form="stream", cells=4, depth=1))[0]
    part.machine.start_control.weight[:, 16:] = 0
    part.machine.start_heads.weight[:, 16:] = 0
    part.machine.first.weight[:] = 0  # nothing is written: only the token cells themselves are on the tape
    x_BTD = torch.randn(1, 12, 16, dtype=torch.float64)
    other = x_BTD.clone()
    other[:, 3] += 1
    positions_BT = torch.arange(12)[None]
    moved = (
        (part(x_BTD, None, context(positions_BT))[0] - part(other, None, context(positions_BT))[0]).abs().amax(-1)[0]
    )
    assert moved[:3].tolist() == [0, 0, 0]
    assert bool((moved[4:7] > 0).any())  # overwritten by token 7
    assert moved[7:].tolist() == [0] * 5
    cut = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    moved = (part(x_BTD, None, context(cut))[0] - part(other, None, context(cut))[0]).abs().amax(-1)[0]
    assert moved[5:].tolist() == [0] * 7


def test_the_state_of_a_stream_does_not_grow():
    model = build(form="stream")
    sizes = [sum(leaf.numel() for leaf in leaves(model(tokens(length=n)).state.core)) for n in (3, 30)]
    assert sizes[0] == sizes[1]


# ------------------------------------------------------------------------------------------------ pieces


def places(own: int, cells: int, random: int | None = None) -> Places:
    return Places(torch.tensor([[own]]), torch.tensor([[cells]]), torch.tensor([[0]]), random)


@pytest.mark.parametrize("cells", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_angle_is_a_cell_of_the_circle(cells, dtype):
    """S4's sibling: a tiny negative angle used to round to a whole turn, cell N, which was the next row's tape."""
    ulp = torch.finfo(dtype).eps * 4
    turn = 2 * math.pi
    angles = [0.0, -1e-8, 1e-8, turn - ulp, turn, -turn, math.pi, -math.pi, 1e6, -1e6]
    at = places(cells - 1, cells)
    for angle in angles:
        theta = wrapped(torch.tensor([[[angle]]], dtype=dtype))
        number, share = address(theta, torch.ones_like(theta), at)
        assert set(number.flatten().tolist()) <= set(range(cells))
        assert float(share.min()) >= 0
        assert float(share.sum()) == pytest.approx(1.0, abs=1e-6)
        if abs(angle) < 1e-7:  # as good as on its own cell
            on_own = float(share[number == cells - 1].sum())
            assert on_own == pytest.approx(1.0, abs=1e-3)


def test_an_address_is_continuous_where_cells_meet():
    at, cell = places(5, 8), 2 * math.pi / 8
    dense = []
    for u in (2 - 1e-9, 2.0, 2 + 1e-9):
        theta = torch.tensor([[[u * cell]]], dtype=torch.float64)
        number, share = address(theta, torch.ones_like(theta), at)
        dense.append(torch.zeros(8, dtype=torch.float64).index_add(0, number.flatten(), share.flatten()))
    torch.testing.assert_close(dense[0], dense[1], rtol=0, atol=1e-8)
    torch.testing.assert_close(dense[2], dense[1], rtol=0, atol=1e-8)
    assert dense[1].tolist() == pytest.approx([0, 0, 0, 1, 0, 0, 0, 0])


def test_writes_of_rank_one_are_a_tape_that_is_written_to():
    """With addresses that meet, name a cell twice, and have any sign."""
    g = torch.Generator().manual_seed(0)
    cells_BSM = torch.randn(3, 6, 4, generator=g, dtype=torch.float64)
    short, plain = RankOne(cells_BSM), Explicit(cells_BSM)
    for _ in range(6):
        index = torch.randint(6, (3, 1, 8), generator=g)
        share, value = (torch.randn(3, 1, n, generator=g, dtype=torch.float64) for n in (8, 4))
        torch.testing.assert_close(short.read(index, share), plain.read(index, share), rtol=0, atol=1e-12)
        short.write(index, share, value)
        plain.write(index, share, value)
        dense = torch.zeros(3, 6, dtype=torch.float64).scatter_add(1, index[:, 0], share[:, 0])
        torch.testing.assert_close(overlap(index, share, index, share)[:, 0], dense.square().sum(1))
    assert not torch.equal(plain.cells_BSM, cells_BSM)


def test_document_sums_never_cross_a_border():
    x_BTD = torch.randn(2, 21, 3, dtype=torch.float64)
    positions_BT = torch.stack([torch.arange(21) % 21, (torch.arange(21) + 4) % 6])
    before = torch.randn(2, 3, dtype=torch.float64)
    got = document_sums(x_BTD, before, positions_BT)
    for b in range(2):
        for t, p in enumerate(positions_BT[b].tolist()):
            want = x_BTD[b, max(0, t - p) : t + 1].sum(0) + (before[b] if p > t else 0)
            torch.testing.assert_close(got[b, t], want)
    x_BTD[1, 0] = torch.inf  # the end of the document that went before
    assert bool(document_sums(x_BTD, before, positions_BT)[1, 2:].isfinite().all())


# ------------------------------------------------------------------------------------------------ gate and halting


def with_decay(model, kappa: float):
    with torch.no_grad():
        for part in mixers(model):
            part.machine.decay_out.weight.zero_()
            part.machine.decay_bias.fill_(math.log(math.expm1(kappa)))
    return model


def test_the_gate_starts_at_a_half_and_falls_to_nothing():
    model = with_decay(build(halt=0.2), 8.0)
    gate = model(tokens(), trace=True, ticks=12).trace["vectur0.gate"]
    assert gate.shape == (B, T, 12)
    torch.testing.assert_close(gate[..., 0], torch.full_like(gate[..., 0], 0.5))
    assert bool((gate.diff(dim=-1) <= 0).all())
    assert bool((gate[..., -1] == 0).all())


def test_a_halted_machine_weighs_nothing_and_costs_nothing():
    """Ticks beyond the last executed one change no bit; without gradients they are not computed."""
    own = spec("vectur", "tiny", depth=1, ticks=12, halt=0.3)
    torch.manual_seed(0)
    model = with_decay(own.build(Subject.vocab).double(), 1.0).eval()
    ids = tokens()
    with torch.no_grad():
        out = model(ids, trace=True)
        used = int(out.trace["ticks"].max())
        assert 1 < used < 12
        assert torch.equal(model(ids, ticks=used).logits, out.logits)
        assert not torch.equal(model(ids, ticks=used - 1).logits, out.logits)
    with_gradients = model(ids, trace=True)
    assert torch.equal(with_gradients.logits, out.logits)
    for name, value in out.trace.items():
        assert torch.equal(value, with_gradients.trace[name]), name
    flops, _, reported = counted(model, Subject(own), 12, None)
    assert flops == pytest.approx(model.cost(12, reported).flops, rel=0.01)
    assert flops < 0.8 * model.cost(12).flops


def test_G6_a_companion_that_runs_longer_changes_no_bit():
    model = build(depth=1, ticks=8, halt=0.35)
    rows = tokens(batch=40, length=3)
    with torch.no_grad():
        ticks = model(rows, trace=True).trace["ticks"].amax(1)
        short, long = int(ticks.argmin()), int(ticks.argmax())
        assert ticks[short] < ticks[long]
        kept, mixed = model(rows[[short, short]]), model(rows[[short, long]])
    assert torch.equal(kept.logits[0], mixed.logits[0])


def test_decay_and_target_have_a_gradient():
    model = build()
    model(tokens(), targets=tokens(1)).nll_BT.sum().backward()
    for part in mixers(model):
        for parameter in (part.machine.decay_bias, part.machine.decay_in.weight, part.machine.target):
            assert bool(parameter.grad.any())


def test_gradients_are_those_of_finite_differences():
    """Away from cell borders, where the slope of an address changes."""
    model = build(depth=1, stir=0.1)
    part = mixers(model)[0]
    ids, goal = tokens(length=9), tokens(1, length=9)
    for parameter in (part.machine.behind, part.machine.head_out.weight, part.machine.target, part.write.weight):
        model.zero_grad()
        model(ids, targets=goal).nll_BT.sum().backward()
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        want = float((parameter.grad * direction).sum())
        losses = []
        with torch.no_grad():
            for step in (1e-6, -1e-6):
                parameter.add_(direction, alpha=step)
                losses.append(float(model(ids, targets=goal).nll_BT.sum()))
                parameter.add_(direction, alpha=-step)
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(want, rel=1e-4, abs=1e-6)


# ------------------------------------------------------------------------------------------------ random symbols


@pytest.mark.parametrize("symbols", ["rademacher", "gaussian"])
@torch.no_grad()
def test_symbols_are_a_function_of_key_and_position(symbols):
    part = mixers(build("vecstur", symbols=symbols))[1]
    whole = symbols_of(part, context(torch.arange(400).expand(50, 400)))
    assert torch.equal(whole, symbols_of(part, context(torch.arange(400).expand(50, 400))))
    later = symbols_of(part, context(torch.arange(7, 20).expand(50, 13)))
    assert torch.equal(later, whole[:, 7:20])
    assert not torch.equal(whole, symbols_of(part, context(torch.arange(400).expand(50, 400), key=4)))
    numbers = whole.flatten()
    assert abs(float(numbers.mean())) < 4.5 / math.sqrt(len(numbers))
    assert float(numbers.square().mean()) == pytest.approx(1.0, abs=0.03)
    if symbols == "rademacher":
        assert whole.unique().tolist() == [-1.0, 1.0]
    else:  # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed once in a thousand
        below = torch.special.ndtr(numbers.sort().values)
        distance = (below - (torch.arange(len(numbers)) + 0.5) / len(numbers)).abs().max()
        assert float(distance) < 1.95 / math.sqrt(len(numbers))
    other = symbols_of(mixers(build("vecstur", symbols=symbols))[0], context(torch.arange(400).expand(50, 400)))
    assert not torch.equal(whole, other)  # every block has its own


@torch.no_grad()
def test_two_evaluations_of_one_key_are_equal_and_of_two_are_not():
    model = build("vecstur")
    first, again, other = (model(tokens(), key=key).logits for key in (5, 5, 6))
    assert torch.equal(first, again)
    assert float((first - other).abs().max()) > 1e-3


@torch.no_grad()
def test_draws_average_tapes_in_eval_mode_only():
    """The variance over keys falls as 1 / draws; training draws one tape."""
    spread = {}
    for draws in (1, 16):
        part = mixers(build("vecstur", depth=1, draws=draws))[0]
        x_BTD = torch.randn(1, T, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = torch.stack([part(x_BTD, None, context(torch.arange(T)[None], key=key))[0] for key in range(24)])
        spread[draws] = float(found.var(0).mean())
    assert spread[1] / 32 < spread[16] < spread[1] / 8
    single, many = (build("vecstur", depth=1, draws=draws) for draws in (1, 4))
    assert many(tokens(), key=1).logits.shape == (B, T, VOCAB)
    assert not torch.equal(single(tokens(), key=1).logits, many(tokens(), key=1).logits)
    many.train()
    assert many.cost(20).flops == single.cost(20).flops
    assert many.eval().cost(20).flops > 2 * single.cost(20).flops


def test_only_random_cells_tell_vecstur_from_vectur():
    plain, random = build("vectur"), build("vecstur")
    assert plain.state_dict().keys() == random.state_dict().keys()
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in random.parameters())


# ------------------------------------------------------------------------------------------------ laws, all forms

SMALL = {"depth": 1, "inner": 8, "heads": 2, "ticks": 2, "cells": 5, "chunk": 4}
FORMS = {
    "chunk": {"form": "chunk"},
    "stream": {"form": "stream"},
    "halting": {"halt": 0.35, "ticks": 4},
    "one_head": {"heads": 1, "spread": 1.0, "reach": 4.0, "expand": 1},
}
SWIFT = {  # the laws of each form that are quick enough for the gate; the rest are slow tests
    "chunk": ("causal", "noise", "chunk", "rows", "reach", "start", "cost", "budget", "repeat"),
    "stream": ("chunk", "reach", "budget"),
    "halting": ("causal", "rows", "cost", "budget"),
    "one_head": ("chunk", "reach", "start"),
}
CASES = [
    pytest.param(kind, form, law, marks=() if law in SWIFT[form] else pytest.mark.slow, id=f"{kind}-{form}-{law}")
    for kind in ("vectur", "vecstur")
    for form in FORMS
    for law in LAWS
]


@pytest.mark.parametrize(("kind", "form", "law"), CASES)
def test_every_form_keeps_the_laws(kind, form, law):
    (finding,) = check(spec(kind, "tiny", **{**SMALL, **FORMS[form]}), only=[law])
    assert finding.passed, finding.detail


@pytest.mark.parametrize("law", ["chunk", "rows", "repeat", "cost", pytest.param("twin", marks=pytest.mark.slow)])
def test_averaged_draws_and_normal_symbols_keep_the_laws(law):
    (finding,) = check(spec("vecstur", "tiny", **SMALL, symbols="gaussian", draws=2), only=[law])
    assert finding.passed, finding.detail


@pytest.mark.parametrize("kind", ["vectur", "vecstur"])
@pytest.mark.parametrize("fields", [{}, {"ticks": 32}, {"form": "chunk"}, {"form": "stream"}, {"depth": 4}])
def test_S4_the_full_unroll_is_well_conditioned(kind, fields):
    assert 0 < conditioning(spec(kind, "tiny", **fields)) < 100


@pytest.mark.parametrize("form", ["chunk", pytest.param("stream", marks=pytest.mark.slow)])
def test_every_form_is_one_graph(form):
    torch._dynamo.reset()
    model = build("vecstur", stir=0.0, form=form, depth=1, ticks=2).train()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(2):
        ids, cuts = tokens(seed, length=9), tokens(seed + 2, length=9) < 3
        ours, theirs = (call(ids, targets=ids, documents=cuts.cumsum(1)).nll_BT for call in (compiled, model))
        ours.sum().backward()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_original_form_is_no_language_model():
    with pytest.raises(UserError, match="hears the future"):
        spec("vectur", form="bidirectional").build(VOCAB)
    part = mixers(build())[0]
    part.form = "bidirectional"
    x_BTD = torch.randn(B, T, 16, dtype=torch.float64)
    with pytest.raises(UserError, match="one whole sequence a row"):
        part(x_BTD, None, context(torch.arange(T).expand(B, T), packed=True))


@pytest.mark.parametrize("kind", ["vectur", "vecstur"])
@pytest.mark.parametrize("form", ["prefix", "chunk", "stream"])
@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "bfloat16"])
def test_bfloat16_keeps_tapes_and_angles_in_float32(kind, form, mixed):
    model = build(kind, stir=0.0, dtype=torch.float32, form=form)
    want = model(tokens()).logits.detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        low = (model if mixed else model.bfloat16())(tokens(), targets=tokens(1), trace=True)
        logits = model(tokens()).logits.detach()
    low.nll_BT.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert low.trace[f"{kind}0.angle"].dtype == torch.float32
    kept = low.state.core[0].ring_BNM if form == "stream" else low.state.core[0].tape.k_BSGK
    assert kept.dtype == torch.float32
    assert 0 < float((logits - want).abs().max()) < 0.2 * float(want.abs().max())


def test_infinities_of_a_finished_document_stay_there():
    for form in ("prefix", "chunk", "stream"):
        model = build("vecstur", form=form)
        with torch.no_grad():
            model.embed.tokens.weight[0] = torch.inf
        ids = torch.tensor([[1, 0, 3, 4, 5, 6, 7, 8, 9, 2]])
        documents = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
        with torch.no_grad():
            first = model(ids[:, :2], documents=documents[:, :2])
            assert not bool(first.logits.isfinite().all())
            whole = model(ids, documents=documents).logits[:, 2:]
            rest = model(ids[:, 2:], first.state, documents=documents[:, 2:]).logits
            alone = model(ids[:, 2:]).logits
        torch.testing.assert_close(whole, alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(rest, alone, rtol=0, atol=1e-10)


def test_streams_refuse_to_average_and_budgets_below_one_are_refused():
    with pytest.raises(UserError, match="draws: 1"):
        spec("vecstur", form="stream", draws=2).build(VOCAB)
    for form in ("prefix", "chunk", "stream"):
        with pytest.raises(UserError, match="give ticks >= 1"):
            build(form=form)(tokens(), ticks=0)


@pytest.mark.parametrize("kind", ["vectur", "vecstur"])
def test_the_solver_matches_the_control(kind):
    shared = {"width": 64, "depth": 2}
    target = count(spec("transformer", heads=4, **shared), 259)
    assert abs(match_params(spec(kind, heads=4, **shared), target, 259).residual) < 0.01


def test_the_default_costs_about_what_attention_costs():
    for width in (128, 512):
        ours, control = (spec(kind, width=width, depth=4).build(259) for kind in ("vectur", "transformer"))
        assert 0.6 < ours.cost(512).flops / control.cost(512).flops < 1.2


def test_state_maps_and_goes_on():
    model = build(form="chunk")
    state = map_state(torch.clone, model(tokens()).state)
    assert torch.isfinite(model(tokens(1), state).logits).all()
