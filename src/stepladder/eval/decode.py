"""The one decoder: batched, cached, ragged; greedy or sampled. Rows never influence each other.

Ragged prompts are padded on the left, and the padding is a document of its own (id 0, the prompt has id 1), so a
padded row computes what it would compute alone: every part resets where a document begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.core.keys import Key, key, unit
from stepladder.data.tokenizers import BOS, EOS, PAD
from stepladder.models.base import Images, take_rows
from stepladder.models.lm import LanguageModel


@dataclass(frozen=True)
class Generation:
    """What one prompt was continued with.

    tokens: int64 ids, without the end-of-sequence token. stop: "eos"; "length" (the bound was reached); "nan" (the
    logits of the next token were unusable: a NaN, +inf, or all -inf). ticks: executed ticks per token chosen, the
    end-of-sequence token included, on average; None if the model reports none or nothing was generated. spent: those
    of every position that was read, the prompt's first (so entry i went into the token at i + 1), or None.
    """

    tokens: np.ndarray
    stop: str
    ticks: float | None
    spent: np.ndarray | None = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 is greedy, the lowest id wins ties; ``top_k`` None or beyond the vocabulary cuts nothing; ``top_p``
    keeps the smallest set of likeliest tokens with at least that mass: 1 keeps all, 0 the likeliest one alone.
    Cuts apply in this order: temperature, top_k, top_p of what is left.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature = {self.temperature}: must be a number >= 0; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k}: must be at least 1; leave it out to sample among all tokens")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must lie in 0..1; 1 keeps all tokens")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; on leaving, every module's mode and torch's generators are as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        model.eval()
        try:
            # Not inference mode: a model that learns at test time takes gradients inside its forward.
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode


def generate(
    model: LanguageModel,
    prompts: Sequence[np.ndarray],
    *,
    max_new: int | Sequence[int],
    eos: int | None = EOS,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    key: int | Key = 0,
    rows: Sequence[int] | None = None,
    ticks: int | None = None,
    batch: int = 128,
    uncached: bool = False,
    images: Sequence[Pictured] | None = None,
    advance: Callable[[float], object] = float,
) -> list[Generation]:
    """Continue every prompt (int ids; an empty one becomes [BOS]) until ``eos`` or ``max_new`` tokens.

    max_new: one bound, or one per prompt, counting the end-of-sequence token. eos None: never stop early.
    temperature, top_k, top_p: see Sampling. key: randomness; a token depends on (key, the prompt's number, position)
    only, so neither on batch-mates nor on how a text is split into prompt and continuation. rows: numbers of the
    prompts, default 0, 1, ...; give them to repeat one prompt of a larger call. ticks: tick budget. batch: prompts
    at a time, grouped by length. uncached: recompute the whole prefix for every token, slow and stateless: what the
    laws compare with. images: for every prompt what stands at its slots; prompts decoded together need
    equally many. advance: called with the share of all prompts that was just finished. Ids outside the
    vocabulary, and texts that grow beyond the model's positions, are a UserError.
    """
    sampling = Sampling(temperature, top_k, top_p)
    texts = [np.asarray(p, dtype=np.int64).reshape(-1) if len(p) else np.array([BOS]) for p in prompts]
    bounds = [max_new] * len(texts) if isinstance(max_new, int) else list(max_new)
    numbers = list(range(len(texts))) if rows is None else list(rows)
    if not len(bounds) == len(numbers) == len(texts):
        raise ValueError(f"{len(texts)} prompts, {len(bounds)} bounds and {len(numbers)} row numbers do not match")
    if min(bounds, default=0) < 0 or batch < 1:
        raise UserError("max_new must be at least 0 and batch at least 1")
    for text in texts:
        if text.min() < 0 or text.max() >= model.vocab:
            raise UserError(
                f"a prompt has the token id {text.max() if text.min() >= 0 else text.min()}, outside the model's "
                f"0..{model.vocab - 1}; use the tokenizer that the model was trained with"
            )
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), bounds[i]))
    done: dict[int, Generation] = {}
    with evaluating(model):
        for start in range(0, len(order), batch):
            group = order[start : start + batch]
            seen = [None] * len(texts) if images is None else images
            rows_of_group = [_Row(texts[i], bounds[i], _root(key) / numbers[i], seen[i]) for i in group]
            done.update(zip(group, _decode(model, rows_of_group, eos, sampling, ticks, uncached), strict=True))
            advance(len(group) / len(order))
    return [done[i] for i in range(len(texts))]


class Pictured(Protocol):
    """The images of a prompt: ``pixels`` uint8 [k, C, Y, X], and the ``slots`` int64 of its tokens, -1 for text."""

    @property
    def pixels(self) -> np.ndarray: ...

    @property
    def slots(self) -> np.ndarray: ...


@dataclass(frozen=True)
class _Row:
    """A prompt, how many tokens it may get, and its own randomness."""

    prompt: np.ndarray
    bound: int
    key: Key
    seen: Pictured | None = None

    def dice(self, most: int) -> np.ndarray:
        """Uniform numbers for the next ``most`` tokens, by their positions in the text."""
        start = len(self.prompt)
        return unit((self.key / "token").words(np.arange(start, start + most), 1)[:, 0])


def _root(seed: int | Key) -> Key:
    return seed if isinstance(seed, Key) else key(seed, "decode")


def _decode(
    model: LanguageModel, rows: list[_Row], eos: int | None, sampling: Sampling, ticks: int | None, uncached: bool
) -> list[Generation]:
    """One batch. Arrays of results are indexed by prompt; ``live`` says which prompt each row of the model is."""
    count, most, limit = len(rows), max(row.bound for row in rows), np.array([row.bound for row in rows])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    written, length = np.zeros((count, most), np.int64), np.zeros(count, np.int64)
    stop = np.full(count, "length", dtype=object)
    calls, reported = np.zeros(count, np.int64), True
    dice = np.stack([row.dice(most) for row in rows]) if sampling.temperature > 0 else None

    chunk, inside = (part.to(device) for part in left_padded([row.prompt for row in rows]))
    images = shown([row.seen for row in rows if row.seen is not None], device)
    noise = torch.tensor([(row.key / "noise").seed() for row in rows], device=device)
    # The last token chosen is never fed back, so a row needs one entry less than it may hold tokens.
    longest = chunk.shape[1]
    room = longest + most - 1
    spent = np.zeros((count, max(room, longest)))  # a prompt's last entry chose the first token, then one a call
    state = None if uncached or not most else model.init_state(count, room, ticks=ticks, key=noise)
    live = np.arange(count)
    going = limit > 0
    for step in range(most):
        out = model(
            chunk,
            state,
            documents=inside if uncached or step == 0 else None,
            key=noise if uncached else None,
            ticks=ticks,
            logits_at="last",
            trace="ticks",
            spend_state=True,
            **({} if images is None else {"images": images}),
        )
        assert out.logits is not None
        lucky = None if dice is None else torch.from_numpy(dice[live, step]).to(device)
        picks, usable = (t.cpu().numpy() for t in choose(out.logits[:, -1], sampling, lucky))
        reported &= "ticks" in out.trace
        if reported and step:
            spent[live[going], longest - 1 + step] = out.trace["ticks"][:, -1].cpu().numpy()[going]
        elif reported:
            spent[:, :longest] = out.trace["ticks"].cpu().numpy()
        calls[live[going]] += 1
        stop[live[going & ~usable]] = "nan"
        going &= usable
        ended = going & (picks == eos)
        stop[live[ended]] = "eos"
        going &= ~ended
        written[live[going], step] = picks[going]
        length[live[going]] += 1
        going &= length[live] < limit[live]
        if not going.any():
            break
        token = torch.from_numpy(np.where(going, picks, PAD)).to(device)[:, None]
        chunk = torch.cat((chunk, token), 1) if uncached else token
        inside = torch.cat((inside, torch.ones_like(token)), 1) if uncached else inside
        if images is not None:  # what is written has none; a cached state has seen them
            slots = torch.cat((images.slots_BT, torch.full_like(token, -1)), 1)
            images = Images(images.pixels_BICYX, slots) if uncached else None
        state = None if uncached else out.state
        if 2 * going.sum() <= len(going):
            # Rows are independent by law, so finished ones can leave: half the batch, half the work.
            kept = torch.from_numpy(going.nonzero()[0]).to(device)
            parts = (chunk, inside, noise, state, images)
            chunk, inside, noise, state, images = (take_rows(part, kept) for part in parts)
            live, going = live[going], going[going]
    found = []
    for i, row in enumerate(rows):
        read = spent[i, longest - len(row.prompt) : longest - 1 + calls[i]] if reported and calls[i] else None
        mean = None if read is None else float(read[-calls[i] :].mean())
        found.append(Generation(written[i, : length[i]], stop[i], mean, read))
    return found


def left_padded(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Prompts that end together: int64 (tokens, documents), both (B, T), padding being the document 0."""
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), PAD, np.int64)
    documents = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        documents[row, longest - len(prompt) :] = 1
    return torch.from_numpy(tokens), torch.from_numpy(documents)


def shown(rows: Sequence[Pictured], device: torch.device) -> Images | None:
    """The images of prompts that end together, as ``left_padded`` pads them; None without any."""
    if not rows:
        return None
    longest = max(len(row.slots) for row in rows)
    slots = np.stack([np.pad(row.slots, (longest - len(row.slots), 0), constant_values=-1) for row in rows])
    pixels = np.stack([row.pixels for row in rows])
    return Images(torch.from_numpy(pixels).to(device), torch.from_numpy(slots).to(device))


def choose(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """The next token of every row (B,), and whether its logits were usable (B,): no NaN, no +inf, not all -inf.

    ``uniform_B``: one number in [0, 1) a row, for sampling. The draw inverts the cumulated probabilities in the order
    of the ids, so that rounding, which may swap two nearly equal probabilities, does not move the choice.
    """
    top_B = logits_BV.max(dim=-1).values
    usable_B = top_B.isfinite()
    if uniform_B is None or sampling.temperature == 0:
        return logits_BV.argmax(dim=-1), usable_B
    # The distance to the largest logit is taken first: it cannot overflow, however small the temperature.
    scaled = (logits_BV.double() - top_B.double()[:, None]) / sampling.temperature
    mass, ids = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        mass[:, sampling.top_k :] = 0.0
    before = mass.cumsum(dim=-1) - mass
    cut = before >= sampling.top_p * mass.sum(dim=-1, keepdim=True)
    cut[:, 0] = False
    if sampling.top_p < 1:
        mass = mass.masked_fill(cut, 0.0)
    kept = torch.zeros_like(mass).scatter(-1, ids, mass)
    edges = kept.cumsum(dim=-1)
    drawn = (edges <= uniform_B.to(edges)[:, None] * edges[:, -1:]).sum(dim=-1)
    # Rounding may carry the product to the last edge: the last token with any probability is meant.
    last = kept.shape[-1] - 1 - (kept > 0).flip(-1).long().argmax(dim=-1)
    return torch.minimum(drawn, last), usable_B
