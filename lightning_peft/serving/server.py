"""Start the server: a process for HTTP, a process that owns the model, and queues between them (LitServe).

The HTTP process checks requests (``routes``) and puts jobs into LitServe's queue. The model's process takes all jobs
that have come, gives them to the ``engine``, and lets it run one step after the other. Each step's events go back
through LitServe's response queue to the requests that wait for them.
"""

from __future__ import annotations

import functools
import hmac
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import litserve as ls
from fastapi import HTTPException, Request
from lightning.pytorch.utilities.model_helpers import is_overridden
from litserve.loops.base import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from lightning_peft.serving.engine import Engine, Event
from lightning_peft.serving.generator import Generator
from lightning_peft.serving.pool import AdapterFolder, AdapterPool
from lightning_peft.serving.predictor import Inputs, Predictor
from lightning_peft.serving.routes import Limits, Routes
from lightning_peft.serving.rows_context import RowsContext

__all__ = ["Served", "serve"]

_LOG = logging.getLogger(__name__)


@dataclass
class Served:
    """The module to serve, and how.

    Attributes:
        module: the base, a LightningModule.
        network: the causal language model in it that generates; None if it does not.
        tokenizer: the tokenizer of ``network``.
        inputs: converts the inputs of ``/predict`` to batches; None for tensors.
    """

    module: L.LightningModule
    network: Any = None
    tokenizer: Any = None
    inputs: Inputs | None = None


@dataclass(frozen=True)
class _Options:
    max_batch_size: int
    max_memory: int | None
    api_key: str | None


class _API(ls.LitAPI):
    """The served model, as LitServe sees it. It is sent to the model's process, which builds the model."""

    def __init__(self, build: Callable[[], Served], folder: AdapterFolder, routes: Routes, options: _Options) -> None:
        super().__init__(spec=routes, loop=_EngineLoop())
        self._build, self._folder, self._options = build, folder, options
        #: the error if the model's process could not start, read by the process that started it
        self.failure = multiprocessing.get_context("spawn").SimpleQueue()

    def setup(self, device: str) -> None:
        """Build the model; LitServe calls it once in the model's process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, but the main process ends this one
        try:
            self.engine = _engine(self._build(), device, self._folder, self._options)
        except BaseException as error:
            self.failure.put(f"{error}" if isinstance(error, Exception) else repr(error))
            raise

    async def authorize(self, request: Request) -> None:
        """Refuse a request without the key. LitServe calls it for each route; ``/health`` needs no key."""
        if self._options.api_key is None or request.url.path == "/health":
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = given or request.headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode(), self._options.api_key.encode()):
            raise HTTPException(401, "the key is missing or wrong: send it as Authorization: Bearer KEY")


class _EngineLoop(LitLoop):
    """The loop of the model's process: take all new jobs, run one step, send its events."""

    def run(self, lit_api: Any, device: str, worker_id: int, request_queue: Any, transport: Any, *_: Any) -> None:
        engine: Engine = lit_api.engine
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(request_queue, inbox), daemon=True).start()
        to: dict[Any, int] = {}  # the response queue of each request
        while True:
            for message in _messages(inbox, wait=not engine):
                if message is None:
                    raise SystemExit  # the server has ended
                queue_id, uid, _, job = message
                if job is None:
                    engine.cancel(uid)
                    to.pop(uid, None)
                    continue
                to[uid] = queue_id
                self._send(transport, to, engine, engine.submit(uid, job))
            self._send(transport, to, engine, engine.step())

    def _send(self, transport: Any, to: dict[Any, int], engine: Engine, events: list[Event]) -> None:
        rows = engine.batch_size
        for event in events:
            queue_id = to.pop(event.uid) if event.last else to[event.uid]
            data = event, rows, len(engine.pool), engine.pool.nbytes
            status = LitAPIStatus.FINISH_STREAMING if event.last else LitAPIStatus.OK
            self.put_response(transport, queue_id, event.uid, data, status, LoopResponseType.STREAMING)
            rows = 0  # the numbers of a step are sent with one event only


def _receive(request_queue: Any, inbox: queue.SimpleQueue[Any]) -> None:
    """Move requests from LitServe's queue, which is slow to read because another process holds it, to a local one."""
    try:
        while True:
            inbox.put(request_queue.get())
    except (EOFError, OSError):
        inbox.put(None)


def _messages(inbox: queue.SimpleQueue[Any], wait: bool) -> Iterator[Any]:
    """Yield all messages in the queue; with ``wait``, wait until there is at least one."""
    if wait:
        yield inbox.get()
    while not inbox.empty():
        yield inbox.get()


def _engine(served: Served, device: str, folder: AdapterFolder, options: _Options) -> Engine:
    module = served.module.to(device).eval()
    context = RowsContext(module)
    pool = AdapterPool(module, folder, options.max_memory, before_change=context.close)
    generator = None if served.network is None else Generator(served.network, context, served.tokenizer)
    predictor = None
    if generator is None:
        if not is_overridden("predict_step", module, L.LightningModule):
            raise ValueError(
                f"{type(module).__name__} has no predict_step, which answers /predict: implement it to return one "
                "entry for each row of a batch"
            )
        predictor = Predictor(module, context, served.inputs)
    return Engine(pool, predictor, generator, options.max_batch_size)


def _stop(main: int, *_: Any) -> None:
    """Shut down cleanly: LitServe does so at a KeyboardInterrupt in its main process, ``main``."""
    raise KeyboardInterrupt if os.getpid() == main else SystemExit(0)


def serve(
    build: Callable[[], Served],
    adapters: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    base: str = "base",
    accelerator: str = "auto",
    max_batch_size: int = 32,
    max_memory: int | None = None,
    api_key: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Serve a model until the process gets SIGTERM or SIGINT; running requests are finished first.

    Args:
        build: returns the :class:`Served` module. It must be picklable, because it is called in the model's process.
        adapters: the folder of adapters.
        host: the address to listen on: ``127.0.0.1`` (this machine alone), ``0.0.0.0`` or ``::``.
        port: the port to listen on.
        base: the name of the base among the models.
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``; one device is used.
        max_batch_size: the largest number of rows that run together.
        max_memory: the maximum number of bytes for loaded adapters; None sets no limit.
        api_key: the key that clients must send as ``Authorization: Bearer KEY``; None requires no key.
        limits: the limits for each request and for the queue.

    Raises:
        FileNotFoundError: if the folder of adapters does not exist.
        RuntimeError: if the model cannot be built; the message says why.
    """
    folder, limits = AdapterFolder(adapters), limits or Limits()
    api = _API(build, folder, Routes(folder, base, limits), _Options(max_batch_size, max_memory, api_key))
    server = ls.LitServer(
        api,
        accelerator=accelerator,
        devices=1,
        timeout=False,
        disable_openapi_url=True,  # type: ignore[arg-type]
    )
    server.uvicorn_graceful_timeout = limits.timeout
    signal.signal(signal.SIGTERM, functools.partial(_stop, os.getpid()))
    try:
        server.run(
            host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning", pretty_logs=False
        )
    except RuntimeError as error:
        if api.failure.empty():
            raise
        raise RuntimeError(api.failure.get()) from error
