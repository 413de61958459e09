"""How far a long piece of work is: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 5  # between lines


class WorkProgress:
    """Shows progress from `with` on; lines said through `say` do not disturb the bar."""

    def __init__(
        self, what: str, total: int, noun: str, *, done: int = 0, say: Callable[[str], None] = print
    ) -> None:
        """Args: what is done, as "pack"; how many `noun` in all; how many a run before has done."""
        self._what, self._total, self._noun, self._say = what, total, noun, say
        self._before = self._done = done
        self._began = self._last = time.monotonic()
        console = Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(what),
                BarColumn(),
                TextColumn("{task.completed:,} of {task.total:,} " + noun),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total, completed=done, note="")

    def __enter__(self) -> "WorkProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more are done; `note` says more about all so far, as "1.20 GB"."""
        self._done += count
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self._done, note=note)
            return
        if now - self._last < SECONDS:
            return
        self._last = now
        said = (
            f"{self._what}: {self._done:,} of {self._total:,} {self._noun}{', ' * bool(note)}{note}"
        )
        rate = (self._done - self._before) / (now - self._began)
        if rate:
            left = (self._total - self._done) / rate
            said += f", {rate:,.0f} a second, {left / 60:,.0f} min left"
        self._say(said)
