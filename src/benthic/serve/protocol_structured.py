"""Request fields that fix the form of an answer: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Schema = dict[str, Any]
Choices = Annotated[list[str], Field(min_length=1, max_length=1024)]


class JsonSchema(BaseModel):
    """A named JSON schema."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    name: str | None = None
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = Field(None, description="Accepted for compatibility; a schema always binds.")


class ResponseFormat(BaseModel):
    """`text`, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            what = "given" if self.json_schema is None else "left out"
            msg = f"type is {self.type}, so json_schema must be {what}"
            raise ValueError(msg)
        return self


class StructuredOutputs(BaseModel):
    """Exactly one of the first five says what the answer must be."""

    model_config = ConfigDict(strict=True, populate_by_name=True, extra="forbid")

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = Field(None, description="Lark, or GBNF as llama.cpp writes it.")
    json_object: bool | None = None
    disable_any_whitespace: bool = Field(
        default=False, description="JSON without white space between its parts."
    )

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        forms = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        given = sum(form is not None for form in forms)
        if given != 1:
            msg = f"{given} of json, regex, choice, grammar and json_object are given, but it must be 1"
            raise ValueError(msg)
        return self
