"""What a person sees: plain lines without a terminal, a bar with one, nothing when quiet."""

from __future__ import annotations

import pytest

from stepladder.train.display import Display
from stepladder.train.loop import Budget, Progress


def watched(budget: Budget, device="cpu", quiet=False) -> Display:
    """A session that took up at step 2 and has made two more steps, at 10 tokens a second."""
    progress = Progress(step=2, tokens=20, seconds=5.0, flops=1e15)
    display = Display("run", budget, progress, device, quiet)
    progress.step, progress.tokens, progress.seconds, progress.mean, progress.flops = 4, 40, 7.0, 1.25, 1e15 + 989e12
    return display


STEPS = Budget(steps=10, seconds=None, horizon=10, flops_per_token=1.0)


def test_speed_and_time_to_go_are_those_of_the_last_seconds():
    display = watched(STEPS)
    assert display.text() == "step 4/10, loss 1.25, 10 tokens/s, eta 0:00:06"
    display._show()
    display.progress.step, display.progress.tokens, display.progress.seconds = 6, 60, 7.2
    display._show()
    assert display.text() == "step 6/10, loss 1.25, 100 tokens/s, eta 0:00:00"


def test_a_budget_in_seconds_ends_when_they_are_spent():
    budget = Budget(steps=None, seconds=30.0, horizon=30, flops_per_token=1.0)
    assert watched(budget).text() == "step 4, loss 1.25, 10 tokens/s, eta 0:00:23"


def test_utilisation_is_shown_where_the_peak_is_known():
    assert watched(STEPS, device="NVIDIA H100 80GB HBM3").text().endswith(", MFU 50%")


def test_without_a_terminal_there_are_plain_lines(capsys):
    with watched(STEPS) as display:
        display.say("[bold]not markup[/bold]")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["run: [bold]not markup[/bold]", "run: step 4/10, loss 1.25, 10 tokens/s, eta 0:00:06"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_gets_a_bar_unless_quiet(monkeypatch, capsys, quiet):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with watched(STEPS, quiet=quiet) as display:
        display.say("hello")
    shown = capsys.readouterr().err
    assert ("10 tokens/s" in shown and "\x1b[" in shown and "hello" in shown) is not quiet
    assert (shown == "") is quiet
