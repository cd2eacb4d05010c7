"""A wish to stop, from whoever may end a process: a terminal, a scheduler, a machine that is taken away."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stop:
    """Whether a signal has asked to stop. The handler only notes it; a second signal ends the process at once."""

    requested = False

    @contextmanager
    def on_signals(self) -> Iterator[Stop]:
        def handle(number: int, frame: FrameType | None) -> None:
            self.requested = True
            signal.signal(number, previous[number])

        previous = {int(s): signal.signal(s, handle) for s in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
