"""Load-test ``lightning-peft serve`` with real HTTP on the loopback, and count answers from the wrong adapter.

Every answer is compared with what its adapter answers offline. The first part measures throughput and latency for
several numbers of adapters and of clients. The second sends requests for many adapters, while adapters are loaded,
unloaded (a quarter of them fits into memory) and replaced by other files. The third sends hostile requests.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import lightning_peft as lp
from benchmarks.measure import hardware, versions

TOKENS = 16
LAYERS, WIDTH = 4, 128


class Encoder(L.LightningModule):
    """A random transformer encoder, from a fixed seed, that classifies 16 tokens into four labels."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(256, WIDTH)
            layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True)
            self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
            self.head = nn.Linear(WIDTH, 4)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return logits (rows, 4) for tokens (rows, 16)."""
        return self.head(self.body(self.embed(batch)).mean(1))


def save_adapters(folder: Path, count: int) -> None:
    """Save ``count`` LoRA adapters of different values, named ``a0``, ``a1``, …"""
    model = Encoder()
    lp.apply(model, lp.LoRA(r=8, targets=["linear1", "linear2"]))
    trained = lp.trainable_parameters(model)
    for i in track(range(count), "save adapters"):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in trained:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        lp.save_adapter(model, folder / f"a{i}")


def offline(folder: Path, names: list[str], inputs: Tensor) -> dict[str | None, Tensor]:
    """Return the answers of each adapter and of the base."""
    model = Encoder().eval()
    answers: dict[str | None, Tensor] = {}
    with torch.inference_mode():
        answers[None] = model.predict_step(inputs, 0)
        for name in names:
            lp.load_adapter(model, folder / name, name)
            answers[name] = model.predict_step(inputs, 0)
            lp.delete_adapter(model, name)
    return answers


class Server:
    """Runs ``lightning-peft serve`` in other processes."""

    def __init__(self, folder: Path, port: int, *arguments: str) -> None:
        command = [sys.executable, "-m", "lightning_peft", "serve", "--model", "benchmarks.serving.Encoder"]
        command += ["--adapters", str(folder), "--port", str(port), "--accelerator", "cpu", *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> Server:
        for _ in range(600):
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        self.process.kill()
        raise RuntimeError("the server does not start: run lightning-peft serve to see why")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def memory(self) -> float:
        """Return the resident memory in MB of the server's largest process, which is the model's."""
        found = subprocess.run(["ps", "-o", "rss=", "-g", str(self.process.pid)], capture_output=True, text=True)
        return max(int(line) for line in found.stdout.split()) / 1000


class Client:
    """Requests predictions, and compares every answer with the correct ones.

    Args:
        url: the server's URL.
        inputs: the possible inputs.
        right: for each adapter, the correct answers for them.
    """

    def __init__(self, url: str, inputs: Tensor, right: dict[str | None, list[Tensor]]) -> None:
        self.url, self.inputs, self.right = url, inputs, right
        self.seconds: list[float] = []
        self.found: Counter[str] = Counter()

    async def ask(self, http: httpx.AsyncClient, name: str | None) -> None:
        """Send one request, and repeat it as long as the server is full."""
        i = random.randrange(len(self.inputs))
        started = time.perf_counter()
        while True:
            answer = await http.post("/predict", json={"adapter": name, "inputs": [self.inputs[i].tolist()]})
            if answer.status_code != 503:
                break
            self.found["full"] += 1
            await asyncio.sleep(0.02)
        self.seconds.append(time.perf_counter() - started)
        if answer.status_code != 200:
            self.found[f"status {answer.status_code}"] += 1
            return
        got = torch.tensor(answer.json()["predictions"][0])
        right = any(torch.allclose(got, answers[i], atol=1e-4) for answers in self.right[name])
        self.found["right" if right else "WRONG"] += 1

    async def run(self, names: list[str | None], clients: int, requests: int) -> float:
        """Send ``requests`` requests from ``clients`` clients, each for a random adapter. Returns requests/s."""
        left = iter(range(requests))
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:

            async def one() -> None:
                for _ in left:
                    await self.ask(http, random.choice(names))

            started = time.perf_counter()
            await asyncio.gather(*(one() for _ in range(clients)))
        return requests / (time.perf_counter() - started)


def loads(folder: Path, args: argparse.Namespace) -> list[str]:
    """Measure throughput and latency. Returns the lines of a table."""
    inputs = torch.randint(0, 256, (20, TOKENS), generator=torch.Generator().manual_seed(0))
    names = [f"a{i}" for i in range(max(args.mixed))]
    right = {name: [answers] for name, answers in offline(folder, names, inputs).items()}
    lines = [
        "| clients | adapters | requests/s | p50 ms | p99 ms | requests/s relative to one adapter |",
        "|---|---|---|---|---|---|",
    ]
    with Server(folder, args.port) as server:
        asyncio.run(Client(server.url, inputs, right).run(names, 8, 2 * len(names)))  # loads the adapters
        for clients in args.clients:
            rates: dict[int, float] = {}
            for count in args.mixed:
                client = Client(server.url, inputs, right)
                rates[count] = asyncio.run(client.run(names[:count], clients, args.requests))
                if client.found != {"right": args.requests}:
                    raise AssertionError(f"wrong or refused answers: {client.found}")
                ms = torch.tensor(client.seconds) * 1000
                p50, p99 = (float(ms.quantile(q)) for q in (0.5, 0.99))
                lines.append(
                    f"| {clients} | {count} | {rates[count]:.0f} | {p50:.1f} | {p99:.1f} | "
                    f"{rates[count] / rates[args.mixed[0]]:.2f} |"
                )
                Console().print(lines[-1])
    return lines


def changes(folder: Path, args: argparse.Namespace) -> list[str]:
    """Send requests while adapters are loaded, unloaded and replaced. Returns the lines of a report."""
    inputs = torch.randint(0, 256, (20, TOKENS), generator=torch.Generator().manual_seed(1))
    used = args.adapters // 10
    names = [f"a{i}" for i in range(used)]
    answers = offline(folder, names, inputs)
    # The files of an adapter may be replaced by those of the next one, so two answers are correct.
    right = {n: [answers[n], answers[names[(i + 1) % used]]] for i, n in enumerate(names)} | {None: [answers[None]]}
    copies = Path(tempfile.mkdtemp())
    for name in names:
        shutil.copytree(folder / name, copies / name)
    size = sum(p.numel() * 4 for p in _lora_parameters())
    replaced = 0

    async def replace(until: asyncio.Event) -> None:
        nonlocal replaced
        while not until.is_set():
            i = random.randrange(used)
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                part = folder / names[i] / f".{file}"
                shutil.copyfile(copies / names[(i + replaced % 2) % used] / file, part)
                part.replace(folder / names[i] / file)
            replaced += 1
            await asyncio.sleep(0.02)

    async def both(client: Client) -> float:
        done = asyncio.Event()
        task = asyncio.create_task(replace(done))
        rate = await client.run([None, *names], args.clients[-1], args.changing)
        done.set()
        await task
        return rate

    with Server(folder, args.port + 1, "--max_memory", str(size * used // 4)) as server:
        client = Client(server.url, inputs, right)
        rate = asyncio.run(both(client))
        memory = server.memory()
    found = ", ".join(f"{count:,} {what}" for what, count in sorted(client.found.items()))
    return [
        f"{args.changing:,} requests from {args.clients[-1]} clients for {used} adapters and the base, with memory for "
        f"{used // 4}, while {replaced:,} adapters were replaced: {found}; {rate:.0f} requests/s. The model's process "
        f"took {memory:.0f} MB with {args.adapters:,} adapters on disk."
    ]


def _lora_parameters() -> list[Tensor]:
    model = Encoder()
    lp.apply(model, lp.LoRA(r=8, targets=["linear1", "linear2"]))
    return list(lp.trainable_parameters(model))


def hostile(folder: Path, args: argparse.Namespace) -> list[str]:
    """Send hostile requests. Returns a table of the requests and their statuses."""
    good = [0] * TOKENS
    sent: dict[str, Any] = {
        "adapter `../a1`": {"adapter": "../a1", "inputs": [good]},
        "adapter `/etc/passwd`": {"adapter": "/etc/passwd", "inputs": [good]},
        "adapter `a1/../a2`": {"adapter": "a1/../a2", "inputs": [good]},
        "adapter `.*`": {"adapter": ".*", "inputs": [good]},
        "adapter of 1 MB": {"adapter": "a" * 10**6, "inputs": [good]},
        "adapter is a list": {"adapter": ["a1"], "inputs": [good]},
        "10,000 inputs": {"inputs": [good] * 10_000},
        "a token beyond the vocabulary": {"inputs": [[10**6] * TOKENS]},
        "a number of 400 digits": {"inputs": [[10**400] * TOKENS]},
        "ragged rows": {"inputs": [good, good[1:]]},
        "unknown field": {"inputs": [good], "class_path": "os.system"},
        "nested 10,000 deep": b"[" * 10_000,
        "not JSON": b"\xff\xfe",
        "body of 20 MB": b" " * 20_000_000,
    }
    lines = ["| request | status | message |", "|---|---|---|"]
    with Server(folder, args.port + 2) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        for what, body in sent.items():
            how = {"content": body} if isinstance(body, bytes) else {"json": body}
            try:
                answer = http.post("/predict", **how)  # type: ignore[arg-type]
                lines.append(f"| {what} | {answer.status_code} | {answer.json()['error']['message'][:100]} |")
            except httpx.WriteError:
                lines.append(f"| {what} | connection closed | |")
        after = http.post("/predict", json={"inputs": [good]})
        lines.append(f"| a good one after all of these | {after.status_code} | |")
    return lines


def main() -> None:
    """Run all parts, and write a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000, help="adapters on disk; default: %(default)s")
    parser.add_argument("--mixed", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=600, help="for each measurement; default: %(default)s")
    parser.add_argument("--changing", type=int, default=10_000, help="requests of the second part")
    parser.add_argument("--port", type=int, default=8720)
    parser.add_argument("--markdown", type=Path, help="the page to write, such as benchmarks/results/serving.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where) / "adapters"
        save_adapters(folder, args.adapters)
        model = f"{LAYERS} layers of width {WIDTH}, {TOKENS} tokens per request, LoRA r=8 on the feed-forward layers"
        packages = ", ".join(f"{package} {version}" for package, version in versions().items())
        page = [
            "# Serving: load and hostile requests\n",
            f"`python -m benchmarks.serving`; {hardware('cpu')}; {packages}. The model is an encoder with {model}. "
            "Clients, the HTTP process and the model share the cores. Every answer is compared with the offline one.\n",
            "## Adapters mixed in one server\n",
            *loads(folder, args),
            "\n## Adapters that are loaded and replaced during requests\n",
            *changes(folder, args),
            "\n## Hostile requests\n",
            *hostile(folder, args),
        ]
    print("\n".join(page))
    if args.markdown is not None:
        args.markdown.write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
