"""Images among text: ``[BOS] question answer [EOS]``, where the question shows one image or several.

An image is either slots, positions at which the model's encoder puts its embeddings (the token there is PAD), or
pixel tokens, the brightness of every pixel as a token of its own. Either way the answer comes behind it and is text:
the class of the image, or what a template makes of several. Held out are the images of the set's own test part, or
without one, those whose pixels hash into one bucket of eight.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from pydantic import field_validator, model_validator

from stepladder.core.config import Field, register
from stepladder.core.errors import UserError
from stepladder.core.keys import Key, key, permute
from stepladder.data.augment import Augment
from stepladder.data.image_files import Labelled, read
from stepladder.data.sources import SOURCES, Shown, Source, shuffled
from stepladder.data.tokenizers import BOS, EOS, IGNORE, PAD, SPECIALS, Tokenizer

IMAGE = "{image}"
PIXELS = 128
"""The first of the bytes that stand for pixels: those from here on are in no ASCII text."""
_COMBINATIONS = 4096  # of labels whose answers are all tried for the longest


@register(SOURCES, "images")
class ImageSource(Source):
    """Images with a class each, to be named; or several of them, to be told about."""

    serves: ClassVar[str] = "image"

    path: str = Field("digits", description="'digits' (of scikit-learn), a folder, or 'hub:OWNER/NAME'; see docs")
    question: str = Field(IMAGE, description="what comes before the answer; {image} is an image")
    answer: str = Field("{label}", description="template of the answer: {label}, {labels[1]}, {sum}")
    side: int = Field(28, ge=1, le=1024, description="rows and columns of an image [the encoder's]")
    channels: int = Field(1, ge=1, le=3, description="colour channels [the encoder's]")
    slots: int = Field(0, ge=0, description="positions of an image [the encoder's]")
    levels: int | None = Field(None, ge=2, le=128, description="show pixels as tokens, of so many levels")
    learn_pixels: bool = Field(False, description="with levels: predict the pixels, too")
    augment: Augment | None = Field(None, description="how training images are changed; default: not at all")
    multiplicity: int | None = Field(None, ge=1, description="variants of each image [1, or what ratio makes of it]")
    ratio: float = Field(0.0, ge=0, description="tokens of different images per parameter of the model, by variants")
    max_multiplicity: int = Field(64, ge=1, description="bound on what ratio makes")

    @property
    def label(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").replace("hub:", "").rpartition("/")[2] or "images"

    @property
    def shown(self) -> int:
        """Images of an example."""
        return self.question.count(IMAGE)

    @property
    def positions(self) -> int:
        """Positions that an image takes."""
        return self.slots if self.levels is None else self.channels * self.side**2

    @cached_property
    def gallery(self) -> Gallery:
        """The images, read once."""
        return gallery(self.path, self.side, self.channels)

    def alphabet(self) -> set[str]:
        """The characters of questions and answers."""
        texts = [self.question.replace(IMAGE, ""), *answers(self, self.gallery.classes)]
        return set().union(*texts)

    def overlap(self) -> dict[str, int]:
        """How many ``images`` there are to test on, and how many of them are in the training part, pixel by pixel."""
        return self.gallery.overlap()

    def content(self) -> str:
        """A digest of all images and labels."""
        return self.gallery.digest

    def open(self, name: str, seed: int, tokenizer: Tokenizer, length: int) -> ImageRows:
        """The training rows."""
        form = Form(self, tokenizer)
        for part in ("train", "valid", "test"):  # not only when they are asked for, at the end of a training
            if len(getattr(self.gallery, part)) < self.shown:
                raise UserError(
                    f"images '{self.path}' have too few for {part}: a question shows {self.shown}; add some"
                )
        longest = form.room(answers(self, self.gallery.classes))
        if longest > length:
            raise UserError(
                f"an example of '{name}' has {longest} tokens, {self.shown} x {self.positions} of them images, and "
                f"does not fit into rows of {length}; set data.sequence to at least {longest}"
            )
        return ImageRows(self, form, key(seed, "data", "images", name), length, length // longest)

    @field_validator("question")
    @classmethod
    def _shows(cls, question: str) -> str:
        if IMAGE not in question:
            raise ValueError("must show an image, as in '{image}' or 'What is this? {image} '")
        return question

    @model_validator(mode="after")
    def _possible(self) -> ImageSource:
        answer(self.answer, ["0"] * self.shown)
        if self.learn_pixels and self.levels is None:
            raise ValueError("learn_pixels is for pixel tokens; set levels, such as 16, or leave it out")
        if self.multiplicity is not None and self.ratio:
            raise ValueError("multiplicity and ratio both say how many variants there are; give one of them")
        return self


def answer(template: str, labels: Sequence[str]) -> str:
    """What is to be said of images with these labels; a flawed template is a ValueError."""
    fields: dict[str, Any] = {"label": labels[0], "labels": list(labels)}
    try:
        if "{sum" in template:
            fields["sum"] = sum(map(int, labels))
        return string.Formatter().vformat(template, (), fields)
    except (KeyError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"answer must be made of {{label}}, {{labels[0]}}, {{labels[1]}}, ... and {{sum}}: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"'{template}' cannot be filled in for {', '.join(labels)}: {error}") from error


def answers(source: ImageSource, classes: Sequence[str]) -> list[str]:
    """The answers to all combinations of classes; of too many, those to the same class throughout."""
    if len(classes) ** source.shown <= _COMBINATIONS:
        chosen = list(itertools.product(classes, repeat=source.shown))
    else:
        chosen = [(name,) * source.shown for name in classes]
    try:
        return [answer(source.answer, labels) for labels in chosen]
    except ValueError as error:
        raise UserError(f"images '{source.path}': {error}") from error


# What is shown ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gallery:
    """A set of images in its three parts, and a digest of all of it."""

    train: Labelled
    valid: Labelled
    test: Labelled
    digest: str

    @property
    def classes(self) -> list[str]:
        """All labels that occur, sorted."""
        return sorted({*self.train.labels, *self.valid.labels, *self.test.labels})

    def overlap(self) -> dict[str, int]:
        """See ImageSource.overlap."""
        known = {image.tobytes() for image in self.train.pixels}
        return {"images": len(self.test), "exact": sum(image.tobytes() in known for image in self.test.pixels)}


def gallery(path: str, side: int, channels: int) -> Gallery:
    """The images at ``path`` (see image_files.read), parted by the hash of their pixels.

    With a test part of its own, one training image of sixteen is for validation; without, of eight hash buckets the
    first is for testing and the second for validation. Equal images are always in one part.
    """
    train, test = read(path, side, channels)
    hashes = [hashlib.sha256(image.tobytes()).digest() for image in train.pixels]
    bucket = np.array([found[0] % (16 if test else 8) for found in hashes])
    own = bucket == (0 if test else 1)
    parts = {"valid": train.take(np.flatnonzero(own))}
    parts["test"] = test or train.take(np.flatnonzero(bucket == 0))
    parts["train"] = train.take(np.flatnonzero(~own if test else bucket > 1))
    for name, part in parts.items():
        if not len(part):
            raise UserError(f"images '{path}' are too few: {len(train)}, and none of them is for {name}; add some")
    whole = hashlib.sha256()
    for part in (train, *([test] if test else [])):
        whole.update(part.pixels.tobytes() + "\0".join(part.labels).encode())
    return Gallery(**parts, digest=whole.hexdigest())


class Form:
    """How examples of a source are written: everything but the pixels and the answer is the same for all."""

    def __init__(self, source: ImageSource, tokenizer: Tokenizer) -> None:
        if source.levels is None and not source.slots:
            raise UserError(
                f"images '{source.path}' have no slots: the run needs an encoder, such as {{kind: conv}}; "
                "or set levels to show pixels as tokens"
            )
        if source.levels is not None and tokenizer.kind != "byte":
            raise UserError(f"pixel tokens need the tokenizer 'byte', not '{tokenizer.kind}'; or leave levels out")
        self.source, self.tokenizer = source, tokenizer
        texts = source.question.split(IMAGE)
        tokens, slots = [np.array([BOS])], [np.array([-1])]
        for place, text in enumerate(texts):
            tokens.append(tokenizer.encode(text).astype(np.int64))
            slots.append(np.full(len(tokens[-1]), -1))
            if place < source.shown:
                tokens.append(np.full(source.positions, PAD))
                slots.append(np.arange(source.positions) + place * source.positions)
        self.question = np.concatenate(tokens)  # [Q], BOS included
        self.places = np.concatenate(slots)  # [Q]: which position of all its images an entry is, -1 for text

    def room(self, texts: Sequence[str]) -> int:
        """Tokens of the longest example among those with these answers."""
        return len(self.question) + max(len(ids) for ids in self.tokenizer.encode_all(texts)) + 1

    def asked(self, pixels: np.ndarray) -> np.ndarray:
        """The tokens of questions about images ``[n, k, C, Y, X]``: int64 ``[n, Q]``, BOS first."""
        tokens = np.tile(self.question, (len(pixels), 1))
        if self.source.levels is not None:
            levels = pixels.astype(np.int64) * self.source.levels // 256
            tokens[:, self.places >= 0] = SPECIALS + PIXELS + levels.reshape(len(pixels), -1)
        return tokens

    @property
    def slots(self) -> np.ndarray:
        """Slots int64 [Q] of a question's positions, -1 for tokens."""
        return self.places if self.source.levels is None else np.full_like(self.places, -1)

    def told(self, labels: Sequence[str]) -> tuple[str, np.ndarray]:
        """The answer to a question about images with these labels, as text and as ids."""
        text = answer(self.source.answer, labels)
        return text, self.tokenizer.encode(text).astype(np.int64)


# Training rows ------------------------------------------------------------------------------------------------------


def multiplicity(ratio: float, params: int, images: int, tokens: int, bound: int) -> int:
    """How many variants of each image there must be for ``ratio`` tokens of different examples per parameter:
    ceil(ratio x params / (images x tokens)) within 1..bound, where ``tokens`` is the true length of an example."""
    return min(bound, max(1, math.ceil(ratio * params / (images * tokens))))


@dataclass(frozen=True)
class ImageRows:
    """Rows of ``count`` examples each: images in shuffled passes over all variants, each once in a pass.

    Item number i is variant i div n of image i mod n, of n training images. A variant is always changed in its own way
    (see Augment), so multiplicity is the number of different images that an image makes.
    """

    source: ImageSource
    form: Form
    secret: Key
    length: int
    count: int
    variants: int = 1
    params: int = 0

    def __post_init__(self) -> None:
        if self.source.multiplicity is not None:
            object.__setattr__(self, "variants", self.source.multiplicity)

    @property
    def images(self) -> int:
        """Images that stand in a row as slots."""
        return self.count * self.source.shown if self.source.levels is None else 0

    @property
    def tokens(self) -> float:
        """Tokens of an example, on average over the classes."""
        texts = answers(self.source, self.source.gallery.classes)
        return len(self.form.question) + 1 + sum(map(len, self.form.tokenizer.encode_all(texts))) / len(texts)

    def expanded(self, params: int) -> ImageRows:
        """The rows with the variants that a model of ``params`` parameters wants, where a ratio says so."""
        if not self.source.ratio:
            return self
        images = len(self.source.gallery.train)
        tokens = math.ceil(self.tokens / self.source.shown)
        found = multiplicity(self.source.ratio, params, images, tokens, self.source.max_multiplicity)
        return replace(self, variants=found, params=params)

    def about(self) -> dict[str, Any]:
        """Counts: of images, their variants, tokens; and the ratio of different tokens to parameters."""
        images = len(self.source.gallery.train)
        unique = round(images * self.variants * self.tokens / self.source.shown)
        found = {"train": images, "multiplicity": self.variants, "tokens_per_example": self.tokens, "tokens": unique}
        if self.params:
            found |= {"params": self.params, "ratio": unique / self.params, "ratio_asked": self.source.ratio}
        return found

    def items(self, numbers: np.ndarray) -> np.ndarray:
        """The items in the rows with these numbers: int64 ``[B, count, k]``."""
        each = self.count * self.source.shown
        places = numbers[:, None] * each + np.arange(each)
        found = shuffled(self.secret / "order", len(self.source.gallery.train) * self.variants, places.reshape(-1))
        return found.reshape(len(numbers), self.count, self.source.shown)

    def pixels(self, step: int, items: np.ndarray) -> np.ndarray:
        """The images of items ``[...]`` as they are shown at a step: uint8 ``[..., C, Y, X]``."""
        train = self.source.gallery.train
        flat = items.reshape(-1)
        pixels = train.pixels[flat % len(train)]
        if self.source.augment is not None:
            pixels = self.source.augment(self.secret / "augment", flat, pixels, step)
        return pixels.reshape(*items.shape, *pixels.shape[1:])

    def rows(self, step: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets and documents; supervised are answer and EOS, and pixels if they are to be learned."""
        items = self.items(numbers)
        tokens = np.full((len(numbers), self.length + 1), PAD)
        scored, begins = np.zeros(tokens.shape, dtype=bool), np.zeros(tokens.shape, dtype=bool)
        learned = (self.form.places >= 0) & self.source.learn_pixels
        flat = items.reshape(-1, self.source.shown)
        # Pixels that become slots are not looked at here.
        asked = self.form.asked(flat if self.source.levels is None else self.pixels(step, flat))
        for question, (row, start, told) in zip(asked, self._laid_out(items), strict=True):
            middle, end = start + len(question), start + len(question) + len(told)
            tokens[row, start:middle], tokens[row, middle:end], tokens[row, end] = question, told, EOS
            scored[row, start:middle], scored[row, middle : end + 1] = learned, True
            begins[row, start] = begins[row, end + 1 :][:1] = True
        targets = np.where(scored, tokens, IGNORE)[:, 1:]
        return tokens[:, :-1], targets, np.cumsum(begins[:, :-1], axis=1) - 1

    def shown(self, step: int, numbers: np.ndarray) -> Shown:
        """The images, in the order of their places."""
        items = self.items(numbers)
        slots = np.full((len(numbers), self.length), -1)
        for place, (row, start, _) in enumerate(self._laid_out(items)):
            first = place % self.count * self.source.shown * self.source.positions
            here = np.where(self.form.slots >= 0, self.form.slots + first, -1)
            slots[row, start : start + len(here)] = here
        return Shown(self.pixels(step, items.reshape(len(numbers), -1)), slots)

    def _laid_out(self, items: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Of every example its row, where it starts there, and the ids of its answer."""
        labels = self.source.gallery.train.labels
        for row, examples in enumerate((items % len(labels)).tolist()):
            start = 0
            for images in examples:
                _, told = self.form.told([labels[image] for image in images])
                yield row, start, told
                start += len(self.form.question) + len(told) + 1
                if start > self.length:
                    raise UserError(f"an answer of {len(told)} tokens to '{self.source.path}' is longer than foreseen")


# Held-out items -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question about held-out images: ``tokens`` int64 [Q] with BOS, ``slots`` int64 [Q], ``pixels`` uint8
    ``[k, C, Y, X]``, the ``labels`` of its k images, the ``answer`` as text and ``told`` as ids; ``index`` are the
    places of the images in their part."""

    tokens: np.ndarray
    slots: np.ndarray
    pixels: np.ndarray
    labels: list[str]
    answer: str
    told: np.ndarray
    index: list[int]


def questions(source: ImageSource, tokenizer: Tokenizer, seed: int, samples: int, part: str = "test") -> list[Question]:
    """At most ``samples`` questions about the images of a part, each image in one of them, chosen by the seed."""
    form, images = Form(source, tokenizer), getattr(source.gallery, part)
    count = min(samples, len(images) // source.shown)
    order = permute(key(seed, "data", "images", part), len(images), np.arange(count * source.shown))
    found = []
    for index in order.reshape(count, source.shown):
        labels = [images.labels[place] for place in index.tolist()]
        text, told = form.told(labels)
        pixels = images.pixels[index]
        found.append(Question(form.asked(pixels[None])[0], form.slots, pixels, labels, text, told, index.tolist()))
    return found
