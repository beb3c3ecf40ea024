"""What all commands have in common: how they end, and what they may print."""

import io

import pytest
import torch
from rich.console import Console

from stepladder import cli
from stepladder.cli import terminal


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."),
    ],
)
def test_too_little_memory_is_one_sentence(error, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "more memory than there is" in capsys.readouterr().err


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail():
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cli.main()


def test_what_a_model_writes_does_not_steer_the_terminal(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=shown))
    answer = {"prompt": "a\tb\n", "text": "\x1b[2J\x0e\r\x9bx", "stop": "eos"}
    terminal.print_answers([answer], ticks=False)
    assert shown.getvalue() == "a\tb\n\ufffd[2J\ufffd\ufffd\ufffdx  (eos)\n"
