"""Errors in OpenAI's shape: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from benthic.errors import (
    AdmissionError,
    BenthicError,
    EngineDeadError,
    OverloadedError,
    ServeError,
    ServerClosingError,
)
from benthic.serve.chat_template import TemplateRenderError
from benthic.serve.protocol_requests import CompletionBody
from benthic.serve.protocol_responses import ErrorBody, ErrorDetail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.exceptions import HTTPException

RETRY_AFTER_S = 1
SHOWN_CHARS = 80
SHAPES = {
    "prompt": "must be text, a non-empty list of token ids, or a non-empty list of either",
    "input": "must be text, or a non-empty list of messages, function calls and their outputs",
    "content": "must be text, or a list of text parts: this server reads text alone",
    "stop": "must be a text of 1 to 1024 characters, or at most 64 of them",
}
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(ServeError):
    """An answer that is not a success.

    Args:
        status: HTTP status.
        message: for a person.
        param: the request field at fault.
        code: for a program.
        retry_after_s: when trying again may help.
        allow: methods that the path does take, for a 405.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.allow = allow

    def body(self) -> bytes:
        """The JSON body; what is not valid text in it is replaced."""
        detail = ErrorDetail(
            message=_clean(str(self)),
            type=KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error"),
            param=None if self.param is None else _clean(self.param),
            code=self.code,
        )
        return ErrorBody(error=detail).model_dump_json().encode()

    def response(self) -> Response:
        """The whole answer."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.allow is not None:
            headers["Allow"] = self.allow
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(self.body(), self.status, headers, media_type="application/json")


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def late(timeout_s: float) -> ApiError:
    """408: the time of a request is over."""
    msg = f"the answer was not complete within {timeout_s:g} s of the request's arrival (timeout_s)"
    return ApiError(408, msg, param="timeout_s", code="deadline_exceeded")


def overloaded(message: str) -> ApiError:
    """503: right request, wrong moment."""
    return ApiError(503, message, code="overloaded", retry_after_s=RETRY_AFTER_S)


def closing(message: str) -> ApiError:
    """503: the server was told to stop."""
    return ApiError(503, message, code="shutting_down", retry_after_s=RETRY_AFTER_S)


def of(error: BenthicError) -> ApiError:
    """The answer that an error of ours deserves."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AdmissionError):
        return _refused(_without_name(str(error)))
    if isinstance(error, OverloadedError):
        return overloaded(_without_name(str(error)))
    if isinstance(error, ServerClosingError):
        return closing(str(error))
    if isinstance(error, TemplateRenderError):
        return invalid(str(error), param="messages")
    code = "engine_dead" if isinstance(error, EngineDeadError) else None
    return ApiError(500, str(error), code=code)


def _without_name(words: str) -> str:
    """What the engine says, without its own name of the sequence."""
    return re.sub(r"^request '[^']*'", "the request", re.sub(r"^request '[^']*': ", "", words))


def _refused(words: str) -> ApiError:
    """400; the field at fault is known where the engine's words begin with it."""
    field = re.split(r" (?:= |holds token |of token )", words, maxsplit=1)[0]
    return invalid(words, param=field if field in CompletionBody.model_fields else None)


def of_validation(errors: Sequence[Any]) -> ApiError:
    """400 for the first of pydantic's errors, naming field, value and bound."""
    first = errors[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "")
        return invalid(
            f"the body is not valid JSON: {why} (at character {first['loc'][-1]})", code="bad_json"
        )
    if first["type"] == "contradiction":
        return invalid(first["ctx"]["why"], param=first["ctx"]["param"])
    path = [str(part) for part in first["loc"] if part != "body"]
    if not path:
        msg = "the body must be a JSON object, sent with Content-Type: application/json"
        return invalid(msg, code="bad_json")
    field = path[0]
    if first["type"] == "missing":
        name = ".".join(path)
        return invalid(f"{name} is missing", param=field)
    place = list(takewhile(re.compile(r"\w+").fullmatch, path))  # behind it pydantic names shapes
    reason = _reason(field, place[-1], errors)
    return invalid(f"{'.'.join(place)}: {reason} (got {_shown(first.get('input'))})", param=field)


def _reason(field: str, name: str, errors: Sequence[Any]) -> str:
    """What a field should be; one of several shapes fails once for each, so the shapes are named instead.

    Args:
        field: of the request's body.
        name: of the field in it that is at fault.
        errors: all of pydantic's.
    """
    own = [error for error in errors if field in error["loc"][:2]]
    own_words = [error["msg"] for error in own if error["type"] == "value_error"]
    if own_words:
        return own_words[0].removeprefix("Value error, ")
    return own[0]["msg"] if len(own) == 1 else SHAPES.get(name, own[0]["msg"])


def of_http(error: HTTPException) -> ApiError:
    """An error of the framework itself: unknown path, wrong method, unreadable body."""
    cause = error.__cause__
    if isinstance(cause, UnicodeDecodeError):
        return invalid(f"the body is not valid UTF-8 (at byte {cause.start})", code="bad_json")
    if isinstance(cause, RecursionError):
        return invalid("the body is nested too deeply", code="bad_json")
    if isinstance(cause, ValueError):  # of Python's reader: a whole number of more than 4,300 digits
        return invalid("the body holds a number with too many digits", code="bad_json")
    return ApiError(error.status_code, str(error.detail), allow=(error.headers or {}).get("Allow"))


def _shown(value: Any) -> str:
    text = repr(value[:SHOWN_CHARS] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def _clean(text: str) -> str:
    return text.encode(errors="replace").decode()
