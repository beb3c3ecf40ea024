"""CompGen's files: the same bytes again, disjoint splits, no duplicates, and a verification that sees every flaw."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from stepladder.core.errors import UserError
from stepladder.core.files import read_json, write_json
from stepladder.data.base import Examples, codes
from stepladder.data.compgen import CompGen, count, generate, names, program, total, verify
from stepladder.data.programs import question_of, record
from stepladder.data.rowfiles import reader, sha256

SMALL = {
    "tasks": ["gcd", "majority", "sort_then_scan"],
    "dataset_size": 300,
    "min_n": 16,
    "max_n": 24,
    "ood_n": 40,
    "ood_value": 0,
}
STRANGE = {"tasks": ["dp_table_stripe", "gcd", "majority", "scan_reduce"], "dataset_size": 300, "split_frac": 0.8}
FILES = ["README.md", "meta.json", "ood.jsonl", "test.jsonl", "train.jsonl"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("compgen") / "small"
    generate(SMALL, out)
    return out


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    out = tmp_path_factory.mktemp("compgen") / "strange"
    generate(STRANGE, out)
    return out


@pytest.fixture
def copied(small, tmp_path):
    """A copy to damage."""
    out = tmp_path / "copied"
    out.mkdir()
    for name in FILES:
        (out / name).write_bytes((small / name).read_bytes())
    return out


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def rewritten(folder, name, change):
    """A file with changed lines, which meta.json then agrees with."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(line + "\n" for line in change(file.read_text().splitlines())))
    meta = read_json(folder / "meta.json")
    meta["splits"][name]["sha256"] = sha256(file)
    write_json(folder / "meta.json", meta)


def test_there_are_the_programs_of_the_source_and_more():
    assert {"scan_reduce", "prefix_sums", "sort_then_scan", "nested_loop_count", "dp_table_stripe"} < set(names())
    assert len(names()) >= 12
    assert "parity" not in names()


def test_files_counts_and_shape_of_a_row(small):
    assert sorted(path.name for path in small.iterdir()) == FILES
    meta = read_json(small / "meta.json")
    assert {name: split["examples"] for name, split in meta["splits"].items()} == {"train": 882, "test": 18, "ood": 18}
    assert sum(split["examples"] for split in meta["splits"].values()) == total(SMALL) == count(small)
    for name, split in meta["splits"].items():
        assert split["sha256"] == sha256(small / split["file"])
        found = rows(small, name)
        assert Counter(row["task"] for row in found) == dict.fromkeys(sorted(SMALL["tasks"]), split["of_each_task"])
        for row in found:
            assert set(row) == {"task", "complexity", "x", "y", "meta"}
            assert set(row["meta"]) == {"n", "i"}
            assert row["complexity"] == program(row["task"]).complexity
            low, high = split["sizes"][row["task"]]
            assert low <= row["meta"]["n"] <= high
    assert meta["splits"]["ood"]["sizes"]["majority"] == [25, 40]
    assert meta["licence"] == "apache-2.0"
    assert meta["config"]["seed"] == 1337


def test_a_row_is_the_example_of_its_number(small):
    for row in rows(small, "test"):
        task = program(row["task"])
        sizes = tuple(read_json(small / "meta.json")["splits"]["test"]["sizes"][row["task"]])
        example = task.batch(1337, "test", np.array([row["meta"]["i"]]), sizes)
        assert [*example.questions(), *example.answers()] == list(question_of(row["x"], row["y"]))
        assert example.size[0] == row["meta"]["n"]


def test_the_same_command_writes_the_same_bytes_in_any_process(strange, tmp_path):
    program = (
        "import sys,json; from stepladder.data.compgen import generate; generate(json.loads(sys.argv[1]), 'again')"
    )
    command = [sys.executable, "-c", program, json.dumps(STRANGE)]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "7"}, check=True)
    assert sorted(path.name for path in strange.iterdir()) == sorted([*FILES, "value_ood.jsonl", "alphabet_ood.jsonl"])
    for path in strange.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_other_tasks_beside_it_and_smaller_blocks_change_no_example(small, tmp_path, monkeypatch):
    monkeypatch.setattr("stepladder.data.compgen._BLOCK", 7)
    monkeypatch.setattr("stepladder.data.compgen._DRAW", 13)
    generate({**SMALL, "tasks": ["gcd"]}, tmp_path / "alone")
    for name in ("train", "test", "ood"):
        assert rows(tmp_path / "alone", name) == [row for row in rows(small, name) if row["task"] == "gcd"]


def test_the_seed_changes_the_examples(small, tmp_path):
    generate({**SMALL, "seed": 1}, tmp_path / "other")
    one, other = ({(r["task"], r["x"]) for r in rows(folder, "train")} for folder in (small, tmp_path / "other"))
    assert {row for row in one & other if row[0] != "gcd"} == set()  # small numbers come up again
    assert len(one & other) < 0.1 * len(one)


def test_no_question_twice_within_or_across_splits_and_across_seeds(small, tmp_path):
    generate({**SMALL, "seed": 1}, tmp_path / "other")
    found = [(row["task"], row["x"]) for name in ("train", "test", "ood") for row in rows(small, name)]
    assert len(set(found)) == len(found) == 918
    trained = {(row["task"], row["x"]) for row in rows(tmp_path / "other", "train")}
    assert not trained & {(row["task"], row["x"]) for row in rows(small, "test")}


def test_duplicates_would_be_common_and_are_left_out(tmp_path):
    few = {"tasks": ["substring_count"], "dataset_size": 3000, "min_n": 8, "max_n": 9, "ood_n": 0}
    generate(few, tmp_path / "few")
    found = rows(tmp_path / "few", "train")
    assert max(row["meta"]["i"] for row in found) > 1.3 * len(found)
    assert len({row["x"] for row in found}) == len(found)
    verify(tmp_path / "few")


def test_in_every_window_all_tasks_occur(small):
    kinds = [row["task"] for row in rows(small, "train")]
    assert all(len(set(kinds[start : start + 3])) == 3 for start in range(0, len(kinds), 3))
    orders = Counter(tuple(kinds[start : start + 3]) for start in range(0, len(kinds), 3))
    assert len(orders) == 6
    assert min(orders.values()) > 25  # 49 expected


def test_the_tasks_of_a_run_never_train_on_test_rows(small):
    task = program("gcd")
    for name, split in (("train", "train"), ("test", "test"), ("ood", "test")):
        mine = [row for row in rows(small, name) if row["task"] == "gcd"]
        pairs = [question_of(row["x"], row["y"]) for row in mine]
        examples = Examples(codes([q for q, _ in pairs]), codes([a for _, a in pairs]), np.zeros(len(pairs), int))
        assert task.admits(split, examples).all()


def test_splits_are_shares_of_the_examples():
    def counts(**given):
        splits = CompGen(tasks=("gcd",), **given).splits()
        return [splits[name][1] for name in splits]

    assert counts(dataset_size=1000) == [980, 20, 20]
    assert counts(dataset_size=1000, split_frac=0.5, ood_n=0) == [500, 500]
    assert counts(dataset_size=3) == [2, 1, 1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tasks": ["gdc"]}, "unknown task 'gdc' — did you mean 'gcd'"),
        ({"tasks": ["parity"]}, "'parity' is no program of CompGen"),
        ({"tasks": []}, "tasks"),
        ({"min_n": 30}, "min_n = 30 is above max_n = 24"),
        ({"ood_n": 24}, "ood_n = 24 must be above max_n = 24"),
        ({"split_frac": 1}, "split_frac"),
        ({"dataset_size": 1}, "dataset_size"),
        ({"fmt": "tsv"}, "'jsonl' or 'parquet'"),
        ({"tasks": ["majority"], "ood_value": 50}, "ood_value = 50 must be above the 50 of train"),
        ({"tasks": ["dp_table_stripe"], "ood_shift": 3}, "ood_shift = 3 must be at least 4, the letters of"),
        ({"ood_shift": 23}, "ood_shift"),
        ({"max_n": 200, "ood_n": 300}, "'gcd' has no digits between those of arrays of 200 and of 300 numbers"),
        ({"max_n": 2000, "ood_n": 3000}, "no size 2000"),
        ({"min_n": 8, "max_n": 8, "ood_n": 0}, "'gcd' has about 33 different train questions with 1 to 1 digits"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path, change, says):
    tasks = ["majority"] if change.get("max_n") == 2000 else ["gcd"]
    with pytest.raises(UserError) as caught:
        generate({**SMALL, "tasks": tasks, **change}, tmp_path / "out")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_dataset_is_left_alone_and_another_is_not_overwritten(copied):
    before = {name: (copied / name).stat().st_mtime_ns for name in FILES}
    assert generate(SMALL, copied) == read_json(copied / "meta.json")
    with pytest.raises(UserError, match="holds something else"):
        generate({**SMALL, "seed": 2}, copied)
    assert {name: (copied / name).stat().st_mtime_ns for name in FILES} == before
    (copied / "test.jsonl").write_text("")
    with pytest.raises(UserError, match=r"test.jsonl is not what was written"):
        generate(SMALL, copied)
    with pytest.raises(UserError, match="holds something else"):
        generate(SMALL, copied.parent)


@pytest.mark.parametrize("blow", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(tmp_path, blow):
    def stop(_):
        raise blow

    with pytest.raises(KeyboardInterrupt if blow is KeyboardInterrupt else UserError):
        generate(SMALL, tmp_path / "out", stop)
    assert list(tmp_path.iterdir()) == []


def test_the_card_tells_how_to_make_it_again(small):
    card = (small / "README.md").read_text()
    assert card.startswith("---\npretty_name: CompGen\nlicense: apache-2.0\n")
    assert "  - split: ood\n    path: ood.jsonl\n" in card
    assert "--tasks gcd,majority,sort_then_scan --dataset-size 300 --seed 1337 --min-n 16 --max-n 24" in card
    for name in ("train", "test", "ood"):
        assert sha256(small / f"{name}.jsonl") in card
    assert "| gcd | O(n) steps for n digits" in card


def test_a_sound_dataset_is_verified(small):
    seen = []
    assert verify(small, advance=seen.append) == {"train": 882, "test": 18, "ood": 18}
    assert sum(seen) == 918


def numbers(row):
    return [int(number) for number in row["x"].split("arr=")[1].split(",")]


def test_values_beyond_those_of_train_are_a_split_of_the_arrays(strange):
    found = rows(strange, "value_ood")
    assert Counter(row["task"] for row in found) == {"majority": 60, "scan_reduce": 60}
    assert all(50 < max(map(abs, numbers(row))) <= 500 for row in found)
    beyond = [sum(abs(number) > 50 for number in numbers(row)) / row["meta"]["n"] for row in found]
    assert np.mean(beyond) == pytest.approx(0.9, abs=0.05)
    assert {row["meta"]["n"] for row in found} <= set(range(8, 65))
    for name in ("train", "test", "ood"):
        assert all(max(map(abs, numbers(row))) <= 50 for row in rows(strange, name) if "arr=" in row["x"])


def test_other_letters_than_those_of_train_are_a_split_of_the_strings(strange):
    def letters(name):
        found = [row["x"] for row in rows(strange, name) if row["task"] == "dp_table_stripe"]
        return {letter for x in found for part in x.split("; ") for letter in part.split("=")[1]}

    assert Counter(row["task"] for row in rows(strange, "alphabet_ood")) == {"dp_table_stripe": 60}
    assert letters("alphabet_ood") == set("nopq")
    assert letters("train") == letters("test") == letters("ood") == set("abcd")
    assert {row["meta"]["n"] for row in rows(strange, "alphabet_ood")} <= set(range(8, 65))


def test_all_splits_are_disjoint_verified_and_on_the_card(strange):
    counts = {"train": 960, "test": 240, "ood": 240, "value_ood": 120, "alphabet_ood": 60}
    assert verify(strange) == counts
    assert total(STRANGE) == count(strange) == sum(counts.values())
    found = [(row["task"], row["x"]) for name in counts for row in rows(strange, name)]
    assert len(set(found)) == len(found)
    meta, card = read_json(strange / "meta.json"), (strange / "README.md").read_text()
    assert meta["splits"]["value_ood"]["inputs"] == dict.fromkeys(("majority", "scan_reduce"), "-500 to 500")
    assert meta["splits"]["alphabet_ood"]["inputs"] == {"dp_table_stripe": "n to q"}
    assert "--ood-value 500 --ood-shift 13" in card
    for name in ("value_ood", "alphabet_ood"):
        assert f"  - split: {name}\n    path: {name}.jsonl\n" in card
        assert f"- **{name}** has the sizes of train" in card
        assert sha256(strange / f"{name}.jsonl") in card
    assert "| 8 to 64 of n to q |" in card


def test_splits_that_no_task_has_or_that_are_not_wanted_are_left_out():
    def splits(**given):
        return list(CompGen(**given).splits())

    assert splits(tasks=("gcd",)) == ["train", "test", "ood"]
    assert splits(tasks=("gcd", "majority")) == ["train", "test", "ood", "value_ood"]
    assert splits(tasks=("all",), ood_n=0, ood_value=0) == ["train", "test", "alphabet_ood"]
    assert splits(tasks=("all",), ood_shift=0) == ["train", "test", "ood", "value_ood"]


@pytest.mark.parametrize(
    ("name", "task", "old", "new"),
    [
        ("test", "majority", r"arr=(-?\d+)", "arr=51"),
        ("value_ood", "majority", r"-?\d+", "7"),
        ("value_ood", "scan_reduce", r"arr=(-?\d+)", "arr=501"),
        ("test", "dp_table_stripe", r"s=.", "s=e"),
        ("alphabet_ood", "dp_table_stripe", r"s=.", "s=r"),
        ("alphabet_ood", "dp_table_stripe", r"(?<=[st]=)[n-q]+", "abc"),
    ],
)
def test_verification_finds_a_row_of_other_numbers_or_letters(strange, tmp_path, monkeypatch, name, task, old, new):
    # The hash must not be what finds it, so every hash is right here.
    monkeypatch.setattr(program(task).__class__, "admits", lambda self, split, drawn: np.ones(len(drawn), bool))
    out = tmp_path / "copied"
    shutil.copytree(strange, out)
    verify(out)

    def change(lines):
        place = next(i for i, line in enumerate(lines) if json.loads(line)["task"] == task)
        row = json.loads(lines[place])
        row["x"] = re.sub(old, new, row["x"])
        question = question_of(row["x"], row["y"])[0]
        row["y"] = record(question, program(task).solve(question))[1]
        return [*lines[:place], json.dumps(row), *lines[place + 1 :]]

    rewritten(out, name, change)
    with pytest.raises(UserError, match=f"does not belong to the {name} split"):
        verify(out)


def test_verification_finds_a_question_in_two_splits(strange, tmp_path, monkeypatch):
    monkeypatch.setattr(program("gcd").__class__, "admits", lambda self, split, drawn: np.ones(len(drawn), bool))
    out = tmp_path / "copied"
    shutil.copytree(strange, out)
    trained = next(line for line in (out / "train.jsonl").read_text().splitlines() if '"gcd"' in line)
    mine = next(line for line in (out / "test.jsonl").read_text().splitlines() if '"gcd"' in line)
    rewritten(out, "test", lambda lines: [trained if line == mine else line for line in lines])
    with pytest.raises(UserError, match="1 questions of 'gcd' occur more than once"):
        verify(out)


def wrong_answer(lines):
    row = json.loads(lines[5])
    row["y"] = row["y"] + "0"
    return [*lines[:5], json.dumps(row), *lines[6:]]


def twice(lines):
    first = json.loads(lines[0])["task"]
    place = next(i for i, line in enumerate(lines) if i and json.loads(line)["task"] == first)
    return [*lines[:place], lines[0], *lines[place + 1 :]]


def other_size(lines):
    row = json.loads(lines[3])
    row["meta"]["n"] = 99
    return [*lines[:3], json.dumps(row), *lines[4:]]


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        (wrong_answer, r"test.jsonl, row 6: the answer to '.*' is .*, not .*0"),
        (twice, "1 questions of '.*' occur more than once"),
        (other_size, r"test.jsonl, row 4: does not belong to the test split"),
        (lambda lines: lines[:-1], "other numbers of rows"),
        (lambda lines: [*lines[:-1], "{"], "not all rows are of CompGen"),
        (lambda lines: [*lines[:-1], '{"task": "gcd"}'], "not all rows are of CompGen"),
    ],
)
def test_verification_finds_a_planted_flaw(copied, flaw, says):
    rewritten(copied, "test", flaw)
    with pytest.raises(UserError, match=says):
        verify(copied)


def test_verification_finds_a_training_row_in_test(copied):
    row = next(line for line in (copied / "train.jsonl").read_text().splitlines() if '"gcd"' in line)
    mine = [line for line in (copied / "test.jsonl").read_text().splitlines() if '"gcd"' in line]
    rewritten(copied, "test", lambda lines: [row if line == mine[0] else line for line in lines])
    with pytest.raises(UserError, match="does not belong to the test split"):
        verify(copied)


def test_verification_finds_changed_and_missing_files(copied, tmp_path):
    (copied / "ood.jsonl").write_bytes((copied / "ood.jsonl").read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(UserError, match=r"ood.jsonl is not what was written"):
        verify(copied)
    with pytest.raises(UserError, match="no dataset of CompGen"):
        verify(tmp_path)


def test_only_some_answers_are_worked_out_when_asked(copied):
    rewritten(copied, "test", wrong_answer)
    verify(copied, every=1000)
    with pytest.raises(UserError, match="row 6"):
        verify(copied, every=5)


def test_parquet_holds_the_same_rows(small, tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'stepladder[hf]'")
    for again in ("one", "two"):
        generate({**SMALL, "fmt": "parquet"}, tmp_path / again)
        verify(tmp_path / again)
    for name in ("train", "test", "ood"):
        files = [small / f"{name}.jsonl", *(tmp_path / again / f"{name}.parquet" for again in ("one", "two"))]
        lines, table = ([row for _, block in reader(file) for row in block] for file in files[:2])
        assert lines == table
        assert files[1].read_bytes() == files[2].read_bytes()


def test_parquet_without_pyarrow_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'stepladder\[hf\]', or use --fmt jsonl"):
        generate({**SMALL, "fmt": "parquet"}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
