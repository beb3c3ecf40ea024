"""Prompts from files with options of their own, and the ticks that went into every token."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.data.tokenizers import BOS, EOS, ByteTokenizer
from stepladder.eval.decode import generate
from stepladder.eval.prompts import Request, answers, read
from stepladder.eval.self_test import Scripted
from stepladder.run import Loaded, Run

POLICY = {"ticks": 4, "depth": 1, "prelude": 0, "policy": {"kind": "act", "tau": 0.6}}


def ask(*prompts, **options):
    return [Request(prompt=prompt, **options) for prompt in prompts]


def test_texts_are_continued_without_special_tokens():
    tokenizer = ByteTokenizer()
    script = {(BOS, *tokenizer.encode("ab").tolist()): (*tokenizer.encode("cé").tolist(), EOS)}
    data = {"sources": [{"kind": "task", "task": "copy"}]}
    run = Run.of({"model": {"kind": "transformer"}, "data": data, "train": {"steps": 1}})
    loaded = Loaded(run, Scripted(tokenizer.vocab, script), tokenizer, 0, Path())
    first, second = answers(loaded, ask("ab", "zz", max_new=9))
    assert [(one["text"], one["stop"]) for one in (first, second)] == [("cé", "eos"), ("", "eos")]
    assert first["tokens"] == ["a", "b", "c", "\\xc3", "\\xa9", "⟨eos⟩"]
    assert first["prompt_tokens"] == 2


def test_ticks_are_those_of_a_forward_over_the_whole_text(make):
    """Entry i went into token i + 1: batched and cached decoding against one plain forward of the finished text."""
    model, generator = make(model="recursive_halting", fields=POLICY).model, torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.4)
    prompts = [np.array([BOS, *range(20, 20 + count)]) for count in (9, 1, 4, 4)]
    told = set()
    for prompt, one in zip(prompts, generate(model, prompts, max_new=[3, 9, 6, 1], temperature=1.5), strict=True):
        read = [*prompt, *one.tokens][: len(prompt) + len(one.tokens) - (one.stop == "length")]
        with torch.no_grad():
            want = model(torch.tensor([read]), trace="ticks").trace["ticks"][0].tolist()
        assert one.spent.tolist() == want
        told.update(want)
    assert len(told) > 1  # or nothing was told apart


def test_mean_ticks_are_those_of_the_tokens_chosen(make):
    loaded = make(model="recursive_halting", fields=POLICY)
    for one in generate(loaded.model, [np.array([BOS, 9, 8]), np.array([BOS])], max_new=[5, 3], eos=None):
        assert one.ticks == one.spent[-len(one.tokens) :].mean()
    (nothing,) = generate(loaded.model, [np.array([BOS, 9])], max_new=0)
    assert nothing.spent is None


def test_options_of_a_line_hold_for_it_alone(make):
    loaded = make(model="shared_loop", fields={"ticks": 2})
    plain = ask("ab", "ab", "ab", "ab", max_new=5)
    changed = [plain[0], *ask("ab", max_new=3, ticks=4), *ask("ab", max_new=5, temperature=2.0, seed=3), plain[3]]
    before, after = answers(loaded, plain), answers(loaded, changed)
    assert [after[place] for place in (0, 3)] == [before[place] for place in (0, 3)]
    assert len(after[1]["tokens"]) == 5
    assert set(after[1]["ticks"]) == {4}
    assert after[2]["tokens"] != before[2]["tokens"]
    (alone,) = answers(loaded, changed[3:])
    assert alone == after[3]


def test_files_of_prompts(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("3+4= \r\n\n{\u2028}\n")
    assert [one.prompt for one in read(["first"], text, {})] == ["first", "3+4= ", "{\u2028}"]
    rows = [{"prompt": "a"}, {"prompt": "b\nc", "max_new": 3, "temperature": 0.5, "top_k": 2, "top_p": 0.9, "ticks": 7}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    first, second = read([], lines, {"max_new": 9, "seed": 5})
    assert first == Request(prompt="a", max_new=9, seed=5)
    assert second == Request(**rows[1], seed=5)


@pytest.mark.parametrize(
    ("line", "flaw"),
    [
        ('{"prompt": "a", "temprature": 1}', "line 2: unknown key 'temprature'"),
        ('{"prompt": "a", "top_p": 2}', "line 2: top_p = 2"),
        ('{"text": "a"}', "line 2: .*prompt"),
        ('{"prompt": "a"', "line 2: .*not valid JSON"),
        ("[1]", "line 2: write an object"),
        ('{"prompt": "a", "prompt": "b"}', r"p\.jsonl: line 2: duplicate key"),
    ],
)
def test_a_flaw_names_its_line(tmp_path, line, flaw):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(UserError, match=flaw):
        read([], tmp_path / "p.jsonl", {})


def test_a_json_file_is_not_read_as_lines_of_text(tmp_path):
    (tmp_path / "p.json").write_text('[{"prompt": "a"}]')
    with pytest.raises(UserError, match=r"call the file \.jsonl"):
        read([], tmp_path / "p.json", {})


def test_nothing_to_continue_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    for file in (None, tmp_path / "p.txt"):
        with pytest.raises(UserError, match="nothing to continue"):
            read([], file, {})
