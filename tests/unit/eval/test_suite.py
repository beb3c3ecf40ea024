"""Running suites: files, metadata, interruptions, wrong names, nothing to do."""

import dataclasses
import json

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, read_lines, write_json, write_manifest
from stepladder.eval import suite as suites
from stepladder.eval.suite import SUITES, check, done, evaluate, quick, tables
from stepladder.models.weights import weights_digest


def home(loaded):
    return loaded.path.parent.parent


def test_results_and_records_say_the_same(make):
    loaded = make()
    (results,) = evaluate(loaded, ["algorithmic"], quiet=True)
    assert read_json(home(loaded) / "results_algorithmic.json") == json.loads(json.dumps(results))
    records = read_lines(home(loaded) / "records" / "algorithmic.jsonl")
    assert results["status"] == "complete"
    assert results["records"] == len(records) == 20 * 5
    for cell in results["cells"]:
        own = [r for r in records if (r["task"], r["size"]) == (cell["task"], cell["size"])]
        assert [r["index"] for r in own] == list(range(20))
        assert cell["accuracy"] == sum(r["correct"] for r in own) / 20
        assert cell["unique"] == len({r["question"] for r in own})


def test_metadata_names_all_that_decides_the_numbers(make):
    loaded = make(eval={"temperature": 0.5})
    meta = evaluate(loaded, ["algorithmic"], quiet=True)[0]["meta"]
    assert meta["decoding"] == {"temperature": 0.5, "top_k": None, "top_p": 1.0, "max_new_tokens": None}
    assert meta["params"] == sum(p.numel() for p in loaded.model.parameters())
    assert meta["weights"] == weights_digest(loaded.model)
    assert (meta["model"], meta["step"], meta["seed"], meta["device"]) == ("transformer", 1, 1234, "cpu")
    assert (meta["run"], meta["tokenizer"]) == (loaded.run.hash(), loaded.tokenizer.fingerprint)
    assert set(meta) >= {"items_digest", "grid_version", "code"}


def test_items_are_those_of_every_rung_and_seed(make):
    runs = [make(), make(model="shared_loop", seed=5, name="other"), make(eval={"seed": 3}), make(eval={"samples": 21})]
    digests = [evaluate(loaded, ["algorithmic"], quiet=True)[0]["meta"]["items_digest"] for loaded in runs]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_the_weights_digest_sees_any_change(make):
    loaded = make()
    before = weights_digest(loaded.model)
    assert weights_digest(loaded.model) == before
    with torch.no_grad():
        loaded.model.norm.weight[0] += 1e-6
    assert weights_digest(loaded.model) != before


def test_an_unknown_suite_is_refused_before_anything_runs(make):
    loaded = make()
    with pytest.raises(UserError, match="unknown suite 'algoritmic' — did you mean 'algorithmic'"):
        evaluate(loaded, ["likelihood", "algoritmic"], quiet=True)
    assert list(home(loaded).iterdir()) == []


def test_names_may_repeat_and_have_hyphens(make):
    results = evaluate(make(), ["self-test", "self_test"], quiet=True)
    assert [r["suite"] for r in results] == ["self_test"]


def test_all_runs_every_suite_and_says_where_there_is_nothing(make):
    loaded = make()
    results = evaluate(loaded, ["all"], quiet=True)
    assert [r["suite"] for r in results] == SUITES.names()
    assert {"algorithmic", "depth", "likelihood", "longctx", "self_test"} <= set(SUITES.names())
    empty = next(r for r in results if r["suite"] == "likelihood")
    assert empty["message"] == "nothing to evaluate: no text source"
    assert (empty["status"], empty["records"]) == ("complete", 0)
    assert read_lines(home(loaded) / "records" / "likelihood.jsonl") == []
    assert len(tables(results)) == len(SUITES.names())


def test_tasks_restrict_the_suites_of_tasks_and_nothing_else(make, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n\n" * 30)
    text = {"kind": "text", "path": str(tmp_path / "a.txt"), "valid": str(tmp_path / "a.txt")}
    parity = {"kind": "task", "task": {"kind": "parity", "train": [4, 16], "iid": [8], "ood": []}}
    sources = [*make().run.data.model_dump(mode="json")["sources"], parity, text]
    loaded = make(sources, eval={"samples": 4})
    names = ["algorithmic", "depth", "likelihood", "self_test"]
    full = evaluate(loaded, names, quiet=True)
    config = loaded.run.eval.model_copy(update={"tasks": ("parity",)})
    some = evaluate(loaded, names, None, config, quiet=True)
    for results, whole in zip(some[:2], full[:2], strict=True):
        kept = [cell for cell in whole["cells"] if cell["task"] in ("parity", "parity#2")]
        assert results["cells"] == kept != whole["cells"]
        assert len(kept) == 4 * len({cell.get("ticks") for cell in kept if results["suite"] == "depth"} or {1})
        assert results["meta"]["tasks"] == ["parity"]
        assert results["meta"]["items_digest"] != whole["meta"]["items_digest"]
    assert some[2]["likelihood"] == full[2]["likelihood"]
    assert len(some[3]["checks"]) == len(full[3]["checks"])
    titles = [shown.title for shown in tables(some)]
    assert [title.endswith("(only parity)") for title in titles] == [True, True, False, False]
    restricted_run = loaded.run.model_copy(update={"eval": config})
    assert list(quick(loaded.model, loaded.tokenizer, restricted_run)) == [
        "algorithmic/parity",
        "algorithmic/parity#2",
        "bits_per_byte/a",
    ]


def test_a_task_that_the_run_does_not_have_is_refused_before_anything_runs(make):
    loaded = make(eval={"samples": 4})
    (before,) = evaluate(loaded, ["algorithmic"], quiet=True)
    for wrong, sentence in (
        ("pairity", "'pairity' is no task of this run — did you mean 'parity'?; it has parity, addition"),
        ("copy", "'copy' is no task of this run; it has parity, addition"),
    ):
        config = loaded.run.eval.model_copy(update={"tasks": ("parity", wrong)})
        with pytest.raises(UserError) as caught:
            evaluate(loaded, ["algorithmic"], None, config, quiet=True)
        assert str(caught.value) == f"eval.tasks: {sentence}"
        with pytest.raises(UserError, match="no task of this run"):
            check(loaded.run.model_copy(update={"eval": config}))
    assert read_json(home(loaded) / "results_algorithmic.json") == json.loads(json.dumps(before))


def test_every_suite_has_a_first_line_for_the_list():
    assert all(len((SUITES.get(name).__doc__ or "").split("\n")[0]) > 20 for name in SUITES.names())


@pytest.mark.parametrize("blow", [KeyboardInterrupt, UserError, RuntimeError])
def test_an_interrupted_suite_leaves_no_numbers(make, monkeypatch, blow):
    loaded = make()
    evaluate(loaded, ["algorithmic"], quiet=True)

    def fail(job):
        raise blow("now")

    monkeypatch.setattr(SUITES.get("algorithmic"), "evaluate", fail)
    with pytest.raises(blow):
        evaluate(loaded, ["algorithmic"], quiet=True)
    left = read_json(home(loaded) / "results_algorithmic.json")
    assert left["status"] == "interrupted"
    assert set(left) == {"suite", "status", "meta"}
    assert not (home(loaded) / "records" / "algorithmic.jsonl").exists()


def test_a_kill_between_records_and_results_is_seen(make, monkeypatch):
    loaded = make()
    monkeypatch.setattr(suites, "canonical", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, ["algorithmic"], quiet=True)
    assert read_json(home(loaded) / "results_algorithmic.json")["status"] == "interrupted"
    monkeypatch.undo()
    assert evaluate(loaded, ["algorithmic"], quiet=True)[0]["records"] == 100


def test_a_suite_that_trains_is_void(make, monkeypatch):
    loaded = make()
    entry = SUITES.get("algorithmic")
    honest = entry.evaluate

    def cheat(job):
        job.model.norm.weight.mul_(1.001)
        return honest(job)

    monkeypatch.setattr(entry, "evaluate", cheat)
    with pytest.raises(RuntimeError, match="changed the model's weights"):
        evaluate(loaded, ["algorithmic"], quiet=True)
    assert read_json(home(loaded) / "results_algorithmic.json")["status"] == "interrupted"


def test_quick_scores_every_source_on_validation_data(make, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n\n" * 30)
    text = {"kind": "text", "path": str(tmp_path / "a.txt"), "valid": str(tmp_path / "a.txt")}
    loaded = make([{"kind": "task", "task": "parity"}, {"kind": "task", "task": "parity"}, text])
    loaded.model.train()
    scores = quick(loaded.model, loaded.tokenizer, loaded.run)
    assert list(scores) == ["algorithmic/parity", "algorithmic/parity#2", "bits_per_byte/a"]
    assert scores["bits_per_byte/a"] == pytest.approx(8.0, rel=0.2)
    assert loaded.model.training
    asked = []
    loaded.model.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].shape))
    quick(loaded.model, loaded.tokenizer, dataclasses.replace(loaded).run)
    assert max(shape[0] for shape in asked) == 12, "train.eval_samples items at a time, not eval.samples"


def test_a_check_finds_what_would_fail_later(make):
    check(make().run)
    with pytest.raises(UserError, match="unknown suite 'algoritmic'"):
        check(make(eval={"suites": ["algoritmic"]}).run)
    few = {"kind": "parity", "train": [1, 8], "iid": [1], "ood": [20]}
    with pytest.raises(UserError, match="parity at size 1 has no test items"):
        check(make([{"kind": "task", "task": few}]).run)


def test_a_flawed_config_costs_no_results(make):
    loaded = make()
    (results,) = evaluate(loaded, ["algorithmic"], quiet=True)
    for flaw in ({"ticks": (0,)}, {"samples": 0}):
        with pytest.raises(UserError, match="1"):
            evaluate(loaded, ["algorithmic"], None, loaded.run.eval.model_copy(update=flaw), quiet=True)
    assert read_json(home(loaded) / "results_algorithmic.json")["records"] == results["records"]
    with pytest.raises(UserError, match=r"eval.ticks"):
        make(eval={"ticks": [0]})


def test_other_data_than_those_trained_on_are_refused(make):
    loaded = make()
    write_json(home(loaded) / "data.json", {"fingerprint": "another"})
    with pytest.raises(UserError, match="not those it was trained on"):
        evaluate(loaded, ["algorithmic"], quiet=True)
    stream = suites.Stream(loaded.run.data, 9, home(loaded), loaded.tokenizer)
    write_json(home(loaded) / "data.json", {"fingerprint": stream.fingerprint()})
    assert evaluate(loaded, ["algorithmic"], quiet=True)[0]["status"] == "complete"


def test_done_means_results_of_this_checkpoint_and_config(make):
    loaded = make()
    folder = home(loaded)
    loaded.path.mkdir(parents=True)
    write_json(loaded.path / "state.json", {"schema": 1, "step": 1})
    write_manifest(loaded.path)
    assert not done(folder, loaded.run)
    evaluate(loaded, loaded.run.eval.suites, quiet=True)
    assert done(folder, loaded.run)
    changes = ({"samples": 21}, {"seed": 3}, {"temperature": 0.5}, {"suites": ("self_test",)}, {"tasks": ("parity",)})
    for change in (*changes, {"lengths": (512,)}):
        assert not done(folder, loaded.run.model_copy(update={"eval": loaded.run.eval.model_copy(update=change)}))
    assert not done(folder, loaded.run.model_copy(update={"seed": 9}))
    restricted_config = loaded.run.eval.model_copy(update={"tasks": ("parity",)})
    evaluate(loaded, ["algorithmic"], None, restricted_config, quiet=True)
    assert not done(folder, loaded.run), "some tasks are not all of them"
    evaluate(loaded, ["algorithmic"], quiet=True)
    assert done(folder, loaded.run)
    (folder / "records/algorithmic.jsonl").write_text("")
    assert not done(folder, loaded.run)
