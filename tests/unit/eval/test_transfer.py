"""Transfer: what is shown, what is asked, what is refused."""

import json

import numpy as np
import pytest

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, read_lines
from stepladder.data.pairs import Pairs
from stepladder.data.tasks import TASKS
from stepladder.data.tokenizers import BOS, EOS, ByteTokenizer
from stepladder.eval import exact, transfer
from stepladder.eval.likelihood import measure
from stepladder.eval.suite import check, evaluate, tables
from stepladder.eval.transfer import asked, demonstrations, positions, prompts, trained_rows
from stepladder.report import suites as page
from stepladder.report.evidence import RunFiles

COPY = {"kind": "task", "task": {"kind": "copy", "train": [4, 12], "iid": [8], "ood": [20]}}


def _pairs(folder, name, groups, sizes):
    path = folder / name
    rows = [
        {"question": f"{group}:{size}.{i}=", "answer": str(i % 7), "group": group, "size": size}
        for group in groups
        for size in sizes
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    train = _pairs(tmp_path, "train.jsonl", ["a", "b"], [3, 4])
    held = _pairs(tmp_path, "held.jsonl", ["a", "b", "c"], [5])
    return {"kind": "pairs", "path": train, "valid": [held], "group": "{group}", "size": "{size}"}


def _asked(loaded):
    return asked(loaded.run, loaded.run.eval)


def test_few_demonstrations_are_the_first_of_more_and_all_are_trained_on(make, pairs):
    one, two = (
        _asked(make(eval={"samples": samples, "transfer": [COPY, pairs], "shots": shots}))
        for samples, shots in ((6, [1, 4]), (9, [2]))
    )
    assert [each.sheet.name for each in one] == ["copy", "train/a", "train/b", "train/c"]
    for more, fewer in zip(one, two, strict=True):
        by_item = {
            (s, i): shown for s, i, shown in zip(fewer.sheet.examples.size, fewer.sheet.index, fewer.shown, strict=True)
        }
        for size, index, shown in zip(more.sheet.examples.size, more.sheet.index, more.shown, strict=True):
            assert shown[:2] == by_item[size, index]  # whatever else is asked
    task = make(eval={"transfer": [COPY]}).run.eval.transfer[0].task
    for shown in one[0].shown:
        assert len(shown) == 4
        assert all(task.verify(question, answer) for question, answer in shown)
        assert all(4 <= len(answer) <= 12 for _, answer in shown)
    assert len({str(shown) for shown in one[0].shown}) == len(one[0].shown)
    for shown in one[1].shown:
        assert len(set(shown)) == 4
        assert all(question.startswith(("a:3", "a:4")) for question, _ in shown)
    assert one[3].most == 0  # nothing of group c is for training


def test_a_task_whose_splits_leak_is_caught(make, monkeypatch):
    loaded = make(eval={"transfer": [{"kind": "task", "task": {"kind": "copy", "train": [4, 4], "ood": []}}]})
    monkeypatch.setattr(TASKS.get("copy"), "admits", lambda self, split, examples: np.ones(len(examples), bool))
    config = loaded.run.eval.model_copy(update={"samples": 400, "shots": (4,)})
    with pytest.raises(RuntimeError, match=r"copy: .* demonstrations are test questions"):
        asked(loaded.run, config)


def test_pairs_that_leak_are_not_shown_and_would_be_caught(make, pairs, tmp_path, monkeypatch):
    rows = (tmp_path / "held.jsonl").read_text()
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(rows.replace("a:5", " A:5"))  # the same questions, but for case and white space
    loaded = make(eval={"transfer": [pairs], "shots": [40]})
    source = loaded.run.eval.transfer[0]
    first = _asked(loaded)[0]
    assert {len(shown) for shown in first.shown} == {40}  # of the group's 60 in the file
    monkeypatch.setattr(source.pairs, "held", [])
    trained_rows.cache_clear()
    with pytest.raises(RuntimeError, match=r"train/a: .* demonstrations are test questions"):
        demonstrations(source, first.sheet, 60, 0)
    assert Pairs is type(source.pairs)


def test_the_prompt_is_one_document_of_whole_examples():
    found = prompts(ByteTokenizer(), [[("1+1=", "2"), ("2+2=", "4")], [("ab=", "ba"), ("c=", "c")]], 1)
    text = ByteTokenizer().encode
    assert found[0].tolist() == [BOS, *text("1+1=").tolist(), *text("2").tolist(), EOS]
    assert found[1].tolist() == [BOS, *text("ab=").tolist(), *text("ba").tolist(), EOS]
    assert [len(ids) for ids in prompts(ByteTokenizer(), [[("a=", "a")]] * 2, 0)] == [0, 0]


def test_without_demonstrations_it_is_the_algorithmic_suite_on_other_tasks(make):
    loaded = make([COPY], eval={"samples": 8})
    (own,) = evaluate(loaded, ["algorithmic"], quiet=True)
    other = make(eval={"samples": 8, "transfer": [COPY], "shots": [0, 2]})
    (found,) = evaluate(other, ["transfer"], quiet=True)
    zero = [cell for cell in found["cells"] if cell["shots"] == 0]
    extra = {"shots", "longest_prompt", "beyond_trained"}
    assert [{k: v for k, v in cell.items() if k not in extra} for cell in zero] == own["cells"]
    assert found["by"] == "shots"
    assert found["records"] == len(read_lines(other.path.parent.parent / "records" / "transfer.jsonl")) == 8 * 2 * 2
    assert found["meta"]["transfer"] == [source.model_dump(mode="json") for source in other.run.eval.transfer]
    assert "of 32 prompts are longer than the 32 tokens of a training row" in found["note"]
    assert tables([found])[0].row_count == 2


def test_the_model_sees_the_demonstrations(make, monkeypatch):
    seen = []

    def generate(model, asked_for, **options):
        seen.extend(asked_for)
        return real(model, asked_for, **options)

    real = exact.generate
    monkeypatch.setattr(exact, "generate", generate)
    loaded = make(eval={"samples": 3, "transfer": [COPY], "shots": [2]})
    evaluate(loaded, ["transfer"], quiet=True)
    (one,) = _asked(loaded)
    questions = one.sheet.examples.questions()
    for ids, shown, question in zip(seen, one.shown, questions, strict=True):
        parts = loaded.tokenizer.decode(ids)
        assert parts == "".join(q + a for q, a in shown) + question
        assert (ids == BOS).sum() == 3
        assert (ids == EOS).sum() == 2


def test_texts_are_scored_as_the_likelihood_suite_does(make, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n\n" * 30)
    text = {"kind": "text", "path": str(tmp_path / "a.txt"), "valid": str(tmp_path / "a.txt")}
    (own,) = evaluate(make([text]), ["likelihood"], quiet=True)
    (found,) = evaluate(make(eval={"transfer": [text]}), ["transfer"], quiet=True)
    assert found["likelihood"] == own["likelihood"]
    assert found["cells"] == []
    assert "a: " in tables([found])[0].caption
    assert measure(make().model, {}, 9) == ([], [], [])


def test_what_does_not_fit_has_a_status_and_no_score(make, pairs):
    loaded = make(
        model="nano_absolute",
        fields={"max_positions": 40},
        eval={"samples": 4, "transfer": [COPY, pairs], "shots": [0, 1, 4]},
    )
    assert positions(loaded.model) == 40
    (found,) = evaluate(loaded, ["transfer"], quiet=True)
    states = {(c["task"], c["size"], c["shots"]): c.get("status", "scored") for c in found["cells"]}
    assert states["copy", 8, 0] == "scored"
    assert states["copy", 20, 0].startswith("too long: ")
    assert states["copy", 20, 0].endswith(" tokens, 40 learned positions")
    assert states["train/c", 5, 0] == "scored"
    assert states["train/c", 5, 1] == "only 0 training examples to show"
    assert all((c["accuracy"] is None) == ("status" in c) for c in found["cells"])
    assert found["records"] == 4 * sum(state == "scored" for state in states.values())
    assert "–" in str(list(tables([found])[0].columns[3].cells))


def test_the_page_shows_it_by_shots(make):
    loaded = make(eval={"samples": 4, "transfer": [COPY], "shots": [0, 1]})
    (found,) = evaluate(loaded, ["transfer"], quiet=True)

    class Evidence:
        def __init__(self):
            self.rungs = ("one",)
            self.runs = {("one", 0): RunFiles("one", 0, "x", "complete", suites={"transfer": found})}

        def of(self, rung):
            return list(self.runs.values())

    (entry,) = page.tables(Evidence())
    assert (entry["by"], entry["values"], entry["notes"]) == ("shots", [0, 1], [found["note"]])
    assert [cell["of"] for cell in entry["rungs"]["one"]] == [2, 2]


REFUSED = [
    ({"kind": "task", "task": "parity"}, "the run is trained on 'parity'"),
    ({"kind": "pairs", "path": "absent.jsonl"}, "absent.jsonl"),
    ({"kind": "text", "path": "absent.txt"}, "absent.txt"),
]


@pytest.mark.parametrize(("source", "says"), REFUSED)
def test_mistakes_are_told_before_anything_is_trained_or_cleared(make, source, says):
    loaded = make(eval={"samples": 4, "suites": ["transfer"], "transfer": [source]})
    with pytest.raises(UserError, match=says):
        check(loaded.run)
    with pytest.raises(UserError, match=says):
        evaluate(loaded, ["transfer"], quiet=True)
    assert not (loaded.path.parent.parent / "results_transfer.json").exists()


def test_nothing_scored_is_no_result(make, monkeypatch):
    loaded = make(eval={"transfer": [COPY]})
    monkeypatch.setattr(transfer, "asked", lambda run, config: [])
    with pytest.raises(UserError, match="transfer scored nothing"):
        evaluate(loaded, ["transfer"], quiet=True)
    assert read_json(loaded.path.parent.parent / "results_transfer.json")["status"] == "interrupted"
    (found,) = evaluate(make(), ["transfer"], quiet=True)
    assert found["message"] == "nothing to evaluate: eval.transfer names no source"
