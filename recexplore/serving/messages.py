"""What the server is asked and what it answers, as JSON; every error in one shape.

{"error": {"code": "unknown_cluster", "message": "what is wrong, and what to do"}}
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

MAX_HISTORY = 256  # clusters of one history, or banned
MAX_HISTORIES = 64  # of one request
MAX_EVENTS = 1_000

Cluster = Annotated[int, Field(strict=True)] | Annotated[str, Field(strict=True)]
History = Annotated[list[Cluster], Field(max_length=MAX_HISTORY)]


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
      status: of HTTP.
      code: what it is, for programs.
      message: what is wrong and what to do, for people.
      headers: further ones of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = headers or {}

    @property
    def body(self) -> bytes:
        """The answer's body."""
        return to_json({"error": {"code": self.code, "message": self.message}})


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Explore(_Request):
    """What to propose after a history, or after each of several."""

    history: History | None = Field(
        None,
        description="clusters, oldest first: ids, or descriptions in words",
        examples=[[3, 17]],
    )
    histories: list[History] | None = Field(
        None, max_length=MAX_HISTORIES, description="several, in place of `history`"
    )
    banned: History = Field([], description="clusters not to propose besides the history's")
    count: int | None = Field(
        None,
        ge=1,
        strict=True,
        description="clusters of an answer at most; all there are if left out",
    )


class MetItem(_Request):
    """An item that a user met."""

    item_id: str = Field(strict=True, max_length=512)
    timestamp: int = Field(strict=True, description="seconds since 1970", ge=0, lt=1 << 53)
    skipped: bool = Field(False, strict=True, description="not looked at, or hardly")
    explored: bool = Field(False, strict=True, description="it was shown to explore")


class Recommend(_Request):
    """What to show a user who has met these items."""

    user_id: str = Field(strict=True, max_length=512)
    events: list[MetItem] = Field(max_length=MAX_EVENTS, description="oldest first")
    now: int | None = Field(
        None, strict=True, ge=0, lt=1 << 53, description="seconds since 1970; the server's clock"
    )


class Proposed(BaseModel):
    """A cluster that is proposed."""

    cluster: int
    description: str
    score: float = Field(description="the alignment model's; σ(score) is the predicted label")
    log_probability: float = Field(description="the novelty model's")
    propensity: float = Field(description="with which probability it was chosen")


class Explored(BaseModel):
    """One history's answer."""

    level: str = Field(description="which level answered: history, shorter or popular")
    clusters: list[Proposed] = Field(description="best first")


class ExploreAnswer(BaseModel):
    """`level` and `clusters`, or `explorations` where several histories were asked about."""

    version: int = Field(description="of the exploration table")
    level: str | None = None
    clusters: list[Proposed] | None = None
    explorations: list[Explored] | None = None


class RecommendedItem(Proposed):
    """An item to show."""

    item_id: str
    title: str
    level: str


class RecommendAnswer(BaseModel):
    """The items to show, in order."""

    version: int = Field(description="of the exploration table, when planning began")
    items: list[RecommendedItem]


class ErrorBody(BaseModel):
    """What went wrong, for programs and for people."""

    code: str
    message: str


class ErrorAnswer(BaseModel):
    """The body of every answer that isn't 200."""

    error: ErrorBody


_Model = TypeVar("_Model", bound=_Request)


def read(model: type[_Model], body: bytes) -> _Model:
    """A request's body, checked.

    Raises:
      Refusal: it isn't JSON (400), or isn't what the model says (422).
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(model, error) from None


def check(model: type[_Model], fields: dict[str, Any]) -> _Model:
    """The same for what doesn't come as JSON."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _refusal(model, error) from None


def _refusal(model: type[BaseModel], error: ValidationError) -> Refusal:
    problems = error.errors(include_url=False, include_input=False)
    if problems[0]["type"] == "json_invalid":
        reason = problems[0]["ctx"]["error"]
        return Refusal(
            400,
            "malformed_json",
            f"The body isn't valid JSON: {reason}. Send one JSON object with the fields "
            f"{_fields(model)}.",
        )
    told = [_in_words(problem) for problem in problems[:4]]  # of a union each choice has its own
    return Refusal(
        422,
        "invalid_request",
        f"{'; '.join(dict.fromkeys(told))}. The fields are {_fields(model)}; /openapi.json says "
        "what they mean.",
    )


def _in_words(problem: Any) -> str:
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in problem["loc"]
        if part not in ("constrained-int", "constrained-str", "int", "str")  # choices of a union
    )
    said = problem["msg"]
    if problem["type"] == "extra_forbidden":
        said = "there is no such field"
    return f"{place.removeprefix('.') or 'The body'}: {said[:1].lower()}{said[1:]}"


def _fields(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a body that the server reads itself, with nothing to look up."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return inlined(definitions[part["$ref"].rpartition("/")[2]])
            return {key: inlined(value) for key, value in part.items()}
        return [inlined(value) for value in part] if isinstance(part, list) else part

    content = {"application/json": {"schema": inlined(schema)}}
    return {"requestBody": {"required": True, "content": content}}
