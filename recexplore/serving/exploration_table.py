"""The exploration table: every history's answer, computed beforehand."""

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from recexplore.errors import InputError
from recexplore.serving import table_files, versions
from recexplore.serving.exploration import HISTORY, Exploration, Popular, Row, answer
from recexplore.serving.table_files import About, Contents


class ExplorationTable:
    """History → exploration.

    Made by `build`, or by `open` from what `write` has written. Any number of threads may look
    histories up at once.

    Args:
      contents: all of it.
      source: what error messages call it.
      version: the number of the version that was opened; None: it wasn't read from disk.
      digest: that it should have; None: the one it has.

    Attributes:
      about: its sizes, and the fingerprints of what it was made from.
      version: see above.
    """

    def __init__(
        self,
        contents: Contents,
        source: str | Path,
        version: int | None = None,
        digest: str | None = None,
    ):
        self.about: About = contents.about
        self.version = version
        self._contents = contents
        self._source = source
        self._digest = digest
        self._keys = contents.about.keys
        # Binary search over a memoryview takes less than half the time of one over an array.
        self._words = [memoryview(word) for word in contents.keys]
        self._exact = memoryview(contents.exact)
        rows = contents.rows
        answers = (rows.clusters, rows.scores, rows.log_probabilities, rows.propensities)
        self._answers = [memoryview(values.ravel()) for values in answers]
        self._popular = tuple(memoryview(values) for values in contents.popular)

    @classmethod
    def build(
        cls,
        histories: Sequence[Sequence[int]],
        clusters: Int[np.ndarray, "B k"],
        scores: Float[np.ndarray, "B k"],
        log_probabilities: Float[np.ndarray, "B k"],
        propensities: Float[np.ndarray, "B k"],
        *,
        counts: Int[np.ndarray, "B"],
        popular: Popular,
        num_clusters: int,
        fingerprints: Mapping[str, str],
    ) -> "ExplorationTable":
        """From the arrays of the compiled step.

        Args:
          histories: B histories of distinct clusters, oldest first.
          clusters: chosen for each, best first; -1 marks places that weren't filled.
          scores: of them; those of places that weren't filled don't matter, as for the others.
          log_probabilities: of them.
          propensities: of them.
          counts: how often users stood at each history; weighs it in what is answered to unseen
            histories with the same end.
          popular: clusters for histories with an end that was never seen.
          num_clusters: M.
          fingerprints: of the "clusters", the "vocabulary" and the models.

        Raises:
          InputError: see `check`; or a history stands there twice.
        """
        from recexplore.serving import table_building  # SciPy, which look-ups can do without

        answers = (clusters, scores, log_probabilities, propensities)
        contents = table_building.build(
            histories,
            answers,
            counts=counts,
            popular=popular,
            num_clusters=num_clusters,
            fingerprints=fingerprints,
        )
        table = cls(contents, "The exploration table")
        table.check()
        return table

    @classmethod
    def open(cls, folder: Path | str, clusters: str) -> "ExplorationTable":
        """Opens the current version; the files are mapped, not read.

        Args:
          folder: that `write` has written to.
          clusters: fingerprint of the clusters it is to be served with; see
            `interests.cluster_table.ClusterTable.fingerprint`.

        Raises:
          InputError: nothing there, damage that shows without reading all of it (`check` finds the
            rest), or a table that was made with other clusters.
        """
        folder = Path(folder)
        while True:
            version = versions.current_version(folder)
            path = versions.path_of(folder, version)
            try:
                contents, digest = table_files.read(path, clusters)
                return cls(contents, path, version, digest)
            except InputError:
                if versions.current_version(folder) == version:
                    raise  # otherwise it was replaced, and removed, under our hands

    def write(self, folder: Path | str) -> int:
        """Writes the table as a new version and makes it the current one; see `versions`.

        Returns:
          The version's number.
        """
        contents = self._contents
        return versions.add_version(Path(folder), lambda new: table_files.write(new, contents))

    def look_up(self, history: Sequence[int], banned: Iterable[int] = ()) -> Exploration:
        """What to propose after a history; never a cluster of the history, nor a banned one.

        Args:
          history: cluster ids, oldest first, as many as are known: the last K are looked up, and
            none of all is proposed.
          banned: further clusters not to propose.

        Raises:
          InputError: the history names a cluster that the table doesn't know.
        """
        about = self.about
        return answer(
            self._find,
            self._popular,
            history,
            banned,
            history_length=about.history_length,
            num_chosen=about.num_chosen,
            num_clusters=about.num_clusters,
        )

    def check(self) -> None:
        """Reads all of the table, which takes a second where there are a million histories.

        Raises:
          InputError: it isn't what was written, or a value isn't what it must be.
        """
        if self._digest not in (None, table_files.digest(self._contents)):
            raise InputError(
                f"{self._source}: the table isn't what was written; its digest differs from "
                f"{table_files.ABOUT}'s. {table_files.REMEDY}"
            )
        if problem := table_files.find_problem(self._contents):
            raise InputError(f"{self._source}: {problem}. {table_files.REMEDY}")

    @property
    def digest(self) -> str:
        """SHA-256 of all that it holds: the same for the same table, wherever it lies."""
        return self._digest or table_files.digest(self._contents)

    def rows(self) -> Iterator[tuple[tuple[int, ...], Row]]:
        """All rows, also those that stand for the histories with one end, in order of their keys.

        In their answers only the places that are filled.
        """
        histories = self._contents.rows.histories
        for place in range(len(self._exact)):
            row = self._row(place)
            length = sum(cluster >= 0 for cluster in row.answer[0])
            answers = (values[:length] for values in row.answer)
            history = tuple(cluster for cluster in histories[place].tolist() if cluster >= 0)
            yield history, Row(tuple(answers), row.exact)

    def any_history(self, draw: float) -> list[int]:
        """A history that the models were asked about; [] where there is none.

        Args:
          draw: in [0, 1); says from which row on one is looked for.
        """
        for place in range(int(draw * len(self._exact)), 2 * len(self._exact)):
            row = place % len(self._exact)
            if self._exact[row]:
                history = self._contents.rows.histories[row].tolist()
                return [cluster for cluster in history if cluster >= 0]
        return []

    def popular(self) -> Popular:
        """What is answered where no end of the history was seen."""
        return self._contents.popular

    def __len__(self) -> int:
        """The number of histories that the models were asked about."""
        return self.about.num_histories

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Exploration]]:
        """The histories that the models were asked about, and the answers."""
        for history, row in self.rows():
            if row.exact:
                yield history, Exploration(*row.answer, HISTORY)

    def _find(self, history: tuple[int, ...]) -> Row | None:
        low, high = 0, len(self._exact)
        words = self._keys.pack(history)
        for values, word in zip(self._words[:-1], words, strict=False):
            low = bisect.bisect_left(values, word, low, high)
            high = bisect.bisect_right(values, word, low, high)
        values, word = self._words[-1], words[-1]
        place = bisect.bisect_left(values, word, low, high)
        if place == high or values[place] != word:
            return None
        return self._row(place)

    def _row(self, place: int) -> Row:
        start = place * self.about.width
        stop = start + self.about.width
        answers = tuple(values[start:stop].tolist() for values in self._answers)
        return Row(answers, self._exact[place] == 1)


class TableReader:
    """The current version of a table, for a process that goes on while versions come and go.

    Args:
      folder: that tables are written to.
      clusters: fingerprint of the clusters that it is served with.

    Raises:
      InputError: see `ExplorationTable.open`.
    """

    def __init__(self, folder: Path | str, clusters: str):
        self._folder = Path(folder)
        self._clusters = clusters
        self._table = ExplorationTable.open(folder, clusters)

    @property
    def table(self) -> ExplorationTable:
        """The version that answers now."""
        return self._table

    def look_up(self, history: Sequence[int], banned: Iterable[int] = ()) -> Exploration:
        """See `ExplorationTable.look_up`."""
        return self._table.look_up(history, banned)

    def reload(self, check: bool = False) -> bool:
        """Goes on with the current version; returns whether it is another one.

        Look-ups in other threads go on meanwhile, each with one version or the other.

        Args:
          check: read all of it first; see `ExplorationTable.check`.

        Raises:
          InputError: the current version can't be served. The one before goes on answering.
        """
        if versions.current_version(self._folder) == self._table.version:
            return False
        table = ExplorationTable.open(self._folder, self._clusters)
        if check:
            table.check()
        self._table = table
        return True
