"""The thought stream against a reference that makes every thought alone, token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from stepladder.core.errors import UserError
from stepladder.experiments.match import count, match_params
from stepladder.laws.cost import counted
from stepladder.laws.law import Subject
from stepladder.models.base import Context, Sink
from stepladder.models.layers import rotate
from stepladder.models.noise import row_keys
from stepladder.models.recurrences.once import Once
from stepladder.models.stack import Stack
from stepladder.models.zoo import spec
from stepladder.train.loss import objective

VOCAB, B, T = 11, 3, 23


def build(kind, seed=0, stir=0.3, **fields):
    """A tiny model in float64 whose parameters are stirred, so that gates are open and halting differs."""
    torch.manual_seed(seed)
    model = spec(kind, "tiny", **fields).build(VOCAB).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=stir)
        if kind == "act":
            model.core.halting.weight.mul_(20.0)  # so that thoughts take different numbers of ticks
    return model


def context(positions_BT, ticks=None):
    sink = Sink(trace={})
    return Context(
        positions_BT * 0, positions_BT, True, ticks, row_keys(7, len(positions_BT), positions_BT.device), 0, False, sink
    )


def tokens(seed=0, batch=B, length=T):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ the reference


def heads(x_ND, count):
    return x_ND.unflatten(-1, (count, -1)).transpose(0, 1)


def cross(part, reader_ND, read_SD, count, groups, base=None, reader_positions=None, read_positions=None):
    """Plain cross-attention of one sequence."""
    q = heads(reader_ND @ part.query.weight.T, count)
    k, v = (heads(x, groups) for x in (read_SD @ part.pair.weight.T).chunk(2, -1))
    if base is not None:
        q, k = rotate(q[None], reader_positions[None], base)[0], rotate(k[None], read_positions[None], base)[0]
    y = []
    for head in range(count):
        group = head * groups // count
        scores = q[head] @ k[group].T / math.sqrt(q.shape[-1])
        y.append(scores.softmax(-1) @ v[group])
    return torch.cat(y, -1) @ part.out.weight.T


def swiglu(part, x):
    gate, up = (x @ part.up.weight.T).chunk(2, -1)
    return (F.silu(gate) * up) @ part.out.weight.T


def think(part, seen_SD, budget, count, base):
    """One thought from the hidden states of its document up to its token: (Z, D) and the ticks it took."""
    groups, tick, place = part.kv_heads, part.tick, torch.arange(len(seen_SD))
    past = part.past_norm(seen_SD)
    z, total, left = part.initial_ZD, 0.0, 1.0
    for k in range(1, budget + 1):
        u = tick.norm(z) + (0.0 if part.inject is None else past[-1] @ part.inject.weight.T)
        own = place[-1:].expand(len(z))
        u = u + cross(tick.cross, tick.cross_norm(u), past, count, groups, base, own, place)
        z = u + swiglu(tick.channel, tick.channel_norm(u))
        if hasattr(part.halting, "epsilon"):
            seen = z.mean(0) / z.mean(0).square().mean().sqrt()
            logit = seen @ part.halting.weight / math.sqrt(z.shape[-1]) + part.halting.bias
            p = float(logit.sigmoid())
            p = 0.0 if k < part.halting.min_ticks else p
            last = k == budget or left - p <= part.halting.epsilon
        else:
            p, last = 0.0, k == budget
        weight = left if last else p
        total, left = total + weight * z, left - weight
        if last:
            return total, k
    raise AssertionError


def reference(part, x_BTD, positions_BT, budget, count, base):
    """The whole part: for every token its document's latest thought, made anew, and read."""
    out, ticks = x_BTD.clone(), torch.full(positions_BT.shape, part.halting.least(budget))
    for b in range(len(x_BTD)):
        for t, p in enumerate(positions_BT[b].tolist()):
            back = (p + 1) % part.chunk
            if p + 1 < part.chunk:
                continue
            seen = x_BTD[b, t - p : t - back + 1]
            z, ticks[b, t] = think(part, seen, budget, count, base)
            read = cross(part.read, part.reader_norm(x_BTD[b, t : t + 1]), part.thought_norm(z), count, part.kv_heads)
            out[b, t] += (part.gate * read)[0]
    return out, ticks


@pytest.mark.parametrize("kind", ["latent", "act"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"chunk": 1},
        {"chunk": 4, "inject": False, "kv_heads": 1, "heads": 4},
        {"chunk": 2, "positions": "none", "ticks": 5},
    ],
)
@torch.no_grad()
def test_it_is_the_reference_for_packed_documents_at_any_budget(kind, fields):
    model = build(kind, seed=3, **fields)
    own = spec(kind, "tiny", **fields)
    base = own.rope_base if own.positions == "rope" else None
    x_BTD = torch.randn(B, T, own.width, dtype=torch.float64)
    positions_BT = torch.stack([torch.arange(T) % size for size in (T, 7, 2)])
    for budget in (None, 1, 2, 7):
        ctx = context(positions_BT, budget)
        got, _ = model.core(x_BTD, None, ctx)
        want, ticks = reference(model.core, x_BTD, positions_BT, budget or own.ticks, own.heads, base)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
        assert torch.equal(ctx.sink.trace["ticks"], ticks)
    assert (len(ticks[positions_BT + 1 >= model.core.chunk].unique()) > 1) == (kind == "act")


# ------------------------------------------------------------------------------------------------ where it sits


@pytest.mark.parametrize(("depth", "before", "after"), [(1, 1, 0), (2, 1, 1), (3, 2, 1)])
def test_it_sits_in_the_middle_of_the_stack(depth, before, after):
    model = spec("latent", "tiny", depth=depth).build(VOCAB)
    assert (len(model.prelude.parts), len(model.coda.parts)) == (2 * before, 2 * after)  # a block has two parts


def test_it_begins_as_the_stack_around_it():
    model = spec("act", "tiny").build(VOCAB)
    with torch.no_grad():
        with_thoughts = model(tokens()).logits
        model.core = Once(Stack([]))
        assert torch.equal(model(tokens()).logits, with_thoughts)


def test_before_a_documents_first_thought_nothing_is_added():
    model = build("latent", chunk=4)
    x_BTD = torch.randn(1, 10, 16, dtype=torch.float64)
    positions_BT = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    y_BTD, _ = model.core(x_BTD, None, context(positions_BT))
    moved = (y_BTD != x_BTD).any(-1)[0].tolist()
    assert moved == [False, False, False, True, True] * 2


# ------------------------------------------------------------------------------------------------ halting


def forced(model, bias):
    with torch.no_grad():
        model.core.halting.weight.zero_()
        model.core.halting.bias.fill_(bias)
    return model


def gradients(model):
    model.zero_grad()
    out = model(tokens(), targets=tokens(1))
    out.nll_BT.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if "halting" not in name}


def test_act_that_never_halts_is_latent_bit_for_bit():
    fixed, adaptive = build("latent"), forced(build("act"), -1e4)
    adaptive.load_state_dict(fixed.state_dict(), strict=False)
    with torch.no_grad():
        one, two = (model(tokens(), trace=True) for model in (fixed, adaptive))
    assert torch.equal(one.logits, two.logits)
    assert (two.trace["ticks"] == 3).sum() == B * (T - 2)  # all tokens but the two before the first thought
    one, two = gradients(fixed), gradients(adaptive)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("min_ticks", [1, 2])
def test_halting_at_once_executes_min_ticks_and_no_more(min_ticks):
    own = spec("act", "tiny", ticks=5, min_ticks=min_ticks)
    model = forced(own.build(Subject.vocab), 50.0).eval()
    flops, _, reported = counted(model, Subject(own), 12, None)
    assert reported == min_ticks
    assert flops == pytest.approx(model.cost(12, min_ticks).flops, rel=0.01)
    with torch.no_grad():
        out = model(tokens(), trace=True)
        assert torch.equal(out.logits, model(tokens(), ticks=min_ticks).logits)
    assert bool((out.trace["ticks"] == min_ticks).all())
    assert bool((out.trace["ponder"] == min_ticks).all())


def test_leaving_the_loop_early_changes_no_bit():
    """With gradients all ticks are computed, without them only those that some thought needs."""
    model = build("act", ticks=6)
    with torch.no_grad():
        model.core.halting.weight.mul_(0.1)
        model.core.halting.bias.fill_(1.0)
    with_gradients = model(tokens(), trace=True)
    with torch.no_grad():
        without = model(tokens(), trace=True)
    assert 1 < int(without.trace["ticks"].max()) < 6
    assert torch.equal(with_gradients.logits, without.logits)
    for name in ("ticks", "ponder", "halt"):
        assert torch.equal(with_gradients.trace[name], without.trace[name]), name


def test_G6_a_companion_that_thinks_longer_changes_no_bit():
    """S7: a break for the whole batch let results depend on who else was in it."""
    model = build("act", ticks=8)
    rows = tokens(batch=40, length=5)  # one thought a row
    with torch.no_grad():
        ticks = model(rows, trace=True).trace["ticks"].amax(1)
        short, long = int(ticks.argmin()), int(ticks.argmax())
        assert ticks[short] < ticks[long]
        kept = model(rows[[short, short]], trace=True)
        mixed = model(rows[[short, long]], trace=True)
    assert torch.equal(kept.logits[0], mixed.logits[0])
    assert torch.equal(kept.trace["ticks"][0], mixed.trace["ticks"][0])


def test_trace_and_price_do_not_depend_on_chunks():
    model = build("act", chunk=4, ticks=5)
    whole = model(tokens(), targets=tokens(1), trace=True)
    state, parts = None, []
    for piece, goal in zip(tokens().split(1, 1), tokens(1).split(1, 1), strict=True):
        parts.append(model(piece, state, targets=goal, trace=True))
        state = parts[-1].state
    for name in ("ticks", "ponder", "halt"):
        joined = torch.cat([part.trace[name] for part in parts], 1)
        torch.testing.assert_close(joined, whole.trace[name], rtol=0, atol=1e-10)
    assert whole.trace["halt"].shape == (B, T, 5)
    made = whole.trace["halt"].any(-1)
    assert made[0].nonzero()[:, 0].tolist() == [3, 7, 11, 15, 19]
    torch.testing.assert_close(whole.losses["ponder"], 0.01 * whole.trace["ponder"])


def test_latent_has_no_price():
    assert not build("latent")(tokens()).losses


@pytest.mark.parametrize("seed", range(3))
def test_S7_the_halting_head_has_a_gradient_that_shortens(seed):
    model = build("act", seed)
    model(tokens()).losses["ponder"].sum().backward()
    halting = model.core.halting
    assert float(halting.bias.grad) < 0  # descent raises the bias, which raises every halting probability
    assert bool(halting.weight.grad.any())
    model.zero_grad()
    model(tokens(), targets=tokens(1)).nll_BT.sum().backward()
    assert bool(halting.bias.grad.any())  # the mass weighs the output: the likelihood has a say, too
    assert bool(halting.weight.grad.any())


def test_ticks_fall_as_the_price_rises():
    found = []
    for price in (0.0, 0.1, 1.0):
        torch.manual_seed(0)
        model = spec("act", "tiny", ponder=price).build(VOCAB).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for step in range(40):
            out = model(tokens(step), targets=tokens(step + 1000), trace=True)
            total, _ = objective(out, tokens(step + 1000), {})
            optimizer.zero_grad()
            (total / (B * T)).backward()
            optimizer.step()
        found.append(out.trace["ponder"].mean().item())
    assert found[0] > found[1] + 0.02
    assert found[1] > found[2] + 0.2


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("ticks", [0, -1])
def test_a_budget_below_one_is_refused(ticks):
    with pytest.raises(UserError, match="give ticks >= 1"):
        build("latent")(tokens(), ticks=ticks)


def test_stochastic_thoughts_have_noise_of_their_own_at_every_place_and_tick():
    model = build("latent", dropout=0.5, chunk=1, thoughts=3, inject=False, ticks=1).train()
    part = model.core
    seen = {}
    part.tick.channel_dropout.register_forward_hook(lambda _, args, out: seen.setdefault("masks", []).append(out == 0))
    part(torch.randn(B, T, 16, dtype=torch.float64), None, context(torch.arange(T).expand(B, T), 2))
    first, second = seen["masks"]
    assert first.shape == (B, T, 3 * 16)  # the thought tokens of an event are lanes of their own
    rows = torch.cat((first, second)).flatten(0, 1).unflatten(1, (3, 16)).flatten(0, 1)
    assert len(torch.unique(rows, dim=0)) > 0.98 * len(rows)


@pytest.mark.parametrize("kind", ["latent", "act"])
def test_the_solver_matches_the_control(kind):
    shared = {"width": 64, "depth": 2, "heads": 4}
    target = count(spec("transformer", **shared), 259)
    assert abs(match_params(spec(kind, **shared), target, 259).residual) < 0.01


def test_nano_absolute_is_the_transformer_with_learned_positions_and_nothing_else():
    shared = {"width": 16, "depth": 2, "heads": 2, "max_positions": 32}
    torch.manual_seed(0)
    control = spec("transformer", positions="learned", **shared).build(VOCAB)
    torch.manual_seed(0)
    model = spec("nano_absolute", **shared).build(VOCAB)
    assert control.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(control(tokens()).logits, model(tokens()).logits)
        with pytest.raises(UserError, match="33 tokens does not fit"):
            model(tokens(length=33))
    with pytest.raises(UserError, match="learned"):
        spec("nano_absolute", positions="rope")
    target = count(spec("transformer", width=64, depth=2, heads=4), 259)
    fields = {"width": 64, "depth": 2, "heads": 4, "max_positions": 128}
    assert abs(match_params(spec("nano_absolute", **fields), target, 259).residual) < 0.01
