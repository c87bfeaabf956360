"""Messages to prompt text through the checkpoint's Jinja template, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from benthic.errors import ConfigError, ServeError

Message = Mapping[str, Any]


class TemplateRenderError(ServeError):
    """The template refused these messages or these variables."""


class ChatTemplate:
    """A compiled template with the names that Hugging Face templates expect.

    Args:
        source: Jinja text.
        special_tokens: `bos_token`, `eos_token` and their like.
    Raises: ConfigError when the source is not Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            msg = f"the chat template is not valid Jinja (line {error.lineno}): {error.message}"
            raise ConfigError(msg) from error
        self.source = source
        self._special_tokens = dict(special_tokens)

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, dict[str, str]]]:
        """Another process compiles it anew."""
        return ChatTemplate, (self.source, self._special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text; with `continue_final` it ends with the last message's own.

        `variables` reach the template by name (e.g. `enable_thinking`).
        Raises: TemplateRenderError with the template's own words.
        """
        names = {
            **self._special_tokens,
            **(variables or {}),
            "messages": list(messages),
            **({} if tools is None else {"tools": list(tools)}),
            "add_generation_prompt": add_generation_prompt and not continue_final,
        }
        try:
            text = self._template.render(names)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
        ) as error:
            msg = f"the chat template refuses these messages: {error}"
            raise TemplateRenderError(msg) from error
        return _without_end(text, messages[-1]["content"]) if continue_final else text


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks trainable text in some templates; here it is only text."""

    tags = {"generation"}  # noqa: RUF012 (the attribute's type is Jinja's)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Keep the body, drop the markers."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _without_end(text: str, last: str) -> str:
    """A prompt without what the template writes behind its last message, white space at its border kept."""
    at = text.rfind(last.strip())
    if at < 0 or not last.strip():
        msg = "the last message is to go on, but the chat template does not show it as it is"
        raise TemplateRenderError(msg)
    whole = last.lstrip()
    return text[: at + len(whole if text.startswith(whole, at) else last.strip())]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 (templates pass it as Jinja's filter takes it)
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """As Jinja's own filter, without the HTML escapes that models have not seen."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)
