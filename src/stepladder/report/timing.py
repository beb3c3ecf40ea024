"""Training times measured side by side: timing.json of a ladder, checked before it is believed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepladder.core.errors import UserError
from stepladder.core.files import read_json
from stepladder.core.redact import redact
from stepladder.core.registry import did_you_mean


@dataclass(frozen=True)
class Timing:
    """Interleaved rounds: in each, every rung took ``steps`` training steps in its turn, alone on the machine.

    seconds: of a step of ``tokens`` tokens, by rung, one number a round. errors: why a rung has none.
    """

    device: str
    rounds: int
    steps: int
    tokens: int
    seconds: dict[str, list[float]]
    errors: dict[str, str]
    sha256: str

    def log_ratios(self, rung: str, control: str) -> list[float]:
        """Round by round, the log of a rung's seconds over the control's; empty where one of the two has none."""
        if rung not in self.seconds or control not in self.seconds:
            return []
        pairs = zip(self.seconds[rung], self.seconds[control], strict=True)
        return [math.log(mine / theirs) for mine, theirs in pairs]

    def tokens_per_s(self, rung: str) -> float | None:
        """Of the geometric mean over rounds."""
        seconds = self.seconds.get(rung)
        return self.tokens / math.exp(float(np.mean(np.log(seconds)))) if seconds else None


def read(path: Path, rungs: Sequence[str]) -> Timing | None:
    """The times of a ladder; None if none were taken. A file that does not hold together is a UserError."""
    if not path.is_file():
        return None
    found = redact(read_json(path))
    if not isinstance(found, dict):
        raise _flawed(path, "it is no mapping")
    seconds, errors = found.get("seconds"), found.get("errors") or {}
    if not isinstance(seconds, dict) or not isinstance(errors, dict):
        raise _flawed(path, "'seconds' (or 'errors') is missing or not a mapping of rungs")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    seconds = {rung: times for rung, times in seconds.items() if times != []}  # of one that never got ready
    if not seconds:
        return Timing("", 0, 0, 0, {}, errors, digest)
    if not isinstance(found.get("device"), str) or not found["device"]:
        raise _flawed(path, "'device' is missing or not a name")
    for name in ("rounds", "steps", "tokens"):
        if not _positive(found.get(name)) or not isinstance(found[name], int):
            raise _flawed(path, f"'{name}' is missing or not a whole number above 0")
    for rung, times in seconds.items():
        if rung not in rungs:
            raise _flawed(path, f"'{rung}' is not one of the rungs{did_you_mean(rung, rungs)}")
        if not isinstance(times, list) or len(times) != found["rounds"] or not all(map(_positive, times)):
            raise _flawed(path, f"the seconds of '{rung}' are not {found['rounds']} numbers above 0")
    return Timing(found["device"], found["rounds"], found["steps"], found["tokens"], seconds, errors, digest)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _flawed(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}; delete it, and climb the ladder again to measure the times anew")
