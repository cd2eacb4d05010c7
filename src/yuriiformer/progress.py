"""Progress with time left: a live bar on a terminal, now and then a line elsewhere. Always on standard error."""

from __future__ import annotations

import os
import time
from types import TracebackType

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

    def advance(self, amount: float, text: str = "") -> None:
        """Add work done."""
        self.done += amount
        if self._bar:
            line = f"{self.label} {text}{self._left()}".strip()
            self._bar.update(self._task, completed=self.done, total=self.total, description=line)
        elif time.monotonic() - self._printed > LINE_EVERY:
            self._printed = time.monotonic()
            console.print(f"{self.label} {text}{self._left()}".strip(), soft_wrap=True, markup=False)

    def _left(self) -> str:
        counted = self.done - self.before
        if not self.total or counted <= 0:
            return ""
        seconds = (time.monotonic() - self._started) / counted * (self.total - self.done)
        return f"  [{self.done / self.total:.0%}, {int(seconds) // 60}:{int(seconds) % 60:02d} left]"

    def line(self, text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)
