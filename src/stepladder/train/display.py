"""What a person sees while a run trains: a bar on a terminal, else a plain line every ten seconds; all on stderr."""

from __future__ import annotations

import datetime
import threading
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from stepladder.train.loop import Budget, Progress

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the GPU's name, from the vendor's data sheets; others show no utilisation."""


class Display:
    """Watches a ``Progress`` from a thread of its own, so that the training loop knows nothing of it."""

    def __init__(self, name: str, budget: Budget, progress: Progress, device: str, quiet: bool) -> None:
        self.name, self.budget, self.progress, self.quiet = name, budget, progress, quiet
        self.peak = next((peak for part, peak in PEAK_FLOPS.items() if part in device), None)
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        # Marks of the last seconds: speed is that of now, not watered down by the first step (compilation, caches).
        self.marks: deque[tuple[int, int, float, float]] = deque(maxlen=40 if self.console.is_terminal else 2)
        self._mark()
        self.bar: Bar | None = None
        self.task = TaskID(0)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Display:
        if self.quiet:
            return self
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Bar(*columns, console=self.console, auto_refresh=False)
            self.task = self.bar.add_task(self.name, total=1.0, text="")
            self.bar.start()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.quiet:
            return
        self.ended.set()
        self.thread.join()
        self._show()
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.quiet:
            self.console.print(f"{self.name}: {text}", markup=False)

    def _watch(self) -> None:
        while not self.ended.wait(10.0 if self.bar is None else 0.25):
            self._show()

    def _mark(self) -> None:
        now = self.progress
        self.marks.append((now.step, now.tokens, now.seconds, now.flops))

    def _show(self) -> None:
        if self.bar is None:
            self.say(self.text())
        else:
            self.bar.update(self.task, completed=self._done(), text=self.text())
            self.bar.refresh()
        if self.progress.step > self.marks[-1][0]:
            self._mark()

    def _done(self) -> float:
        if self.budget.steps is not None:
            return self.progress.step / self.budget.steps
        return min(1.0, self.progress.seconds / (self.budget.seconds or 1.0))

    def text(self) -> str:
        """Step, running loss, tokens a second, time to go and, on a known GPU, its utilisation."""
        now = self.progress
        step, tokens, seconds, flops = self.marks[0]
        spent = max(now.seconds - seconds, 1e-9)
        of = f"/{self.budget.steps}" if self.budget.steps is not None else ""
        parts = [f"step {now.step}{of}"]
        if now.mean is not None:
            parts.append(f"loss {now.mean:.4g}")
        if now.step > step:
            parts.append(f"{(now.tokens - tokens) / spent:,.0f} tokens/s")
            parts.append(f"eta {datetime.timedelta(seconds=round(self._left(spent / (now.step - step))))}")
            if self.peak is not None:
                parts.append(f"MFU {(now.flops - flops) / spent / self.peak:.0%}")
        return ", ".join(parts)

    def _left(self, seconds_a_step: float) -> float:
        if self.budget.steps is not None:
            return seconds_a_step * (self.budget.steps - self.progress.step)
        return max(0.0, (self.budget.seconds or 0.0) - self.progress.seconds)
