"""The answers of OpenAI's API for texts and conversations, built from the engine's events."""

from __future__ import annotations

import time
import uuid
from typing import Any

from lightning_peft.serving.errors import RequestError

__all__ = ["TextAnswer", "error_body", "models"]


class TextAnswer:
    """An answer that is built from the engine's events.

    Args:
        model: the name that the client gave.
        chat: whether it is a chat completion.
    """

    def __init__(self, model: str, chat: bool) -> None:
        self._chat = chat
        kind = "chat.completion" if chat else "text_completion"
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "object": kind}
        self._tail = {"created": int(time.time()), "model": model}
        self._choices: dict[int, dict[str, Any]] = {}
        self._tokens: dict[int, tuple[int, int]] = {}

    def add(self, content: dict[str, Any]) -> None:
        """Add an event of the engine."""
        index, text = content["index"], content["text"]
        body: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        self._choices[index] = {"index": index, **body, "logprobs": None, "finish_reason": content["finish_reason"]}
        self._tokens[index] = content["prompt_tokens"], content["completion_tokens"]

    def chunk(self, content: dict[str, Any], first: bool) -> dict[str, Any]:
        """Return the chunk to stream for an event of the engine; ``first`` is True for the first event of a text."""
        self._tokens[content["index"]] = content["prompt_tokens"], content["completion_tokens"]
        text = content["text"]
        role = {"role": "assistant"} if first else {}
        body: dict[str, Any] = {"delta": {**role, "content": text}} if self._chat else {"text": text}
        choice = {"index": content["index"], **body, "logprobs": None, "finish_reason": content["finish_reason"]}
        return {**self._stream_head, **self._tail, "choices": [choice]}

    def usage_chunk(self, per_prompt: int) -> dict[str, Any]:
        """Return the last chunk of a stream whose client asked for the usage."""
        return {**self._stream_head, **self._tail, "choices": [], "usage": self.usage(per_prompt)}

    def body(self, per_prompt: int) -> dict[str, Any]:
        """Return the whole answer; ``per_prompt`` texts belong to each prompt."""
        choices = [self._choices[i] for i in sorted(self._choices)]
        return {**self._head, **self._tail, "choices": choices, "usage": self.usage(per_prompt)}

    def usage(self, per_prompt: int) -> dict[str, int]:
        """Return the token counts. A prompt counts once, even if several texts continue it."""
        prompts = sum(prompt for i, (prompt, _) in self._tokens.items() if i % per_prompt == 0)
        texts = sum(tokens for _, tokens in self._tokens.values())
        return {"prompt_tokens": prompts, "completion_tokens": texts, "total_tokens": prompts + texts}

    @property
    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head


def models(base: str, adapters: list[str]) -> dict[str, Any]:
    """Return the answer of ``GET /v1/models``: the base and all adapters."""
    entries = [{"id": base, "object": "model", "created": 0, "owned_by": "lightning_peft"}]
    entries += [
        {"id": n, "object": "model", "created": 0, "owned_by": "lightning_peft", "parent": base} for n in adapters
    ]
    return {"object": "list", "data": entries}


def error_body(error: RequestError) -> dict[str, Any]:
    """Return the body of an answer that refuses a request."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    code = "model_not_found" if error.status == 404 else None
    return {"error": {"message": error.message, "type": kind, "param": None, "code": code}}
