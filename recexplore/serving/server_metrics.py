"""What the server tells Prometheus."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from recexplore.serving.exploration import LEVELS

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0)
OTHER = "other"  # every path that the server doesn't have, so that nobody can invent labels


class ServerMetrics:
    """Counters of one server.

    Args:
      routes: the paths that are told apart.
    """

    def __init__(self, routes: tuple[str, ...]):
        self._registry = CollectorRegistry()
        self._routes = frozenset(routes)
        self._requests = Counter(
            "recexplore_requests",
            "Requests answered.",
            ["route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "recexplore_request_seconds",
            "From a request's headers to the end of its answer.",
            ["route"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        levels = Counter(
            "recexplore_explorations",
            "Histories answered, by the level that answered.",
            ["level"],
            registry=self._registry,
        )
        self.levels: dict[str, Callable[[], None]] = {
            level: levels.labels(level).inc for level in LEVELS
        }
        self.version = Gauge(
            "recexplore_table_version", "The version that answers.", registry=self._registry
        )
        self.reloads = Counter(
            "recexplore_reloads", "Changes to another version.", registry=self._registry
        )
        self.failed_reloads = Counter(
            "recexplore_failed_reloads",
            "Attempts at a version that can't be served.",
            registry=self._registry,
        )
        self.in_flight = Gauge(
            "recexplore_requests_in_flight", "Being answered now.", registry=self._registry
        )
        ProcessCollector(registry=self._registry)
        self._known: dict[tuple[str, int], Callable[[], None]] = {}  # looking labels up takes long
        self._observe = {
            route: self._seconds.labels(route).observe for route in (*sorted(routes), OTHER)
        }

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts a request."""
        route = path if path in self._routes else OTHER
        count = self._known.get((route, status))
        if count is None:
            count = self._requests.labels(route, str(status)).inc
            self._known[route, status] = count
        count()
        self._observe[route](seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
