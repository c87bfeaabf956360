"""The HTTP application: routes, error shapes and the OpenAPI document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request  # noqa: TC002 (FastAPI reads the annotations of routes)
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from benthic import __version__
from benthic.errors import BenthicError
from benthic.serve import api_errors
from benthic.serve.api_chat import ChatJob, render_prompt
from benthic.serve.api_completions import CompletionJob, read_prompts
from benthic.serve.api_responses import ResponseJob, as_chat
from benthic.serve.fleet_routes import fleet_routes
from benthic.serve.middleware import ApiKeys, BodyLimit, InFlight, RequestIds
from benthic.serve.protocol_items import NOT_STORED, ResponseObject, ResponsesBody
from benthic.serve.protocol_requests import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from benthic.serve.protocol_responses import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Detokenized,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    Tokenized,
    Version,
)
from benthic.serve.rate_limit import RateLimit
from benthic.serve.sse import ClientGoneError, EventStream, until_disconnect

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pydantic import BaseModel

    from benthic.serve.service import Prompt, Service

CLIENT_CLOSED_REQUEST = 499


def create_app(
    service: Service,
    *,
    api_keys: Sequence[str],
    max_body_bytes: int,
    requests_per_minute: int | None = None,
    page: APIRouter | None = None,
) -> InFlight:
    """The whole ASGI application; its outermost layer counts the requests in flight."""
    app = FastAPI(
        title="benthic",
        version=__version__,
        description="OpenAI-compatible server for language models of the DeepSeek-V3 architecture.",
        redoc_url=None,
        openapi_url=None,
        docs_url=None,
    )
    app.include_router(generation_routes(service))
    app.include_router(response_routes(service))
    app.include_router(token_routes(service))
    app.include_router(status_routes(service))
    if service.whole.instances is not None:
        app.include_router(fleet_routes(service.whole.instances))
    if page is not None:
        app.include_router(page, include_in_schema=False)
    _add_openapi(app, service.settings.served_names)
    _add_error_handlers(app, service)
    layers: Any = BodyLimit(app, max_body_bytes)
    if requests_per_minute is not None:
        layers = RateLimit(layers, requests_per_minute, service.whole.take, keyed=bool(api_keys))
    if api_keys:
        layers = ApiKeys(layers, api_keys)
    return InFlight(RequestIds(layers))


def generation_routes(service: Service) -> APIRouter:
    """`/v1/completions` and `/v1/chat/completions`."""
    router = APIRouter(tags=["generate"])

    @router.post("/v1/embeddings", include_in_schema=False)
    async def embed() -> Response:
        """Refused in words: clients that ask find out why."""
        msg = "this server generates text; it computes no embeddings"
        raise api_errors.ApiError(404, msg, code="embeddings_not_offered")

    @router.post("/v1/completions", **_streams(Completion, Completion))
    async def complete(body: CompletionBody, request: Request) -> Response:
        """Continue one or several prompts."""
        arrival_s = service.clock()
        service.check_model(body.model)
        service.check_health()
        grammar = await service.grammar(body)
        job = CompletionJob(service, body, await read_prompts(service, body), grammar)
        return await answer(service, request, job, arrival_s, stream=bool(body.stream))

    @router.post("/v1/chat/completions", **_streams(ChatCompletion, ChatChunk))
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        arrival_s = service.clock()
        service.check_model(body.model)
        service.check_health()
        job = await make_chat(service, body)
        return await answer(service, request, job, arrival_s, stream=bool(body.stream))

    return router


def response_routes(service: Service) -> APIRouter:
    """`/v1/responses`, and the words for those who look for a stored one."""
    router = APIRouter(tags=["generate"])

    @router.post("/v1/responses", **_streams(ResponseObject, ResponseObject))
    async def respond(body: ResponsesBody, request: Request) -> Response:
        """Answer a conversation with items."""
        arrival_s = service.clock()
        service.check_model(body.model)
        service.check_health()
        job = ResponseJob(service, body, await make_chat(service, as_chat(body)))
        return await answer(service, request, job, arrival_s, stream=bool(body.stream))

    @router.api_route("/v1/responses/{rest:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
    async def stored() -> Response:
        """Refused in words."""
        raise api_errors.ApiError(404, NOT_STORED, code="not_stored")

    return router


async def make_chat(service: Service, body: ChatBody) -> ChatJob:
    """A chat, its prompt rendered. Raises: ApiError 400, TemplateRenderError."""
    prompt = await render_prompt(service, body, add_special_tokens=bool(body.add_special_tokens))
    return ChatJob(service, body, prompt, await service.tool_plan(body, prompt))


async def answer(
    service: Service,
    request: Request,
    job: CompletionJob | ChatJob | ResponseJob,
    arrival_s: float,
    *,
    stream: bool,
) -> Response:
    """Stream a job's events, or collect them into one answer; a client that leaves ends the job."""
    if stream:
        framed = isinstance(job, ResponseJob)
        return EventStream(job.events(arrival_s), service.metrics, framed=framed)
    try:
        result: BaseModel = await until_disconnect(request.receive, job.collect(arrival_s))
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return _json(result)


def token_routes(service: Service) -> APIRouter:
    """`/tokenize` and `/detokenize`."""
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize", **_answers(Tokenized))
    async def tokenize(body: TokenizeBody) -> Response:
        """Token ids of a text, or of messages through the chat template."""
        service.check_model(body.model)
        ids = (await _read_tokenize(service, body)).ids
        names = [service.tokenizer.text_of(token) for token in ids] if body.return_token_strs else None
        limit = service.ready.max_model_len
        return _json(Tokenized(count=len(ids), max_model_len=limit, tokens=list(ids), token_strs=names))

    @router.post("/detokenize", **_answers(Detokenized))
    async def detokenize(body: DetokenizeBody) -> Response:
        """Text of token ids, special tokens included."""
        service.check_model(body.model)
        ids = service.token_prompt(body.tokens, field="tokens").ids
        text = await service.in_thread(lambda: service.tokenizer.decode(ids, skip_special_tokens=False))
        return _json(Detokenized(prompt=text))

    return router


async def _read_tokenize(service: Service, body: TokenizeBody) -> Prompt:
    if body.messages is None:
        return await service.encode(
            body.prompt or "", add_special_tokens=body.add_special_tokens is not False
        )
    return await render_prompt(service, body, add_special_tokens=bool(body.add_special_tokens))


def status_routes(service: Service) -> APIRouter:
    """What is served, and how it is doing."""
    router = APIRouter(tags=["status"])

    def card(name: str) -> ModelCard:
        return ModelCard(
            id=name,
            created=service.started_at,
            root=service.settings.root,
            max_model_len=service.ready.max_model_len,
        )

    @router.get("/v1/models", **_answers(ModelList, 401))
    async def models() -> Response:
        """The names that requests may use."""
        return _json(ModelList(data=[card(name) for name in service.settings.served_names]))

    @router.get("/v1/models/{model_id:path}", **_answers(ModelCard, 401, 404))
    async def model(model_id: str) -> Response:
        """One of them."""
        service.check_model(model_id)
        return _json(card(model_id))

    @router.get("/health", **_answers(Health, 503))
    async def health() -> Response:
        """200 when a request sent now would be taken: the engine lives, reports, and nothing is draining."""
        service.check_health()
        return _json(Health())

    @router.get("/version", **_answers(Version))
    async def version() -> Response:
        """The server's version."""
        return _json(Version(version=__version__))

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Counters, gauges and histograms for Prometheus."""
        return Response(await service.whole.exposition(), media_type=CONTENT_TYPE_LATEST)

    return router


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def _answers(model: type[BaseModel], *errors: int) -> dict[str, Any]:
    """Route arguments that declare the answer and the errors it may be."""
    statuses = errors or (400, 401, 404, 413, 429)
    return {
        "response_model": model,
        "responses": {status: {"model": ErrorBody} for status in statuses},
    }


def _streams(model: type[BaseModel], chunk: type[BaseModel]) -> dict[str, Any]:
    """The same for a route that also streams chunks."""
    declared = _answers(model, 400, 401, 404, 408, 413, 429, 500, 503)
    schema = {"type": "string", "description": f"Events `data: {chunk.__name__}`, then `data: [DONE]`."}
    declared["responses"][200] = {"content": {"text/event-stream": {"schema": schema}}}
    return declared


def _add_openapi(app: FastAPI, served_names: Sequence[str]) -> None:
    """Serve the OpenAPI document with the model names of this server, and without FastAPI's own 422."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = document["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        served = {"type": "string", "enum": list(served_names)}
        for body in (CompletionBody, ChatBody, ResponsesBody, TokenizeBody, DetokenizeBody):
            schemas[body.__name__]["properties"]["model"]["anyOf"] = [served, {"type": "null"}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    app.openapi_url = "/openapi.json"
    app.docs_url = "/docs"
    app.setup()


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    """Every error leaves in OpenAI's shape and is counted."""

    def handle(make: Callable[[Any], api_errors.ApiError]) -> Any:
        async def handler(_request: Request, error: Exception) -> Response:
            failure = make(error)
            service.metrics.refused(failure.status)
            return failure.response()

        return handler

    app.add_exception_handler(RequestValidationError, handle(lambda e: api_errors.of_validation(e.errors())))
    app.add_exception_handler(HTTPException, handle(api_errors.of_http))
    app.add_exception_handler(BenthicError, handle(api_errors.of))
    app.add_exception_handler(Exception, handle(_of_bug))


def _of_bug(error: Exception) -> api_errors.ApiError:
    """The traceback is in the server's log; the client learns the kind only."""
    return api_errors.ApiError(500, f"the server failed ({type(error).__name__}); see its log")
