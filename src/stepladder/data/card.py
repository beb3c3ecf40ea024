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

- **Splits by content.** An example is in test (and ood) if the hash of its question says so, else in train: whatever
  seed is used, no test question can be in train. No question occurs twice.
- **ood** has larger sizes than train and test: what is trained short is tested long.
- **Order.** Tasks alternate: in every {count} rows in a row each occurs once, in a random order.
- **Answers** agree with a second, independent solver: `stepladder data compgen verify DIR`.

Made by {generator}, byte for byte again by

```
{command}
```

{files}
"""


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
    for task in meta["tasks"]:
        ranges = (split["sizes"][task] for split in meta["splits"].values())
        rows.append([task, *(f"{low} to {high}" for low, high in ranges)])
    return _table(rows, head)


def _command(config: dict[str, Any]) -> str:
    given = {**config, "tasks": ",".join(config["tasks"])}
    return " ".join(
        ["stepladder data compgen generate --out-dir DIR", *(f"--{k.replace('_', '-')} {v}" for k, v in given.items())]
    )
