"""The HTTP server: explorations and items, as JSON.

    POST /v1/explore      what to propose after a history of clusters (GET: the same, in the query)
    POST /v1/recommend    what to show a user who has met these items
    GET  /v1/clusters     all clusters, in words
    GET  /v1/histories/random  a history of the table
    GET  /healthz  /metrics  /openapi.json  /

`create_app` gets everything ready; `recexplore/serve.py` finds it in a work directory. Answers are
written by hand and bodies read by pydantic itself: FastAPI's own way to do both costs more than
everything else in an answer together.
"""

import asyncio
import contextlib
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException

import recexplore
from recexplore.errors import InputError
from recexplore.serving import messages, page
from recexplore.serving.exploration import Exploration
from recexplore.serving.exploration_table import ExplorationTable, TableReader
from recexplore.serving.guard import INTERNAL, Guard, Limits
from recexplore.serving.messages import Refusal
from recexplore.serving.planner_queue import PlannerQueue
from recexplore.serving.server_metrics import ServerMetrics
from recexplore.serving.table_watch import TableWatch

EXPLORE, RECOMMEND, CLUSTERS = "/v1/explore", "/v1/recommend", "/v1/clusters"
RANDOM, HEALTH, METRICS, OPENAPI = (
    "/v1/histories/random",
    "/healthz",
    "/metrics",
    "/openapi.json",
)
ROUTES = ("/", EXPLORE, RECOMMEND, CLUSTERS, RANDOM, HEALTH, METRICS, OPENAPI)
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Names:
    """What clusters and items are called.

    Attributes:
      descriptions: of each cluster.
      titles: item id → title.
      examples: item ids of each cluster, a few.
    """

    descriptions: Sequence[str]
    titles: Mapping[str, str]
    examples: Sequence[Sequence[str]]


class _Json(Response):
    media_type = "application/json"


class ClusterAnswers:
    """Answers about clusters.

    Args:
      reader: of the exploration table.
      names: of its clusters.
      metrics: where levels are counted.
    """

    def __init__(self, reader: TableReader, names: Names, metrics: ServerMetrics):
        self._reader = reader
        self._descriptions = list(names.descriptions)
        self._levels = metrics.levels
        self._ids = {text.casefold(): place for place, text in enumerate(self._descriptions)}
        self._ids |= {text: place for place, text in enumerate(self._descriptions)}

    def explore_json(self, body: bytes) -> bytes:
        """The body of POST /v1/explore → the answer's."""
        return to_json(self.explore(messages.read(messages.Explore, body)))

    def explore(self, asked: messages.Explore) -> dict[str, Any]:
        """See `messages.Explore` and `messages.ExploreAnswer`."""
        table = self._reader.table  # one version, whatever happens meanwhile
        if (asked.history is None) == (asked.histories is None):
            raise Refusal(422, "invalid_request", "Send either `history` or `histories`.")
        most = table.about.num_chosen
        if asked.count is not None and asked.count > most:
            raise Refusal(
                422,
                "invalid_request",
                f"count: it is {asked.count}, and the table has at most {most} clusters for a "
                f"history. Ask for 1..{most}.",
            )
        banned = self._known(asked.banned)
        if asked.history is not None:
            found = self._explored(table, asked.history, banned, asked.count)
            return {"version": table.version, **found}
        found = [self._explored(table, each, banned, asked.count) for each in asked.histories or ()]
        return {"version": table.version, "explorations": found}

    def random_history(self) -> dict[str, Any]:
        """A history that the models were asked about, where there is one."""
        table = self._reader.table
        history = table.any_history(random.random())
        named = [{"cluster": c, "description": self._descriptions[c]} for c in history]
        return {"version": table.version, "history": named}

    def _explored(
        self, table: ExplorationTable, history: list[Any], banned: list[int], count: int | None
    ) -> dict[str, Any]:
        try:
            found = table.look_up(self._known(history), banned)
        except InputError as error:
            raise Refusal(422, "unknown_cluster", str(error)) from error
        self._levels[found.level]()
        return {"level": found.level, "clusters": self._rows(found, count)}

    def _rows(self, found: Exploration, count: int | None) -> list[dict[str, Any]]:
        descriptions = self._descriptions
        rows = [
            {
                "cluster": cluster,
                "description": descriptions[cluster],
                "score": score,
                "log_probability": log_probability,
                "propensity": propensity,
            }
            for cluster, score, log_probability, propensity in zip(
                found.clusters,
                found.scores,
                found.log_probabilities,
                found.propensities,
                strict=True,
            )
        ]
        return rows[:count]

    def _known(self, named: list[Any]) -> list[int]:
        """Ids of clusters that are named by id or in words."""
        ids = [cluster if type(cluster) is int else self._described(cluster) for cluster in named]
        size = len(self._descriptions)
        if ids and not (0 <= min(ids) and max(ids) < size):
            unknown = next(cluster for cluster in ids if not 0 <= cluster < size)
            raise Refusal(
                422,
                "unknown_cluster",
                f"There is no cluster {unknown!s:.20}: ids are the whole numbers 0..{size - 1}. "
                f"GET {CLUSTERS} lists them with their descriptions.",
            )
        return ids

    def _described(self, text: str) -> int:
        found = self._ids.get(text)
        if found is None:
            found = self._ids.get(text.strip().casefold())
        if found is None:
            raise Refusal(
                422,
                "unknown_cluster",
                f"No cluster is described as {text[:200]!r}. GET {CLUSTERS} lists the "
                "descriptions; ids are whole numbers without quotation marks.",
            )
        return found


def create_app(
    reader: TableReader,
    names: Names,
    planner: PlannerQueue,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    local_names: bool = False,
    reload_seconds: float = 2.0,
) -> Guard:
    """The server, as an ASGI application.

    Args:
      reader: of the exploration table; also the planner's.
      names: of clusters and items.
      planner: for what to show; may have none.
      limits: on requests.
      token: that requests must carry, but for the page and /healthz.
      local_names: see `Guard`.
      reload_seconds: between two looks for a new version of the table.
    """
    metrics = ServerMetrics(ROUTES)
    watch = TableWatch(reader, reload_seconds, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        planner.start()
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, watch.look_now)
        watching = asyncio.create_task(watch.run())
        yield
        watching.cancel()
        planner.stop()

    app = FastAPI(
        title="recexplore",
        version=recexplore.__version__,
        description="Each user's next novel interest: clusters, scores and items.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        openapi_url=OPENAPI,
        lifespan=lifespan,
        responses={"4XX": {"model": messages.ErrorAnswer}, "5XX": {"model": messages.ErrorAnswer}},
    )
    _add_errors(app)
    answers = ClusterAnswers(reader, names, metrics)
    _add_asking(app, answers, names, planner, reader)
    _add_looking(app, reader, planner, metrics, watch)
    direct = {("POST", EXPLORE): answers.explore_json}
    return Guard(app, direct, limits or Limits(), token, metrics, local_names)


def _add_asking(
    app: FastAPI, answers: ClusterAnswers, names: Names, planner: PlannerQueue, reader: TableReader
) -> None:
    told = {200: {"model": messages.ExploreAnswer}}
    clusters = to_json({"clusters": _listed(names)})

    @app.post(EXPLORE, responses=told, openapi_extra=messages.request_body(messages.Explore))
    async def explore(request: Request) -> Response:
        """What to propose after a history of clusters, or after each of several."""
        return _Json(answers.explore_json(await request.body()))

    @app.get(EXPLORE, responses=told)
    async def explore_in_query(request: Request) -> Response:
        """The same in the query: `?history=3,17&banned=8&count=2`, or `history=` several times."""
        return _Json(to_json(answers.explore(_of_query(request))))

    @app.get(CLUSTERS)
    async def all_clusters() -> Response:
        """All clusters: ids, descriptions, and a few of their items."""
        return _Json(clusters)

    @app.get(RANDOM)
    async def random_history() -> Response:
        """A history of the table, drawn at random."""
        return _Json(to_json(answers.random_history()))

    @app.post(
        RECOMMEND,
        responses={200: {"model": messages.RecommendAnswer}},
        openapi_extra=messages.request_body(messages.Recommend),
    )
    async def recommend(request: Request) -> Response:
        """What to show a user who has met these items."""
        asked = messages.read(messages.Recommend, await request.body())
        events = [(e.item_id, e.timestamp, e.skipped, e.explored) for e in asked.events]
        now = int(time.time()) if asked.now is None else asked.now
        version = reader.table.version
        planned = await planner.plan(asked.user_id, events, now)
        items = [_shown(item, names) for item in planned]
        return _Json(to_json({"version": version, "items": items}))


def _add_looking(
    app: FastAPI,
    reader: TableReader,
    planner: PlannerQueue,
    metrics: ServerMetrics,
    watch: TableWatch,
) -> None:
    shown, headers = page.read()

    @app.get("/", include_in_schema=False)
    async def the_page() -> Response:
        return Response(shown, headers=headers, media_type="text/html")

    @app.get(HEALTH)
    async def health() -> Response:
        """What is served; 200 as long as explorations are answered."""
        table = reader.table
        told = {
            "status": "ok",
            "version": table.version,
            "histories": len(table),
            "clusters": table.about.num_clusters,
            "fingerprints": dict(table.about.fingerprints),
            "items": {"status": planner.state, "problem": planner.problem or None},
            "reload_problem": watch.problem or None,
        }
        return _Json(to_json(told))

    @app.get(METRICS)
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type=_METRICS_TYPE)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return _Json(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:200]
        if error.status_code == 405:
            own = (route for route in app.routes if getattr(route, "path", "") == request.url.path)
            allowed = ", ".join(sorted({method for route in own for method in route.methods}))
            text = f"{path} is asked with {allowed}, not with {request.method}."
            return await refused(
                request, Refusal(405, "method_not_allowed", text, {"allow": allowed})
            )
        text = f"There is nothing at {path}. Ask one of {', '.join(ROUTES)}."
        return await refused(request, Refusal(error.status_code, "not_found", text))

    @app.exception_handler(Exception)
    async def failed(request: Request, _: Exception) -> Response:
        return await refused(request, INTERNAL)


def _of_query(request: Request) -> messages.Explore:
    fields: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if name in ("history", "banned"):
            parts = [part.strip() for part in value.split(",")]
            numbers = all(part.isascii() and part.isdecimal() and len(part) < 12 for part in parts)
            fields.setdefault(name, []).extend(map(int, parts) if numbers else [value])
        elif name == "count" and value.isascii() and value.isdecimal() and len(value) < 12:
            fields[name] = int(value)
        else:
            fields[name] = value
    return messages.check(messages.Explore, fields)


def _listed(names: Names) -> list[dict[str, Any]]:
    return [
        {
            "cluster": cluster,
            "description": description,
            "examples": [_titled(item, names) for item in examples],
        }
        for cluster, (description, examples) in enumerate(
            zip(names.descriptions, names.examples, strict=True)
        )
    ]


def _shown(item: Any, names: Names) -> dict[str, Any]:
    """A `planner.Planned`, with what it is called."""
    return {
        **_titled(item.item_id, names),
        "cluster": item.cluster,
        "description": names.descriptions[item.cluster],
        "score": item.score,
        "log_probability": item.log_probability,
        "propensity": item.propensity,
        "level": item.level,
    }


def _titled(item_id: str, names: Names) -> dict[str, str]:
    return {"item_id": item_id, "title": names.titles.get(item_id, item_id)}
