"""The decoder: batched = alone = recomputed, keyed sampling, bounds, and leaving everything as it was."""

import dataclasses

import numpy as np
import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.data.tokenizers import BOS, EOS
from stepladder.eval.decode import Sampling, choose, evaluating, generate, left_padded
from stepladder.eval.self_test import Scripted
from stepladder.models.zoo import spec

VOCAB = 24


def build(name="transformer", **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return spec(name, "tiny", **fields).build(VOCAB)


def ragged(count=12, longest=9):
    rng = np.random.default_rng(5)
    return [np.concatenate(([BOS], rng.integers(3, VOCAB, n % longest))) for n in range(count)]


def plain(generations):
    return [(one.tokens.tolist(), one.stop, one.ticks) for one in generations]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["transformer", "shared_loop", "identity"])
def test_batched_alone_and_recomputed_are_one(name, temperature):
    model, options = build(name), {"max_new": 8, "temperature": temperature, "key": 9}
    together = plain(generate(model, ragged(), **options))
    assert plain(generate(model, ragged(), batch=1, **options)) == together
    assert plain(generate(model, ragged(), batch=5, **options)) == together
    assert plain(generate(model, ragged(), uncached=True, **options)) == together
    assert len({tuple(tokens) for tokens, *_ in together}) > 1


def test_the_order_of_prompts_does_not_matter():
    model, prompts = build(), ragged()
    backwards = generate(model, prompts[::-1], max_new=6, temperature=1.0, rows=range(len(prompts))[::-1])
    assert plain(backwards)[::-1] == plain(generate(model, prompts, max_new=6, temperature=1.0))


def test_a_sample_depends_on_key_number_and_position_only():
    model, prompts = build(), ragged()
    whole = generate(model, prompts, max_new=8, temperature=1.5, key=4, eos=None)
    one = generate(model, prompts[3:4], max_new=8, temperature=1.5, key=4, eos=None, rows=[3])
    assert plain(one) == plain(whole[3:4])
    further = [np.concatenate((p, done.tokens[:3])) for p, done in zip(prompts, whole, strict=True)]
    rest = generate(model, further, max_new=5, temperature=1.5, key=4, eos=None)
    assert [one.tokens.tolist() for one in rest] == [one.tokens[3:].tolist() for one in whole]
    other = generate(model, prompts, max_new=8, temperature=1.5, key=5, eos=None)
    assert plain(other) != plain(whole)
    same_text = generate(model, [prompts[3]] * 2, max_new=8, temperature=1.5, key=4, eos=None)
    assert same_text[0].tokens.tolist() != same_text[1].tokens.tolist()


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for sampling, expected in [
        (Sampling(1.0), logits.softmax(0)),
        (Sampling(0.5), (logits * 2).softmax(0)),
        (Sampling(1.0, top_k=2), torch.tensor([1.0, -torch.inf, -torch.inf, 2.0]).softmax(0)),
        (Sampling(1.0, top_p=0.7), torch.tensor([1.0, -torch.inf, -torch.inf, 2.0]).softmax(0)),
    ]:
        picks, usable = choose(logits.expand(count, -1), sampling, uniform)
        assert usable.all()
        assert torch.allclose(picks.bincount(minlength=4) / count, expected, atol=2e-4)


def test_bounds_may_differ_by_prompt_and_be_zero():
    found = generate(build(), ragged(4), max_new=[0, 1, 5, 3], eos=None)
    assert [len(one.tokens) for one in found] == [0, 1, 5, 3]
    assert [one.stop for one in found] == ["length"] * 4
    assert found[0].ticks is None
    assert generate(build(), [], max_new=3) == []
    assert plain(generate(build(), ragged(2), max_new=0)) == [([], "length", None)] * 2


def test_an_empty_prompt_is_bos():
    model = build()
    empty, bos = (generate(model, [prompt], max_new=6) for prompt in (np.array([], dtype=np.int64), np.array([BOS])))
    assert plain(empty) == plain(bos)


def test_ticks_are_those_executed():
    model = build("shared_loop", ticks=3)
    assert {one.ticks for one in generate(model, ragged(), max_new=4)} == {3.0}
    assert {one.ticks for one in generate(model, ragged(), max_new=4, ticks=5)} == {5.0}
    model.register_forward_hook(lambda _, __, out: dataclasses.replace(out, trace={}))
    assert {one.ticks for one in generate(model, ragged(), max_new=4)} == {None}


def test_finished_rows_leave_the_batch():
    script = {(BOS, 3 + row): (*[4] * row, EOS) for row in range(8)}
    model, sizes = Scripted(VOCAB, script), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    found = generate(model, [np.array(prompt) for prompt in script], max_new=20)
    assert plain(found) == [([4] * row, "eos", 1.0) for row in range(8)]
    # 8 rows until 4 have ended, 4 until 2 have, and so on.
    assert sizes == [8, 8, 8, 8, 4, 4, 2, 1]


def test_progress_adds_up_to_one():
    shares = []
    generate(build(), ragged(7), max_new=1, batch=3, advance=shares.append)
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(1.0)


def test_left_padding_is_a_document_of_its_own():
    tokens, documents = left_padded([np.array([1, 5]), np.array([1, 6, 7, 8])])
    assert tokens.tolist() == [[0, 0, 1, 5], [1, 6, 7, 8]]
    assert documents.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_modes_and_generators_are_as_before():
    model = build("transformer", dropout=0.5)
    model.train()
    model.head.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    noisy = generate(model, ragged(), max_new=4)

    def fail():
        with evaluating(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            torch.rand(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert plain(generate(model.eval(), ragged(), max_new=4)) == plain(noisy)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"max_new": -1}, "max_new"),
        ({"batch": 0}, "batch"),
    ],
)
def test_impossible_options_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        generate(build(), ragged(1), **{"max_new": 2, **options})


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_foreign_ids_are_refused_before_the_model_sees_them(token):
    with pytest.raises(UserError, match=rf"token id {token}, outside the model's 0\.\.23"):
        generate(build(), [np.array([BOS, token])], max_new=2)
