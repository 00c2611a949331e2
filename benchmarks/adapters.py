"""Time adapter operations here and in PEFT: inject, save, load a second one, switch, merge, unmerge, unload.

    python -m benchmarks.adapters --threads 2 --markdown benchmarks/results/adapters.md     # 1.1 billion parameters
    python -m benchmarks.adapters --size tiny --repeats 3

Both libraries take turns on the same base, a random Llama of TinyLlama's shape, with the same LoRA on every linear
layer. Both load the second adapter from the same directory. Their outputs are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import lightning_peft as lp
from benchmarks.measure import Spread, add_run_options, hardware, paired_ratio, parse_line, versions

#: hidden, intermediate, layers, heads, key heads, vocabulary; "full" is TinyLlama-1.1B
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 100),
    "small": (512, 1408, 8, 8, 2, 8_000),
    "full": (2048, 5632, 22, 32, 4, 32_000),
}
OPERATIONS = ("inject", "save", "load second", "switch", "merge", "unmerge", "unload")

#: the reason, for operations in which this library is slower
WHY = {
    "save": "every tensor is copied and checked, the header is read back, and a fingerprint of the base and a model "
    "card are written.",
    "load second": "the base's fingerprint and every tensor are checked before anything is changed.",
    "merge": "the sum is computed in float32, rounded once and checked for NaN and infinity, and the originals are "
    "kept, so that unmerge is exact; PEFT rounds the change to the weight's dtype, adds it, and subtracts it "
    "again to unmerge.",
}


def build(size: str, dtype: torch.dtype) -> nn.Module:
    """The base on the meta device, without values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, key_heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device="cpu")
    # its buffers are computed in __init__, so they cannot be on the meta device
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Fill the base with copies of one block of random numbers, because a billion draws would take long."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        flat = parameter.view(-1)
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block[: len(part)])


class Ours:
    """The operations in this library."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        self.model, self.rank = base, rank

    def inject(self) -> None:
        lp.apply(self.model, lp.LoRA(r=self.rank, alpha=2 * self.rank, name="first"))

    def save(self, directory: Path) -> None:
        lp.save_adapter(self.model, directory, "first")

    def load(self, directory: Path) -> None:
        lp.load_adapter(self.model, directory, name="second")

    def switch(self) -> None:
        lp.set_active(self.model, "second")

    def merge(self) -> None:
        lp.merge(self.model, "second")

    def unmerge(self) -> None:
        lp.unmerge(self.model)

    def unload(self) -> nn.Module:
        return lp.unload(self.model)


class Peft:
    """The operations in PEFT."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        self.model: Any = base
        self.rank = rank

    def inject(self) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(self.model, config, adapter_name="first")

    def save(self, directory: Path) -> None:
        self.model.save_pretrained(directory, save_embedding_layers=False)

    def load(self, directory: Path) -> None:
        self.model.load_adapter(directory, "second")

    def switch(self) -> None:
        self.model.set_adapter("second")

    def merge(self) -> None:
        self.model.merge_adapter(["second"])

    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    def unload(self) -> nn.Module:
        return self.model.unload()


LIBRARIES = {"ours": Ours, "peft": Peft}


def second_adapter(base: nn.Module, rank: int, directory: Path) -> None:
    """Write an adapter that changes the output, for both libraries to load."""
    lp.apply(base, lp.LoRA(r=rank, alpha=2 * rank, name="second"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.01, generator=generator)
    lp.save_adapter(base, directory, "second")
    lp.unload(base)


def run(library: Any, second: Path, scratch: Path, probe: Tensor, clock: Callable[[], float]) -> tuple[dict, dict]:
    """Run every operation once, in order. Returns the seconds of each, and the logits after some of them."""
    seconds: dict[str, float] = {}
    logits: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = clock()
        yield
        seconds[name] = clock() - start

    def look(name: str) -> None:
        with torch.no_grad():
            logits[name] = library.model(input_ids=probe).logits

    with timed("inject"):
        library.inject()
    with timed("save"):
        library.save(scratch)
    with timed("load second"):
        library.load(second)
    with timed("switch"):
        library.switch()
    look("switched")
    with timed("merge"):
        library.merge()
    look("merged")
    with timed("unmerge"):
        library.unmerge()
    with timed("unload"):
        library.model = library.unload()
    look("unloaded")
    gc.collect()
    return seconds, logits


def table(args: argparse.Namespace, times: dict[str, list[dict]], facts: list[str]) -> str:
    """The page for ``benchmarks/results``."""
    ours, peft = times["ours"], times["peft"]
    lines = [
        "# Handling an adapter",
        "",
        f"Command: `python -m benchmarks.adapters {' '.join(args.line)}`.",
        "",
        f"Hardware: {hardware('cpu')}. Versions: {', '.join(f'{k} {v}' for k, v in versions().items())}.",
        "",
        *(f"{fact}\n" for fact in facts),
        "| operation | ours, s | PEFT, s | ours / PEFT | |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name in OPERATIONS:
        mine, theirs = [t[name] for t in ours], [t[name] for t in peft]
        ratio = paired_ratio(mine, theirs)
        why = WHY.get(name, "no reason known.") if ratio.low > 1 else ""
        spread = f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})"
        lines.append(f"| {name} | {Spread.of(mine).median:.4f} | {Spread.of(theirs).median:.4f} | {spread} | {why} |")
    return "\n".join(lines) + "\n"


def size_of(directory: Path) -> int:
    """Return the size in bytes of the tensor file in a directory or in its only subfolder."""
    return max(f.stat().st_size for f in directory.rglob("adapter_model.safetensors"))


def main(line: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if the outputs of the libraries differ."""
    parser = argparse.ArgumentParser(prog="benchmarks.adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="dtype of the base")
    add_run_options(parser, repeats=5)
    args = parse_line(parser, line)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", module="peft")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(soft_wrap=True, highlight=False)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]

    base = build(args.size, getattr(torch, args.dtype))
    fill(base)
    count = sum(p.numel() for p in base.parameters())
    console.print(f"{count:,} parameters in {args.dtype}")
    probe = torch.arange(8)[None]
    plain = base(input_ids=probe).logits.detach()
    times: dict[str, list[dict]] = {name: [] for name in LIBRARIES}
    logits: dict[str, dict[str, Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        second, scratch = Path(folder, "second"), Path(folder, "scratch")
        second_adapter(base, args.rank, second)
        for repetition in range(-1, args.repeats):  # the first is a warm-up: imports, the file cache
            for name in list(LIBRARIES)[:: 1 if repetition % 2 else -1]:
                library = LIBRARIES[name](base, args.rank)
                seconds, logits[name] = run(library, second, scratch / name, probe, clock)
                # PEFT's unmerge does not restore the base exactly, so loading here would refuse it as another base
                fill(base)
                if repetition >= 0:
                    times[name].append(seconds)
                console.print(name, {k: round(v, 4) for k, v in seconds.items()})
        sizes = {name: size_of(scratch / name) for name in LIBRARIES}

    scale = plain.abs().max()
    apart = ((logits["ours"]["switched"] - logits["peft"]["switched"]).abs().max() / scale).item()
    moved = ((logits["ours"]["switched"] - plain).abs().max() / scale).item()
    restored = {name: torch.equal(found["unloaded"], plain) for name, found in logits.items()}
    facts = [
        f"{count:,} parameters in {args.dtype}, LoRA of rank {args.rank} on every linear layer, {args.repeats} "
        "repetitions in turn (median, quartiles in brackets).",
        f"The second adapter changes the logits by at most {moved:.2g} of the largest logit; the libraries differ by "
        f"at most {apart:.2g}. "
        + " ".join(
            f"After unmerging with {name} the base is {'unchanged' if ok else 'changed'}."
            for name, ok in restored.items()
        ),
        f"Files: ours {sizes['ours'] / 1e6:.1f} MB, PEFT's {sizes['peft'] / 1e6:.1f} MB.",
    ]
    page = table(args, times, facts)
    console.print(page, markup=False)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(page)
    return 0 if apart < 0.1 * moved and restored["ours"] else 1


if __name__ == "__main__":
    sys.exit(main())
