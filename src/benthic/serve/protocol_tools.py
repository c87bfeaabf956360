"""Request fields about tools: what may be called, what must be, and the calls of earlier turns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class FunctionTool(BaseModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    model_config = ConfigDict(strict=True)

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Accepted for compatibility.")


class Tool(BaseModel):
    """One tool."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: FunctionTool

    def as_template_input(self) -> dict[str, Any]:
        """As chat templates expect it."""
        return self.model_dump(exclude_none=True)


class NamedFunction(BaseModel):
    """The name of a function."""

    model_config = ConfigDict(strict=True)

    name: ToolName


class NamedTool(BaseModel):
    """The one tool that must be called."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(BaseModel):
    """A function that was called, with its arguments as JSON text."""

    model_config = ConfigDict(strict=True)

    name: str
    arguments: str


class CalledTool(BaseModel):
    """A call of an earlier turn."""

    model_config = ConfigDict(strict=True)

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
