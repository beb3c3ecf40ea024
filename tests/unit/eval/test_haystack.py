"""Needles lie where they are said to lie, in held-out text that cannot answer for them; a flawed item is seen."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from stepladder.core.errors import UserError
from stepladder.core.keys import key
from stepladder.data.corpora import PYDOC, Corpus
from stepladder.data.shards import Shard, prepare
from stepladder.data.tasks.needle import FACTS, KEYS
from stepladder.data.tokenizers import BOS, EOS, BPETokenizer, ByteTokenizer, CharTokenizer
from stepladder.eval import haystack
from stepladder.eval.haystack import CHOICES, KINDS, STRAY, Documents, flaw, items, spellable
from stepladder.run import cache_folder

BYTES = ByteTokenizer()
BPE = BPETokenizer.train(
    ["the code of the word in every text, again and again. "] * 9 + ["amber river 123 pass key"], 300
)
DEPTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
PROSE = [f"Sentence {n} of a text. It goes on, and on! Does it end?\nIt does." * 3 for n in range(40)]


def documents(texts=PROSE, tokenizer=BYTES):
    rows = [np.concatenate(([BOS], tokenizer.encode(text), [EOS])) for text in texts]
    return Documents([Shard(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))], tokenizer)


def drawn(texts=PROSE, tokenizer=BYTES, length=512, seed=3, kinds=tuple(KINDS), indices=range(6)):
    source = documents(texts, tokenizer)
    pairs = itertools.product(kinds, indices)
    return [item for kind, index in pairs for item in items(source, seed, kind, length, DEPTHS, index)]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["byte", "bpe"])
@pytest.mark.parametrize("length", [256, 1000])
def test_items_are_what_they_are_said_to_be(tokenizer, length):
    for item in drawn(tokenizer=tokenizer, length=length):
        assert flaw(item, tokenizer) == ""
        assert len(item.prompt) + item.options.shape[1] + 1 == length, "BOS ... answer EOS"
        text = tokenizer.decode(item.prompt)
        needle = item.question + item.choices[0] + "."
        assert text.endswith(item.question)
        assert text.count(needle) == 1
        assert text.count(item.choices[0]) == 1
        assert tokenizer.decode(item.prompt[item.start :]).startswith(needle)
        assert [text.count(choice) for choice in item.choices[1:]] == [int(item.kind == "multi_key")] * (CHOICES - 1)
        assert [tokenizer.decode(row) for row in item.options] == list(item.choices)
        assert len(set(item.choices)) == CHOICES


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["byte", "bpe"])
def test_the_depth_is_that_of_the_needle_among_all_else(tokenizer):
    for item in drawn(tokenizer=tokenizer, length=700):
        fact = tokenizer.decode(item.prompt[item.start :]).partition(".")[0] + "."
        before = len(item.prompt[1 : item.start])
        after = len(item.prompt[item.start :]) - len(tokenizer.encode(fact)) - len(tokenizer.encode(item.question))
        assert abs(before / (before + after) - item.depth) <= 1 / STRAY + 1 / 500
        if item.depth in (0, 1):
            assert (before, after)[int(item.depth)] == 0


def test_needles_stand_between_sentences_where_there_are_some_and_between_words_anyway():
    ends = {"passkey": [], "word": [], "multi_key": []}
    for item in drawn(length=2000):
        if 0 < item.depth < 1:
            ends[item.kind].append(BYTES.decode(item.prompt[: item.start])[-1])
    assert all(set(found) <= set(".!?\n") for found in ends.values())
    (item,) = items(documents(["word " * 400]), 0, "passkey", 300, (0.5,), 0)
    assert BYTES.decode(item.prompt[item.start - 1 : item.start + 12]) == "d the passkey"
    (item,) = items(documents(["x" * 2000]), 0, "passkey", 300, (0.5,), 0)
    body = item.length - 2 - 5 - len(item.question)
    assert item.start - 1 == round(0.5 * (body - len(" the passkey=12345.")))


def test_a_curve_over_depths_compares_depths_alone():
    curve = items(documents(), 1, "multi_key", 600, DEPTHS, 2)
    assert len({(item.question, item.choices) for item in curve}) == 1
    assert len({item.prompt.tobytes() for item in curve}) == len(DEPTHS)
    assert len({tuple(np.sort(item.prompt)) for item in curve}) == 1, "the same tokens in another order"


def test_items_depend_on_seed_kind_length_and_index():
    first = drawn(indices=range(2))
    assert [item.prompt.tobytes() for item in first] == [item.prompt.tobytes() for item in drawn(indices=range(2))]
    seen = {}
    for seed, length in ((3, 512), (4, 512), (3, 513)):
        for item in drawn(seed=seed, length=length, indices=range(4)):
            if item.depth == 0.5:
                seen.setdefault((seed, length), []).append((item.question, item.choices))
    every = list(itertools.chain.from_iterable(seen.values()))
    assert len(set(every)) == len(every) == 36


def test_distractors_lie_on_both_sides_of_the_needle_and_are_never_cut():
    sides = {depth: [] for depth in DEPTHS}
    for item in drawn(length=700, kinds=("multi_key",), indices=range(30)):
        text, needle = BYTES.decode(item.prompt), BYTES.decode(item.prompt[: item.start])
        assert sum(text.count(f" the code of {name}=") for name in KEYS) == CHOICES + 1, "all whole, and the question"
        sides[item.depth].append(sum(choice in needle for choice in item.choices[1:]))
    means = [np.mean(sides[depth]) / (CHOICES - 1) for depth in DEPTHS]
    assert means[0] == 0
    assert means[-1] == 1
    assert means == pytest.approx(DEPTHS, abs=0.15)


def test_answers_that_the_text_has_by_accident_are_not_taken():
    for kind in KINDS:
        (plain,) = items(documents(["so and so. " * 60]), 5, kind, 400, (0.5,), 0)
        crowd = " ".join(plain.choices)
        (other,) = items(documents([f"{crowd}. " * 60]), 5, kind, 400, (0.5,), 0)
        assert not set(plain.choices) & set(other.choices)
        assert flaw(other, BYTES) == ""


def test_a_text_that_has_the_very_words_of_the_needle_is_refused_or_avoided():
    with pytest.raises(UserError, match="says 'the passkey=' itself"):
        items(documents(["Then the passkey=1. " * 60]), 5, "passkey", 400, (0.5,), 0)
    taken = [FACTS["word"].format(name) for name in KEYS[:-1]]
    (item,) = items(documents([f"{''.join(taken)} " * 3]), 5, "word", 4000, (0.5,), 0)
    assert item.question == FACTS["word"].format(KEYS[-1])
    assert flaw(item, BYTES) == ""


def test_too_short_a_length_has_no_items():
    assert items(documents(), 1, "multi_key", 190, DEPTHS, 0) is None
    assert len(items(documents(), 1, "multi_key", 256, DEPTHS, 0)) == len(DEPTHS)


def test_haystacks_are_held_out_documents_each_used_once_before_any_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path))
    rows = [json.dumps({"text": f"<{number}> " * 8}) for number in range(400)]
    (tmp_path / "numbered.jsonl").write_text("\n".join(rows))
    corpus = Corpus(str(tmp_path / "numbered.jsonl"))
    held_out = {text.split()[0] for text in corpus.documents("valid")}
    source = Documents([prepare(corpus, BYTES, cache_folder()).valid], BYTES)
    assert source.count == len(held_out) > 10
    numbers = BYTES.decode(source.haystack(key(1), source.tokens - 60)).split()[1:-1]
    assert set(numbers) <= held_out
    assert {number for number, _ in itertools.groupby(numbers)} == set(numbers)
    assert len(list(itertools.groupby(numbers))) == len(set(numbers)) >= len(held_out) - 2
    twice = BYTES.decode(source.haystack(key(1), 2 * source.tokens)).split()[1:-1]
    assert set(twice) == held_out
    assert len(list(itertools.groupby(twice))) > 1.5 * len(held_out)


def test_haystacks_begin_anywhere():
    begins = {documents().haystack(key(2, index), 300).tobytes() for index in range(30)}
    assert len(begins) > 20


def test_what_can_be_spelled():
    prose = "".join(sorted(set("".join(KEYS) + "".join(FACTS.values()) + "0123456789.") - set("{}")))
    assert spellable(BYTES)
    assert spellable(BPE)
    assert spellable(CharTokenizer("".join(sorted({*prose, *"abcdefghijklmnopqrstuvwxyz"}))))
    assert not spellable(CharTokenizer("01^=")), "it refuses the rest"
    assert not spellable(CharTokenizer("01^=", unknown=True)), "it says unknown"


def test_flaws_are_seen():
    (item,) = items(documents(), 3, "multi_key", 600, (0.25,), 0)
    assert flaw(item, BYTES) == ""
    fact = item.prompt[item.start : item.start + len(item.question) + 6]
    rest = np.delete(item.prompt, np.arange(item.start, item.start + len(fact)))

    def changed(prompt, **fields):
        return flaw(dataclasses.replace(item, prompt=prompt, **fields), BYTES)

    end = len(item.question)
    moved = np.concatenate((rest[:-end], fact, rest[-end:]))
    assert "at depth 1.000 instead of 0.25" in changed(moved)
    slightly = np.insert(rest, item.start + 60, fact)
    assert "instead of 0.25" in changed(slightly)
    assert "595 tokens instead of 600" in changed(item.prompt[:-5])
    truncated = np.concatenate((rest[:-end], rest[1 : 1 + len(fact)], rest[-end:]))
    assert "stands in the text 0 times" in changed(truncated)
    cut = item.prompt.copy()
    cut[item.start + len(fact) - 1] = BYTES.encode(" ")[0]
    assert "stands in the text 0 times" in changed(cut)
    doubled = item.prompt.copy()
    doubled[-end - len(fact) : -end] = fact
    assert "stands in the text 2 times" in changed(doubled)
    accident = item.prompt.copy()
    accident[-end - 5 : -end] = item.options[0]
    assert f"'{item.choices[0]}' occurs in the text 2 times instead of 1" in changed(accident)
    other = item.prompt.copy()
    other[-end - 5 : -end] = item.options[1]
    assert f"'{item.choices[1]}' occurs in the text 2 times instead of 1" in changed(other)
    asked = item.prompt.copy()
    asked[-end - end : -end] = item.prompt[-end:]
    assert "its question stands in the text more than once" in changed(asked)
    assert "does not end in its question" in changed(np.concatenate((item.prompt[:-2], item.prompt[-1:], [70])))
    special = item.prompt.copy()
    special[5] = EOS
    assert "a special token" in changed(special)


def test_pieces_encode_as_the_whole_text_does():
    """What the model sees around the needle is what it sees where the task ``needle`` is trained on."""
    for text in (" the code of amber=48213. the word of cedar=lubak. the passkey=",):
        parts = [" the code of amber=", "48213", ".", " the word of cedar=", "lubak", ".", " the passkey="]
        assert np.concatenate(BPE.encode_all(parts)).tolist() == BPE.encode(text).tolist()


def test_the_built_in_text_has_needles_at_every_default_length(tmp_path):
    source = Documents([prepare(Corpus(PYDOC), BYTES, tmp_path).valid], BYTES)
    for kind, length in itertools.product(KINDS, (256, 512, 1024, 2048, 4096)):
        for item in items(source, 1234, kind, length, DEPTHS, 0):
            assert flaw(item, BYTES) == ""
    assert haystack.ROOM < 256
