"""The names of all values that this package logs, with their units. docs/logging.md shows the same table."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CONFIG", "METRICS", "Key", "of_adapter"]


class Key(NamedTuple):
    """One logged value; ``part`` is the argument of :class:`AdapterMonitor` that turns it off, empty if none does."""

    name: str
    unit: str
    meaning: str
    part: str = ""


CONFIG = "peft"
METHODS = Key("methods", "", "class and arguments of each method, by adapter name")
TRAINABLE = Key("trainable", "parameters", "parameters that train")
TOTAL = Key("total", "parameters", "all parameters, including adapters")
PERCENT = Key("percent", "%", "trainable share of all parameters")
TRAINABLE_BYTES = Key("trainable_bytes", "bytes", "size of the trained state, as a checkpoint stores it")
TOTAL_BYTES = Key("total_bytes", "bytes", "size of the model's state, including adapters")

SAMPLES = Key("throughput/samples_per_second", "1/s", "samples of all processes per second", "throughput")
TOKENS = Key(
    "throughput/tokens_per_second",
    "1/s",
    "tokens of all processes per second, without padding; only if the batch has `input_ids`",
    "throughput",
)
STEP_TIME = Key("throughput/step_time", "s", "time per optimizer step, including data loading", "throughput")
PEAK = Key(
    "memory/peak_gb",
    "GB (10⁹ bytes)",
    "peak memory: of tensors on rank 0's GPU since the fit started; on the CPU, of the process since its start",
    "memory",
)
GRADIENT = Key("grad_norm", "", "L2 norm of the gradient of the adapter's parameters, before clipping", "norms")
BASE_GRADIENT = Key(
    "base_grad_norm",
    "",
    "the same for parameters of the base that the method trains: heads, biases, whole layers",
    "norms",
)
STEP = Key("step_norm", "", "norm of the change of the adapter's parameters in one optimizer step", "norms")
UPDATE = Key(
    "relative_update",
    "",
    "‖ΔW‖ / ‖W‖ (Frobenius) over all adapted weights; only if each ΔW is a low-rank product",
    "norms",
)
EFFECTIVE_RANK = Key(
    "effective_rank",
    "",
    "effective rank of ΔW (Roy and Vetterli 2007), mean over the adapted weights; same condition",
    "ranks",
)
RANK = Key("rank", "", "DyLoRA: rank drawn for this step", "ranks")
RANKS = Key("rank/<weight>", "", "AdaLoRA: current rank of a weight", "ranks")
RANK_TOTAL = Key("rank_total", "", "AdaLoRA: sum of these ranks", "ranks")
RANK_PLOT = Key("ranks", "image", "AdaLoRA: plot of the final ranks", "plots")

CONFIGURATION = (METHODS, TRAINABLE, TOTAL, PERCENT, TRAINABLE_BYTES, TOTAL_BYTES)
OF_RUN = (SAMPLES, TOKENS, STEP_TIME, PEAK)
OF_ADAPTER = (GRADIENT, BASE_GRADIENT, STEP, UPDATE, EFFECTIVE_RANK, RANK, RANKS, RANK_TOTAL, RANK_PLOT)
#: every key under its full name
METRICS = (
    *(key._replace(name=f"{CONFIG}/{key.name}") for key in CONFIGURATION),
    *OF_RUN,
    *(key._replace(name=f"<adapter>/{key.name}") for key in OF_ADAPTER),
)


def of_adapter(adapter: str, key: Key, weight: str = "") -> str:
    """The full name of a value of one adapter, such as ``default/grad_norm``."""
    return f"{adapter}/{key.name.replace('<weight>', weight)}"
