"""The recurrence: one head call, hold, rows left out, documents in every tick, losses, telemetry, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch.utils.flop_counter import FlopCounterMode

from stepladder.core.errors import UserError
from stepladder.eval.decode import generate
from stepladder.models.base import IGNORE, leaves
from stepladder.models.halting import Halting
from stepladder.models.policies import POLICIES
from stepladder.models.recurrences import recursive_halting as module
from stepladder.models.recurrences.recursive_halting import FiLM, RecursiveHalting
from stepladder.models.zoo import spec

V = 13


class Planned(Halting):
    """Stops every place at the tick that a plan (B, T) says."""

    mixes = False

    def __init__(self, plan):
        super().__init__(min_ticks=1)
        self.plan = plan

    def decide(self, new, old, before):
        return torch.zeros_like(before.offer), before.ticks + 1 >= self.plan


def build(seed=0, **fields):
    """In float64, every weight stirred."""
    torch.manual_seed(seed)
    model = spec("recursive_halting", "tiny", **{"ticks": 5, **fields}).build(V).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def draw(most, *shape, seed=0):
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("policy", ["act", "ponder", "controller"])
def test_one_head_call_is_the_mixture_of_all_ticks_logits(policy, monkeypatch):
    """sum_k w_k U h_k, with every tick's states given to the head alone."""
    model, seen = build(policy=policy), {"reads": [], "weights": []}
    real = model.core.halting.forward

    def watched(*args):
        weight, progress = real(*args)
        seen["weights"].append(weight)
        return weight, progress

    monkeypatch.setattr(model.core.halting, "forward", watched)
    model.core.norm_out.register_forward_hook(lambda _, args, out: seen["reads"].append(out))
    logits = model(draw(V, 3, 9)).logits
    parts = [w[..., None] * model.head.logits(h) for w, h in zip(seen["weights"], seen["reads"], strict=True)]
    assert len(parts) == 5
    torch.testing.assert_close(logits, sum(parts), rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(seen["weights"]), torch.ones(3, 9, dtype=torch.float64))


def fed(model, tokens, plan, splits, **call):
    """Logits of chunks under a plan of exits, and the last state."""
    state, found = None, []
    for piece, ends in zip(tokens.split(splits, 1), plan.split(splits, 1), strict=True):
        model.core.halting = Planned(ends)
        out = model(piece, state, **call)
        state = out.state
        found.append(out.logits)
    return torch.cat(found, 1), state


@torch.no_grad()
def test_decoding_with_rows_left_out_is_the_whole_pass_whatever_the_exits():
    model, tokens, plan = build(), draw(V, 6, 14), draw(5, 6, 14, seed=1) + 1
    whole, state = fed(model, tokens, plan, [14])
    for splits in ([1] * 14, [5] + [1] * 9, [3, 4, 7]):
        cut, after = fed(model, tokens, plan, splits)
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12)
        for got, want in zip(leaves(after), leaves(state), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    model.core.train()  # every tick of every row, as with gradients
    every, _ = fed(model, tokens, plan, [1] * 14)
    torch.testing.assert_close(every, whole, rtol=0, atol=1e-12)
    never, _ = fed(model.eval(), tokens, torch.full_like(plan, 5), [14])
    assert float((never - whole).abs().max()) > 1e-2  # exits do matter


@torch.no_grad()
def test_only_running_rows_are_computed_in_decoding():
    """Matrix products of the body by executed ticks: 1 + 3 + 5 of 15 row-ticks."""
    model, tokens = build(prelude=0), draw(V, 3, 4)
    state = model(tokens).state

    def flops(ends):
        model.core.halting = Planned(torch.tensor(ends)[:, None])
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, :1], state)
        return counter.get_total_flops()

    fixed = flops([1, 1, 1])
    per_row_tick = (flops([5, 5, 5]) - fixed) / 12
    assert flops([1, 3, 5]) - fixed == pytest.approx(6 * per_row_tick)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES.names())
def test_batched_cached_ragged_decoding_is_recomputation_and_rows_alone(policy):
    model = build(policy=policy)
    prompts = [draw(V, length, seed=length).numpy() for length in (1, 7, 3, 5)]
    cached = generate(model, prompts, max_new=12, eos=None)
    for other in (
        generate(model, prompts, max_new=12, eos=None, uncached=True),
        generate(model, prompts, max_new=12, eos=None, batch=1),
    ):
        assert [one.tokens.tolist() for one in other] == [one.tokens.tolist() for one in cached]
        assert [one.ticks for one in other] == pytest.approx([one.ticks for one in cached])


@pytest.mark.parametrize("policy", POLICIES.names())
def test_packed_documents_are_as_they_are_alone(policy):
    model = build(policy=policy)
    tokens, documents = draw(V, 2, 12), (torch.arange(12) >= 5).long().expand(2, -1)
    packed = model(tokens, documents=documents).logits
    alone = torch.cat((model(tokens[:, :5]).logits, model(tokens[:, 5:]).logits), 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("learn", [False, True])
def test_deep_supervision_is_the_mean_likelihood_of_executed_ticks(learn):
    model, tokens, targets = build(deep=0.5).train(), draw(V, 3, 8), draw(V, 3, 8, seed=1)
    plan = draw(5, 3, 8, seed=2) + 1
    model.core.halting, reads = Planned(plan), []
    model.core.norm_out.register_forward_hook(lambda _, args, out: reads.append(out))
    with torch.set_grad_enabled(learn):
        deep = model(tokens, targets=targets).losses["deep"]
    by_tick = torch.stack([model.head.nll(h, targets) for h in reads[:5]])
    for b in range(3):
        for t in range(8):
            want = 0.5 * by_tick[: plan[b, t], b, t].mean()
            torch.testing.assert_close(deep[b, t], want)
    assert deep.requires_grad == learn
    assert "deep" not in model.eval()(tokens, targets=targets).losses
    assert "deep" not in model.train()(tokens).losses


def test_unscored_targets_leave_the_lessons_finite_and_zero():
    model = build(deep=0.5, policy="controller").train()
    targets = torch.full((2, 6), IGNORE)
    losses = model(draw(V, 2, 6), targets=targets).losses
    assert not losses["deep"].any()
    assert bool(losses["compute"].isfinite().all())


def test_the_likelihood_of_ticks_never_makes_more_than_a_chunk_of_logits(monkeypatch):
    from stepladder.models.heads import softmax

    model, largest = build(deep=0.5).train(), []
    monkeypatch.setattr(softmax, "CHUNK", 7 * V)
    real = model.head.logits
    monkeypatch.setattr(model.head, "logits", lambda h: largest.append(len(h)) or real(h))
    model(draw(V, 3, 8), targets=draw(V, 3, 8, seed=1)).losses["deep"].sum().backward()
    assert max(largest) <= 7
    assert sum(largest) >= 6 * 24  # the output's, and five ticks'


def test_lessons_are_counted_in_training_flops():
    plain, deep, taught = (
        spec("recursive_halting", width=32, **fields).build(50).cost(64)
        for fields in ({}, {"deep": 0.1}, {"policy": "controller"})
    )
    head = 2 * 32 * 50
    assert plain.train_flops == 3 * plain.flops
    assert deep.train_flops == pytest.approx(plain.train_flops + 4 * 3 * head)
    own = 2 * 16 * 64  # the controller's own product: 4 decisions forward and backward, and as many in its lesson
    assert taught.train_flops == pytest.approx(plain.train_flops + 4 * (head + 3 * own + 3 * own))


def test_the_modulation_starts_as_nothing_and_has_no_more_rank_than_ticks():
    film = FiLM(8, 3, 2)
    for gain, shift in film(5):
        assert torch.equal(gain, torch.ones(8))
        assert not shift.any()
    with torch.no_grad():
        film.map.normal_()
    found = torch.stack([torch.cat(pair) for pair in film(5)])
    assert torch.equal(found[3], found[2])  # later ticks are as the last one
    offset = torch.cat((torch.ones(8), torch.zeros(8)))
    assert torch.linalg.matrix_rank((found - offset).detach()) == 2
    with pytest.raises(UserError, match="film_rank=4: 3 ticks are told apart by a map of rank 3 at most"):
        spec("recursive_halting", "tiny", film_rank=4).build(V)
    none = spec("recursive_halting", "tiny", film_rank=0).build(V)
    assert none.core.film is None


def test_telemetry_is_what_happened():
    model, tokens, plan = build(), draw(V, 3, 8), draw(5, 3, 8, seed=2) + 1
    model.core.halting = Planned(plan)
    with torch.no_grad():
        trace = model(tokens, trace=True).trace
    assert torch.equal(trace["ticks"], plan)
    torch.testing.assert_close(trace["ponder"], plan.double())
    assert trace["halt"].shape == trace["change"].shape == (3, 8, 5)
    moved = trace["change"] > 0
    assert torch.equal(moved.sum(-1), plan)
    assert set(model(tokens, trace="ticks").trace) == {"ticks", "ponder"}


def test_exits_are_drawn_in_training_from_the_calls_key_alone():
    model, tokens = build(policy="controller").train(), draw(V, 4, 30)
    first, same, other = (model(tokens, key=key, trace=True).trace["ticks"] for key in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    still = [model.eval()(tokens, key=key, trace=True).trace["ticks"] for key in (1, 2)]
    assert torch.equal(*still)


def test_what_cannot_be_asked_is_refused():
    model = build()
    state = model(draw(V, 2, 3)).state
    with pytest.raises(UserError, match="begun with 5 ticks and cannot go on with 3"):
        model(draw(V, 2, 3), state, ticks=3)
    with pytest.raises(UserError, match="give ticks >= 1"):
        model(draw(V, 2, 3), ticks=0)
    with pytest.raises(UserError, match="exceed the state's capacity of 4"):
        model(draw(V, 2, 5), model.init_state(2, 4))
    with pytest.raises(UserError, match="unknown halting policy 'actt' — did you mean 'act'"):
        spec("recursive_halting", "tiny", policy="actt")


@pytest.mark.parametrize("policy", ["ponder", "controller", "convergence"])
def test_training_is_one_graph_under_every_policy(policy):
    """``act`` is what the zoo's own test compiles."""
    torch._dynamo.reset()
    model = build(policy=policy, ticks=3, dropout=0.1).train()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, results = torch.compile(model, backend=counter, fullgraph=True), []
    for call in (compiled, model):
        model.zero_grad()
        out = call(draw(V, 2, 9), targets=draw(V, 2, 9, seed=1), key=3)
        loss = out.nll_BT.sum() + sum(term.sum() for term in out.losses.values())
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", POLICIES.names())
def test_mixed_precision_runs_and_losses_stay_wide(policy):
    torch.manual_seed(0)
    model, tokens = spec("recursive_halting", "tiny", policy=policy).build(V).train(), draw(V, 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, targets=tokens)
        assert {value.dtype for value in (out.nll_BT, *out.losses.values())} == {torch.float32}
        (out.nll_BT.sum() + sum(term.sum() for term in out.losses.values())).backward()
        with torch.no_grad():
            model.eval()
            for start in (None, model.init_state(2, 12)):
                state = model(tokens, start).state
                assert bool(model(tokens[:, :1], state).logits.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_price_shortens():
    """Expected ticks start midway, at 2.5; a high price ends them at the first."""
    found = []
    for price in (0.0, 3.0):
        torch.manual_seed(0)
        fields = {"width": 16, "heads": 2, "ticks": 4, "deep": 0.2, "policy": {"kind": "act", "ponder": price}}
        model = spec("recursive_halting", **fields).build(V).train()
        optimizer = torch.optim.AdamW(model.parameters(), 0.03, weight_decay=0.0)
        for step in range(80):
            tokens = draw(V, 8, 12, seed=step)
            out = model(tokens[:, :-1], targets=tokens[:, :-1])
            optimizer.zero_grad()
            (out.nll_BT + sum(out.losses.values())).mean().backward()
            optimizer.step()
        found.append(float(model.eval()(draw(V, 8, 12, seed=99), trace=True).trace["ponder"].mean()))
    assert found[1] < 1.5 < found[0]


def test_the_ticks_that_training_weighs_are_those_that_evaluation_executes(monkeypatch):
    """With gradients all ticks are computed; what is computed beyond an exit reaches nobody."""
    model, tokens = build(), draw(V, 4, 10)
    trained = model(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, trained.detach(), rtol=0, atol=1e-12)
    real = RecursiveHalting._tick

    def spoiled(self, s, again, shown, rows, modulation, gate, ctx):
        """Noise on states of places that have stopped, where they are computed at all."""
        running = shown[self.first].running_BT[..., None]
        return real(self, torch.where(running, s, s + 5.0), again, shown, rows, modulation, gate, ctx)

    monkeypatch.setattr(module.RecursiveHalting, "_tick", spoiled)
    torch.testing.assert_close(model(tokens).logits, trained, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_spoiled_states_above_would_show_if_they_were_not_held(monkeypatch):
    model, tokens = build(), draw(V, 4, 10)
    trained = model(tokens).logits
    real = RecursiveHalting._tick

    def spoiled(self, s, again, shown, rows, modulation, gate, ctx):
        running = shown[self.first].running_BT[..., None]
        shown = tuple(each and replace(each, running_BT=torch.ones_like(each.running_BT)) for each in shown)
        return real(self, torch.where(running, s, s + 5.0), again, shown, rows, modulation, gate, ctx)

    monkeypatch.setattr(module.RecursiveHalting, "_tick", spoiled)
    assert float((model(tokens).logits - trained).abs().max()) > 1e-3
