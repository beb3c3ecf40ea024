"""The recursive-halting transformer keeps every law under every policy, and every policy really parts its tokens."""

import pytest

from stepladder.laws import LAWS, Subject, check
from stepladder.models.zoo import spec

POLICIES = {
    "scaled": {"kind": "act", "tau": 0.6, "halting_mass_scale": 1.5},
    "ponder": {"kind": "ponder", "tau": 0.8, "price": 0.1},
    "fixed": {"kind": "fixed"},
    "convergence": {"kind": "convergence", "threshold": 0.45},
    "controller": {"kind": "controller", "hidden": 4},
}
"""Beside ``act``, which the tiny configuration has."""


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("policy", POLICIES)
def test_policy_keeps_law(policy, law):
    (finding,) = check(spec("recursive_halting", "tiny", policy=POLICIES[policy]), only=[law])
    assert finding.passed, f"{policy} breaks '{law}': {finding.detail}"


@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_tokens_stop_at_different_ticks_in_what_the_laws_see(policy):
    fields = {} if policy is None else {"policy": POLICIES[policy]}
    subject = Subject(spec("recursive_halting", "tiny", **fields))
    ticks = subject.build(stir=0.3)(subject.tokens(8, 16, "halt"), trace=True).trace["ticks"]
    assert len(ticks.unique()) == (1 if policy == "fixed" else 2)
