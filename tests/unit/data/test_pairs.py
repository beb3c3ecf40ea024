"""Pairs from files: read by templates, held out, packed once a pass, asked by group and size."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepladder.core.config import validate
from stepladder.core.errors import UserError
from stepladder.core.keys import key, permute
from stepladder.data.compgen import generate
from stepladder.data.pairrows import packed
from stepladder.data.pairs import Pairs, Templates
from stepladder.data.stream import DataConfig, Stream
from stepladder.data.tokenizers import BOS, EOS, IGNORE, PAD, ByteTokenizer
from stepladder.eval.exact import tasks as asked_of
from stepladder.eval.suite import restricted
from stepladder.run import Run

BYTE = ByteTokenizer()
PLAIN = Templates("{question}", "{answer}")
CLRS = Templates("{question}", "{answer}", "{algo_name}", "{length}")
SHARED = Path(__file__).parents[4] / "shared" / "data" / "reasoning"


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def sums(numbers: range, **more: Any) -> list[dict[str, Any]]:
    return [
        {"question": f"{n}+{n}=", "answer": f"{2 * n}\n\n", "algo_name": "double", "length": len(str(n))} | more
        for n in numbers
    ]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    train = sums(range(5, 200)) + sums(range(300, 350), algo_name="again")
    held = sums(range(195, 230)) + sums(range(1000, 1010)) + sums(range(5), algo_name="new")
    return lines(tmp_path / "train.jsonl", train), lines(tmp_path / "held.jsonl.gz", held)


def source(path: str, *valid: str, **more: Any) -> dict[str, Any]:
    own = {"group": "{algo_name}", "size": "{length}"}
    return {"kind": "pairs", "path": path, **({"valid": list(valid)} if valid else {}), **own, **more}


def config(*sources: dict[str, Any], **more: Any) -> DataConfig:
    return validate(DataConfig, {"sources": list(sources), "sequence": 64, **more}, "test.yaml")


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{a}", "x"),
        ("<{a}> {n} {f}", "<x> 7 0.5"),
        ("{m[k]}{{{l[1]}}}", "v{w}"),
        ("{n:03d} {a!r} {f:.{n}f}", "007 'x' 0.5000000"),
    ],
)
def test_templates_are_those_of_python(tmp_path, template, filled):
    path = lines(tmp_path / "a.jsonl", [{"a": "x", "n": 7, "f": 0.5, "m": {"k": "v"}, "l": ["u", "w"]}])
    (pair,) = Pairs(path, [path], Templates(template, "{a}")).train
    assert pair.question == filled


def test_templates_say_what_is_what(tmp_path):
    row = {"task": "gcd", "x": "a=4; b=2", "y": " gcd=2 \n", "meta": {"n": 1, "i": 7}, "none": None, "flag": True}
    path = lines(tmp_path / "a.jsonl", [row])
    pairs = Pairs(path, [path], Templates("task={task}\n{x}\n", "{y}", "{task}", "{meta[n]}"))
    assert list(pairs.train) == [("task=gcd\na=4; b=2\n", "gcd=2", "gcd", 1, f"'{path}', line 1")]
    for template, says in (
        ("{question}", "line 1: '{question}' asks for 'question', the line has task, x, y, meta, none, flag"),
        ("{meta}", "neither a text nor a number"),
        ("{none}", "None is neither"),
        ("{flag}", "True is neither"),
        ("{x.upper}", "neither a text nor a number"),
        ("{meta[a]}", "asks for 'a'"),
    ):
        with pytest.raises(UserError) as caught:
            Pairs(path, [path], Templates(template, "{y}"))
        assert says in str(caught.value)
    with pytest.raises(UserError, match=r"line 1: the size 'gcd' is no whole number"):
        Pairs(path, [path], Templates("{x}", "{y}", None, "{task}"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no pair"),
        ('{"question": "a", "answer": "b"}\n', "too few pairs to hold some out"),
        ('{"question": "a", "answer": " \\n"}\n', "line 1: the answer is empty"),
        ('{"question": "", "answer": "b"}\n', "line 1: the question is empty"),
        ('\n{"question": "a", "answer"\n', "line 2: not JSON"),
        ("[1]\n", "the line has no fields"),
    ],
)
def test_a_flawed_file_is_refused_by_name_and_line(tmp_path, content, says):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl") as caught:
        Pairs(str(tmp_path / "a.jsonl"), [], PLAIN)
    assert says in str(caught.value)


def test_a_missing_file_and_another_ending_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.jsonl' cannot be read"):
        Pairs(str(tmp_path / "nowhere.jsonl"), [], PLAIN)
    with pytest.raises(UserError, match=r"must end in .jsonl"):
        Pairs("a.txt", [], PLAIN)


def test_without_a_file_of_their_own_some_questions_are_held_out_copies_and_all(tmp_path):
    rows = sums(range(400))
    spaced = [{**row, "question": row["question"].replace("+", " + ").upper() + " "} for row in rows]
    pairs = Pairs(lines(tmp_path / "a.jsonl", rows + spaced + rows), [], CLRS)
    (counts,) = pairs.overlap().values()
    assert counts["questions"] == pytest.approx(2 * 400 / 16, abs=20)
    assert (counts["exact"], counts["normalised"]) == (0, 0)
    assert len(pairs.train) + 3 * counts["questions"] / 2 == pytest.approx(1200, abs=60)


def test_overlap_is_measured_by_group(files):
    assert Pairs(files[0], [files[1]], CLRS).overlap() == {
        "double": {"questions": 45, "exact": 5, "normalised": 5},
        "new": {"questions": 5, "exact": 0, "normalised": 0},
    }


def test_normalised_overlap_sees_case_and_space(tmp_path):
    train = lines(tmp_path / "a.jsonl", [{"question": "What is  it?", "answer": "1"}])
    held = lines(tmp_path / "b.jsonl", [{"question": "what is it?\n", "answer": "1"}])
    assert Pairs(train, [held], PLAIN).overlap()[""] == {"questions": 1, "exact": 0, "normalised": 1}


def test_sizes_up_to_the_longest_trained_on_are_iid_and_groups_not_trained_on_are_ood(files):
    quizzes = Pairs(files[0], [files[1]], CLRS).quizzes
    assert (quizzes["double"].iid, quizzes["double"].ood) == ((3,), (4,))
    assert (quizzes["new"].iid, quizzes["new"].ood) == ((), (1,))
    plain = Pairs(files[0], [files[1]], PLAIN).quizzes
    assert list(plain) == [""]
    assert (plain[""].iid, plain[""].ood) == ((0,), ())


def test_questions_are_asked_once_and_may_not_contradict_each_other(tmp_path):
    rows = sums(range(10))
    path = lines(tmp_path / "a.jsonl", rows)
    assert len(Pairs(path, [lines(tmp_path / "b.jsonl", rows + rows)], PLAIN).held) == 10
    rows.append({**rows[3], "answer": "7"})
    with pytest.raises(UserError, match=r"b.jsonl', line 11: the question of '.*b.jsonl', line 4 has another answer"):
        Pairs(path, [lines(tmp_path / "b.jsonl", rows)], PLAIN)


def test_items_are_all_pairs_or_a_choice_of_the_seed(files):
    quiz = Pairs(files[0], [files[1]], CLRS).quizzes["double"]
    examples, index = quiz.items(0, 100)
    assert examples.size.tolist() == [3] * 35 + [4] * 10
    assert index.tolist() == [*range(35), *range(10)]
    held = Pairs(files[0], [files[1]], CLRS).held
    assert sorted(examples.questions()) == sorted(pair.question for pair in held if pair.group == "double")
    some = quiz.items(0, 7)[0]
    assert some.questions() == quiz.items(0, 7)[0].questions() == examples.questions()[:7] + examples.questions()[35:42]
    assert some.questions() != quiz.items(1, 7)[0].questions()
    assert all(quiz.verify(q, a) and quiz.solve(q) == a for q, a in zip(some.questions(), some.answers(), strict=True))
    assert not quiz.verify(some.questions()[0], some.answers()[0] + " ")
    assert set(quiz.glance(0, 5).size.tolist()) == {3}
    assert len(quiz.glance(0, 500)) == 35


def test_the_result_behind_the_steps_has_a_mark_of_its_own(tmp_path):
    rows = [{"question": f"{n}?", "answer": f"[{n}], [{n + 1}] | {n}\n\n"} for n in range(40)]
    path = lines(tmp_path / "a.jsonl", rows)
    quiz = Pairs(path, [path], PLAIN._replace(final=" | ")).quizzes[""]
    assert quiz.marks("3?", "[3], [4] | 3") == quiz.marks("3?", "[9] | 3") == quiz.marks("3?", "3") == {"final": 1.0}
    assert quiz.marks("3?", "[3], [4] | 4") == quiz.marks("3?", "[3], [4]") == quiz.marks("3?", "") == {"final": 0.0}
    assert quiz.verify("3?", "[3], [4] | 3")
    assert not quiz.verify("3?", "[9] | 3")
    assert Pairs(path, [path], PLAIN).quizzes[""].marks("3?", "3") == {}


def test_texts_beyond_ascii_survive(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"question": f"naïve {n} ☃?", "answer": f"é{n} 😀"} for n in range(40)])
    quiz = Pairs(path, [], PLAIN).quizzes[""]
    examples, _ = quiz.items(0, 50)
    assert all(q.startswith("naïve ") and a.endswith(" 😀") for q, a in zip(examples.questions(), examples.answers()))
    assert [quiz.solve(q) for q in examples.questions()] == examples.answers()
    for tokenizer in ("byte", "char", "alphabet", {"kind": "bpe", "vocab": 280}):
        stream = Stream(config(source(path, group=None, size=None), tokenizer=tokenizer), 0, tmp_path / "cache")
        texts = stream.tokenizer.encode_all(examples.questions())
        assert [stream.tokenizer.decode(ids) for ids in texts] == examples.questions()


@pytest.mark.parametrize("length", [17, 40, 64, 1000])
def test_rows_hold_every_pair_once_and_answers_are_scored(files, length, tmp_path):
    pairs = Pairs(files[0], [files[1]], CLRS)
    made = packed(pairs, BYTE, length, key(0), tmp_path)
    tokens, targets, documents = made.rows(np.arange(made.windows))
    seen = []
    for row in range(made.windows):
        used = tokens[row] != PAD
        begins = np.flatnonzero(tokens[row] == BOS)
        assert documents[row, begins].tolist() == list(range(len(begins)))
        assert (documents[row, ~used] == len(begins)).all()
        assert used[: used.sum()].all()
        for document in range(len(begins)):
            ids = tokens[row, documents[row] == document]
            asked = targets[row, documents[row] == document]
            assert (ids[0], ids[-1], asked[-1]) == (BOS, EOS, IGNORE)
            text, answer = BYTE.decode(ids), BYTE.decode(asked[asked != IGNORE])
            assert asked[asked != IGNORE][-1] == EOS
            assert (ids[1:] == asked[:-1])[asked[:-1] != IGNORE].all()
            seen.append((text.removesuffix(answer), answer))
    assert Counter(seen) == Counter((pair.question, pair.answer) for pair in pairs.train)
    assert tokens.dtype == targets.dtype == documents.dtype == np.int64
    assert targets.min() == IGNORE


@pytest.mark.parametrize("chunk", [7, 1 << 18])
def test_a_row_ends_where_the_next_pair_does_not_fit(files, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("stepladder.data.pairrows._CHUNK", chunk)
    pairs = Pairs(files[0], [files[1]], CLRS)
    made = packed(pairs, BYTE, 40, key(0), tmp_path)
    order = permute(key(0), len(pairs.train), np.arange(len(pairs.train)))
    texts = [pair.question + pair.answer for pair in pairs.train]
    wanted: list[list[int]] = [[]]
    for place in order.tolist():
        if sum(len(texts[one]) + 2 for one in (*wanted[-1], place)) > 40:
            wanted.append([])
        wanted[-1].append(place)
    assert np.diff(made.first).tolist() == [len(row) for row in wanted]
    tokens = made.rows(np.arange(made.windows))[0]
    assert [BYTE.decode(row) for row in tokens] == ["".join(texts[one] for one in row) for row in wanted]
    backwards = made.rows(np.arange(made.windows)[::-1])
    assert all((a == b[::-1]).all() for a, b in zip(made.rows(np.arange(made.windows)), backwards))
    assert (tokens[:3] != packed(pairs, BYTE, 40, key(1), tmp_path).rows(np.arange(3))[0]).any()


class TestOnDisk:
    def test_tokens_are_made_once_and_damage_is_found(self, files, tmp_path, monkeypatch):
        pairs = Pairs(files[0], [files[1]], CLRS)
        before = packed(pairs, BYTE, 64, key(0), tmp_path).rows(np.arange(3))
        (folder,) = tmp_path.glob("pairs-*")
        with monkeypatch.context() as patch:
            patch.setattr("stepladder.data.pairrows._build", None)
            again = packed(pairs, BYTE, 64, key(0), tmp_path).rows(np.arange(3))
            packed(pairs, BYTE, 999, key(5), tmp_path)
        assert all((a == b).all() for a, b in zip(before, again))
        assert isinstance(packed(pairs, BYTE, 64, key(0), tmp_path).tokens.base, np.memmap)
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2] + b"xx")
        with pytest.raises(UserError, match=r"damaged cache: .*delete the folder"):
            packed(pairs, BYTE, 64, key(0), tmp_path)

    def test_other_pairs_have_other_tokens(self, files, tmp_path):
        for given in ([files[1]], []):
            packed(Pairs(files[0], given, CLRS), BYTE, 64, key(0), tmp_path)
        assert len(list(tmp_path.glob("pairs-*"))) == 2

    def test_no_text_is_kept(self, tmp_path):
        rows = [{"question": f"{n}?" + "x" * 8000, "answer": str(n)} for n in range(3000)]
        path = lines(tmp_path / "a.jsonl", rows)
        tracemalloc.start()
        pairs = Pairs(path, [], PLAIN)
        made = packed(pairs, BYTE, 9000, key(0), tmp_path)
        made.rows(np.arange(8))
        pairs.quizzes[""].items(0, 10)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert Path(path).stat().st_size > 24_000_000
        assert kept < 1_000_000
        assert peak < 20_000_000, peak  # a block of tokens while they are made
        assert len(pairs.train) + len(pairs.held) == 3000

    def test_pairs_are_read_from_the_middle_of_packed_files_too(self, tmp_path):
        rows = sums(range(300))
        plain = Path(lines(tmp_path / "plain.jsonl", rows))
        plain.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n\n", 50))
        (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        order = np.random.default_rng(0).permutation(250)
        found = []
        for path in (plain, tmp_path / "packed.jsonl.gz"):
            pairs = Pairs(str(path), [], CLRS)
            read = list(pairs.train)
            assert pairs.train.take(order) == [read[place] for place in order]
            numbered = {pair.question: pair.place for pair in read}
            assert numbered["40+40="].endswith("line 81")
            assert numbered["200+200="].endswith("line 251")
            found.append([pair[:4] for pair in read])
        assert found[0] == found[1]

    def test_a_file_that_changes_in_the_meantime_is_an_error(self, files):
        pairs = Pairs(files[0], [files[1]], CLRS)
        Path(files[0]).write_text(Path(files[0]).read_text()[5:])
        with pytest.raises(UserError, match=r"train.jsonl' was changed while it was in use"):
            list(pairs.train)


class TestChance:
    def quizzes(self, tmp_path: Path, train: list[tuple[Any, ...]], held: list[tuple[Any, ...]]) -> dict[str, Any]:
        files = []
        for name, rows in (("a", train), ("b", held)):
            given = [{"question": q, "answer": a, "algo_name": g, "length": n} for q, a, g, n in rows]
            files.append(lines(tmp_path / f"{name}.jsonl", given))
        return Pairs(files[0], [files[1]], CLRS).quizzes

    def test_answers_of_the_size_trained_on_are_what_a_guess_is_among(self, tmp_path):
        train = [(f"t{n}", str(n % 4), "g", 1) for n in range(40)] + [("u", "far", "g", 2), ("v", "off", "other", 1)]
        quiz = self.quizzes(tmp_path, train, [("h0", "0", "g", 1), ("h1", "3", "g", 1), ("h2", "3", "g", 1)])["g"]
        assert quiz.chance(1) == 1 / 4
        assert quiz.chance(1) == uniform({"0", "1", "2", "3"}, ["0", "3", "3"])

    def test_an_answer_that_nothing_else_has_cannot_be_guessed(self, tmp_path):
        train = [(f"t{n}", str(n % 4), "g", 1) for n in range(40)]
        quizzes = self.quizzes(tmp_path, train, [("h0", "0", "g", 1), ("h1", "new", "g", 1), ("n", "one", "alone", 1)])
        assert quizzes["g"].chance(1) == 1 / 2 / 5
        assert quizzes["alone"].chance(1) == 0  # it was 1

    def test_a_group_not_trained_on_is_guessed_from_its_other_questions(self, tmp_path):
        train = [(f"t{n}", str(n), "g", 1) for n in range(400)]
        yes = [(f"h{n}", "ny"[n % 2], "closed", n) for n in range(20)]
        free = [(f"f{n}", f"only {n}", "open", 1) for n in range(20)]
        quizzes = self.quizzes(tmp_path, train, yes + free)
        assert {quizzes["closed"].chance(size) for size in range(20)} == {1 / 2}
        assert quizzes["open"].chance(1) == 0  # it was 1/20

    def test_a_size_not_trained_on_is_guessed_from_all_sizes_of_the_group(self, tmp_path):
        train = [(f"t{n}", str(n % 10), "g", 1) for n in range(40)]
        quiz = self.quizzes(tmp_path, train, [("h0", "0", "g", 2), ("h1", "x", "g", 2), ("h2", "x", "g", 3)])["g"]
        assert (quiz.chance(2), quiz.chance(3)) == (1 / 11, 1 / 11)

    def test_it_is_never_above_one_in_the_answers_asked(self, files):
        for quiz in Pairs(files[0], [files[1]], CLRS).quizzes.values():
            examples, _ = quiz.items(0, 1000)
            for size in quiz.iid + quiz.ood:
                here = {a for a, n in zip(examples.answers(), examples.size.tolist()) if n == size}
                assert quiz.chance(size) <= 1 / len(here)


def uniform(known: set[str], answers: list[str]) -> float:
    """The accuracy of a uniform guess among what is known."""
    return sum(answer in known for answer in answers) / len(answers) / len(known)


def test_a_pair_longer_than_a_row_is_refused_by_its_line(tmp_path, files):
    long = lines(tmp_path / "long.jsonl", [*sums(range(30)), {"question": "x" * 50, "answer": "y" * 20}])
    with pytest.raises(
        UserError, match=r"long.jsonl', line 31: 72 tokens .* rows of 64; set data.sequence to at least 72"
    ):
        Stream(config(source(long, files[1], group=None, size=None)), 0, tmp_path)


class TestStream:
    def test_a_pass_shows_every_row_once_and_passes_differ(self, files, tmp_path):
        stream = Stream(config(source(*files)), 3, tmp_path)
        count = stream._rows[0].packed.windows
        passes = [
            [row.tobytes() for row in stream.batch(number, np.arange(count), count).tokens] for number in range(3)
        ]
        assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
        assert passes[0] != passes[1] != passes[2]
        again = Stream(config(source(*files)), 3, tmp_path).batch(1, np.arange(count)[::-1], count)
        assert [row.tobytes() for row in again.tokens][::-1] == passes[1]
        assert [
            r.tobytes() for r in Stream(config(source(*files)), 4, tmp_path).batch(0, np.arange(count), count).tokens
        ] != passes[0]

    def test_nothing_held_out_is_trained_on(self, files, tmp_path):
        held = {pair.question for pair in Pairs(files[0], [], CLRS).held}
        stream = Stream(config(source(files[0])), 0, tmp_path)
        text = "".join(BYTE.decode(row) for row in stream.batch(0, np.arange(64), 64).tokens)
        assert held
        assert not any(question in text for question in held if len(question) > 7)

    def test_beside_a_task_and_a_text(self, files, tmp_path):
        mixed = config(source(*files, weight=2), {"kind": "task", "task": "parity"}, {"kind": "text", "path": "pydoc"})
        stream = Stream(mixed, 0, tmp_path)
        batch = stream.batch(0, np.arange(200), 200)
        assert np.bincount(batch.source, minlength=3) / 200 == pytest.approx([0.5, 0.25, 0.25], abs=0.1)
        found = stream.overlap()
        assert found["train/double"] == {"questions": 45, "exact": 5, "normalised": 5}
        assert found["parity"]["exact"] == 0
        assert stream.describe(0)["sizes"] == {"parity": [4, 16]}

    def test_the_alphabet_is_that_of_the_pairs(self, files, tmp_path):
        stream = Stream(config(source(*files), tokenizer="alphabet"), 0, tmp_path)
        assert stream.tokenizer.vocab == 3 + len("0123456789+=")
        assert not (tmp_path / "cache").exists()

    def test_fingerprints_follow_content_and_templates_not_places(self, files, tmp_path):
        def fingerprint(*given: str, **more: Any) -> str:
            return Stream(config(source(*given, **more)), 0, tmp_path).fingerprint()

        (tmp_path / "moved").mkdir()
        moved = [str(tmp_path / "moved" / Path(file).name) for file in files]
        for here, there in zip(files, moved, strict=True):
            Path(there).write_bytes(Path(here).read_bytes())
        before = fingerprint(*files)
        assert fingerprint(*moved) == before
        Path(moved[0]).write_text(Path(moved[0]).read_text().replace("10", "11", 1))
        others = {fingerprint(*moved), fingerprint(files[0]), fingerprint(*files, answer="={answer}")}
        assert len({before, *others}) == 4

    @pytest.mark.parametrize(
        ("more", "match"),
        [
            ({"question": "what?"}, "question = 'what\\?': must name a field of the lines in braces"),
            ({"answer": "{}"}, "must name a field"),
            ({"group": "{algo_name"}, "group = '{algo_name'"),
            ({"valid": 3}, "valid"),
            ({"sise": "{length}"}, "did you mean 'size'"),
        ],
    )
    def test_mistakes_are_one_sentence(self, more, match):
        with pytest.raises(UserError, match=f"^test.yaml: .*{match}"):
            config(source("a.jsonl", **more))

    def test_one_held_out_file_may_be_given_as_a_text(self, files):
        assert config(source(files[0], valid=files[1])) == config(source(*files))


def test_exported_programs_are_pairs(tmp_path):
    generate({"tasks": ["gcd", "majority"], "dataset_size": 300, "max_n": 40, "ood_n": 60}, tmp_path / "made")
    made = [str(tmp_path / "made" / f"{name}.jsonl") for name in ("train", "test", "ood")]
    templates = {"question": "task={task}\n{x}\n", "answer": "{y}", "group": "{task}", "size": "{meta[n]}"}
    stream = Stream(config(source(made[0], *made[1:], **templates), sequence=512), 0, tmp_path)
    for name, quiz in stream.config.sources[0].asked("made"):
        low, high = {"made/gcd": (5, 6), "made/majority": (40, 41)}[name]
        assert max(quiz.iid) <= low < high <= min(quiz.ood)
    assert {name: (c["exact"], c["normalised"]) for name, c in stream.overlap().items()} == {
        "train/gcd": (0, 0),
        "train/majority": (0, 0),
    }


def test_published_texts_are_pairs(tmp_path):
    names = ("clrs_text_train", "clrs_text_valid", "clrs_text_eval_lengths")
    train, *valid = (SHARED / f"{name}.jsonl.gz" for name in names)
    if not train.is_file():
        pytest.skip(f"needs {train.name} in shared/data/reasoning beside the checkout")
    pairs = Pairs(str(train), [str(file) for file in valid], Templates("{question}", "{answer}", "{algo}", "{length}"))
    assert (len(pairs.train), len(pairs.held), len(pairs.quizzes)) == (6000, 1200, 30)
    assert all(counts["exact"] == counts["normalised"] == 0 for counts in pairs.overlap().values())
    assert (min(pairs.quizzes["bfs"].ood), max(pairs.quizzes["bfs"].iid)) == (32, 31)
    made = packed(pairs, BYTE, 8192, key(0), tmp_path)
    assert len(made.tokens) == sum(len(p.question) + len(p.answer) + 2 for p in pairs.train)
    assert len(made.tokens) > 0.8 * made.windows * 8192


def test_eval_tasks_restrict_pairs_too(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(f'{{"question": "{a}+{b}=", "answer": "{a + b}"}}\n' for a in range(20) for b in range(20)))
    sources = [{"kind": "task", "task": "copy"}, {"kind": "pairs", "path": str(path)}]
    run = Run.of({"model": {"kind": "transformer"}, "data": {"sources": sources}, "train": {"steps": 1}})
    names = {only: [name for name, _ in asked_of(restricted(run, only))] for only in ((), ("copy",), ("sums",))}
    assert names == {(): ["copy", "sums"], ("copy",): ["copy"], ("sums",): ["sums"]}
    with pytest.raises(UserError, match="did you mean 'sums'"):
        restricted(run, ("sum",))
