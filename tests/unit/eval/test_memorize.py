"""Memorising: what is carried over, by which memories, and that nothing is scored that was just memorised."""

import copy

import numpy as np
import pytest
import torch

from stepladder.core.config import validate
from stepladder.core.errors import UserError
from stepladder.data.tokenizers import BOS, EOS
from stepladder.eval import exact, longctx
from stepladder.eval.exact import algorithmic
from stepladder.eval.likelihood import likelihood, table
from stepladder.eval.memorize import Memorizer
from stepladder.eval.suite import Job, evaluate
from stepladder.run import EvalConfig, Memorize

LEARN = ["titans_lmm", "titans_mac", "titans_mag", "titans_mal", "hope_attention", "hope_selfmod"]


def ids(count, seed=0):
    return torch.randint(97, 123, (count,), generator=torch.Generator().manual_seed(seed)).numpy()


def text(seed):
    return "".join(map(chr, ids(120, seed)))


def job(loaded, **config):
    return Job(loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval.model_copy(update=config))


def logits(memorizer, tokens):
    with torch.no_grad(), memorizer.applied():
        return memorizer.model(torch.from_numpy(tokens)[None]).logits


@pytest.fixture
def source(tmp_path):
    def write(*documents):
        path = tmp_path / "words.txt"
        path.write_text("\f".join(documents))
        return [{"kind": "text", "path": str(path), "valid": str(path)}]

    return write


@pytest.mark.parametrize("name", LEARN)
def test_a_text_changes_what_comes_after_until_it_is_forgotten(make, name):
    model = make(model=name).model
    before = copy.deepcopy(model.state_dict())
    memorizer = Memorizer(model, Memorize())
    plain = logits(memorizer, ids(30))
    with torch.no_grad():
        memorizer.read(ids(150, 1))
    once = logits(memorizer, ids(30))
    assert not torch.equal(once, plain)
    with torch.no_grad():
        memorizer.read(ids(150, 1))
    assert not torch.equal(logits(memorizer, ids(30)), once)
    twice = Memorizer(model, Memorize(steps=2))
    with torch.no_grad():
        twice.read(ids(150, 1))
    assert torch.equal(logits(twice, ids(30)), logits(memorizer, ids(30)))
    memorizer.reset()
    assert torch.equal(logits(memorizer, ids(30)), plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_next_document_begins_with_the_weights_behind_the_text(make):
    model = make(model="titans_lmm").model
    with torch.no_grad():
        memory = model(torch.from_numpy(ids(70, 1))[None]).state.core[0].memory
        memorizer = Memorizer(model, Memorize())
        memorizer.read(ids(70, 1))
        with memorizer.applied():
            start = [weight.clone() for weight in memorizer.walkers[0].first]
    torch.testing.assert_close(start, [weight[0] for weight in memory.now])


@pytest.mark.parametrize(
    ("paths", "moved"),
    [
        (("all",), {"selfmod", "0", "1", "2"}),
        (("selfmod",), {"selfmod"}),
        (("cms.0", "memory"), {"0"}),
        (("cms",), {"0", "1", "2"}),
    ],
)
def test_only_the_named_memories_learn(make, paths, moved):
    model = make(model="hope_selfmod", fields={"level_chunk": 8, "factor": 2}).model
    memorizer = Memorizer(model, Memorize(paths=paths))
    with torch.no_grad():
        memorizer.read(ids(100, 1))
        memories, levels = memorizer.walkers
        before = [weight.clone() for weight in (*memories.first, *levels.first)]
        with memorizer.applied():
            after = [weight.clone() for weight in (*memories.first, *levels.first)]
    names = ["selfmod", "selfmod", "0", "0", "1", "1", "2", "2"]
    assert {n for n, a, b in zip(names, before, after, strict=True) if not torch.equal(a, b)} == moved


def test_a_text_below_the_threshold_is_not_memorised(make):
    model = make(model="titans_lmm").model
    memorizer = Memorizer(model, Memorize(surprise=100.0))
    plain = logits(memorizer, ids(30))
    with torch.no_grad():
        memorizer.read(ids(150, 1))
    assert torch.equal(logits(memorizer, ids(30)), plain)
    assert memorizer.about()["below_threshold"] == 1
    assert memorizer.about()["read"] == 0


def test_windows_are_scored_behind_others_and_never_behind_themselves(make, source):
    """A change in one window moves the adapted scores of the next one, or without a reset of all later ones."""

    def scores(first, **options):
        loaded = make(source(first + text(1) + text(2)), model="titans_lmm")
        records = likelihood(job(loaded, memorize=Memorize(**options), batch=4)).records
        return (np.array([record[name] for record in records]) for name in ("nll", "adapted_nll"))

    for options, reached in (({}, 1), ({"reset": False}, 99)):
        plain, adapted = scores(text(0)[:63], **options)
        other_plain, other = scores("?" * 63, **options)
        assert adapted[0] == plain[0]
        assert (adapted[1:] != plain[1:]).all()
        np.testing.assert_array_equal(other_plain[3:], plain[3:])
        moved = np.flatnonzero(adapted[3:] != other[3:])
        assert len(moved) == 0 if reached == 1 else len(moved) == len(plain) - 3


def test_a_model_without_memories_scores_the_same_twice(make, source):
    loaded = make(source(text(0), text(1)))
    outcome = likelihood(job(loaded, memorize=Memorize(), batch=1))
    assert all(record["adapted_nll"] == record["nll"] for record in outcome.records)
    assert outcome.body["memorize"]["memories"] == 0
    (entry,) = outcome.body["likelihood"]
    assert entry["adapted"]["bits_per_byte"] == entry["bits_per_byte"]
    assert "after memorising" in [column.header for column in table(outcome.body).columns]


def test_answers_are_fed_after_their_item_and_the_run_is_marked(make, monkeypatch):
    events = []
    real = exact.ask

    def ask(model, tokenizer, sheet, *rest, **options):
        if len(sheet.index) == 1:
            events.append(("asked", sheet.examples.questions()[0]))
        return real(model, tokenizer, sheet, *rest, **options)

    class Listening(Memorizer):
        def read(self, text):
            events.append(("read", loaded.tokenizer.decode(text[1:])))
            super().read(text)

    monkeypatch.setattr(exact, "ask", ask)
    monkeypatch.setattr(exact, "Memorizer", Listening)
    loaded = make(model="titans_lmm")
    config = {"samples": 6, "tasks": ("parity",)}
    outcome = algorithmic(job(loaded, **config, memorize=Memorize(reset=False, use_correct_answer=True)))
    assert outcome.body["memorize"]["comparable"] is False
    for record in outcome.records:
        fed = events.index(("read", record["question"] + record["answer"]))
        assert max(place for place, event in enumerate(events) if event == ("asked", record["question"])) < fed
    plain = algorithmic(job(loaded, **config, memorize=Memorize()))
    assert plain.body["memorize"]["comparable"] is True
    assert all({"accuracy", "low", "high"} <= cell["adapted"].keys() for cell in plain.body["cells"])
    with pytest.raises(UserError, match="use_correct_answer needs reset=false"):
        validate(EvalConfig, {"memorize": {"use_correct_answer": True}}, "eval")
    with pytest.raises(UserError, match="paths"):
        validate(EvalConfig, {"memorize": {"paths": ["titan"]}}, "eval")


def test_a_needle_is_asked_with_its_text_and_from_memory_alone(make, source, monkeypatch):
    loaded = make(source(*(text(n) * 3 for n in range(4))), model="titans_lmm", eval={"samples": 2})
    seen, read = [], []
    real = longctx.answer

    def answer(model, batch, *rest):
        if len(batch) == 1:
            seen.append(batch[0])
        return real(model, batch, *rest)

    monkeypatch.setattr(longctx, "answer", answer)
    monkeypatch.setattr(Memorizer, "read", lambda self, ids: read.append(ids))
    body = longctx.longctx(job(loaded, memorize=Memorize())).body
    figures = [f"{name}_{figure}" for name in ("adapted", "recall") for figure in ("accuracy", "choice")]
    assert all(0 <= cell[figure] <= 1 for cell in body["cells"] for figure in figures)
    assert longctx.table(body | {"meta": {}}).row_count == len(longctx.KINDS)
    for text_ids, whole, alone in zip(read, seen[::2], seen[1::2], strict=True):
        question = loaded.tokenizer.encode(whole.question)
        assert np.array_equal(np.concatenate((text_ids, question)), whole.prompt)
        assert np.array_equal(alone.prompt, [BOS, *question])
        assert EOS not in text_ids


def test_a_suite_that_does_not_memorise_says_so(make, tmp_path):
    loaded = make()
    config = loaded.run.eval.model_copy(update={"memorize": Memorize()})
    (results,) = evaluate(loaded, ["self_test"], tmp_path, config, quiet=True)
    assert results["memorize"] == {"applied": False}
    assert results["meta"]["memorize"]["steps"] == 1
