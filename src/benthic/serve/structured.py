"""From request fields to a grammar that the engine can follow; a grammar that is none is refused here.

llguidance parses JSON schemas, regular expressions, Lark and GBNF into one form, which crosses to the engine
process as text. It is checked without the vocabulary, in a tokenizing thread: a schema may take a while.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from benthic.serve import api_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llguidance import GrammarFormat

    from benthic.serve.protocol_requests import SamplingBody

FIELDS: Final = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
"""Those of a request that may fix the form of its answer."""

ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, kw_only=True)
class Form:
    """What one field asks for; `compact` is JSON without white space."""

    field: str
    kind: GrammarFormat
    text: str
    compact: bool = False


def binds(body: SamplingBody) -> bool:
    """Whether some field fixes the form of the answer; costs next to nothing."""
    return any(getattr(body, name) is not None for name in FIELDS)


def grammar_of(body: SamplingBody) -> str | None:
    """The grammar that the answer must follow, as llguidance writes it; None for free text.

    Raises:
        ApiError: 400 for more than one form, a form that is no grammar, or a field that contradicts it.
    """
    try:
        forms = list(_forms(body))
    except RecursionError:
        msg = "the schema is nested too deeply"
        raise api_errors.invalid(msg, code="bad_json") from None
    if not forms:
        return None
    if len(forms) > 1:
        names = ", ".join(form.field for form in forms)
        msg = f"{names} each fix the form of the answer, but there is one answer. Give one of them."
        raise api_errors.invalid(msg, param=forms[1].field)
    check_endings(body, forms[0].field)
    return compile_form(forms[0])


def compile_form(form: Form) -> str:
    """Text of the grammar. Raises: ApiError 400 with the parser's words."""
    from llguidance import LLMatcher, grammar_from  # noqa: PLC0415 (only such requests need it)

    try:
        if form.compact:
            grammar = LLMatcher.grammar_from_json_schema(form.text, overrides={"whitespace_flexible": False})
        else:
            grammar = grammar_from(form.kind, form.text)
        problem = LLMatcher.validate_grammar(grammar)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem and not problem.startswith("WARNING"):
        kind = "JSON schema" if form.kind == "json" else form.kind
        msg = f"{form.field} is not a {kind} that can be followed: {problem[:300]}"
        raise api_errors.invalid(msg, param=form.field)
    return grammar


THOUGHT = r"""start: thought gap? @answer
thought[lazy]: /(.|\n)*<\/think>/
gap: /\n{1,2}/"""


def after_thought(grammar: str) -> str:
    """What a grammar allows, behind any text and the `</think>` that ends it."""
    try:
        listed = json.loads(grammar)
    except ValueError:
        listed = {"grammars": [{"lark_grammar": grammar}]}
    first, *others = listed["grammars"]
    listed["grammars"] = [{"lark_grammar": THOUGHT}, first | {"name": "answer"}, *others]
    return json.dumps(listed)


def _forms(body: SamplingBody) -> Iterator[Form]:
    if body.response_format is not None and body.response_format.type != "text":
        named = body.response_format.json_schema
        yield _json("response_format", ANY_OBJECT if named is None else named.schema_)
    asked = body.structured_outputs
    if asked is not None:
        compact = asked.disable_any_whitespace
        if asked.json_ is not None or asked.json_object:
            schema = ANY_OBJECT if asked.json_ is None else asked.json_
            yield _json("structured_outputs", schema, compact=compact)
        yield from _plain("structured_outputs", asked.regex, asked.choice, asked.grammar)
    if body.guided_json is not None:
        yield _json("guided_json", body.guided_json)
    yield from _plain("guided_regex", body.guided_regex, None, None)
    yield from _plain("guided_choice", None, body.guided_choice, None)
    yield from _plain("guided_grammar", None, None, body.guided_grammar)


def _json(field: str, schema: dict[str, Any] | str, *, compact: bool = False) -> Form:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return Form(field=field, kind="json", text=text, compact=compact)


def _plain(field: str, regex: str | None, choice: list[str] | None, grammar: str | None) -> Iterator[Form]:
    if regex is not None:
        yield Form(field=field, kind="regex", text=regex)
    if choice is not None:
        yield Form(field=field, kind="choice", text=json.dumps(choice))
    if grammar is not None:
        yield Form(field=field, kind="grammar", text=grammar)


def check_endings(body: SamplingBody, field: str) -> None:
    """A grammar says where the answer ends; fields that say otherwise cannot be obeyed as well.

    Raises:
        ApiError: 400 when `ignore_eos` or `min_tokens` is set.
    """
    for name, value in (("ignore_eos", body.ignore_eos), ("min_tokens", body.min_tokens)):
        if value:
            msg = f"{name} = {value}, but {field} says where the answer ends. Leave one of them out."
            raise api_errors.invalid(msg, param=name)
