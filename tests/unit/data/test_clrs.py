"""CLRS-Text: right answers, pure texts, stand-ins that leave no trace, files without repeats."""

import gzip
import json
import re
import sys
import types
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from stepladder.core.errors import UserError
from stepladder.data import clrs
from stepladder.data.clrs import ALGORITHMS, EVAL_LENGTHS, TRAIN_LENGTHS, ClrsText, example, generate, told, total

SHARED = Path(__file__).parents[4] / "shared" / "data" / "reasoning"


def installed():
    try:
        return metadata.version("dm-clrs") == clrs.VERSION
    except metadata.PackageNotFoundError:
        return False


needs_package = pytest.mark.skipif(
    not installed(), reason=f"needs dm-clrs: pip install attrs, pip install --no-deps dm-clrs=={clrs.VERSION}"
)


def numbers(text):
    return [float(number) for number in re.findall(r"-?[\d.]+", text)]


def test_grids_are_those_of_the_paper():
    assert len(ALGORITHMS) == 30
    assert sum(map(len, TRAIN_LENGTHS.values())) == 215
    assert sum(map(len, EVAL_LENGTHS.values())) == 823
    assert TRAIN_LENGTHS["bfs"] == (4, 5, 10, 11, 12, 15, 19, 23, 28, 31)
    assert (EVAL_LENGTHS["bridges"], EVAL_LENGTHS["minimum"][-1]) == ((4, 5, 6, 7), 64)
    assert (TRAIN_LENGTHS["dfs"][-1], EVAL_LENGTHS["dfs"][-1]) == (23, 20)  # published so


def test_cells_are_the_grid_or_what_is_asked_for():
    assert len(ClrsText(algorithms=("all",)).cells()) == 215
    assert ClrsText(algorithms=("bridges",), lengths="eval").cells() == [("bridges", n) for n in (4, 5, 6, 7)]
    assert ClrsText(algorithms=("bfs", "bfs"), lengths=("7", 9, 7)).cells() == [("bfs", 7), ("bfs", 9)]
    assert total({"algorithms": ["bridges"], "per_cell": 3}) == 6


@needs_package
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_gives_texts_of_its_length(algorithm):
    question, answer = example(algorithm, 5, 0, 0)
    assert re.fullmatch(rf"{algorithm}:\n.+\n[\w, ]+:\n", question)
    assert re.fullmatch(r"[^|\n]+\n\n", answer)
    assert max(map(len, re.findall(r"[\d.]+", question + answer))) <= 5  # three decimals
    if algorithm != "segments_intersect":
        assert len(example(algorithm, 9, 0, 0)[0]) > len(question)
    if algorithm == "segments_intersect":
        return
    traced, steps = example(algorithm, 4, 0, 0, hints=True)
    assert re.search(r"initial_trace: .*\ntrace \| [\w, ()]+:\n$", traced)
    assert " | " in steps


@needs_package
@pytest.mark.parametrize("length", [4, 11, 31])
def test_answers_are_right(length):
    for index in range(20):
        for algorithm in ("insertion_sort", "heapsort", "bubble_sort", "quicksort"):
            question, answer = example(algorithm, length, 1, index)
            assert numbers(answer) == sorted(numbers(question.split("key: ")[1]))
        question, answer = example("minimum", length, 1, index)
        assert int(answer) == np.argmin(numbers(question.split("key: ")[1]))
        question, answer = example("binary_search", length, 1, index)
        key, target = (numbers(part) for part in question.split("key: ")[1].split("target: "))
        assert int(answer) == min(np.searchsorted(key, target[0]), length - 1)  # as the textbook's version has it
        question, answer = example("naive_string_matcher", length, 1, index)
        # "string" marks text (0) and pattern (1); "key" holds the letters of both.
        marks, letters = (part.split("]")[0].split() for part in re.split(r"\w+: \[", question)[1:3])
        both = ["".join(x for x, mark in zip(letters, marks, strict=True) if mark == m) for m in "01"]
        found = both[0].find(both[1])
        assert int(answer) == (found if found >= 0 else len(both[0]))


@needs_package
def test_a_text_is_a_function_of_seed_algorithm_length_and_index():
    texts = [example("bfs", 8, 0, 3), example("bfs", 8, 0, 4), example("bfs", 8, 1, 3), example("bfs", 9, 0, 3)]
    np.random.seed(5)
    assert example("bfs", 8, 0, 3) == texts[0]
    assert len({question for question, _ in texts}) == 4
    inputs = {example(name, 12, 0, 0)[0].split("key: ")[1].split("\n")[0] for name in ("insertion_sort", "heapsort")}
    assert len(inputs) == 2, "algorithms with like inputs must not be given the same ones"


@needs_package
def test_stand_ins_leave_no_trace_and_touch_nobody(monkeypatch):
    mine = {name: types.ModuleType(name) for name in ("jax", "jax.numpy", "tensorflow", "clrs", "clrs._src")}
    for name, module in mine.items():
        monkeypatch.setitem(sys.modules, name, module)
    before = dict(sys.modules)
    samplers, _ = clrs._package.__wrapped__()
    assert samplers.__name__ == "clrs._src.samplers"
    assert all(sys.modules[name] is module for name, module in mine.items())
    new = {name.split(".")[0] for name in sys.modules if name not in before}
    assert not new & {"jax", "chex", "tensorflow", "absl", "clrs"}


@needs_package
def test_the_import_that_fails_leaves_no_trace_either(monkeypatch):
    monkeypatch.setattr(clrs, "_stand_ins", dict)
    with pytest.raises(UserError, match=r"cannot import dm-clrs .*--no-deps dm-clrs==2.0.3"):
        clrs._package.__wrapped__()
    assert "clrs._src" not in sys.modules


@pytest.mark.parametrize(("found", "says"), [(None, "needs dm-clrs"), ("3.0", "and 3.0 is installed")])
def test_a_missing_or_other_package_is_one_sentence(monkeypatch, tmp_path, found, says):
    def version(name):
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(clrs.metadata, "version", version)
    monkeypatch.setattr(
        clrs.importlib.util, "find_spec", lambda _: types.SimpleNamespace(submodule_search_locations=[""])
    )
    monkeypatch.setattr(clrs, "_package", clrs._package.__wrapped__)
    with pytest.raises(UserError, match=f"{says}.*pip install --no-deps dm-clrs==2.0.3"):
        generate({"algorithms": ["bfs"]}, tmp_path / "a.jsonl")
    assert list(tmp_path.iterdir()) == []


def rows(path):
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


@needs_package
def test_files_have_all_cells_in_turn_and_no_question_twice(tmp_path):
    tree = {"algorithms": ["bridges", "minimum"], "lengths": [4, 6], "per_cell": 40, "seed": 3}
    seen = []
    made = generate(tree, tmp_path / "one.jsonl", advance=seen.append)
    found = rows(tmp_path / "one.jsonl")
    assert len(found) == made["rows"] == sum(seen) == 160
    assert all(set(row) == {"question", "answer", "algo_name", "length"} for row in found)
    assert Counter((row["algo_name"], row["length"]) for row in found) == made["by_cell"]
    assert len({row["question"] for row in found}) == len(found)
    assert made["repeated"] > 5  # of graphs on four nodes
    assert [(row["algo_name"], row["length"]) for row in found[:4]] == list(made["by_cell"])
    generate(tree, tmp_path / "two.jsonl.gz")
    generate(tree, tmp_path / "three.jsonl.gz")
    assert rows(tmp_path / "two.jsonl.gz") == found
    assert (tmp_path / "two.jsonl.gz").read_bytes() == (tmp_path / "three.jsonl.gz").read_bytes()
    alone = generate({**tree, "algorithms": ["minimum"]}, tmp_path / "alone.jsonl")
    assert alone["rows"] == 80
    assert rows(tmp_path / "alone.jsonl") == [row for row in found if row["algo_name"] == "minimum"]
    generate({**tree, "seed": 4}, tmp_path / "other.jsonl", exclude=[tmp_path / "one.jsonl", tmp_path / "two.jsonl.gz"])
    assert not {row["question"] for row in rows(tmp_path / "other.jsonl")} & {row["question"] for row in found}


@needs_package
def test_a_cell_that_runs_out_has_fewer_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(clrs, "_PATIENCE", 20)
    made = generate({"algorithms": ["bridges"], "lengths": [4], "per_cell": 500}, tmp_path / "few.jsonl")
    assert 20 < made["rows"] < 500
    assert f"fewer than 500: bridges at 4: {made['rows']}" in told(made, 500)


@needs_package
def test_long_texts_are_left_out_and_a_cell_of_nothing_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(clrs, "_PATIENCE", 20)
    tree = {"algorithms": ["bubble_sort"], "lengths": [6], "per_cell": 5, "hints": True}
    assert generate(tree, tmp_path / "all.jsonl")["too_long"] == 0
    sizes = sorted(len(row["question"] + row["answer"]) for row in rows(tmp_path / "all.jsonl"))
    made = generate({**tree, "max_chars": sizes[2]}, tmp_path / "some.jsonl")
    assert made["too_long"] > 0
    assert all(len(row["question"] + row["answer"]) <= sizes[2] for row in rows(tmp_path / "some.jsonl"))
    with pytest.raises(UserError, match=r"'bubble_sort' at length 6 has no text .* at most 64 characters"):
        generate({**tree, "max_chars": 64}, tmp_path / "none.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"all.jsonl", "some.jsonl"}


@needs_package
@pytest.mark.parametrize(
    ("tree", "out", "says"),
    [
        ({"algorithms": ["bfss"]}, "a.jsonl", "unknown algorithm 'bfss' — did you mean 'bfs'"),
        ({"algorithms": ["bfs"], "lengths": [3]}, "a.jsonl", "lengths from 4 to 256"),
        ({"algorithms": ["bfs"], "lengths": []}, "a.jsonl", "lengths from 4 to 256"),
        ({"algorithms": []}, "a.jsonl", "algorithms"),
        ({"algorithms": ["bfs"], "per_cell": 0}, "a.jsonl", "per_cell"),
        ({"algorithms": ["bfs"]}, "a.txt", "must end in .jsonl"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, tree, out, says):
    with pytest.raises(UserError) as caught:
        generate(tree, tmp_path / out)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@needs_package
def test_an_interruption_keeps_the_old_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("old")

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate({"algorithms": ["minimum"], "lengths": [4], "per_cell": 2}, tmp_path / "a.jsonl", advance=stop)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@needs_package
def test_texts_have_the_form_of_published_ones():
    file = SHARED / "clrs_text_valid.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"needs {file.name} in shared/data/reasoning beside the checkout")

    def form(question, answer):
        return re.sub(r"-?\d+(\.\d+)?", "N", question), re.sub(r"-?\d+(\.\d+)?", "N", answer)

    published = {(r["algo"], r["length"]): (r["question"], r["answer"]) for r in rows(file)}
    assert {name for name, _ in published} == set(ALGORITHMS)
    for (name, length), texts in published.items():
        if name in ("kmp_matcher", "naive_string_matcher", "segments_intersect") or length > 12:
            continue
        assert form(*example(name, length, 0, 0)) == form(*texts), name
