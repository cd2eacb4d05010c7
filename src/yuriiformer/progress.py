"""Progress with time left: a live bar on a terminal, now and then a line elsewhere. Always on standard error."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY = 10.0  # seconds

# Of several processes that train one run together, the first speaks.
console = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
if not console.is_terminal:
    console.width = max(console.width, 170)  # a table in a log file is not cut to 80 columns


class Meter:
    """Counts work towards a total. `with Meter("training", 400) as meter: meter.advance(10, "loss 3.2")`."""

    def __init__(self, label: str, total: float | None) -> None:
        self.label, self.total = label, total
        self.done = self.before = 0.0
        self._notes: set[str] = set()
        self._texts: dict[str, str] = {}
        columns = (TextColumn("{task.description}", markup=False), BarColumn(20))
        self._bar = Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> Meter:
        self._started = self._printed = time.monotonic()
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def skip(self, amount: float) -> None:
        """Count work that an earlier session did: it says nothing about the speed."""
        self.before += amount
        self.advance(amount)

    def advance(self, amount: float, text: str = "", of: str = "") -> None:
        """Add work done. Of several things at once, each has its own text under its name."""
        self.done += amount
        self._texts[of] = text
        line = f"{self.label} {chr(10).join(filter(None, self._texts.values()))}{self._left()}".strip()
        if self._bar:
            self._bar.update(self._task, completed=self.done, total=self.total, description=line)
        elif line != self.label and time.monotonic() - self._printed > LINE_EVERY:
            self._printed = time.monotonic()
            console.print(line, soft_wrap=True, markup=False)

    def forget(self, of: str) -> None:
        """One of several things is done: its text goes."""
        self._texts.pop(of, None)

    def _left(self) -> str:
        counted = self.done - self.before
        if not self.total or counted <= 0:
            return ""
        seconds = (time.monotonic() - self._started) / counted * (self.total - self.done)
        return f"  [{self.done / self.total:.0%}, {duration(seconds)} left]"

    def note(self, text: str) -> None:
        """A line that is told once, though each of many runs has it to say."""
        if text not in self._notes:
            self._notes.add(text)
            self.line(text)

    def line(self, text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)


class RunProgress:
    """An observer of a run's records: shows loss, speed, memory and time left. A step counts `work` on the meter."""

    def __init__(self, meter: Meter, label: str, *, at: int, steps: int, work: float) -> None:
        self.meter, self.label, self.steps, self.work = meter, label, steps, work
        self.at, self.validation = at, ""
        self.last: dict[str, Any] | None = None
        meter.skip(at * work)

    def __call__(self, record: dict[str, Any]) -> None:
        if "warning" in record:
            self.meter.line(f"warning: {record['warning']}")
            return
        if "note" in record:
            self.meter.note(record["note"])
            return
        before, self.last = self.last, record
        if "validation" in record:
            self.validation = f", validation {record['validation']:.3f}"
        text = f"step {record['step']}/{self.steps}, loss {record['loss']:.3f}{self.validation}"
        if before and (seconds := record["seconds"] - before["seconds"]) > 0:
            text += f", {(record['tokens'] - before['tokens']) / seconds:,.0f} tokens/s"
        if "mfu" in record:
            text += f", {record['mfu']:.0%} MFU"
        if "memory" in record:
            text += f", {size(record['memory'])}"
        if record.get("skipped"):
            text += f", {record['skipped']} steps skipped"
        self.meter.advance((record["step"] - self.at) * self.work, f"{self.label}: {text}", self.label)
        self.at = record["step"]

    def finish(self, text: str) -> None:
        """Count what is left as done, and print a line that stays."""
        self.meter.forget(self.label)
        self.meter.advance((self.steps - self.at) * self.work)
        self.meter.line(f"{self.label}: {text}")


def duration(seconds: float) -> str:
    """In the form 1:05, 2:03:04 or 3 d 04:05:06."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def size(count: float) -> str:
    """Bytes in the form 0.5 kB, 1.2 MB, 80.0 GB."""
    power = 1 + sum(count >= limit for limit in (1e6, 1e9))
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB')[power - 1]}"
