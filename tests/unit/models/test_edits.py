"""Taps: what is traced, and interventions that replace it."""

from __future__ import annotations

import math

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.models.mixers.machine import Explicit
from stepladder.models.noise import Dropout
from stepladder.models.zoo import ARCHITECTURES, spec

VOCAB, B, T, TICKS, HEADS, INNER = 11, 2, 13, 3, 3, 8


@pytest.fixture(params=["vectur", "vecstur"])
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    torch.manual_seed(0)
    model = spec(kind, "tiny").build(VOCAB).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model


@pytest.fixture
def tokens():
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(1))


def pinned(to):
    """An edit that puts head 0 at cell ``to`` of its document, as soon as there is one."""

    def pin(angle_BTH, ctx):
        behind, cells = (ctx.positions_BT - to).clamp(min=0), ctx.positions_BT + 1
        angle = 2 * math.pi * behind.to(angle_BTH.dtype) / cells
        return torch.cat((angle[..., None], angle_BTH[..., 1:]), dim=-1)

    return pin


TRACED = {
    "angle": (TICKS + 1, HEADS), "behind": (TICKS + 1, HEADS), "weight": (TICKS + 1, HEADS),
    "cell": (TICKS + 1, 2 * HEADS), "share": (TICKS + 1, 2 * HEADS), "distance": (TICKS + 1,), "read": (TICKS + 1,),
    "tape": (TICKS + 1,), "gate": (TICKS,), "write": (TICKS,), "ticks": (),
}  # fmt: skip


def test_what_is_traced(model, tokens, kind):
    trace = model(tokens, trace=True).trace
    for block in range(2):
        for name, shape in TRACED.items():
            assert trace[f"{kind}{block}.{name}"].shape == (B, T, *shape), name
    assert len(trace) == 1 + 2 * len(TRACED)
    both = torch.stack([trace[f"{kind}{block}.ticks"] for block in range(2)])
    assert torch.equal(trace["ticks"], both.amax(0))


def test_ticks_alone_leave_the_rest_uncollected(model, tokens):
    assert list(model(tokens, trace="ticks").trace) == ["ticks"]
    assert list(spec("shared_loop", "tiny").build(VOCAB)(tokens, trace="ticks").trace) == ["ticks"]


@torch.no_grad()
def test_a_trace_says_what_the_machine_did(model, tokens, kind):
    """From the noted cells and shares follow the noted reads; explicit tapes leave the same trace."""
    part, seen = model.core.parts[0].part, {}
    part.register_forward_hook(lambda _, args, out: seen.update(state=out[1]))
    trace = model(tokens, trace=True).trace
    cells, symbols = (each[:, :, 0] for each in (seen["state"].tape.k_BSGK, seen["state"].tape.v_BSGK))
    cell, share = (trace[f"{kind}0.{name}"][:, :, 0] for name in ("cell", "share"))
    for b in range(B):
        for t in range(T):
            rows = torch.stack([cells[b, c] if c >= 0 else symbols[b, -1 - c] for c in cell[b, t].tolist()])
            torch.testing.assert_close(trace[f"{kind}0.read"][b, t, 0], (share[b, t][:, None] * rows).sum(0).norm())
    assert bool((cell < 0).any()) == (kind == "vecstur")
    assert int(cell.max()) < T
    for each in model.core.parts[::2]:
        each.part.tape = "explicit"
    again = model(tokens, trace=True).trace
    for name, value in trace.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_norm_of_a_tape_that_is_never_formed(model, tokens, kind, monkeypatch):
    trace = model(tokens, trace=True).trace[f"{kind}0.tape"][:, -1]
    part, norms, write = model.core.parts[0].part, [], Explicit.write

    def measured(tape, *written):
        norms.append(tape.cells_BSM.flatten(1).norm(dim=1))
        write(tape, *written)
        norms.append(tape.cells_BSM.flatten(1).norm(dim=1))

    monkeypatch.setattr(Explicit, "write", measured)
    part.tape = "explicit"
    model(tokens)
    before, after = norms[-2 * TICKS :: 2], norms[-2 * TICKS + 1 :: 2]  # of the last position, whose tape is all cells
    torch.testing.assert_close(torch.stack([*before, after[-1]], 1), trace)


@torch.no_grad()
def test_a_pinned_head_reads_where_it_is_pinned(tokens):
    torch.manual_seed(0)
    model = spec("vectur", "tiny").build(VOCAB).double().eval()
    trace = model(tokens, trace=True, edits={"vectur0.angle": pinned(2)}).trace
    cell, share = (trace[f"vectur0.{name}"][:, 3:, :, [0, HEADS]] for name in ("cell", "share"))  # of head 0
    there = torch.where(cell == 2, share, 0.0).sum(-1)
    torch.testing.assert_close(there, trace["vectur0.weight"][:, 3:, :, 0])
    free = model(tokens, trace=True)
    before, after = free.trace["vectur0.angle"], trace["vectur0.angle"]
    assert not torch.equal(before[..., 0], after[..., 0])
    assert torch.equal(before[:, :, 0, 1:], after[:, :, 0, 1:])  # the other heads, before they could hear of it


@torch.no_grad()
def test_an_edit_reaches_what_it_should_and_nothing_else(model, tokens, kind):
    plain = model(tokens).logits
    same = model(tokens, edits={f"{kind}0.read": lambda value, _: value}).logits
    assert torch.equal(same, plain)

    def from_token_5(value, ctx):
        return torch.where((ctx.positions_BT >= 5)[..., None], 0.0, value)

    moved = (model(tokens, edits={f"{kind}1.write": from_token_5}).logits - plain).abs().amax(-1)
    assert not bool(moved[:, :5].any())
    assert bool((moved[:, 5:] > 0).any(0).all())

    ticks = []
    model(tokens, edits={f"{kind}1.gate": lambda value, ctx: ticks.append(ctx.tick) or value})
    assert ticks == [0, 1, 2]


@torch.no_grad()
def test_no_write_is_a_machine_that_only_reads(model, tokens, kind):
    closed = {f"{kind}{n}.gate": lambda value, _: torch.zeros_like(value) for n in range(2)}
    out = model(tokens, edits=closed, trace=True)
    assert bool((out.trace["ticks"] == 0).all())
    assert bool((out.trace[f"{kind}0.write"] == 0).all())
    silent = {f"{kind}{n}.gate": lambda value, ctx: value * (ctx.tick < 1) for n in range(2)}
    assert torch.equal(model(tokens, edits=silent).logits, model(tokens, ticks=1).logits)


def test_edits_pass_gradients_and_survive_recomputation(model, tokens, kind):
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = {}
    for recompute in (False, True):
        model.zero_grad()
        scale.grad = None
        out = model(tokens, targets=tokens, recompute=recompute, edits={f"{kind}0.read": lambda v, _: v * scale})
        out.nll_BT.sum().backward()
        found[recompute] = [scale.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    torch.testing.assert_close(found[True], found[False])
    assert float(scale.grad) != 0


@pytest.mark.parametrize("form", ["prefix", "chunk", "stream"])
def test_a_trace_and_recomputation_go_together(kind, tokens, form):
    """What is noted is not noted again in the backward pass, and must not be missed there."""
    model = spec(kind, "tiny", form=form).build(VOCAB)
    gradients = []
    for call in ({}, {"trace": True}, {"trace": True, "recompute": True}):
        model.zero_grad()
        out = model(tokens, targets=tokens, **call)
        assert not any(value.requires_grad for value in out.trace.values())
        out.nll_BT.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients[:2], strict=True))
    torch.testing.assert_close(gradients[2], gradients[0])


def test_edits_hold_in_decoding(model, tokens, kind):
    edits = {f"{kind}0.angle": pinned(1)} if kind == "vectur" else {f"{kind}0.control": lambda value, _: -value}
    with torch.no_grad():
        whole, state, parts = model(tokens, edits=edits).logits, None, []
        for token in tokens.split(1, dim=1):
            out = model(token, state, edits=edits)
            state = out.state
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


def test_mistakes_are_told(model, tokens, kind):
    with pytest.raises(UserError, match=f"nothing is called '{kind}0.angel' — did you mean '{kind}0.angle'"):
        model(tokens, edits={f"{kind}0.angel": lambda value, _: value})
    with pytest.raises(UserError, match="taps: none"):
        spec("transformer", "tiny").build(VOCAB)(tokens, edits={"angle": lambda value, _: value})
    with pytest.raises(UserError, match=r"returns shape \(13, 3\), not \(2, 13, 3\)"):
        model(tokens, edits={f"{kind}0.angle": lambda value, _: value[0]})


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_parts_of_a_kind_are_counted_from_zero(name):
    model = spec(name, "tiny").build(VOCAB)
    for kind in {type(part) for part in model.modules() if hasattr(type(part), "site")}:
        sites = [part.site for part in model.modules() if type(part) is kind]
        assert sites == list(range(len(sites)))
    assert any(isinstance(part, Dropout) for part in model.modules())
