"""A sweep as a W&B sweep file, for those who run theirs there: the same points, by W&B's agents and its search."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stepladder.core.errors import UserError
from stepladder.core.files import write_atomic, write_json
from stepladder.experiments.sweep import Plan, Range

_METHODS = {"grid": "grid", "random": "random", "tpe": "bayes"}


def export(made: Plan, path: Path, root: Path) -> Path:
    """Write the sweep to ``path`` and the run that its points share beside it, as ``<stem>.run.json``; returns that.

    W&B's agents call ``stepladder train`` with the values of a point as overrides, in a run named by W&B. Values other
    than numbers, texts and booleans are a UserError: an agent hands on nothing else.
    """
    sweep, shared = made.sweep, path.with_suffix(".run.json")
    parameters = {place: _parameter(place, values) for place, values in sweep.space.items()}
    train = shlex.join(["stepladder", "train", str(shared), "--runs", str(root / sweep.name), "--quiet"])
    tree: dict[str, Any] = {
        "name": sweep.name,
        "program": "stepladder",
        "method": _METHODS[sweep.method],
        "metric": {"name": sweep.metric, "goal": sweep.goal.replace("ise", "ize")},
        "parameters": {**parameters, "seed": {"values": list(sweep.seeds)}},
        "command": ["bash", "-c", f'exec {train} --name "$WANDB_RUN_ID" "$@"', "stepladder", "${args_no_hyphens}"],
    }
    if sweep.points is not None:
        tree["run_cap"] = sweep.points * len(sweep.seeds)
    head = [f"W&B sweep, written by: stepladder sweep {sweep.name} --export-wandb", f"  wandb sweep {path}"]
    head += [f"{len(made.invalid)} of the points are no valid runs and fail there."] if made.invalid else []
    head += ["W&B takes every seed as a point of its own: group by all but the seed."] if len(sweep.seeds) > 1 else []
    yaml = YAML()
    yaml.version = (1, 1)  # W&B reads that: 1e-05 is a text there, and "no" a boolean
    body = io.StringIO()
    yaml.dump(tree, body)
    text = body.getvalue().removeprefix("%YAML 1.1\n---\n")
    write_json(shared, {"name": sweep.name, **{part: node for part, node in sweep.run.items() if part != "name"}})
    write_atomic(path, "".join(f"# {line}\n" for line in head) + text)
    return shared


def _parameter(path: str, values: list[Any] | Range) -> dict[str, Any]:
    if isinstance(values, Range):
        low, high = values.ends()
        if not values.whole:
            return {"distribution": "log_uniform_values" if values.log else "uniform", "min": low, "max": high}
        if not values.log:
            return {"distribution": "int_uniform", "min": low, "max": high}
        return {"distribution": "q_log_uniform_values", "q": 1, "min": low, "max": high}
    for value in values:
        if not isinstance(value, str | int | float):
            raise UserError(
                f"W&B cannot hand on {path}={value!r}; give paths whose values are numbers, texts, booleans"
            )
    return {"values": values}
