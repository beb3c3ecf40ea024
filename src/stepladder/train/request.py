"""What is asked of a run's directory against what it holds: begin, go on, extend, or nothing left to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder.core.config import digest, leaves
from stepladder.core.errors import UserError
from stepladder.core.files import read_json
from stepladder.run import Run, TrainConfig, checkpoint_path, latest_checkpoint

BUDGETS = ("steps", "tokens", "flops", "seconds")


@dataclass(frozen=True)
class Asked:
    """``base`` is the run of the directory; ``train`` has the budget to train to, larger than its in an extension."""

    base: Run
    train: TrainConfig

    @property
    def extended(self) -> dict[str, Any] | None:
        """The budget of an extension; None if there is none."""
        if self.train == self.base.train:
            return None
        return {unit: value for unit in BUDGETS if (value := getattr(self.train, unit)) is not None}

    def hash(self) -> str:
        """The run's hash; an extended run is another thing than the run, and than a fresh one of the longer budget."""
        return digest({"run": self.base.hash(), "extended": self.extended}) if self.extended else self.base.hash()


def agree(run: Run, run_dir: Path, resume: bool, extend: bool) -> Asked:
    """What training ``run`` in ``run_dir`` means, given what is there; a contradiction is a UserError.

    A directory holds one run for good: that of its config.json, of which only what decides nothing (``eval``, the
    bookkeeping of ``train``) may change. Extending it adds extension.json, the new budget.
    """
    if not (run_dir / "config.json").exists():
        return Asked(run, run.train)
    if not resume:
        raise UserError(f"{run_dir} exists; give the run another name, or let it resume")
    base = held(run_dir)
    grown = _grown(base, run)
    if base.hash() != run.hash() and not (grown and extend):
        way = "--extend to train it for longer, or " if grown else ""
        raise UserError(f"{run_dir} holds another run: {differences(base, run)}; give {way}another name")
    budget = {unit: getattr(base.train, unit) for unit in BUDGETS}
    base = run.model_copy(update={"name": base.name, "train": run.train.model_copy(update=budget)})
    if not (run_dir / "extension.json").exists():
        return Asked(base, run.train)
    given, already = Asked(base, run.train), read_json(run_dir / "extension.json")
    if not given.extended or any(given.extended.get(unit, 0) < value for unit, value in already.items()):
        told = ", ".join(f"train.{unit}={value}" for unit, value in already.items())
        raise UserError(f"{run_dir} was extended to {told}; ask for that or more with --extend, or give another name")
    return given


def held(run_dir: Path) -> Run:
    """The run that a directory holds."""
    return Run.of(read_json(run_dir / "config.json"), str(run_dir / "config.json"))


def finished(run_dir: Path, asked: Asked) -> bool:
    """Whether there is nothing to train any more: complete, or diverged, which it would do again.

    The checkpoint of the last step must be there and sound; otherwise there is something to train again.
    """
    if not (run_dir / "summary.json").exists():
        return False
    summary = read_json(run_dir / "summary.json")
    if not isinstance(summary, dict) or summary.get("status") not in ("complete", "diverged"):
        return False
    if summary.get("hash") != asked.hash():
        return False
    last = latest_checkpoint(run_dir)
    return last is not None and last == checkpoint_path(run_dir, summary.get("steps", -1))


def _grown(base: Run, run: Run) -> bool:
    """Whether ``run`` is ``base`` with more of the same budget."""
    for unit in BUDGETS:
        before, after = getattr(base.train, unit), getattr(run.train, unit)
        if before is not None and after is not None and after > before:
            same = run.train.model_copy(update={unit: before})
            return run.model_copy(update={"train": same}).hash() == base.hash()
    return False


def differences(base: Run, run: Run) -> str:
    """The first few paths in which two runs differ, with both values."""
    there, asked = leaves(base.decisive()), leaves(run.decisive())
    paths = [p for p in dict.fromkeys((*asked, *there)) if there.get(p) != asked.get(p)]
    shown = [f"{path} is {there.get(path)!r} there and {asked.get(path)!r} here" for path in paths[:3]]
    return ", ".join(shown) + (f" and {len(paths) - 3} more differ" if len(paths) > 3 else "")
