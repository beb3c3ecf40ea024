"""Every law catches the miniatures that break it, for the right reason; and lets honest ones pass."""

import random
import re

import broken
import broken_halting
import broken_models
import broken_planner  # noqa: F401 (it notes its miniatures)
import broken_vectur
import miniature
import numpy as np
import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.laws import LAWS, Subject, check, probe
from stepladder.models.zoo import ARCHITECTURES

IDS = [f"{law}-{cls.__name__}" for law, cls, _ in miniature.BROKEN]


@pytest.mark.parametrize(("law", "cls", "finding"), miniature.BROKEN, ids=IDS)
def test_law_catches(law, cls, finding):
    (found,) = check(cls, only=[law])
    assert not found.passed, f"{cls.__name__} passes '{law}': {found.detail}"
    assert re.search(finding, found.detail), found.detail


def test_every_law_has_something_to_catch():
    assert {law for law, _, _ in miniature.BROKEN} == set(LAWS)


def test_miniatures_are_not_in_the_zoo():
    assert not {cls.__name__ for _, cls, _ in miniature.BROKEN} & set(ARCHITECTURES.names())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("cls", [miniature.Healthy, miniature.HealthyHalting, broken_halting.HealthyRecursive])
def test_honest_miniature_keeps_law(cls, law):
    (found,) = check(cls, only=[law])
    assert found.passed, found.detail


def test_halting_miniature_really_halts():
    """Otherwise the laws above would have been kept by a plain loop."""
    subject = Subject(miniature.HealthyHalting(**miniature.HealthyHalting.tiny))
    ticks = subject.build(stir=0.3)(subject.tokens(8, 16, "halt"), trace=True).trace["ticks"]
    assert len(ticks.unique()) >= 3


@pytest.mark.parametrize("cls", [broken.SumOverSequence, broken.BatchWideStop, broken_models.UnsavedBuffer])
def test_a_broken_architecture_gets_a_finding_for_every_law(cls):
    found = check(cls)
    assert [each.law for each in found] == list(LAWS)
    assert all(each.detail and each.seconds >= 0 for each in found)
    assert any(each.passed for each in found)
    assert not all(each.passed for each in found)


def test_only_the_ill_conditioned_miniatures_amplify_rounding():
    assert probe(miniature.Chaotic) > 1e3
    assert probe(broken_vectur.SumsAndLongSteps) > 1e3
    assert probe(miniature.Healthy) < 100


class Crashes(miniature.Mini):
    """Cannot even be built."""

    def build(self, vocab):
        raise ZeroDivisionError("no model today")


def test_an_exception_is_a_finding_that_names_it():
    found = check(Crashes)
    assert len(found) == len(LAWS)
    assert {each.detail for each in found} == {"ZeroDivisionError: no model today"}
    assert not any(each.passed for each in found)


def test_check_takes_a_name_a_class_or_a_value():
    small = miniature.Healthy(width=8, depth=1)
    for what, name in (("baseline", "transformer"), (miniature.Healthy, "Healthy"), (small, "Healthy")):
        (found,) = check(what, only=["budget"])
        assert found.passed
        assert found.architecture == name


def test_wrong_names_are_user_errors_before_anything_runs():
    with pytest.raises(UserError, match="unknown law 'casual' — did you mean 'causal'"):
        check("identity", only=["start", "casual"])
    with pytest.raises(UserError, match="unknown architecture 'transformr'"):
        check("transformr")


def test_check_leaves_global_state_alone():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads()
    assert all(found.passed for found in check("identity"))
    after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_switched_off_leak_is_seen_only_because_weights_are_stirred():
    """The gate of ThoughtOfAll is zero at the start: as built, it would pass."""
    subject = Subject(broken.ThoughtOfAll(**broken.ThoughtOfAll.tiny))
    tokens = subject.tokens(2, 8, "gate")
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % subject.vocab
    for stir, leaks in ((0.0, False), (0.1, True)):
        model = subject.build(stir=stir)
        assert bool((model(tokens).logits[:, :5] != model(other).logits[:, :5]).any()) == leaks
