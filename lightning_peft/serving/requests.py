"""The requests that clients may send: fields, types and limits."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from lightning_peft.serving.errors import RequestError
from lightning_peft.serving.sequence import Sampling

__all__ = ["ChatRequest", "CompletionRequest", "PredictRequest", "TextRequest", "parse"]

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_MAX_INPUTS = 1024

#: fields of OpenAI's API that are ignored, because they do not change an answer
_WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")

Request = TypeVar("Request", bound=BaseModel)


class PredictRequest(BaseModel):
    """The body of ``POST /predict``.

    Attributes:
        adapter: the name of an adapter; null or absent for the base.
        inputs: one entry for each prediction.
    """

    model_config = ConfigDict(extra="forbid")
    adapter: Name | None = None
    inputs: Annotated[list[Any], Field(min_length=1, max_length=_MAX_INPUTS)]


class TextRequest(BaseModel):
    """The fields that completions and chat completions have in common."""

    model_config = ConfigDict(extra="forbid")
    model: Name
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1, le=16)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63 - 2**20)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[Name], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None

    def sampling(self, default_tokens: int, most_tokens: int) -> Sampling:
        """Return the sampling options of this request.

        Args:
            default_tokens: the value of ``max_tokens`` if the request does not have it.
            most_tokens: the maximum value of ``max_tokens``.

        Raises:
            RequestError: 400, if ``max_tokens`` is larger than ``most_tokens``.
        """
        tokens = default_tokens if self.max_tokens is None else self.max_tokens
        if tokens > most_tokens:
            raise RequestError(400, f"max_tokens: at most {most_tokens} on this server, got {tokens}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(tokens, self.temperature, self.top_p, self.top_k, self.seed, stop)


class CompletionRequest(TextRequest):
    """The body of ``POST /v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=_MAX_INPUTS)]


class Message(BaseModel):
    """One message of a conversation; its content is text."""

    model_config = ConfigDict(extra="forbid")
    role: Name
    content: str
    name: Name | None = None


class ChatRequest(TextRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _join_text(cls, messages: Any) -> Any:
        """Join content that is a list of texts; other kinds of content stay, and are refused."""
        if not isinstance(messages, list):
            return messages
        return [
            {**m, "content": _text_of(m["content"])} if isinstance(m, dict) and "content" in m else m for m in messages
        ]


def _text_of(content: Any) -> Any:
    if not isinstance(content, list) or not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return content
    return "".join(str(part.get("text", "")) for part in content)


def parse(body: bytes, kind: type[Request]) -> Request:
    """Read the body of a request.

    Raises:
        RequestError: 400, if it is not a JSON object; 422, if a field is missing, unknown or has another type. Fields
            of OpenAI's API that are not supported are refused unless they are null, rather than ignored.
    """
    try:
        content = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the body must be JSON (without NaN and Infinity)") from error
    if not isinstance(content, dict):
        raise RequestError(400, "the body must be a JSON object")
    known = kind.model_fields
    if issubclass(kind, TextRequest):
        content = {k: v for k, v in content.items() if k in known or (v is not None and k not in _WITHOUT_EFFECT)}
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        told = [f"{'.'.join(str(part) for part in e['loc'][:3])}: {e['msg'][:200]}" for e in found[:3]]
        raise RequestError(422, "; ".join(told)) from error


def _no_constant(name: str) -> float:
    raise ValueError(name)
