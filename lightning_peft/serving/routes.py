"""The HTTP routes: check a request, hand it to the process that owns the model, and send its answer."""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from litserve.specs.base import LitSpec
from litserve.utils import ResponseBufferItem

from lightning_peft.serving import openai
from lightning_peft.serving.engine import Event, GenerateJob, PredictJob
from lightning_peft.serving.errors import RequestError
from lightning_peft.serving.metrics import Metrics
from lightning_peft.serving.pool import AdapterFolder
from lightning_peft.serving.requests import ChatRequest, CompletionRequest, PredictRequest, TextRequest, parse
from lightning_peft.serving.sequence import Sampling

__all__ = ["Limits", "Routes"]


@dataclass(frozen=True)
class Limits:
    """Limits for each request, and for the queue.

    Attributes:
        max_body: the largest body of a request, in bytes.
        max_queue: the largest number of requests that run or wait; more get status 503.
        timeout: the longest time for one request, in seconds; then it is dropped with status 504.
        max_new_tokens: the largest ``max_tokens``, and the default of ``/predict`` and of chat completions.
    """

    max_body: int = 4 * 2**20
    max_queue: int = 256
    timeout: float = 60.0
    max_new_tokens: int = 256


class Routes(LitSpec):
    """All routes. They run in the HTTP process, and the model runs in another one.

    Args:
        folder: the adapters.
        base: the name of the base among the models.
        limits: the limits for each request and for the queue.
    """

    def __init__(self, folder: AdapterFolder, base: str, limits: Limits) -> None:
        super().__init__()
        self.api_path = "/predict"
        self._folder, self._base, self._limits = folder, base, limits
        self._metrics: Metrics | None = None
        self._active = 0
        self.add_endpoint("/predict", self.predict, ["POST"])
        self.add_endpoint("/v1/completions", self.completions, ["POST"])
        self.add_endpoint("/v1/chat/completions", self.chat_completions, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/metrics", self.metrics, ["GET"])

    @property
    def stream(self) -> bool:
        """True, because LitServe then accepts several messages for one request."""
        return True

    def __getstate__(self) -> dict[str, Any]:
        # The model's process gets a copy without the attributes that cannot be pickled, which it does not use.
        return {**super().__getstate__(), "_metrics": None, "_endpoints": []}

    async def predict(self, request: Request) -> Response:
        """``POST /predict``: predictions for some inputs."""
        return await self._answer("/predict", request, self._predict)

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``: continue texts."""
        return await self._answer("/v1/completions", request, self._complete)

    async def chat_completions(self, request: Request) -> Response:
        """``POST /v1/chat/completions``: answer a conversation."""
        return await self._answer("/v1/chat/completions", request, self._chat)

    async def models(self) -> Response:
        """``GET /v1/models``: the base and the adapters in the folder."""
        return _json(openai.models(self._base, self._folder.names()))

    async def metrics(self) -> Response:
        """``GET /metrics``: counts for Prometheus."""
        self._counts.active.set(self._active)
        return Response(self._counts.text(), media_type="text/plain; version=0.0.4")

    @property
    def _counts(self) -> Metrics:
        if self._metrics is None:
            self._metrics = Metrics()
        return self._metrics

    async def _answer(self, route: str, request: Request, answer: Callable[..., Awaitable[Response]]) -> Response:
        started = time.monotonic()

        def finished(status: int) -> None:
            self._counts.finished(route, status, time.monotonic() - started)

        try:
            response = await answer(request, finished)
        except RequestError as error:
            response = _json(openai.error_body(error), error.status)
            if error.retry_after is not None:
                response.headers["Retry-After"] = str(error.retry_after)
        if not isinstance(response, StreamingResponse):
            finished(response.status_code)
        return response

    async def _predict(self, request: Request, finished: Callable[[int], None]) -> Response:
        asked = parse(await self._body(request), PredictRequest)
        job = PredictJob(asked.adapter, asked.inputs, self._limits.max_new_tokens)
        events = [event.content async for event in self._ask(job, request)]
        if "predictions" in events[0]:
            return _json(events[0])
        self._counts.tokens.inc(sum(content["completion_tokens"] for content in events))
        return _json({"predictions": [c["text"] for c in sorted(events, key=lambda content: content["index"])]})

    async def _complete(self, request: Request, finished: Callable[[int], None]) -> Response:
        asked = parse(await self._body(request), CompletionRequest)
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else list(asked.prompt)
        sampling = asked.sampling(16, self._limits.max_new_tokens)  # OpenAI's default
        return await self._text(asked, self._job(asked, prompts, sampling, chat=False), request, finished)

    async def _chat(self, request: Request, finished: Callable[[int], None]) -> Response:
        asked = parse(await self._body(request), ChatRequest)
        most = self._limits.max_new_tokens
        sampling = asked.sampling(min(asked.max_completion_tokens or most, most), most)
        conversation = [message.model_dump(exclude_none=True) for message in asked.messages]
        return await self._text(asked, self._job(asked, [conversation], sampling, chat=True), request, finished)

    def _job(self, asked: TextRequest, prompts: list[Any], sampling: Sampling, chat: bool) -> GenerateJob:
        adapter = None if asked.model == self._base else asked.model
        return GenerateJob(adapter, prompts, sampling, asked.n, chat, asked.stream)

    async def _text(
        self, asked: TextRequest, job: GenerateJob, request: Request, finished: Callable[[int], None]
    ) -> Response:
        answer = openai.TextAnswer(asked.model, job.chat)
        events = self._ask(job, request)
        if not job.stream:
            async for event in events:
                self._counts.tokens.inc(event.content["completion_tokens"])
                answer.add(event.content)
            return _json(answer.body(job.count))
        first = await anext(events)  # so that an error is sent with its own status
        usage = bool((asked.stream_options or {}).get("include_usage"))

        async def chunks() -> AsyncIterator[str]:
            started: set[int] = set()
            status, event = 200, first
            try:
                while True:
                    index = event.content["index"]
                    yield _sse(answer.chunk(event.content, index not in started))
                    started.add(index)
                    if event.last:
                        break
                    event = await anext(events)
                if usage:
                    yield _sse(answer.usage_chunk(job.count))
                yield "data: [DONE]\n\n"
            except RequestError as error:
                status = error.status
                yield _sse(openai.error_body(error))
            finally:
                await events.aclose()  # type: ignore[attr-defined]  # cancels the job if the client has disconnected
                self._counts.tokens.inc(answer.usage(job.count)["completion_tokens"])
                finished(status)

        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def _ask(self, job: PredictJob | GenerateJob, request: Request) -> AsyncIterator[Event]:
        """Send a job to the model's process, and yield its events.

        Raises:
            RequestError: 503, if too many requests wait; 504, if the request took too long; other statuses if the
                model's process refuses the job.
        """
        if self._active >= self._limits.max_queue:
            raise RequestError(503, "too many requests are waiting: try again", retry_after=1)
        uid, item = uuid.uuid4().hex, ResponseBufferItem(asyncio.Event(), deque())
        until = time.monotonic() + self._limits.timeout
        self._active += 1
        self.response_buffer[uid] = item  # type: ignore[index]
        self._send(uid, job)
        done = False
        try:
            while not done:
                await self._wait(item, until, request)
                while item.response_queue:
                    (event, rows, adapters, nbytes), _ = item.response_queue.popleft()
                    self._counts.engine(rows, adapters, nbytes)
                    done = event.last
                    if event.error is not None:
                        raise event.error
                    yield event
        finally:
            self._active -= 1
            self.response_buffer.pop(uid, None)  # type: ignore[attr-defined]
            if not done:
                self._send(uid, None)

    def _send(self, uid: str, job: PredictJob | GenerateJob | None) -> None:
        """Send a job to the model's process; None cancels the one that was sent."""
        self.request_queue.put((self.response_queue_id, uid, time.monotonic(), job))  # type: ignore[attr-defined]

    async def _wait(self, item: ResponseBufferItem, until: float, request: Request) -> None:
        """Wait until the item has a new event, the time is up, or the client has disconnected."""
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise RequestError(504, f"the request took longer than {self._limits.timeout:g} s")
            try:
                await asyncio.wait_for(item.event.wait(), min(left, 1.0))
            except asyncio.TimeoutError:
                if await request.is_disconnected():
                    raise RequestError(499, "the client has disconnected") from None
                continue
            item.event.clear()
            return

    async def _body(self, request: Request) -> bytes:
        """Read the body of a request, up to the limit.

        Raises:
            RequestError: 413, if it is larger.
        """
        limit, parts, size = self._limits.max_body, [], 0
        told = request.headers.get("content-length", "0")
        if not told.isdecimal() or int(told[:20]) > limit:
            raise RequestError(413, f"the body is larger than {limit:,} bytes")
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise RequestError(413, f"the body is larger than {limit:,} bytes")
            parts.append(part)
        return b"".join(parts)


def _json(content: Any, status: int = 200) -> Response:
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(content))
    return Response(text, status, media_type="application/json")


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
