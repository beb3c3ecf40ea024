"""Hold architectures against the laws."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from stepladder.core.errors import UserError
from stepladder.core.registry import did_you_mean
from stepladder.laws.causal import causal, noise
from stepladder.laws.chunk import chunk
from stepladder.laws.cost import budget, cost
from stepladder.laws.export import export
from stepladder.laws.law import Law, Subject, Violation
from stepladder.laws.repeat import conditioning, repeat, twin
from stepladder.laws.rows import rows
from stepladder.laws.training import reach, resume, start
from stepladder.models.spec import Spec
from stepladder.models.zoo import spec as named_spec

LAWS: dict[str, Law] = {
    each.name: each for each in (causal, noise, chunk, rows, reach, start, cost, budget, repeat, resume, twin, export)
}
"""All laws by name, in the order in which they are reported."""


@dataclass(frozen=True)
class Finding:
    """What one law said about one architecture: a short sentence with the measured number, and the seconds taken."""

    architecture: str
    law: str
    passed: bool
    detail: str
    seconds: float


def subject_of(what: str | Spec | type[Spec]) -> Subject:
    """The subject behind a registered name, a Spec class (both in the tiny configuration) or a Spec as it is."""
    if isinstance(what, str):
        what = named_spec(what, "tiny")
    return Subject(what if isinstance(what, Spec) else what(**what.tiny))


def check(what: str | Spec | type[Spec], only: Sequence[str] | None = None) -> list[Finding]:
    """Hold an architecture against all laws, or against those named in ``only``; one finding each.

    No failure ends the check: an exception inside a law is a failed finding that names it. An unknown law or
    architecture is a UserError.
    """
    for name in only or ():
        if name not in LAWS:
            hint = did_you_mean(name, LAWS) or f"; known: {', '.join(LAWS)}"
            raise UserError(f"unknown law '{name}'{hint}")
    subject = subject_of(what)
    return [_find(subject, each) for each in LAWS.values() if only is None or each.name in only]


def probe(what: str | Spec | type[Spec]) -> float:
    """The conditioning number of an architecture (see ``conditioning``): printed beside the findings."""
    with _one_thread():
        return conditioning(subject_of(what).spec)


def _find(subject: Subject, each: Law) -> Finding:
    begun = time.perf_counter()
    try:
        with _one_thread():
            passed, detail = True, each.run(subject)
    except Violation as violation:
        passed, detail = False, str(violation)
    except Exception as error:  # whatever a broken architecture raises is a finding about it
        passed, detail = False, f"{type(error).__name__}: {error}"
    return Finding(subject.name, each.name, passed, detail, time.perf_counter() - begun)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: sums in one order, and tiny tensors gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
