"""What a run tells its user: plain lines, and bars on a terminal for what takes long."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_SHOW_AFTER_SECONDS = 2.0
_LINE_EVERY_SECONDS = 15.0

Update = Callable[..., None]
"""`update(done, total, **figures)`: called as often as the work likes."""


class Progress:
    """Lines and bars on standard error, so that standard output stays for results.

    Args:
      terminal: draw bars; by default when standard error is a terminal.
      silent: say nothing at all.
    """

    def __init__(self, terminal: bool | None = None, silent: bool = False):
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._silent = silent

    def say(self, line: str) -> None:
        """Prints one line."""
        if not self._silent:
            print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def bar(self, what: str) -> Iterator[Update]:
        """Gives an `update` for one long piece of work, shown once it takes two seconds."""
        if self._silent:
            yield lambda *_, **__: None
            return
        with self._rich_bar(what) if self._terminal else self._plain_lines(what) as update:
            yield update

    @contextlib.contextmanager
    def _rich_bar(self, what: str) -> Iterator[Update]:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        start, display, task = (
            time.monotonic(),
            RichProgress(*columns, console=Console(stderr=True)),
            None,
        )
        try:

            def update(done: int, total: int, **figures: float) -> None:
                nonlocal task
                if task is None:
                    if time.monotonic() - start < _SHOW_AFTER_SECONDS:
                        return
                    display.start()
                    task = display.add_task(what, total=total, figures="")
                display.update(task, completed=done, total=total, figures=_as_text(figures))

            yield update
        finally:
            display.stop()

    @contextlib.contextmanager
    def _plain_lines(self, what: str) -> Iterator[Update]:
        last = time.monotonic()

        def update(done: int, total: int, **figures: float) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY_SECONDS:
                last = time.monotonic()
                self.say(f"  {what}: {done:.0f}/{total:.0f} {_as_text(figures)}".rstrip())

        yield update


def _as_text(figures: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in figures.items())
