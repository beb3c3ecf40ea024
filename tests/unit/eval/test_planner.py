"""The planner's diagnostics against the model itself, plan by plan, and by hand on whole distributions."""

import itertools
import math

import numpy as np
import pytest
import torch

from stepladder.data.tokenizers import IGNORE
from stepladder.eval.beliefs import Given, look, planner_of, replanned
from stepladder.eval.planner import chain, entropy, planner, table
from stepladder.eval.suite import Job, evaluate
from stepladder.models.weights import weights_digest
from stepladder.models.zoo import spec

VOCAB, CHUNK = 259, 4


def sharp(model):
    """Plans that differ."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=g).to(parameter)
    return model


@pytest.fixture
def planned(make, tmp_path):
    def build(name="apelr_v2", sources=None, **fields):
        fields = {"executor": "gru", "plans": 3, "chunk": CHUNK, **fields}
        loaded = make(sources, model=name, fields=fields, eval={"samples": 3})
        sharp(loaded.model)
        return loaded

    return build


def job(loaded):
    return Job(loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval)


def rows(count=3, length=23):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCAB, (count, length + 1))
    targets = tokens[:, 1:].copy()
    documents = np.zeros((count, length), np.int64)
    documents[0, 9:] = 1
    targets[0, 8] = IGNORE
    live = np.ones((count, length), bool)
    live[2, 15:] = False
    targets[2, 14:] = IGNORE
    return Given(tokens[:, :-1], targets, documents, live, np.arange(count))


@pytest.mark.parametrize("name", ["apelr_v1", "apelr_v2"])
def test_what_is_seen_is_what_models_so_configured_compute(planned, name):
    loaded, given = planned(name, lookahead=2, feedback=0.5), rows()
    seen = look(loaded.model, given)
    tokens, targets, documents = (torch.from_numpy(x) for x in (given.tokens, given.targets, given.documents))

    def nll(**fields):
        model = spec(name, **{**loaded.run.model.model_dump(exclude={"kind"}), **fields}).build(VOCAB).eval()
        model.load_state_dict(loaded.model.state_dict())
        return model(tokens, targets=targets, documents=documents).nll_BT.detach().numpy()

    for plan in range(3):
        np.testing.assert_allclose(seen.forced[..., plan], nll(control="forced", forced=plan), atol=1e-4)
    want = {
        "own": nll(),
        "uniform": nll(control="uniform"),
        "prior": nll(control="frozen"),
        "no evidence": nll(filtering=False),
        "no forecast": nll(feedback=0.0),
    }
    assert seen.nll.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_allclose(seen.nll[key], value, atol=1e-4)
    # Chunks, by hand: first tokens of documents, and moves that a token of the document follows.
    for row, place in itertools.product(range(3), range(23)):
        position = place - 9 if row == 0 and place >= 9 else place
        first = position == 0
        moved = position > 0 and (position + loaded.model.head.plan.first) % CHUNK == 0
        more = place + 1 < (15 if row == 2 else 23) and not (row == 0 and place == 8)
        assert seen.begun[row, place] == ((first or moved) and more and (row < 2 or place < 15))
        assert seen.follows[row, place] == (seen.begun[row, place] and not first)
    credit = seen.credit[1, 4]
    gate = loaded.model(tokens, documents=documents, trace=True).trace["gate"][1, 4].double().numpy()
    by_plan = np.log(gate) - seen.forced[1, 4]
    np.testing.assert_allclose(credit, np.exp(by_plan) / np.exp(by_plan).sum(), rtol=1e-4)


def test_information_and_divergence_are_those_of_whole_distributions(planned):
    loaded, given = planned(), rows()
    seen, head = look(loaded.model, given), planner_of(loaded.model)
    out = []
    hook = head.register_forward_pre_hook(lambda _, args: out.append(args[0]))
    trace = loaded.model(
        *map(torch.from_numpy, (given.tokens,)), documents=torch.from_numpy(given.documents), trace=True
    ).trace
    hook.remove()
    where = (given.targets != IGNORE) & given.live
    h, gate = out[0][torch.from_numpy(where)], trace["gate"][torch.from_numpy(where)].double().detach().numpy()
    p = torch.stack([x.double().softmax(-1) for x in head.experts.logits(h)], 1).detach().numpy()
    mixed = (gate[..., None] * p).sum(1)
    np.testing.assert_allclose(seen.sample.information, entropy(mixed) - (gate * entropy(p)).sum(1), atol=1e-6)
    for column, (i, j) in enumerate([(1, 0), (2, 0), (2, 1)]):
        js = entropy((p[:, i] + p[:, j]) / 2) - (entropy(p[:, i]) + entropy(p[:, j])) / 2
        np.testing.assert_allclose(seen.sample.divergence[:, column], js, atol=1e-6)
    np.testing.assert_allclose(seen.sample.words, p.sum(0), atol=1e-5)


def test_the_suite_adds_up_what_was_seen(planned):
    loaded = planned()
    before, plan = weights_digest(loaded.model), loaded.model.head.plan
    outcome = planner(job(loaded))
    assert weights_digest(loaded.model) == before
    assert loaded.model.head.plan is plan
    assert [cell["source"] for cell in outcome.body["cells"]] == ["parity", "addition"]
    for cell in outcome.body["cells"]:
        mine = [record for record in outcome.records if record["source"] == cell["source"]]
        total = sum(record["tokens"] for record in mine)
        assert cell["tokens"] == total
        assert cell["nll"] == pytest.approx(sum(record["nll"]["own"] for record in mine) / total)
        lost = sum(record["nll"]["uniform"] - record["nll"]["own"] for record in mine) / total
        assert cell["ablated"]["uniform"]["more"] == pytest.approx(lost)
        assert cell["ablated"]["uniform"]["stderr"] > 0
        for k in range(3):
            assert cell["forced"][k] == pytest.approx(sum(record["forced"][k] for record in mine) / total)
        paths = [record["plans"] for record in mine]
        assert cell["chunks"] == sum(map(len, paths))
        stays = [a == b for path in paths for a, b in itertools.pairwise(path)]
        assert cell["persistence"] == pytest.approx(np.mean(stays))
        assert sum(cell["usage"]) == pytest.approx(1)
        assert cell["chunk_mi"] == pytest.approx(cell["utilization"] * math.log(3) - cell["entropy"])
        assert 0 <= cell["chunk_mi"] <= math.log(3)
        apart = cell["divergence"]
        assert 0 < apart["least"] <= apart["mean"] <= apart["most"] <= apart["bound"] == math.log(2)
        assert len(cell["excerpt"]["tokens"]) == len(cell["excerpt"]["credit"])
        assert all(len(words) <= 8 for words in cell["words"])
        assert any(cell["words"])
    ours = outcome.body["planner_eval"]
    assert ours["planner_mask_delta_loss"] == pytest.approx(
        np.mean([cell["ablated"]["uniform"]["more"] for cell in outcome.body["cells"]])
    )
    assert table({"cells": outcome.body["cells"]}).row_count == 2


def test_the_chain_s_own_law_and_dwell(planned):
    head = planned().model.head
    with torch.no_grad():
        head.moves.copy_(torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8]]).log().flatten())
    found = chain(head)
    law = np.array(found["stationary"])
    np.testing.assert_allclose(law @ np.array(found["moves"]), law, atol=1e-6)
    np.testing.assert_allclose(found["dwell"], [1 / 0.3, 1 / 0.4, 1 / 0.2], rtol=1e-5)
    assert found["stays"] == pytest.approx(0.7)


def test_one_plan_has_nothing_to_tell_apart(planned):
    (cell, _) = planner(job(planned(plans=1))).body["cells"]
    assert cell["utilization"] is cell["divergence"] is None
    assert cell["chunk_mi"] == pytest.approx(0, abs=1e-9)
    assert cell["token_mi"]["mean"] == pytest.approx(0, abs=1e-6)
    assert cell["ablated"]["uniform"]["more"] == pytest.approx(0, abs=1e-5)


def test_text_is_looked_at_too(planned, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\f".join(f"paragraph number {n}, of a planned text" for n in range(200)))
    loaded = planned(sources=[{"kind": "text", "path": str(path)}])
    (cell,) = planner(job(loaded)).body["cells"]
    assert cell["source"] == "corpus"
    assert len(cell["entropy_by_place"]) == CHUNK
    assert cell["forecast"]["nats"] > 0


@pytest.mark.parametrize(("name", "fields", "says"), [
    ("transformer", {}, "the architecture 'transformer' has no planner"),
    ("apelr_v2", {"control": "uniform"}, "control=uniform fixes the gate"),
])  # fmt: skip
def test_what_has_no_belief_is_refused_in_a_sentence(make, name, fields, says):
    (results,) = evaluate(make(model=name, fields=fields), ["planner"], quiet=True)
    assert results["status"] == "complete"
    assert says in results["message"]
    assert "cells" not in results


def test_another_plan_is_put_back_even_after_an_error(planned):
    model = planned().model
    plan = model.head.plan
    seen = []

    def fails():
        with replanned(model, control="forced", forced=2):
            seen.append((model.head.plan.control, model.head.plan.forced))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert seen == [("forced", 2)]
    assert model.head.plan is plan
