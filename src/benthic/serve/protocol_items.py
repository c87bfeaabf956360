"""POST /v1/responses in its basic form: the request, the items of conversation and answer, the answer.

Nothing is stored: a request carries its whole conversation. What would need a store, or tools that run on the
server, is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from benthic.serve.protocol_requests import Body, Text, refuse
from benthic.serve.protocol_responses import ChatLogprob  # noqa: TC001 (pydantic reads the annotations)
from benthic.serve.protocol_structured import Schema  # noqa: TC001
from benthic.serve.protocol_tools import ToolName  # noqa: TC001

NOT_STORED = "this server stores no responses. Send the whole conversation as input."

# Known elsewhere, not offered here, with the values that change nothing.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str | None]] = {
    "background": ((False,), None),
    "context_management": ((), None),
    "conversation": ((), NOT_STORED),
    "max_tool_calls": ((), None),
    "previous_response_id": ((), NOT_STORED),
    "prompt": ((), None),
    "reasoning": (({},), None),
    "service_tier": (("auto", "default"), None),
    "store": ((False,), NOT_STORED),
    "stream_options": (({},), None),
    "truncation": (("disabled",), None),
}


class Strict(BaseModel):
    """Base of what clients send; unknown fields are ignored."""

    model_config = ConfigDict(strict=True)


class InputPart(Strict):
    """One piece of an input message's content; only text is offered."""

    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputMessage(Strict):
    """One message of the conversation; an answer's own messages can be sent back as they came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[InputPart]

    @property
    def text(self) -> str:
        """The content as one text."""
        return text_of(self.content)


class InputCall(Strict):
    """A function call of an earlier answer."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class InputCallOutput(Strict):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text | list[InputPart]

    @property
    def text(self) -> str:
        """The output as one text."""
        return text_of(self.output)


class InputReasoning(Strict):
    """An answer's reasoning, sent back; chat templates leave old reasoning out, and so is this."""

    type: Literal["reasoning"]


InputItem = InputMessage | InputCall | InputCallOutput | InputReasoning


class ResponseTool(Strict):
    """A function that the model may call; tools that run on the server are not offered."""

    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Accepted for compatibility.")


class ChosenTool(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    name: ToolName


class TextFormat(BaseModel):
    """What the answer must be."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Accepted for compatibility; a schema always binds.")

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            what = "given" if self.schema_ is None else "left out"
            msg = f"type is {self.type}, so schema must be {what}"
            raise ValueError(msg)
        return self


class TextOptions(Strict):
    """How the answer's text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = Field(None, description="Only medium: nothing is changed.")


class ResponsesBody(Body):
    """POST /v1/responses. `None` means: the server's default."""

    input: Text | Annotated[list[InputItem], Field(min_length=1)] = Field(
        description="Text, or messages, function calls and their outputs."
    )
    instructions: Text | None = Field(None, description="A system message before the others.")
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31, description="Default: what fits.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 and 0 keep every token.")
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    ignore_eos: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31, description="Lower goes first.")
    timeout_s: float | None = Field(
        None, gt=0, le=86400, allow_inf_nan=False, description="Seconds from arrival; then 408."
    )
    text: TextOptions | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: dict[str, str] | None = Field(None, description="Returned as it came.")
    stream: bool | None = None
    user: Text | None = Field(None, description="Accepted for compatibility; not used.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in UNSUPPORTED.keys() & data.keys():
                harmless, words = UNSUPPORTED[name]
                if data[name] is not None and data[name] not in harmless:
                    refuse(name, f"{name}: {words or 'not supported by this server. Leave it out.'}")
        return data

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's text carries log-probabilities."""
        return bool(self.include) or self.top_logprobs is not None


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[dict[str, Any]] = []
    logprobs: list[ChatLogprob] = []


class ReasoningText(BaseModel):
    """The text of reasoning."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


Status = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(BaseModel):
    """What the model said."""

    id: str
    type: Literal["message"] = "message"
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class OutputReasoning(BaseModel):
    """What the model thought."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: Status = "in_progress"
    summary: list[dict[str, Any]] = []
    content: list[ReasoningText] = []


class OutputCall(BaseModel):
    """A function that the model calls."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Status = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputDetails(BaseModel):
    """How many prompt tokens came out of the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """How many of the generated tokens were reasoning."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens in and out."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(BaseModel):
    """Answer of /v1/responses."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    top_p: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    truncation: Literal["disabled"] = "disabled"
    metadata: dict[str, str]
    usage: ResponseUsage | None = None


def text_of(content: str | list[InputPart]) -> str:
    """Content as one text."""
    return content if isinstance(content, str) else "".join(part.text for part in content)
