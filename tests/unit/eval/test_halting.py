"""Exits by hand: forced policies, what beats random exits and what does not, calibration, and the files."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from stepladder.data.packing import Encoded, encode
from stepladder.data.tokenizers import EOS, PAD
from stepladder.eval import halting as module
from stepladder.eval.decode import generate
from stepladder.eval.exact import sheets
from stepladder.eval.halting import (
    NO_CHOICE,
    Choices,
    calibration_error,
    chooses,
    compare,
    correlation,
    exits,
    halting,
    table,
    walk,
)
from stepladder.eval.suite import Job, evaluate
from stepladder.models.base import Cost, Output
from stepladder.models.halting import Halting
from stepladder.models.weights import weights_digest
from stepladder.models.zoo import spec

TICKS = 4


def job(loaded, model=None, **config):
    return Job(model or loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval.model_copy(update=config))


def act(make, bias=0.0, weight=0.0, **fields):
    """A tiny ``act`` whose halting probability is sigmoid(bias) wherever ``weight`` is 0."""
    loaded = make(model="act", fields={"ticks": TICKS, "chunk": 2, **fields})
    policy = loaded.model.core.halting
    with torch.no_grad():
        policy.bias.fill_(bias)
        policy.weight.normal_(0, weight, generator=torch.Generator().manual_seed(0))
        loaded.model.core.gate.fill_(1.0)
    return loaded


class Stops(Halting):
    """Stops where the first channel of the state, the tick, has reached the second."""

    def __init__(self):
        super().__init__(min_ticks=1)

    def decide(self, new, old, before):
        stop = new[..., 0] >= new[..., 1]
        return torch.where(stop, before.left, 0.0), stop


class Toy(nn.Module):
    """Knows the next token from tick ``need`` of a token on, and stops at tick ``stop``; both are told by ``plan``."""

    vocab = 259

    def __init__(self, plan):
        super().__init__()
        self.plan, self.halting = plan, Stops()

    def forward(self, tokens, ticks=None, logits_at=None, trace=False):
        mixed = (tokens * (torch.arange(tokens.shape[1]) * 2654435761 + 12345)).cumsum(1)
        for _ in range(3):  # xorshift and a product that wraps
            mixed = (mixed ^ (mixed >> 31)) * 0x2545F4914F6CDD1D
        need, stop = self.plan((mixed >> 40 & 0xFFFF) / 2.0**16, (mixed >> 20 & 0xFFFF) / 2.0**16)
        budget = TICKS if ticks is None else ticks
        progress = self.halting.start(torch.ones_like(tokens, dtype=torch.bool), torch.float32)
        known = torch.zeros(tokens.shape)
        for tick in range(1, budget + 1):
            state = torch.stack((torch.full(tokens.shape, float(tick)), stop.float()), -1)
            weight, progress = self.halting(state, state, progress, tick, budget)
            known = known + weight * (tick >= need)
        after = torch.cat((tokens[:, 1:], torch.full((len(tokens), 1), EOS)), 1)  # it peeks: a toy
        said = torch.where(known > 0.5, torch.where(after == PAD, EOS, after), 70)
        logits = torch.zeros(*tokens.shape, self.vocab).scatter(2, said[..., None], 3.0)[logits_at]
        return Output(logits, None, None, {}, {"ticks": progress.ticks})

    def cost(self, context, ticks=None):
        return Cost(0, 100.0 * (TICKS if ticks is None else ticks))


def of(luck):
    """A tick from 1 to TICKS for every number in [0, 1)."""
    return (luck * TICKS).floor() + 1


PLANS = {
    "coin": lambda first, second: (of(first), of(second)),
    "wise": lambda first, second: (of(first), of(first)),
    "eager": lambda first, second: (of(first), torch.ones_like(first)),
}


def toy_cells(make, plan, samples=300):
    loaded = make(model="act", fields={"ticks": TICKS}, eval={"samples": samples})
    return halting(job(loaded, Toy(PLANS[plan]))).body["cells"]


@pytest.mark.parametrize(("bias", "ticks"), [(30.0, 1), (-30.0, TICKS)])
def test_forced_policies_give_the_histogram_they_must(make, bias, ticks):
    loaded = act(make, bias)
    body = halting(job(loaded)).body
    assert {row["ticks"] for row in body["histogram"]} == {ticks}
    assert [row["tokens"] for row in body["histogram"]] == [cell["tokens"] for cell in body["cells"]]
    assert {cell["mean_ticks"] for cell in body["cells"]} == {float(ticks)}
    for cell in body["cells"]:  # one number of ticks for all: there is nothing to shuffle
        assert cell["learned"] == pytest.approx(cell["random"]) == pytest.approx(cell["fixed"])
        assert cell["gain"] == pytest.approx(0)
    executed, cost = body["executed"], loaded.model.cost
    assert (executed["ticks"], executed["batch_ticks"], executed["budget"]) == (ticks, ticks, TICKS)
    assert executed["flops"] == pytest.approx(cost(32, ticks).flops)
    assert executed["flops_declared"] == cost(32).flops


def test_a_policy_that_tosses_a_coin_gains_nothing(make):
    for cell in toy_cells(make, "coin"):
        assert 1 < cell["mean_ticks"] < TICKS
        assert abs(cell["gain"]) < 4 * cell["gain_stderr"]
        assert cell["gain_stderr"] < 0.05
        assert cell["random"] == pytest.approx(cell["learned"], abs=0.15)


def test_budgets_that_are_only_caps_would_be_fooled_by_a_coin(make, monkeypatch):
    """The broken form: with the policy left to stop, a shuffled exit can only cut short, never add ticks."""
    monkeypatch.setattr(module, "exits", lambda model: contextlib.nullcontext())
    assert all(cell["gain"] > 4 * cell["gain_stderr"] for cell in toy_cells(make, "coin"))


def test_a_policy_that_stops_when_it_is_right_beats_random_and_fixed_and_equals_the_oracle(make):
    for cell in toy_cells(make, "wise"):
        assert cell["accuracy"] == cell["exact"] == cell["learned"] == cell["oracle"] == 1.0
        assert cell["mean_ticks"] == pytest.approx(cell["oracle_ticks"])
        assert cell["gain"] == pytest.approx(1 - cell["random"])
        assert cell["gain"] > 5 * cell["gain_stderr"]
        assert cell["over_fixed"] > 5 * cell["over_fixed_stderr"]


def test_accuracy_of_the_exits_is_what_the_plan_says(make):
    loaded = make(model="act", fields={"ticks": TICKS}, eval={"samples": 400})
    body = halting(job(loaded, Toy(PLANS["eager"]))).body
    for cell, rows in itertools.groupby(body["fixed"], key=lambda row: (row["task"], row["size"])):
        accuracies = [row["accuracy"] for row in rows]
        assert accuracies == sorted(accuracies)
        assert accuracies[-1] == 1.0, cell
        assert accuracies == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.12)
    assert {cell["mean_ticks"] for cell in body["cells"]} == {1.0}
    assert all(cell["learned"] == cell["accuracy"] < cell["oracle"] for cell in body["cells"])
    assert body["executed"]["flops"] == 100.0


def constructed(ticks, at):
    """Choices with these ticks and this table of what is right at every exit."""
    ticks, at = np.array(ticks, dtype=float), np.array(at, dtype=bool)
    right = at[ticks.astype(int) - 1, np.arange(len(ticks))]
    return Choices(np.arange(len(ticks)), right, np.full(len(ticks), 0.5), ticks, at, ticks)


def test_exits_by_hand():
    """Four tokens of two items; random is the mean over all 24 shuffles, counted here one by one."""
    at = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
    ticks = [1, 2, 3, 2]
    found = compare(constructed(ticks, at), np.array([0, 0, 1, 1]))
    shuffles = [np.mean([at[t - 1][token] for token, t in enumerate(mixed)]) for mixed in itertools.permutations(ticks)]
    assert found["random"] == pytest.approx(np.mean(shuffles))
    assert (found["learned"], found["oracle"]) == (0.75, 0.75)
    assert found["fixed"] == 0.5  # the mean is 2 ticks exactly
    assert found["oracle_ticks"] == pytest.approx((1 + 2 + 3 + 3) / 4)  # the last is right nowhere: the whole budget
    own = [1 - 0.75, 1 - 0.75, 1 - 0.25, 0.0]
    assert found["gain"] == pytest.approx(np.mean(own))
    by_item = [own[0] + own[1], own[2] + own[3]]
    assert found["gain_stderr"] == pytest.approx(np.std(by_item, ddof=1) * 2**0.5 / 4)


def test_fixed_lies_between_its_two_neighbours():
    for ticks, at, fixed in (([1, 2], [[0, 0], [1, 1], [1, 1]], 0.5), ([3, 3], [[0, 0], [1, 1], [1, 0]], 0.5)):
        assert compare(constructed(ticks, at), np.arange(2))["fixed"] == pytest.approx(fixed)


def test_a_question_asked_twice_is_one_item():
    at = np.array([[1, 0, 0, 1], [1, 1, 0, 0]])
    once = compare(constructed([1, 2, 2, 1], at), np.arange(4))
    twice = compare(constructed([1, 2, 2, 1] * 2, np.tile(at, 2)), np.tile(np.arange(4), 2))
    assert twice == pytest.approx(once)


def test_exit_at_the_own_tick_is_the_own_output_and_all_ticks_are_executed():
    torch.manual_seed(0)
    model = spec("act", "tiny", ticks=6, epsilon=0.01).build(12).double().eval()
    with torch.no_grad():
        model.core.gate.fill_(1.0)
        model.core.halting.weight.normal_(0, 4)
        tokens = torch.randint(0, 12, (60, 5))  # one thought a row, read by its last three tokens
        own = model(tokens, trace=True)
        ticks = own.trace["ticks"][:, -1]
        assert len(ticks.unique()) > 2
        digest, policy = weights_digest(model), model.core.halting
        moved = 0.0
        for count in range(1, 7):
            with exits(model):
                out = model(tokens, ticks=count, trace=True)
            assert bool((out.trace["ticks"][:, -1] == count).all())
            same = (out.logits - own.logits).abs().amax((1, 2))
            torch.testing.assert_close(out.logits[ticks == count], own.logits[ticks == count], rtol=0, atol=1e-12)
            if count < 6:
                capped = model(tokens, ticks=count).logits
                longer = ticks > count
                torch.testing.assert_close(out.logits[longer], capped[longer], rtol=0, atol=1e-12)
            moved = max(moved, float(same[ticks < count].max()) if bool((ticks < count).any()) else 0.0)
        assert moved > 1e-4  # ticks beyond the own ones do something
        assert model.core.halting is policy
        assert weights_digest(model) == digest


def test_the_policy_comes_back_after_an_error(make):
    loaded = act(make)
    policy = loaded.model.core.halting
    with contextlib.suppress(KeyError), exits(loaded.model):
        assert loaded.model.core.halting is not policy
        raise KeyError
    assert loaded.model.core.halting is policy


def test_teacher_forced_choices_are_those_of_the_decoder(make):
    loaded = make()
    prompts = [np.array([1, *np.random.default_rng(row).integers(3, 200, 3 + row % 3)]) for row in range(9)]
    said = [one.tokens for one in generate(loaded.model, prompts, max_new=4, eos=None)]
    wrong = [np.where(np.arange(4) == row % 4, (tokens + 1) % 259, tokens) for row, tokens in enumerate(said)]
    for answers, expected in ((said, True), (wrong, False)):
        lengths = np.array([len(p) - 1 for p in prompts])
        questions = np.full((9, 8), PAD)
        for row, prompt in enumerate(prompts):
            questions[row, : len(prompt) - 1] = prompt[1:]
        encoded = Encoded(questions, lengths, np.array(answers), np.full(9, 4))
        right = walk(loaded.model, encoded, 0, 4).right.reshape(9, 5)[:, :4]  # the fifth is the end of sequence
        first = [0 if expected is False and row % 4 == 0 else 1 for row in range(9)]
        assert right[:, 0].tolist() == [bool(x) for x in first]
        if expected:
            assert right.all()
        else:
            assert not right[np.arange(9), np.arange(9) % 4].any()


def test_E2_the_batch_does_not_matter(make):
    loaded = act(make, weight=8.0)
    sheet = sheets(loaded.run, 1, 9)[0]
    encoded = encode(sheet.examples, loaded.tokenizer)
    alone, together = (walk(loaded.model, encoded, TICKS, batch) for batch in (1, 64))
    assert len(np.unique(alone.ticks)) > 1
    for name in ("item", "right", "ticks", "at"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(together, name))
    np.testing.assert_allclose(alone.confidence, together.confidence, rtol=1e-4)
    assert (together.loops == together.loops[0]).all()
    assert alone.loops.mean() <= together.loops[0]  # a batch goes on until its last place has stopped
    assert together.loops[0] >= together.ticks.max()


def test_E11_unusable_logits_are_wrong_and_have_no_confidence(make):
    loaded = act(make)
    with torch.no_grad():
        loaded.model.norm.weight.fill_(float("nan"))
    body = halting(job(loaded)).body
    assert {cell["accuracy"] for cell in body["cells"]} == {0.0}
    assert {row["confidence"] for row in body["by_ticks"]} == {0.0}


@pytest.mark.parametrize("kind", ["latent", "shared_loop", "transformer"])
def test_models_that_do_not_choose_have_a_sentence_and_no_comparison(make, kind):
    fields = {} if kind == "transformer" else {"ticks": 3}
    loaded = make(model=kind, fields=fields)
    assert not chooses(loaded.model, 3)
    body = halting(job(loaded)).body
    assert (body["note"], body["chooses"], body["fixed"]) == (NO_CHOICE, False, [])
    assert {cell["mean_ticks"] for cell in body["cells"]} == {3.0 if fields else 1.0}
    assert {cell["learned"] for cell in body["cells"]} == {cell["oracle"] for cell in body["cells"]} == {None}
    assert body["executed"]["flops"] == body["executed"]["flops_declared"] == loaded.model.cost(32).flops
    shown = table(body)
    assert shown.row_count == 5
    assert shown.caption == NO_CHOICE


def test_a_minimum_equal_to_the_budget_leaves_no_choice(make):
    loaded = act(make, min_ticks=TICKS - 1)
    assert chooses(loaded.model, TICKS)
    assert not chooses(loaded.model, TICKS - 1)


def test_records_add_up_to_the_cells(make):
    loaded = act(make, weight=8.0)
    (results,) = evaluate(loaded, ["halting"], quiet=True)
    outcome = halting(job(loaded))
    assert results["records"] == len(outcome.records) == 20 * 5
    for cell in outcome.body["cells"]:
        mine = [r for r in outcome.records if (r["task"], r["size"]) == (cell["task"], cell["size"])]
        assert [record["index"] for record in mine] == list(range(20))
        right, ticks = (list(itertools.chain(*(record[name] for record in mine))) for name in ("right", "ticks"))
        assert (cell["n"], cell["tokens"]) == (20, len(right))
        assert cell["accuracy"] == pytest.approx(np.mean(right))
        assert cell["mean_ticks"] == pytest.approx(np.mean(ticks))
        assert cell["exact"] == pytest.approx(np.mean([record["correct"] for record in mine]))
        assert len(mine[0]["right"]) == len(mine[0]["answer"]) + 1  # one token a character, and the end
        at = list(itertools.chain(*(record["right_at"] for record in mine)))
        assert cell["oracle"] == pytest.approx(np.mean([bool(found) for found in at]))
    for name in ("histogram", "by_ticks"):
        assert sum(row["tokens"] for row in outcome.body[name]) == sum(c["tokens"] for c in outcome.body["cells"])
    assert table(outcome.body).row_count == 5
    assert outcome.body == {name: results[name] for name in outcome.body}


def test_calibration_of_the_calibrated_and_of_the_sure():
    sure = np.repeat(np.arange(1, 10) / 10, 100)
    right = np.concatenate([np.arange(100) < 10 * level for level in range(1, 10)])
    assert calibration_error(sure, right, bins=9) == pytest.approx(0, abs=1e-9)
    assert calibration_error(np.full(200, 0.99), np.arange(200) % 2 == 0) == pytest.approx(0.49, abs=0.01)
    assert calibration_error(1 - sure, right, bins=9) == pytest.approx(np.abs(1 - 2 * sure).mean())
    assert calibration_error(np.array([0.8]), np.array([True])) == pytest.approx(0.2)


def test_bins_hold_equal_numbers_of_tokens():
    """One bin of equal width would hold 90 of these 100 and let their errors cancel."""
    confidence = np.concatenate((np.full(45, 0.95), np.full(45, 0.96), np.full(10, 0.1)))
    right = np.concatenate((np.zeros(45), np.ones(45), np.zeros(10))).astype(bool)
    assert calibration_error(confidence, right, bins=2) > 0.4


def test_correlation_needs_variation():
    assert correlation(np.array([1, 2, 3]), np.array([2, 4, 6])) == pytest.approx(1)
    assert correlation(np.array([1, 1, 1]), np.array([2, 4, 6])) is None
