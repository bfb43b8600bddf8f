"""Goes on with a new version of the exploration table once there is one."""

import asyncio
import contextlib
import logging

from recexplore.errors import InputError
from recexplore.serving.exploration_table import TableReader
from recexplore.serving.server_metrics import ServerMetrics

_FAILED = 5  # so many times as long until a version that can't be served is tried again
_CHECKED = True  # all of a new version is read before it answers

_log = logging.getLogger(__name__)


class TableWatch:
    """Looks for new versions in the background; requests notice nothing.

    Args:
      reader: of the table.
      seconds: between two looks.
      metrics: where versions are counted.

    Attributes:
      problem: why the newest version isn't served; empty where it is.
    """

    def __init__(self, reader: TableReader, seconds: float, metrics: ServerMetrics):
        self._reader = reader
        self._seconds = seconds
        self._metrics = metrics
        self._asked = asyncio.Event()
        self.problem = ""
        metrics.version.set(reader.table.version or 0)

    def look_now(self) -> None:
        """Looks at once, for a signal."""
        self._asked.set()

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            patience = _FAILED if self.problem else 1  # a million rows take a second to refuse
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), self._seconds * patience)
            self._asked.clear()
            await self.look()

    async def look(self) -> bool:
        """Looks once; returns whether the version has changed."""
        try:
            loop = asyncio.get_running_loop()
            changed = await loop.run_in_executor(None, self._reader.reload, _CHECKED)
        except Exception as error:  # whatever it is, the server goes on, and looks again
            self._metrics.failed_reloads.inc()
            known = isinstance(error, InputError | OSError)
            problem = str(error) if known else f"{type(error).__name__}: {error}"
            if problem != self.problem:
                version = self._reader.table.version
                _log.error("Version %s goes on: %s", version, problem, exc_info=not known)
            self.problem = problem
            return False
        self.problem = ""
        if changed:
            self._metrics.reloads.inc()
            self._metrics.version.set(self._reader.table.version or 0)
            _log.warning("Version %s answers now.", self._reader.table.version)
        return changed
