"""The dataset card of CompGen: README.md as the Hugging Face hub and people read it."""

from __future__ import annotations

from typing import Any

_TEXT = """\
# CompGen: small programs with a declared complexity

Input `x` and output `y` of programs whose time and space are known, made by Stepladder. `task` names the program,
`complexity` its class, `meta.n` the size of the input; `meta.i` is the number of the example within its split.

| task | complexity | size | x | y |
| --- | --- | --- | --- | --- |
{tasks}

{splits}

- **Splits by content.** An example is in train only if the hash of its question says so, in all other splits only if
  it says otherwise: whatever seed is used, no test question can be in train. No question occurs twice.
{beyond}
- **Order.** Tasks alternate: in every {count} rows of train in a row each occurs once, in a random order.
- **Answers** agree with a second, independent solver: `stepladder data compgen verify DIR`.

Made by {generator}, byte for byte again by

```
{command}
```

{files}
"""

_BEYOND = {
    "ood": "has larger sizes than train and test: what is trained short is tested long.",
    "value_ood": "has the sizes of train, and in every array numbers beyond those of train.",
    "alphabet_ood": "has the sizes of train, and none of the letters of train, but as many others.",
}


def card(meta: dict[str, Any], examples: dict[str, tuple[str, str]]) -> str:
    """README.md for a dataset: ``meta`` is its meta.json, ``examples`` an x and y of every task."""
    rows = sum(split["examples"] for split in meta["splits"].values())
    sizes = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    category = next((name for most, name in sizes if rows < most), "1M<n<10M" if rows < 10**7 else "10M<n<100M")
    front = ["---", "pretty_name: CompGen", f"license: {meta['licence']}", "task_categories:", "- text-generation"]
    front += ["tags:", "- algorithmic", "- synthetic", "size_categories:", f"- {category}"]
    front += ["configs:", "- config_name: default", "  data_files:"]
    for name, split in meta["splits"].items():
        front += [f"  - split: {name}", f"    path: {split['file']}"]
    text = _TEXT.format(
        tasks=_table(
            [
                [name, about["complexity"], about["size"], *_code(examples[name])]
                for name, about in meta["tasks"].items()
            ]
        ),
        splits=_splits(meta),
        beyond="\n".join(f"- **{name}** {what}" for name, what in _BEYOND.items() if name in meta["splits"]),
        count=len(meta["tasks"]),
        generator=meta["generator"],
        command=_command(meta["config"]),
        files=_table(
            [[s["file"], f"{s['bytes']:,} bytes", f"`{s['sha256']}`"] for s in meta["splits"].values()],
            ["file", "size", "SHA-256"],
        ),
    )
    return "\n".join([*front, "---", "", text])


def _table(rows: list[list[str]], header: list[str] | None = None) -> str:
    head = [] if header is None else [header, ["---"] * len(header)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def _code(texts: tuple[str, str]) -> list[str]:
    return [f"`{text}`" for text in texts]


def _splits(meta: dict[str, Any]) -> str:
    names = list(meta["splits"])
    head = ["sizes of", *names]
    rows = [["examples", *(f"{split['examples']:,}" for split in meta["splits"].values())]]
    rows += [[task, *(_range(split, task) for split in meta["splits"].values())] for task in meta["tasks"]]
    return _table(rows, head)


def _range(split: dict[str, Any], task: str) -> str:
    """Sizes of a task in a split, and what its inputs are drawn from; "" if it is not there."""
    if task not in split["sizes"]:
        return ""
    low, high = split["sizes"][task]
    inputs = split["inputs"].get(task)
    return f"{low} to {high}" + (f" of {inputs}" if inputs else "")


def _command(config: dict[str, Any]) -> str:
    given = {**config, "tasks": ",".join(config["tasks"])}
    return " ".join(
        ["stepladder data compgen generate --out-dir DIR", *(f"--{k.replace('_', '-')} {v}" for k, v in given.items())]
    )
