"""The request bodies of the HTTP API: every field, its bounds and its default.

Fields this server does not know are ignored, as OpenAI's own API does with clients newer than itself; fields
that it knows but does not offer are refused by name (`UNSUPPORTED`), because ignoring them would change the
answer.
Numbers are not converted from text: `"temperature": "1"` is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from benthic.serve.protocol_structured import (  # noqa: TC001 (pydantic reads the annotations)
    Choices,
    ResponseFormat,
    Schema,
    StructuredOutputs,
)
from benthic.serve.protocol_tools import CalledTool, Tool, ToolChoice  # noqa: TC001


def _utf8(text: str) -> str:
    """JSON can write half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        msg = f"character {error.start} is half of a surrogate pair, which is not valid text"
        raise ValueError(msg) from None
    return text


def refuse(param: str, message: str) -> NoReturn:
    """Raise an error about the whole body that still names the field at fault."""
    kind = "contradiction"
    raise PydanticCustomError(kind, "{why}", {"why": message, "param": param})


Text = Annotated[str, AfterValidator(_utf8)]
StopString = Annotated[Text, StringConstraints(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]

# Known elsewhere, not offered here; the value that changes nothing is accepted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "custom_logit_processor": (),
    "documents": ([],),
    "ebnf": (),
    "function_call": ("none",),
    "functions": ([],),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "lora_path": (),
    "max_new_tokens": (),
    "min_new_tokens": (),
    "modalities": (["text"],),
    "no_stop_trim": (False,),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning_effort": (),
    "regex": (),
    "repetition_detection": (),
    "return_hidden_states": (False,),
    "separate_reasoning": (True,),
    "stop_regex": ([],),
    "suffix": ("",),
    "thinking": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "vllm_xargs": ({},),
    "web_search_options": (),
}

INSTEAD: dict[str, str] = {
    "chat_template": "Start the server with --chat-template FILE.",
    "ebnf": "Send structured_outputs with a grammar (Lark or GBNF).",
    "functions": "Send tools.",
    "function_call": "Send tool_choice.",
    "json_schema": "Send response_format or structured_outputs.",
    "max_new_tokens": "Send max_tokens.",
    "min_new_tokens": "Send min_tokens.",
    "reasoning_effort": "Send what the chat template reads as chat_template_kwargs.",
    "regex": "Send structured_outputs with a regex.",
    "thinking": 'Send chat_template_kwargs, as {"thinking": true}.',
}
"""What does the same here; the others can only be left out."""


class StreamOptions(BaseModel):
    """What a stream carries beside text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: Text | None = Field(None, description="A name that /v1/models lists. Default: the first.")


class SamplingBody(Body):
    """Fields that completions and chat completions share. `None` means: the server's default."""

    also_unsupported: ClassVar[frozenset[str]] = frozenset()

    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 and 0 keep every token.")
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, allow_inf_nan=False)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        None, max_length=1024, description="Token id to what is added to its logit."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=128)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=64)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=1024)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Write tokens of log-probabilities as `token_id:7`."
    )
    return_token_ids: bool | None = Field(None, description="Add the ids of prompt and answer.")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | Text | None = Field(None, description="Older name of structured_outputs.json.")
    guided_regex: Text | None = Field(None, description="Older name of structured_outputs.regex.")
    guided_choice: Choices | None = Field(None, description="Older name of structured_outputs.choice.")
    guided_grammar: Text | None = Field(None, description="Older name of structured_outputs.grammar.")
    priority: int | None = Field(None, ge=-(2**31), lt=2**31, description="Lower goes first.")
    timeout_s: float | None = Field(
        None, gt=0, le=86400, allow_inf_nan=False, description="Seconds from arrival; then 408."
    )
    kv_transfer_params: dict[str, Any] | None = Field(
        None, description="Hand-over between a prefill and a decode server, in vLLM's words."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="Accepted for compatibility; not used.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        """Raises: PydanticCustomError naming the first field that this server knows of but does not offer."""
        if isinstance(data, dict):
            for name in (UNSUPPORTED.keys() | cls.also_unsupported) & data.keys():
                value = data[name]
                if value is not None and value not in UNSUPPORTED.get(name, ()):
                    remedy = INSTEAD.get(name, "Leave it out.")
                    refuse(name, f"{name} is not supported by this server. {remedy}")
        return data

    @model_validator(mode="after")
    def _check_pairs(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            refuse(
                "stream_options",
                "stream_options is set but stream is not true. Set stream=true or leave stream_options out.",
            )
        if self.stream and self.prompt_logprobs is not None:
            refuse(
                "prompt_logprobs", "prompt_logprobs cannot be streamed. Leave out stream or prompt_logprobs."
            )
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1)]
    ) = Field(description="Text, token ids, or a list of either.")
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="Default 16.")
    best_of: int | None = Field(
        None,
        ge=1,
        le=128,
        description="Generate so many and return the n likeliest, by mean log-probability.",
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    add_special_tokens: bool | None = Field(None, description="Default true.")

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionBody:
        best_of, n = self.best_of, self.n or 1
        if best_of is None or best_of == n:
            return self
        if best_of < n:
            refuse("best_of", f"best_of = {best_of} is below n = {n}. Raise best_of or lower n.")
        if self.stream:
            msg = f"best_of = {best_of} cannot be streamed: the likeliest is known at the end. Leave out one."
            refuse("best_of", msg)
        return self


class TextPart(BaseModel):
    """One piece of a message's content."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[CalledTool] | None = Field(None, description="Of an assistant's earlier turn.")
    tool_call_id: Text | None = Field(None, description="Which call a tool's message answers.")
    reasoning_content: Text | None = Field(
        None, description="Of an assistant's earlier turn, for chat templates that show it."
    )
    prefix: bool | None = Field(
        None, description="Of an assistant's last message: go on with it, in DeepSeek's words."
    )

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            refuse("messages", f"a message of role {self.role} has tool_calls, but only an assistant calls")
        if self.content is None and not self.tool_calls:
            refuse("messages", f"a message of role {self.role} has neither content nor tool_calls")
        return self

    def as_template_input(self) -> dict[str, Any]:
        """Role and plain text, and what else there is, as chat templates expect them."""
        parts = self.content
        text = "".join(part.text for part in parts) if isinstance(parts, list) else parts
        others = {
            "name": self.name,
            "tool_calls": [call.model_dump() for call in self.tool_calls or ()] or None,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        given = {key: value for key, value in others.items() if value is not None}
        return {"role": self.role, "content": text, **given}


class TemplateBody(BaseModel):
    """Fields that steer the chat template."""

    messages: list[ChatMessage] | None = Field(min_length=1)
    add_generation_prompt: bool | None = Field(None, description="Default true.")
    continue_final_message: bool | None = Field(
        None, description="Go on with the last message, which is not ended."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables for the chat template, e.g. enable_thinking."
    )
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = Field(None, description="Default auto where there are tools.")

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the last message."""
        return bool(self.continue_final_message or (self.messages and self.messages[-1].prefix))

    @model_validator(mode="after")
    def _check_continued(self) -> TemplateBody:
        messages = self.messages or []
        if any(message.prefix for message in messages[:-1]):
            refuse("messages", "a message with prefix = true must be the last one")
        if not self.continues:
            return self
        if self.add_generation_prompt:
            refuse(
                "add_generation_prompt",
                "add_generation_prompt begins a message, but the last one is to go on. Leave one out.",
            )
        if messages and (messages[-1].role != "assistant" or not messages[-1].content):
            refuse("messages", "the last message is to go on, so it must be an assistant's and not empty")
        return self


class ChatBody(SamplingBody, TemplateBody):
    """POST /v1/chat/completions."""

    also_unsupported: ClassVar[frozenset[str]] = frozenset({"best_of"})

    messages: list[ChatMessage] = Field(min_length=1)  # type: ignore[assignment]
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="Default: what fits.")
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Older name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include_reasoning: bool | None = Field(None, description="False leaves reasoning out of the answer.")
    parallel_tool_calls: bool | None = Field(
        None,
        description="False bounds tool_choice=required to one call; what the model does freely is its own.",
    )
    add_special_tokens: bool | None = Field(None, description="Beside the template's. Default false.")
    echo: bool | None = Field(None, description="Only false: a conversation is not echoed.")

    @model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        if self.echo:
            refuse("echo", "echo is not supported in chat. Leave it out.")
        if self.top_logprobs and not self.logprobs:
            refuse(
                "top_logprobs",
                f"top_logprobs = {self.top_logprobs} but logprobs is not true. Set logprobs=true.",
            )
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            refuse(
                "max_tokens",
                f"max_tokens = {self.max_tokens} but max_completion_tokens = {self.max_completion_tokens}. "
                "Set one of them.",
            )
        return self


class TokenizeBody(Body, TemplateBody):
    """POST /tokenize: `prompt`, or `messages` to go through the chat template."""

    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="Default true for prompt, false for messages.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            refuse("prompt", "give exactly one of prompt and messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[TokenId]
