"""The presets of images reach what docs/vision.md says of them."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from stepladder import run as running
from stepladder.core.files import read_json
from stepladder.eval import suite
from stepladder.train import session

HOME = Path(__file__).parents[2]
MNIST = HOME.parent / "shared" / "data" / "vision"
DIGITS = pytest.mark.skipif(not find_spec("sklearn"), reason="needs scikit-learn: pip install 'stepladder[vision]'")


def cell(tmp_path, preset, *overrides):
    run = running.read(HOME / "configs" / f"{preset}.yaml", list(overrides))
    home = session.train(run, tmp_path, rehearse=suite.check, quiet=True)
    (results,) = suite.evaluate(running.load(home), run.eval.suites, quiet=True)
    assert read_json(home / "data.json")["overlap"].popitem()[1]["exact"] == 0
    return results["cells"][0]


@DIGITS
def test_a_loop_that_halts_reads_digits(tmp_path):
    found = cell(tmp_path, "digits_act", "train.steps=150")
    assert found["n"] > 150
    assert found["accuracy"] >= 0.9
    assert 1 <= found["ticks"] <= 3


@pytest.mark.slow
@DIGITS
def test_two_digits_and_their_sum(tmp_path):
    found = cell(tmp_path, "digit_sums")
    assert found["chance"] == 0.01
    assert found["accuracy"] >= 0.9


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="needs MNIST in shared/data/vision beside the checkout")
def test_mnist(tmp_path):
    found = cell(tmp_path, "mnist_conv", f"data.sources.0.path={MNIST}")
    assert found["n"] == 10_000
    assert found["accuracy"] >= 0.97
