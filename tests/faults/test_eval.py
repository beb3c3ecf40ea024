"""Faults of evaluation: known scores, batch invariance, ends of outputs, extraction, perplexity, side effects, NaN."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from stepladder.core.config import validate
from stepladder.core.errors import UserError
from stepladder.core.files import read_json
from stepladder.data.tokenizers import BOS, EOS, BPETokenizer, ByteTokenizer
from stepladder.eval.decode import generate
from stepladder.eval.exact import algorithmic, ask, cells, lenient, sheets, tasks
from stepladder.eval.likelihood import likelihood
from stepladder.eval.self_test import Scripted, constant, oracle, scripted, shuffled, uniform
from stepladder.eval.suite import Job, evaluate, quick
from stepladder.models.weights import weights_digest
from stepladder.models.zoo import ARCHITECTURES, spec
from stepladder.run import Loaded, Run

BYTES = ByteTokenizer()
PARITY = {"kind": "task", "task": {"kind": "parity", "train": [4, 16], "iid": [8, 16], "ood": [20]}}
ADDITION = {"kind": "task", "task": {"kind": "addition", "train": [1, 4], "iid": [4], "ood": [6]}}


def build(vocab, name="transformer", **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return spec(name, "tiny", **fields).build(vocab).eval()


def load(home, sources=(PARITY, ADDITION), tokenizer=BYTES, name="transformer", samples=20):
    tree = {
        "model": {"kind": name, **ARCHITECTURES.get(name).tiny},
        "data": {"sequence": 32, "sources": list(sources)},
        "train": {"steps": 1, "eval_samples": 8},
        "eval": {"samples": samples},
    }
    run = validate(Run, tree, "test")
    return Loaded(run, build(tokenizer.vocab, name), tokenizer, 1, home / "checkpoints" / "step-1")


def job(loaded, **config):
    return Job(loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval.model_copy(update=config))


@pytest.mark.parametrize("check", [oracle, constant, uniform, shuffled])
def test_E1_models_of_known_score_get_it(tmp_path, check):
    loaded = load(tmp_path, samples=100)
    for sheet in sheets(loaded.run, 3, 100):
        passed, detail = check(sheet, job(loaded))
        assert passed, detail


def test_E1_an_oracle_has_100_and_a_coin_is_at_chance(tmp_path):
    loaded = load(tmp_path)
    sheet = sheets(loaded.run, 3, 400)[0]
    answers = sheet.examples.answers()
    coin = np.random.default_rng(0).choice(["0", "1"], len(answers)).tolist()
    for replies, low, high in ((answers, 1.0, 1.0), (coin, 0.4, 0.6)):
        records = ask(scripted(sheet, replies, BYTES), BYTES, sheet, loaded.run.eval)
        for cell in cells(records, dict(tasks(loaded.run))):
            if cell["size"] > 8:  # at 8 bits there are few different questions
                assert low <= cell["accuracy"] <= high
                assert cell["low"] <= cell["accuracy"] <= cell["high"]
    assert cell["chance"] == 0.5


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_E2_the_batch_does_not_matter(tmp_path, name):
    loaded = load(tmp_path, name=name, samples=8)
    for temperature in (0.0, 1.0):
        alone, together = (algorithmic(job(loaded, batch=b, temperature=temperature)) for b in (1, 64))
        assert alone.records == together.records
        assert alone.body == together.body


def test_E2_order_and_side_of_padding_do_not_matter(tmp_path):
    loaded = load(tmp_path)
    sheet = sheets(loaded.run, 3, 6)[0]
    ids = [np.concatenate(([BOS], row)) for row in BYTES.encode_all(sheet.examples.questions())]
    first = [one.tokens[0] for one in generate(loaded.model, ids, max_new=1, eos=None)]
    order = np.random.default_rng(1).permutation(len(ids))
    shuffled_first = [one.tokens[0] for one in generate(loaded.model, [ids[i] for i in order], max_new=1, eos=None)]
    assert shuffled_first == [first[i] for i in order]
    longest = max(map(len, ids))
    right = torch.zeros((len(ids), longest), dtype=torch.int64)
    for row, prompt in enumerate(ids):
        right[row, : len(prompt)] = torch.from_numpy(prompt)
    picks = loaded.model(right).logits.argmax(-1)
    assert [int(picks[row, len(prompt) - 1]) for row, prompt in enumerate(ids)] == first


@pytest.mark.parametrize(
    ("written", "output", "correct", "stop"),
    [
        ("12", "12", True, "eos"),
        ("123", "123", False, "eos"),
        ("1", "1", False, "eos"),
        ("", "", False, "eos"),
        (" 12", " 12", False, "eos"),
        ("12.", "12.", False, "eos"),
        ("12345", "1234", False, "length"),  # never ends: cut at the longest answer + 2 tokens
        ("1212", "1212", False, "length"),
    ],
)
def test_E3_outputs_are_bounded_and_count_only_if_they_end(tmp_path, written, output, correct, stop):
    loaded = load(tmp_path, [ADDITION])
    (sheet,) = sheets(loaded.run, 3, 1)
    examples = dataclasses.replace(
        sheet.examples.take(np.array([0])),
        question=np.frombuffer(b"5+7=", np.uint8)[None],
        answer=np.frombuffer(b"12", np.uint8)[None],
    )
    sheet = dataclasses.replace(sheet, examples=examples, index=np.array([0]))
    reply = (*BYTES.encode(written).tolist(), EOS)
    model = Scripted(BYTES.vocab, {(BOS, *BYTES.encode("5+7=").tolist()): reply})
    (record,) = ask(model, BYTES, sheet, loaded.run.eval)
    assert (record["output"], record["correct"], record["stop"]) == (output, correct, stop)
    (cell,) = cells([record], dict(tasks(loaded.run)))
    assert cell["stops"] == {stop: 1}


@pytest.mark.parametrize(
    ("output", "answer", "forgiven"),
    [
        ("12. Actually 13", "12", True),
        ("Actually 13, not 12", "12", False),
        ("1,234", "1234", True),
        ("1,23", "1", True),
        ("\u22120", "0", True),
        ("\u22125", "-5", True),
        ("\uff11\uff12", "12", True),
        ("```\n12\n```", "12", True),
        ("```python\nabc\n```", "abc", True),
        ("`abc`", "abc", True),
        ("12.", "12", True),
        ("12.5", "12", True),
        ("= 12", "12", True),
        ("123", "12", False),
        ("012", "12", False),
        ("12", "012", False),
        ("", "12", False),
        ("abc.", "abc", True),
        (" \n abc \nxyz", "abc", True),
        ("xabc", "abc", False),
        ("ABC", "abc", False),
        ("", "abc", False),
        ("no number", "12", False),
    ],
)
def test_E4_lenient_match_forgives_form_and_exact_match_nothing(output, answer, forgiven):
    assert lenient(output, answer) == forgiven
    assert lenient(answer, answer)


def test_E4_lenient_never_counts_as_correct(tmp_path):
    loaded = load(tmp_path, [ADDITION])
    (sheet,) = sheets(loaded.run, 3, 10)
    model = scripted(sheet, [f"{answer}." for answer in sheet.examples.answers()], BYTES)
    (first, second) = cells(ask(model, BYTES, sheet, loaded.run.eval), dict(tasks(loaded.run)))
    assert (first["accuracy"], first["lenient"]) == (second["accuracy"], second["lenient"]) == (0.0, 1.0)


TEXT = "\f".join(f"In chapter {n} the {'long ' * (n % 9)}tale goes on: é." for n in range(40))


def flat(vocab):
    """A model that gives every token the same probability."""
    model = build(vocab, "identity")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_E6_perplexity_weighs_tokens_and_bits_per_byte_compare(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    source = {"kind": "text", "path": str(tmp_path / "t.txt"), "valid": str(tmp_path / "t.txt")}
    found = {}
    for tokenizer in (BYTES, BPETokenizer.train([TEXT], 300)):
        loaded = load(tmp_path, [source], tokenizer)
        loaded = dataclasses.replace(loaded, model=flat(tokenizer.vocab))
        (found[tokenizer.kind],) = likelihood(job(loaded)).body["likelihood"]
        tokens = sum(len(tokenizer.encode(document)) + 1 for document in TEXT.split("\f"))
        assert found[tokenizer.kind]["tokens"] == tokens
        assert found[tokenizer.kind]["perplexity"] == pytest.approx(tokenizer.vocab)
        bits = tokens * math.log2(tokenizer.vocab) / len(TEXT.replace("\f", "").encode())
        assert found[tokenizer.kind]["bits_per_byte"] == pytest.approx(bits)
    assert found["byte"]["bytes"] == found["bpe"]["bytes"]
    assert found["byte"]["tokens"] > found["bpe"]["tokens"]


def test_E6_the_last_window_counts_with_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    loaded = load(tmp_path, [{"kind": "text", "path": str(tmp_path / "t.txt"), "valid": str(tmp_path / "t.txt")}])
    results = [likelihood(job(loaded, batch=batch)) for batch in (1, 7, 64)]
    records = results[0].records
    assert 0 < records[-1]["tokens"] < 32
    weighted = sum(r["nll"] for r in records) / sum(r["tokens"] for r in records)
    unweighted = np.mean([r["nll"] / r["tokens"] for r in records])
    for result in results:
        mean = math.log(result.body["likelihood"][0]["perplexity"])
        assert mean == pytest.approx(weighted, rel=1e-6)
        assert mean != pytest.approx(unweighted, rel=1e-6)


@pytest.mark.parametrize("damage", ["absent", "other"])
def test_E8_no_score_on_text_that_is_not_there(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "t.txt"
    path.write_text(TEXT, encoding="utf-8")
    loaded = load(tmp_path, [{"kind": "text", "path": str(path), "valid": str(path)}])
    (before,) = evaluate(loaded, ["likelihood"], quiet=True)
    if damage == "absent":
        path.unlink()
        with pytest.raises(UserError, match=r"t\.txt"):
            evaluate(loaded, ["likelihood"], quiet=True)
        left = read_json(tmp_path / "results_likelihood.json")
        assert left == before  # refused before anything is cleared: these are the numbers of the text that was there
    else:
        path.write_text(TEXT.replace("tale", "song"), encoding="utf-8")
        (after,) = evaluate(loaded, ["likelihood"], quiet=True)
        assert after["meta"]["items_digest"] != before["meta"]["items_digest"]


def test_E10_evaluation_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    text = {"kind": "text", "path": str(tmp_path / "t.txt"), "valid": str(tmp_path / "t.txt")}
    loaded = load(tmp_path, [PARITY, text], name="shared_loop", samples=5)
    model = loaded.model.train()
    model.head.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.full((2, 5), 9)
    model(tokens, targets=tokens).nll_BT.sum().backward()
    optimizer.step()

    def everything():
        gradients = [p.grad.clone() for p in model.parameters()]
        optimizing = [v.clone() for entry in optimizer.state_dict()["state"].values() for v in entry.values()]
        random = [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))]
        return weights_digest(model), [m.training for m in model.modules()], gradients + optimizing + random

    before = copy.deepcopy(everything())
    evaluate(loaded, ["all"], quiet=True)
    quick(model, loaded.tokenizer, loaded.run)
    after = everything()
    assert before[:2] == after[:2]
    assert all(torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_E11_nan_logits_flag_the_item_and_spare_its_batch(tmp_path, temperature):
    loaded = load(tmp_path, [PARITY])
    (sheet,) = sheets(loaded.run, 3, 4)
    solved = scripted(sheet, sheet.examples.answers(), BYTES)
    poisoned = sheet.examples.questions()[1]
    ids = [BOS, *BYTES.encode(poisoned).tolist()]

    def poison(_, inputs, options, out):
        hit = torch.tensor([[t for t in row if t >= 0] == ids for row in out.state.tokens_BS.tolist()])
        return dataclasses.replace(out, logits=out.logits.masked_fill(hit[:, None, None], math.nan))

    solved.register_forward_hook(poison, with_kwargs=True)
    config = loaded.run.eval.model_copy(update={"temperature": temperature})
    for record in ask(solved, BYTES, sheet, config):
        if record["question"] == poisoned:
            assert (record["stop"], record["correct"], record["lenient"], record["output"]) == ("nan", False, False, "")
        else:
            assert (record["stop"], record["correct"]) == ("eos", True)


def test_E11_a_model_that_is_all_nan_scores_zero_not_chance(tmp_path):
    loaded = load(tmp_path, [PARITY])
    with torch.no_grad():
        loaded.model.norm.weight.fill_(math.nan)
    outcome = algorithmic(job(loaded))
    assert {cell["accuracy"] for cell in outcome.body["cells"]} == {0.0}
    assert {tuple(cell["stops"]) for cell in outcome.body["cells"]} == {("nan",)}
