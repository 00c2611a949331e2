"""The server as a client sees it: real processes, real HTTP on the loopback."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import lightning_peft as lp
from tests.serving.modules import Regressor, save_adapters

KEY = {"Authorization": "Bearer secret"}
ROOT = Path(__file__).parents[2]


def start(*arguments: str, folder: Path, module: str = "tests.serving.modules.Regressor") -> tuple[Any, str]:
    """Start a server on a free port; returns its process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lightning_peft", "serve", "--model", module, "--adapters", str(folder)]
    log = (folder.parent / "server.log").open("w")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen([*command, "--port", str(port), *arguments], cwd=ROOT, stdout=log, stderr=log, env=env)
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return process, url
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    process.kill()
    raise RuntimeError((folder.parent / "server.log").read_text())


@pytest.fixture(scope="module")
def served(tmp_path_factory: Any) -> Iterator[tuple[str, dict[str | None, Any], Any]]:
    """The address of a server with adapters and a key, the models by adapter, and its process."""
    folder = tmp_path_factory.mktemp("served") / "adapters"
    models = save_adapters(folder, {f"t{i}": lp.LoRA(r=2, targets="all-linear", exclude=()) for i in range(6)})
    arguments = ["--api_key", "secret", "--max_body", "20KB", "--max_queue", "16", "--max_memory", "400"]
    process, url = start(*arguments, folder=folder)
    yield url, {None: Regressor(), **models}, process
    process.kill()
    process.wait()


def test_mixed_requests_get_the_answers_of_their_adapters_while_adapters_come_and_go(served: Any):
    url, models, _ = served
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    want = {name: model.eval().predict_step(x, 0).detach() for name, model in models.items()}
    with httpx.Client(headers=KEY, base_url=url) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def ask(i: int) -> bool:
            name = list(models)[i % len(models)]
            answer = client.post("/predict", json={"adapter": name, "inputs": x.tolist()})
            while answer.status_code == 503:  # the memory holds two of the six adapters
                assert answer.headers["retry-after"] == "1"
                time.sleep(0.01)
                answer = client.post("/predict", json={"adapter": name, "inputs": x.tolist()})
            return torch.allclose(torch.tensor(answer.json()["predictions"]), want[name], atol=1e-5)

        assert all(pool.map(ask, range(140)))
        counted = client.get("/metrics").text
        names = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    assert 'lightning_peft_requests_total{route="/predict",status="200"} 140.0' in counted
    assert "lightning_peft_adapters_loaded 0.0" not in counted
    assert names == ["base", *sorted(name for name in models if name)]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/predict", b"{", 400, "must be JSON"),
        ("/predict", b"[1]", 400, "JSON object"),
        ("/predict", b"[" * 15_000, 400, "must be JSON"),
        ("/predict", b'{"inputs": [NaN]}', 400, "NaN"),
        ("/predict", b'{"inputs": []}', 422, "inputs"),
        ("/predict", b'{"inputs": [[1, 2, 3, 4]], "path": "/etc"}', 422, "path"),
        ("/predict", b'{"inputs": [[1, 2, 3, 4]], "adapter": "../adapters/t0"}', 404, "no adapter"),
        ("/predict", b'{"inputs": [[1, 2, 3, 4]], "adapter": ["t0"]}', 422, "adapter"),
        ("/predict", b'{"inputs": [[1, 2, 3, 4]], "adapter": "t00"}', 404, "nearest name"),
        ("/predict", b'{"inputs": ["\\ud800"]}', 422, "inputs"),
        ("/predict", b'{"inputs": [' + b"1," * 15_000 + b"1]}", 413, "20,000 bytes"),
        ("/v1/completions", b'{"model": "base", "prompt": "x"}', 404, "not a causal language model"),
        ("/v1/completions", b'{"model": "base", "prompt": "x", "logprobs": 5}', 422, "logprobs"),
    ],
)
def test_wrong_requests_get_a_clear_answer(served: Any, path: str, body: bytes, status: int, said: str):
    answer = httpx.post(served[0] + path, content=body, headers=KEY)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_a_body_of_unknown_length_is_read_up_to_the_limit(served: Any):
    answer = httpx.post(f"{served[0]}/predict", content=(b" " * 1000 for _ in range(100)), headers=KEY)
    assert answer.status_code == 413


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"X-API-Key": "secre"}])
def test_the_key_is_required(served: Any, headers: dict[str, str]):
    for path in ("/predict", "/v1/completions"):
        assert httpx.post(served[0] + path, json={"inputs": [[0] * 4]}, headers=headers).status_code == 401
    assert httpx.get(f"{served[0]}/metrics", headers=headers).status_code == 401


def test_a_full_queue_refuses_and_sigterm_finishes_what_runs(served: Any):
    url, _, process = served
    body = {"inputs": [[0.0] * 4] * 200}
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(httpx.post, f"{url}/predict", json=body, headers=KEY, timeout=60) for _ in range(40)]
        answers = [future.result() for future in asked]
    codes = {answer.status_code for answer in answers}
    assert codes <= {200, 503}
    assert 200 in codes
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        last = pool.submit(httpx.post, f"{url}/predict", json={"inputs": [[0.0] * 4] * 900}, headers=KEY, timeout=60)
        while not last.done() and "active_requests 1.0" not in httpx.get(f"{url}/metrics", headers=KEY).text:
            pass
        process.send_signal(signal.SIGTERM)
        assert last.result().status_code == 200
    assert process.wait(timeout=30) == 0


def test_a_model_that_cannot_be_built_is_one_line(tmp_path: Path):
    (tmp_path / "in").mkdir()
    with pytest.raises(RuntimeError) as error:
        start("--model.width=3", folder=tmp_path / "in")
    assert "has no argument width" in str(error.value)
    assert "Traceback" not in str(error.value)
