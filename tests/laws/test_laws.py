"""Every architecture of the zoo keeps every law."""

import pytest

from stepladder.laws import LAWS, check, probe
from stepladder.models.zoo import ARCHITECTURES

EVERY = [(name, law) for name in ARCHITECTURES.names() for law in LAWS]


@pytest.mark.parametrize(("name", "law"), EVERY, ids=[f"{name}-{law}" for name, law in EVERY])
def test_architecture_keeps_law(name, law):
    (finding,) = check(name, only=[law])
    assert finding.passed, f"{name} breaks '{law}': {finding.detail}"
    assert finding.architecture == name
    assert finding.detail


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_architecture_is_well_conditioned(name):
    assert 0 < probe(name) < 1e3
