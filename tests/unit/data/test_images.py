"""The source of images: what a row holds, what is held out, and how many variants there are."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stepladder.core.config import validate
from stepladder.core.errors import UserError
from stepladder.data.image_files import Labelled
from stepladder.data.images import answer, gallery, multiplicity, questions
from stepladder.data.stream import DataConfig, Stream
from stepladder.data.tokenizers import BOS, EOS, IGNORE, PAD


@pytest.fixture
def folder(tmp_path, write_idx):
    return str(write_idx(tmp_path / "bars"))


@pytest.fixture
def stream(folder, tmp_path):
    """``stream(sequence=24, seed=0, more=(), **fields)``: a stream of little images with four slots each."""

    def make(sequence=24, seed=0, more=(), tokenizer="byte", **fields):
        shape = {} if "levels" in fields else {"slots": 4}
        source = {"kind": "images", "path": folder, "side": 8, **shape, **fields}
        tree = {"tokenizer": tokenizer, "sequence": sequence, "sources": [source, *more]}
        return Stream(validate(DataConfig, tree, "x"), seed, tmp_path / "cache")

    return make


def test_a_row_is_images_and_labels(stream):
    made = stream()
    batch, source = made.batch(3, np.arange(4), 4), made.config.sources[0]
    known = {image.tobytes(): label for image, label in zip(*vars(source.gallery.train).values(), strict=True)}
    assert batch.images.pixels.shape == (4, 3, 1, 8, 8)
    for row in range(4):
        for place in range(3):  # BOS, four slots, the label, EOS: three times, and padding
            here = slice(7 * place, 7 * place + 7)
            label = known[batch.images.pixels[row, place].tobytes()]
            told = made.tokenizer.encode(label)[0]
            assert batch.tokens[row, here].tolist() == [BOS, PAD, PAD, PAD, PAD, told, EOS]
            assert batch.images.slots[row, here].tolist() == [-1, *range(4 * place, 4 * place + 4), -1, -1]
            assert batch.targets[row, here].tolist() == [IGNORE] * 4 + [told, EOS, IGNORE]
            assert set(batch.documents[row, here]) == {place}
        assert set(batch.tokens[row, 21:]) == {PAD}
        assert set(batch.targets[row, 20:]) == {IGNORE}
        assert set(batch.images.slots[row, 21:]) == {-1}
        assert set(batch.documents[row, 21:]) == {3}


def test_rows_that_are_full_to_the_last_token(stream):
    batch = stream(sequence=14).batch(0, np.arange(2), 2)
    assert (batch.tokens[:, -1] == EOS).all()
    assert batch.documents.max() == 1
    targets = stream(sequence=13).batch(0, np.arange(2), 2).targets
    assert (targets != IGNORE).sum() == 4  # the second example does not fit whole, so it is not there


def test_batches_are_functions_of_step_and_row(stream):
    whole = stream(augment={}).batch(5, np.arange(6), 6)
    parts = [stream(augment={}).batch(5, rows, 6) for rows in (np.array([4, 1]), np.array([0]))]
    for rows, part in zip(([4, 1], [0]), parts, strict=True):
        assert np.array_equal(part.images.pixels, whole.images.pixels[rows])
        assert np.array_equal(part.tokens, whole.tokens[rows])
    assert not np.array_equal(stream(seed=1).batch(5, np.arange(6), 6).images.pixels, whole.images.pixels)


def test_a_pass_shows_every_variant_once(stream):
    made = stream(multiplicity=3, sequence=7)
    rows = made._rows[0]
    total = 3 * len(rows.source.gallery.train)
    assert sorted(rows.items(np.arange(total)).reshape(-1)) == list(range(total))
    assert sorted(rows.items(np.arange(total, 2 * total)).reshape(-1)) == list(range(total))
    assert made.images()["bars"]["multiplicity"] == 3


def test_variants_of_an_image_differ_and_each_is_always_the_same(stream):
    rows = stream(multiplicity=4, augment={"degrees": 40, "translate": 0.2})._rows[0]
    n = len(rows.source.gallery.train)
    shown = rows.pixels(0, np.array([7, 7 + n, 7 + 2 * n]))
    assert len({image.tobytes() for image in shown}) == 3
    assert np.array_equal(shown, rows.pixels(900, np.array([7, 7 + n, 7 + 2 * n])))


def test_test_images_are_never_changed(stream):
    source = stream(augment={"degrees": 90}).config.sources[0]
    asked = questions(source, stream().tokenizer, 0, 40)
    known = {image.tobytes() for image in source.gallery.test.pixels}
    assert len(asked) == 40
    assert all(question.pixels.tobytes() in known for question in asked)


@pytest.mark.parametrize(
    ("ratio", "params", "images", "tokens", "expected"),
    # 20 tokens for each of 2.13 M parameters: with 786 tokens an image MNIST has enough of them, with 51 it has not.
    [(20, 2_130_000, 60_000, 786, 1), (20, 2_130_000, 60_000, 51, 14), (0.1, 10, 60_000, 51, 1), (1e9, 10, 1, 1, 64)],
)
def test_multiplicity_is_the_formula(ratio, params, images, tokens, expected):
    assert multiplicity(ratio, params, images, tokens, 64) == expected


def test_multiplicity_is_worked_out_on_the_true_counts(stream):
    made = stream(ratio=2.0)
    images = len(made.config.sources[0].gallery.train)
    made.expand(images * 7 * 5 // 2 + 1)
    about = made.images()["bars"]
    assert about["tokens_per_example"] == 7
    assert about["multiplicity"] == 6
    assert about["tokens"] == 6 * 7 * images
    assert about["ratio"] >= about["ratio_asked"] == 2.0
    assert stream().images()["bars"]["multiplicity"] == 1


def test_pixels_as_tokens(stream):
    made = stream(sequence=70, levels=4, learn_pixels=True)
    batch = made.batch(0, np.arange(2), 2)
    assert batch.images is None
    pixels = made._rows[0].pixels(0, made._rows[0].items(np.arange(2)))
    wanted = 3 + 128 + pixels.reshape(2, -1).astype(int) * 4 // 256
    assert np.array_equal(batch.tokens[:, 1:65], wanted)
    assert np.array_equal(batch.targets[:, :64], wanted)
    assert (batch.targets[:, 64:66] != IGNORE).all()
    only_labels = stream(sequence=70, levels=4).batch(0, np.arange(2), 2)
    assert (only_labels.targets != IGNORE).sum() == 4
    assert stream(sequence=70, levels=4).images_per_row() == 0


def test_images_inside_text(stream):
    made = stream(sequence=64, question="add {image} and {image}: ", answer="{labels[0]}+{labels[1]}={sum}")
    batch = made.batch(0, np.arange(2), 2)
    text = made.tokenizer.decode(batch.tokens[0])
    assert text.startswith("add  and : ")
    train = made.config.sources[0].gallery.train
    known = {image.tobytes(): int(label) for image, label in zip(train.pixels, train.labels, strict=True)}
    one, two = (known[image.tobytes()] for image in batch.images.pixels[0, :2])
    assert f": {one}+{two}={one + two}" in text
    slots = batch.images.slots[0]
    assert slots[slots >= 0].tolist() == list(range(4 * batch.images.pixels.shape[1]))
    first = len("add ") + 1
    assert slots[first : first + 4].tolist() == [0, 1, 2, 3]
    asked = questions(made.config.sources[0], made.tokenizer, 0, 1000)
    assert len(asked) == 20  # 40 test images, each in one question
    assert len({index for question in asked for index in question.index}) == 40


def test_images_and_text_in_one_run(stream):
    made = stream(sequence=24, more=[{"kind": "task", "task": {"kind": "copy", "train": [2, 4]}}])
    batch = made.batch(0, np.arange(40), 40)
    shown = batch.source == 0
    assert 5 < shown.sum() < 35
    assert ((batch.images.slots >= 0).any(axis=1) == shown).all()
    assert not batch.images.pixels[~shown].any()


def test_parts_are_disjoint_and_the_overlap_is_measured(folder, stream, tmp_path, write_folders):
    found = gallery(folder, 8, 1)
    assert (len(found.test), len(found.train) + len(found.valid)) == (40, 96)
    whole = gallery(str(write_folders(tmp_path / "whole", ("",), 200)), 8, 1)
    parts = [{image.tobytes() for image in part.pixels} for part in (whole.train, whole.valid, whole.test)]
    assert sum(map(len, parts)) == 200
    assert not parts[0] & parts[2]
    assert stream().overlap()["bars"] == {"images": 40, "exact": 0}
    pixels = np.concatenate((found.train.pixels[:3], found.test.pixels[3:]))
    leaky = replace(found, test=Labelled(pixels, found.test.labels))
    assert leaky.overlap() == {"images": 40, "exact": 3}


def test_the_fingerprint_tells_images_apart(stream, folder):
    before = stream().fingerprint()
    assert before == stream().fingerprint()
    file = Path(folder) / "t10k-labels-idx1-ubyte.gz"
    data = bytearray(gzip.decompress(file.read_bytes()))
    data[-1] = (data[-1] + 1) % 4
    file.write_bytes(gzip.compress(bytes(data)))
    assert stream().fingerprint() != before


def test_mistakes_are_sentences(stream):
    with pytest.raises(UserError, match="an example of 'bars' has 7 tokens, 1 x 4 of them images"):
        stream(sequence=6)
    with pytest.raises(UserError, match="the run needs an encoder"):
        stream(slots=0)
    with pytest.raises(UserError, match="pixel tokens need the tokenizer 'byte'"):
        stream(levels=4, tokenizer="alphabet", sequence=80)
    with pytest.raises(UserError, match="have too few for valid: a question shows 12"):
        stream(question="{image}" * 12, answer="{label}", sequence=200)
    for fields, sentence in (
        ({"question": "what?"}, "must show an image"),
        ({"answer": "{labels[1]}"}, "must be made of"),
        ({"answer": "{name}"}, "must be made of"),
        ({"learn_pixels": True}, "set levels"),
        ({"multiplicity": 2, "ratio": 1.0}, "give one of them"),
    ):
        with pytest.raises(UserError, match=sentence):
            stream(**fields)
    with pytest.raises(ValueError, match="cannot be filled in for cat"):
        answer("{sum}", ["cat"])
