"""The ``self_test`` suite: does the evaluation measure what it says, and does this model decode as it computes?

First, scripted models whose score is known walk through the same decoding and scoring as a real one: an oracle that
works every answer out must have 100 %, others exactly the share of items they were scripted to get right. Then
the run's own model is decoded in ways that must not matter. One failed check fails the suite.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.core.keys import below, key
from stepladder.data.tokenizers import BOS, EOS, SPECIALS, Tokenizer
from stepladder.eval.decode import Generation, evaluating, generate, left_padded
from stepladder.eval.exact import Sheet, ask, sheets
from stepladder.eval.suite import Job, Outcome, suite
from stepladder.models.base import Output
from stepladder.models.lm import LanguageModel

SAMPLES = 50
"""Items per cell that the scripted models answer, at most."""
DEVIATIONS = 5.0
"""How far, in standard deviations, a uniform guesser may be from its expectation: one false alarm in 10^6."""
ROUNDING = 1e-4
"""Largest difference of logits, relative to the largest logit, that padding may make in float32."""

Check = tuple[bool, str]


@dataclass(frozen=True)
class _Said:
    """The state of a scripted model: the tokens so far, -1 where there are none, and how many there are."""

    tokens_BS: Tensor
    length_B: Tensor


class Scripted(LanguageModel):
    """A model that knows by heart what follows each of some prompts, and ends the sequence anywhere else."""

    def __init__(self, vocab: int, script: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        nn.Module.__init__(self)
        self.vocab = vocab
        self.script = {
            (*prompt, *reply[:count]): token for prompt, reply in script.items() for count, token in enumerate(reply)
        }

    def init_state(self, batch: int, capacity: int, *_: Any, **__: Any) -> Any:
        """An empty memory."""
        return _Said(torch.full((batch, capacity), -1), torch.zeros(batch, dtype=torch.int64))

    def forward(self, tokens_BT: Tensor, state: Any = None, **options: Any) -> Output:
        """Logits (B, 1, V) of the next token: 0 for the one in the script, -inf for all others."""
        batch, count = tokens_BT.shape
        said = state or self.init_state(batch, count)
        documents = options.get("documents")
        heard = tokens_BT if documents is None else torch.where(documents > 0, tokens_BT, -1)
        place = said.length_B[:, None] + torch.arange(count)
        said = replace(said, tokens_BS=said.tokens_BS.scatter(1, place, heard), length_B=said.length_B + count)
        rows = [tuple(token for token in row if token >= 0) for row in said.tokens_BS.tolist()]
        after = torch.tensor([self.script.get(row, EOS) for row in rows])
        logits = torch.full((batch, 1, self.vocab), -math.inf).scatter(2, after[:, None, None], 0.0)
        return Output(logits, None, said, {}, {"ticks": torch.ones(batch, count)})


def scripted(sheet: Sheet, replies: Iterable[str], tokenizer: Tokenizer) -> Scripted:
    """A model that answers a sheet with ``replies``; a question asked twice gets its last reply."""
    questions = tokenizer.encode_all(sheet.examples.questions())
    texts = tokenizer.encode_all(list(replies))
    pairs = zip(questions, texts, strict=True)
    return Scripted(tokenizer.vocab, {(BOS, *q.tolist()): (*a.tolist(), EOS) for q, a in pairs})


def _exactly(sheet: Sheet, replies: dict[str, str], job: Job) -> Check:
    """Whether a model scripted to give ``replies`` by question scores exactly what they are worth."""
    questions = sheet.examples.questions()
    given = [replies[question] for question in questions]
    worth = [sheet.task.verify(question, mine) for question, mine in zip(questions, given, strict=True)]
    config = job.config.model_copy(update={"temperature": 0.0, "max_new_tokens": None})
    records = ask(scripted(sheet, given, job.tokenizer), job.tokenizer, sheet, config)
    scored = [record["correct"] for record in records]
    odd = next((r for r, want in zip(records, worth, strict=True) if r["correct"] != want), None)
    share = f"{sum(scored)} of {len(scored)} right"
    if odd is None:
        return True, share
    return False, f"{share} instead of {sum(worth)}: {odd['question']!r} was answered {odd['output']!r}"


def oracle(sheet: Sheet, job: Job) -> Check:
    """A model that works out every answer from the question's text has 100 %."""
    solved = {question: sheet.task.solve(question) for question in sheet.examples.questions()}
    fine, detail = _exactly(sheet, solved, job)
    wrong = sum(solved[q] != a for q, a in zip(sheet.examples.questions(), sheet.examples.answers(), strict=True))
    return fine and not wrong, detail + (f"; the task's own answer differs on {wrong}" if wrong else "")


def constant(sheet: Sheet, job: Job) -> Check:
    """A model that always gives the commonest answer has exactly that answer's share."""
    common = Counter(sheet.examples.answers()).most_common(1)[0][0]
    return _exactly(sheet, dict.fromkeys(sheet.examples.questions(), common), job)


def shuffled(sheet: Sheet, job: Job) -> Check:
    """A model that gives every question the next one's answer has exactly the share of neighbours that agree."""
    answers = sheet.examples.answers()
    return _exactly(sheet, dict(zip(sheet.examples.questions(), np.roll(answers, 1).tolist(), strict=True)), job)


def uniform(sheet: Sheet, job: Job) -> Check:
    """A model that guesses uniformly among the answers seen at a size is at chance, within sampling error."""
    questions, answers, sizes = sheet.examples.questions(), sheet.examples.answers(), sheet.examples.size
    replies: dict[str, str] = {}
    for size in np.unique(sizes):
        here = np.flatnonzero(sizes == size)
        seen = sorted({answers[i] for i in here})
        if sheet.task.chance(int(size)) > (1 + 1e-9) / len(seen):
            return False, f"size {size} has {len(seen)} answers, so chance is not {sheet.task.chance(int(size)):.3g}"
        luck = key(job.config.seed, "self_test", sheet.name, int(size)).words(np.arange(len(here)), 1)[:, 0]
        guesses = [seen[choice] for choice in below(luck, len(seen))]
        replies |= dict(zip((questions[i] for i in here), guesses, strict=True))
        # A question that is asked m times is one guess that counts m times.
        times = Counter(questions[i] for i in here)
        truth = {questions[i]: answers[i] for i in here}
        right = sum(count for question, count in times.items() if replies[question] == truth[question])
        spread = math.sqrt(sum(m * m for m in times.values()) / len(seen) * (1 - 1 / len(seen)))
        if abs(right - len(here) / len(seen)) > DEVIATIONS * spread + 1e-9:
            return False, f"size {size}: {right} of {len(here)} guesses among {len(seen)} answers are right"
    return _exactly(sheet, replies, job)


def _prompts(job: Job, count: int = 16) -> tuple[list[np.ndarray], int]:
    """Random prompts of unequal length, and how many tokens to add: all fit into a row of the run."""
    longest = max(1, min(24, job.run.data.sequence // 2))
    secret = key(job.config.seed, "self_test", "prompts")
    words = secret.words(np.arange(count), longest)
    ids = below(words, job.model.vocab - SPECIALS) + SPECIALS
    return [np.concatenate(([BOS], row[: n % longest])) for n, row in enumerate(ids)], longest


def _same(one: list[Generation], other: list[Generation]) -> Check:
    for row, (a, b) in enumerate(zip(one, other, strict=True)):
        if a.stop != b.stop or not np.array_equal(a.tokens, b.tokens):
            return False, f"prompt {row}: {a.tokens.tolist()} ({a.stop}) and {b.tokens.tolist()} ({b.stop})"
    return True, f"{len(one)} prompts, {sum(len(a.tokens) for a in one)} tokens equal"


def repeat(job: Job) -> Check:
    """Decoding twice gives the same tokens, greedily and sampled, wherever torch's own generator stands."""
    prompts, count = _prompts(job)
    for temperature in (0.0, 1.0):
        pair = []
        for stand in range(2):
            with evaluating(job.model):
                torch.manual_seed(stand)
                pair.append(generate(job.model, prompts, max_new=count, eos=None, temperature=temperature, key=7))
        fine, detail = _same(*pair)
        if not fine:
            break
    return fine, detail


def cached(job: Job) -> Check:
    """Decoding with a carried state gives the tokens that recomputing every prefix gives."""
    prompts, count = _prompts(job)
    return _same(*(generate(job.model, prompts, max_new=count, eos=None, uncached=u) for u in (False, True)))


def alone(job: Job) -> Check:
    """Decoding in a batch gives the tokens that decoding one by one gives, greedily and sampled."""
    prompts, count = _prompts(job)
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = {"max_new": count, "eos": None, "temperature": temperature, "key": 7}
        fine, detail = _same(*(generate(job.model, prompts, batch=size, **options) for size in (len(prompts), 1)))
        if not fine:
            break
    return fine, detail


def causal(job: Job) -> Check:
    """Changing a token leaves all logits before it as they were."""
    prompts, length = _prompts(job, count=4)
    tokens = torch.from_numpy(np.stack([np.resize(p, length + 1) for p in prompts])).to(_device(job.model))
    cut = (length + 1) // 2
    changed = tokens.clone()
    changed[:, cut:] = SPECIALS + (changed[:, cut:] + 1) % (job.model.vocab - SPECIALS)
    before, after = (job.model(t).logits[:, :cut] for t in (tokens, changed))
    return _close(before, after, 0.0 if before.device.type == "cpu" else ROUNDING)


def padding(job: Job) -> Check:
    """Padding on the left leaves the logits of the last token as they were."""
    prompts, _ = _prompts(job)
    tokens, documents = (part.to(_device(job.model)) for part in left_padded(prompts))
    together = job.model(tokens, documents=documents, logits_at="last").logits[:, 0]
    each = (torch.from_numpy(prompt).to(tokens)[None] for prompt in prompts)
    single = torch.cat([job.model(prompt, logits_at="last").logits[:, 0] for prompt in each])
    return _close(single, together, ROUNDING)


def _device(model: LanguageModel) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _close(one: Tensor, other: Tensor, bound: float) -> Check:
    difference = ((one - other).abs().max() / one.abs().max().clamp(min=1e-30)).item()
    return difference <= bound, f"relative difference of logits {difference:.2g}, allowed {bound:g}"


SCORING: tuple[Callable[[Sheet, Job], Check], ...] = (oracle, constant, uniform, shuffled)
DECODING: tuple[Callable[[Job], Check], ...] = (repeat, cached, alone, causal, padding)


def table(results: dict[str, Any]) -> Table:
    """A row a check."""
    shown = Table("check", "passed", "finding", title=f"self-test: {results['status']}", box=SIMPLE)
    for check in results["checks"]:
        mark = "[green]yes[/green]" if check["passed"] else "[bold red]no[/bold red]"
        shown.add_row(check["name"], mark, check["detail"].replace("[", "\\["))
    return shown


@suite("self_test", needs="any", show=table)
def self_test(job: Job) -> Outcome:
    """Scripted models must score what they are worth; the model must decode as it computes."""
    asked = sheets(job.run, job.config.seed, min(job.config.samples, SAMPLES))
    checks: list[dict[str, Any]] = []
    total = len(asked) * len(SCORING) + len(DECODING)

    def note(name: str, check: Callable[[], Check]) -> None:
        try:
            passed, detail = check()
        except UserError as error:
            passed, detail = False, str(error)
        checks.append({"name": name, "passed": bool(passed), "detail": detail})
        job.advance(1 / total)

    for scoring in SCORING:
        for sheet in asked:
            note(f"{scoring.__name__}/{sheet.name}", partial(scoring, sheet, job))
    for decoding in DECODING:
        note(decoding.__name__, partial(decoding, job))
    status = "passed" if all(check["passed"] for check in checks) else "failed"
    items = (item for sheet in asked for item in sheet.items())
    return Outcome({"checks": checks}, checks, items, status)
