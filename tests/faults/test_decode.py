"""Faults of decoding: carried state against recomputation, ragged batches, overflow, odd sampling, reused states."""

import gc
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.data.tokenizers import BOS
from stepladder.eval.decode import Sampling, choose, generate
from stepladder.models.base import leaves
from stepladder.models.zoo import ARCHITECTURES, spec

VOCAB = 24
INF, NAN = float("inf"), float("nan")


def build(name, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return spec(name, "tiny", **fields).build(VOCAB).eval()


def ragged(count=12):
    rng = np.random.default_rng(5)
    return [np.concatenate(([BOS], rng.integers(3, VOCAB, n % 9))) for n in range(count)]


def plain(generations):
    return [(one.tokens.tolist(), one.stop) for one in generations]


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_G1_decoding_is_the_forward(name):
    model = build(name)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(3, VOCAB, (2, 40)))
    with torch.no_grad():
        whole = model(tokens).logits
        for prefill in (1, 2, 7, 33):
            state, parts = model.init_state(2, 40), []
            for chunk in (tokens[:, :prefill], *tokens[:, prefill:].split(1, dim=1)):
                out = model(chunk, state)
                state = out.state
                parts.append(out.logits)
            assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    cached, recomputed = (generate(model, ragged(4), max_new=40, eos=None, uncached=u) for u in (False, True))
    assert plain(cached) == plain(recomputed)


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_G2_a_ragged_batch_with_early_ends_is_one_by_one(name):
    model = build(name)
    unbounded = generate(model, ragged(), max_new=10, eos=None)
    eos = Counter(t for one in unbounded for t in one.tokens[1:].tolist()).most_common(1)[0][0]
    together = generate(model, ragged(), max_new=10, eos=eos)
    assert plain(together) == [
        plain(generate(model, [p], max_new=10, eos=eos, rows=[row]))[0] for row, p in enumerate(ragged())
    ]
    assert len({len(one.tokens) for one in together}) > 1, "no row ended early: the test shows nothing"
    assert all(eos not in one.tokens for one in together)


def test_G3_a_full_cache_is_an_error_not_a_wrap():
    model = build("transformer")
    state = model(torch.full((1, 4), 5), model.init_state(1, 5)).state
    model(torch.full((1, 1), 5), state)
    with pytest.raises(UserError, match="capacity of 5"):
        model(torch.full((1, 2), 5), state)


def test_G3_decoding_beyond_learned_positions_is_refused():
    model = build("transformer", positions="learned", max_positions=10)
    assert len(generate(model, [np.full(6, 5)], max_new=5, eos=None)[0].tokens) == 5
    with pytest.raises(UserError, match="10 learned positions"):
        generate(model, [np.full(6, 5)], max_new=6, eos=None)
    with pytest.raises(UserError, match="10 learned positions"):
        generate(model, [np.full(11, 5)], max_new=1)


@pytest.mark.parametrize(
    ("sampling", "logits", "pick", "usable"),
    [
        (Sampling(0.0), [1.0, 3.0, 3.0, 2.0], 1, True),  # ties: the lowest id
        (Sampling(0.0, top_k=1, top_p=0.0), [1.0, 3.0, 2.0, 0.0], 1, True),
        (Sampling(1e-300), [1.0, 3.0, 2.0, 0.0], 1, True),
        (Sampling(1.0, top_k=99), [-INF, -INF, 0.0, -INF], 2, True),
        (Sampling(1.0, top_k=1), [1.0, 3.0, 2.0, 0.0], 1, True),
        (Sampling(1.0, top_p=0.0), [1.0, 3.0, 2.0, 0.0], 1, True),
        (Sampling(1.0, top_p=0.0), [3.0, 3.0, 2.0, 0.0], 0, True),
        (Sampling(1.0, top_p=1.0), [0.0, -INF, -INF, -INF], 0, True),
        (Sampling(1.0), [1e30, -1e30, -1e30, -1e30], 0, True),
        (Sampling(0.0), [-INF] * 4, None, False),
        (Sampling(1.0), [-INF] * 4, None, False),
        (Sampling(0.0), [0.0, NAN, 1.0, 2.0], None, False),
        (Sampling(1.0, top_k=2, top_p=0.5), [0.0, NAN, 1.0, 2.0], None, False),
        (Sampling(0.0), [0.0, INF, 1.0, 2.0], None, False),
        (Sampling(1.0), [0.0, INF, 1.0, 2.0], None, False),
    ],
)
@pytest.mark.parametrize("luck", [0.0, 0.5, 1 - 2**-53])
def test_G4_the_corners_of_sampling_are_defined(sampling, logits, pick, usable, luck):
    picks, found = choose(torch.tensor([logits]), sampling, torch.tensor([luck], dtype=torch.float64))
    assert found.tolist() == [usable]
    assert 0 <= int(picks) < 4
    if pick is not None:
        assert int(picks) == pick


def test_G4_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-INF, 0.0, -INF, -1.0, -INF]]).expand(1001, -1)
    picks, _ = choose(logits, Sampling(1.0), torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert set(picks.tolist()) == {1, 3}


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_G7_a_state_serves_two_requests(name):
    model = build(name)
    prompt = torch.tensor([[BOS, 5, 9, 7]])
    with torch.no_grad():
        state = model(prompt, model.init_state(1, 12)).state
        before = [leaf.clone() for leaf in leaves(state)]
        for request in ([3, 4, 5, 6], [9, 9, 8, 8]):
            text = torch.tensor([request])
            carried = model(text, state).logits
            assert torch.allclose(carried, model(torch.cat((prompt, text), 1)).logits[:, 4:], rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(leaves(state), before, strict=True))


def test_G7_a_cancelled_request_frees_its_state():
    model, held = build("transformer"), []

    def cancel(_, inputs):
        if len(inputs) > 1 and inputs[1] is not None:
            held.extend(weakref.ref(leaf) for leaf in leaves(inputs[1]))
        if len(held) > 20:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(cancel)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ragged(4), max_new=30, eos=None)
    handle.remove()
    gc.collect()
    assert held
    assert not any(ref() is not None for ref in held)
    assert plain(generate(model, ragged(4), max_new=5)) == plain(generate(build("transformer"), ragged(4), max_new=5))
