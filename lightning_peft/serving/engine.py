"""Decide which request runs when. One thread owns the model, and calls :meth:`Engine.step` in a loop."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.serving.errors import RequestError
from lightning_peft.serving.generator import Generator
from lightning_peft.serving.pool import AdapterPool, Loaded
from lightning_peft.serving.predictor import Predictor
from lightning_peft.serving.sequence import GeneratedText, Sampling

__all__ = ["Engine", "Event", "GenerateJob", "PredictJob"]

_LOG = logging.getLogger(__name__)


@dataclass
class PredictJob:
    """A request for predictions.

    Attributes:
        adapter: the name of the adapter; None for the base.
        inputs: one entry for each row; for a language model, texts to continue.
        max_new_tokens: for a language model: the largest number of tokens to add to each.
    """

    adapter: str | None
    inputs: list[Any]
    max_new_tokens: int


@dataclass
class GenerateJob:
    """A request for texts.

    Attributes:
        adapter: the name of the adapter; None for the base.
        prompts: texts, or conversations (lists of messages) if ``chat``.
        sampling: how to choose tokens. With a seed, text ``i`` uses ``seed + i``.
        count: how many texts to generate for each prompt.
        chat: whether prompts are conversations, to be formatted with the tokenizer's chat template.
        stream: whether to send each new part of a text at once, instead of the whole text at its end.
    """

    adapter: str | None
    prompts: list[Any]
    sampling: Sampling
    count: int = 1
    chat: bool = False
    stream: bool = False


@dataclass
class Event:
    """A message for a request: a part of its answer, or an error.

    Attributes:
        uid: the id of the request.
        content: for a prediction, ``{"predictions": [...]}``; for a text, ``{"index", "text", "finish_reason",
            "prompt_tokens", "completion_tokens"}``.
        last: whether this is the request's last message.
        error: the error, if the request failed; ``content`` is then empty.
    """

    uid: Any
    content: dict[str, Any]
    last: bool
    error: RequestError | None = None


@dataclass(eq=False)
class _Running:
    """A request that has been accepted.

    Attributes:
        uid: the id of the request.
        job: the request.
        loaded: its adapter in memory.
        answers: for a prediction, the answers so far.
        texts: the texts that are not complete, with their index.
        parts: the parts of each text so far, if they are not sent one by one.
    """

    uid: Any
    job: PredictJob | GenerateJob
    loaded: Loaded | None
    answers: list[Any] = field(default_factory=list)
    texts: dict[int, GeneratedText] = field(default_factory=dict)
    parts: dict[int, str] = field(default_factory=dict)

    @property
    def internal(self) -> str | None:
        return None if self.loaded is None else self.loaded.internal


class Engine:
    """Runs requests for one model.

    Args:
        pool: the adapters.
        predictor: runs predictions; None if the module has no ``predict_step``.
        generator: generates texts; None if the model cannot.
        max_batch_size: the largest number of rows that run together.
    """

    def __init__(
        self,
        pool: AdapterPool,
        predictor: Predictor | None,
        generator: Generator | None,
        max_batch_size: int = 32,
    ) -> None:
        self.pool, self.max_batch_size = pool, max_batch_size
        self.predictor, self.generator = predictor, generator
        self._predictions: deque[_Running] = deque()
        self._queue: deque[_Running] = deque()  # texts that wait for room in the batch
        self._running: dict[Any, _Running] = {}
        self.batch_size = 0  #: rows of the last step

    def __bool__(self) -> bool:
        """Whether any request is left."""
        return bool(self._running)

    def submit(self, uid: Any, job: PredictJob | GenerateJob) -> list[Event]:
        """Accept a request. Returns the error if it cannot be answered; None otherwise."""
        try:
            if isinstance(job, PredictJob):
                self._accept_prediction(uid, job)
            else:
                self._accept_texts(uid, job)
        except Exception as error:  # a tokenizer can raise any exception
            return [Event(uid, {}, True, _refusal(error))]
        return []

    def cancel(self, uid: Any) -> None:
        """Drop a request whose client has disconnected."""
        request = self._running.get(uid)
        if request is None:
            return
        for text in request.texts.values():
            if self.generator is not None:
                self.generator.remove(text)
        for queue in (self._predictions, self._queue):
            if request in queue:
                queue.remove(request)
        self._end(request)

    def step(self) -> list[Event]:
        """Run one batch of predictions, and give every text one token."""
        self.batch_size = 0
        return [*self._predict(), *self._generate()]

    def _accept_prediction(self, uid: Any, job: PredictJob) -> None:
        if self.predictor is not None:
            self._predictions.append(self._accept(uid, job))
            return
        if not all(isinstance(text, str) for text in job.inputs):
            raise RequestError(422, "inputs: a language model needs texts")
        self._accept_texts(uid, GenerateJob(job.adapter, job.inputs, Sampling(job.max_new_tokens)))

    def _accept_texts(self, uid: Any, job: GenerateJob) -> None:
        if self.generator is None:
            raise RequestError(404, "the served module is not a causal language model")
        prompts = [self._tokens(prompt, job) for prompt in job.prompts]
        request = self._accept(uid, job)
        for i, prompt in enumerate(p for p in prompts for _ in range(job.count)):
            seed = None if job.sampling.seed is None else job.sampling.seed + i
            request.texts[i] = self.generator.new(prompt, request.internal, job.sampling, seed)
            request.parts[i] = ""
        self._queue.append(request)

    def _tokens(self, prompt: Any, job: GenerateJob) -> list[int]:
        tokenizer = self.generator.tokenizer  # type: ignore[union-attr]
        if job.chat:
            if not getattr(tokenizer, "chat_template", None):
                raise RequestError(400, "the model's tokenizer has no chat template: use /v1/completions")
            try:
                ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
            except Exception as error:  # a template is code of the model's author, and can raise any exception
                raise RequestError(400, f"the chat template does not accept these messages: {error}") from error
        else:
            ids = tokenizer(prompt)["input_ids"]
        if not ids:
            raise RequestError(400, "the prompt is empty")
        positions = self.generator.positions  # type: ignore[union-attr]
        if positions is not None and len(ids) + job.sampling.max_tokens > positions:
            raise RequestError(
                400,
                f"the prompt has {len(ids)} tokens and max_tokens is {job.sampling.max_tokens}, but the model has "
                f"{positions} positions",
            )
        return list(ids)

    def _accept(self, uid: Any, job: PredictJob | GenerateJob) -> _Running:
        loaded = None if job.adapter is None else self.pool.acquire(job.adapter)
        request = self._running[uid] = _Running(uid, job, loaded)
        return request

    def _end(self, request: _Running) -> None:
        self._running.pop(request.uid, None)
        if request.loaded is not None:
            self.pool.release(request.loaded)

    def _predict(self) -> Iterator[Event]:
        if not self._predictions:
            return
        chosen: list[tuple[_Running, list[Any]]] = []
        room = self.max_batch_size
        for request in self._predictions:
            part = request.job.inputs[len(request.answers) :][:room]  # type: ignore[union-attr]
            chosen.append((request, part))
            room -= len(part)
            if not room:
                break
        yield from self._predicted(chosen)

    def _predicted(self, chosen: list[tuple[_Running, list[Any]]]) -> Iterator[Event]:
        """Run the inputs of some requests as one batch; if that fails, each request by itself."""
        inputs = [value for _, part in chosen for value in part]
        adapters = [request.internal for request, part in chosen for _ in part]
        try:
            answers = iter(self.predictor.run(inputs, adapters))  # type: ignore[union-attr]
        except Exception as error:
            if len(chosen) > 1:
                for one in chosen:
                    yield from self._predicted([one])
                return
            request = chosen[0][0]
            self._predictions.remove(request)
            self._end(request)
            yield Event(request.uid, {}, True, _refusal(error))
            return
        self.batch_size += len(inputs)
        for request, part in chosen:
            request.answers += [next(answers) for _ in part]
            if len(request.answers) == len(request.job.inputs):  # type: ignore[union-attr]
                self._predictions.remove(request)
                self._end(request)
                yield Event(request.uid, {"predictions": request.answers}, True)

    def _generate(self) -> Iterator[Event]:
        generator = self.generator
        if generator is None:
            return
        while self._queue and (len(generator) + len(self._queue[0].texts) <= self.max_batch_size or not len(generator)):
            for text in self._queue.popleft().texts.values():
                generator.add(text)
        if not len(generator):
            return
        self.batch_size += len(generator)
        of = {id(text): (request, i) for request in self._running.values() for i, text in request.texts.items()}
        try:
            new = generator.step()
        except Exception as error:
            generator.clear()
            for request in {id(r): r for r, _ in of.values() if r not in self._queue}.values():
                self._end(request)
                yield Event(request.uid, {}, True, _refusal(error))
            return
        for text, part in new:
            yield from self._continued(*of[id(text)], text, part)

    def _continued(self, request: _Running, index: int, text: GeneratedText, part: str) -> Iterator[Event]:
        request.parts[index] += part
        stream = request.job.stream  # type: ignore[union-attr]
        if text.finish is not None:
            del request.texts[index]
        elif not stream or not part:
            return
        if not request.texts:
            self._end(request)
        content = {
            "index": index,
            "text": part if stream else request.parts[index],
            "finish_reason": text.finish,
            "prompt_tokens": len(text.prompt),
            "completion_tokens": len(text.tokens),
        }
        yield Event(request.uid, content, not request.texts)


def _refusal(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    _LOG.error("a request failed", exc_info=error)
    return RequestError(500, "the request failed: the server's log says why")
