"""What a run logs about its adapters: every value against the plain computation, with CSVLogger of both packages."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_peft as lp
from lightning_peft.trainer.logs import keys
from lightning_peft.trainer.logs.norms import effective_ranks
from lightning_peft.trainer.logs.throughput import Throughput, samples_in

from .toys import Toy, loader, trainer, val_loader


def rows(root: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without empty cells."""
    with (root / "lightning_logs/version_0/metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


class Reference(L.Callback):
    """Computes what should be logged, in float64 from the parameters themselves."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        own = {n: p for n, p in module.named_parameters() if ".adapters." in n}
        self.before = {n: p.detach().double().clone() for n, p in own.items()}
        grads = torch.cat([p.grad.double().flatten() for p in own.values()])
        head = torch.cat([p.grad.double().flatten() for p in module.head.parameters()])
        self.now = {"default/grad_norm": float(grads.norm()), "default/base_grad_norm": float(head.norm())}

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        own = {n: p.detach().double() for n, p in module.named_parameters() if ".adapters." in n}
        moved = torch.cat([(own[n] - before).flatten() for n, before in self.before.items()])
        updates, weights = [], []
        for layer in (module.body[0], module.body[4]):
            adapter = layer.adapters["default"]
            updates.append(4.0 * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double())  # alpha / r = 4
            weights.append(layer.weight.double())
        entropies = []
        for sigma in map(torch.linalg.svdvals, updates):
            p = sigma[sigma > 1e-12] / sigma.sum()
            entropies.append(float((-(p * p.log()).sum()).exp()))
        norm = [torch.cat([m.flatten() for m in ms]).norm() for ms in (updates, weights)]
        self.now |= {
            "default/step_norm": float(moved.norm()),
            "default/relative_update": float(norm[0] / norm[1]),
            "default/effective_rank": sum(entropies) / len(entropies),
        }
        self.found.append(self.now)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """Two epochs of 5 steps with the callback that a fit gets by default, logged every second step."""
    root, reference = tmp_path_factory.mktemp("run"), Reference()
    fit = trainer(
        root, reference, logger=CSVLogger(root), log_every_n_steps=2, gradient_clip_val=0.01, enable_checkpointing=False
    )
    torch.manual_seed(0)
    fit.fit(Toy(), loader(), val_loader())
    return root, reference


def test_norms_and_ranks_are_those_of_the_plain_computation(run: tuple[Path, Reference]) -> None:
    root, reference = run
    logged = [row for row in rows(root) if "default/grad_norm" in row]
    assert [int(row["step"]) for row in logged] == [1, 3, 5, 7, 9]
    assert [int(row["step"]) for row in rows(root) if "loss" in row] == [1, 3, 5, 7, 9]  # Lightning's own steps
    for row in logged:
        expected = reference.found[int(row["step"])]
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-4)


def test_throughput_and_memory(run: tuple[Path, Reference]) -> None:
    logged = [row for row in rows(run[0]) if keys.STEP_TIME.name in row]
    assert len(logged) == 5
    for row in logged:
        assert float(row[keys.SAMPLES.name]) * float(row[keys.STEP_TIME.name]) == pytest.approx(8)
        assert 0.05 < float(row[keys.PEAK.name]) < 100
        assert keys.TOKENS.name not in row


def test_the_configuration_and_the_counts(run: tuple[Path, Reference]) -> None:
    peft = yaml.safe_load((run[0] / "lightning_logs/version_0/hparams.yaml").read_text())["peft"]
    assert (peft["trainable"], peft["total"], peft["methods"]["default"]["r"]) == (290, 866, 4)
    assert peft["trainable_bytes"] == 4 * 290
    assert peft["total_bytes"] == 4 * (866 + 32) + 8  # with the buffers of the norm layer: mean, variance, a count


def test_every_logged_value_is_in_the_list_of_keys(run: tuple[Path, Reference]) -> None:
    known = {key.name.replace("<adapter>", "default") for key in keys.METRICS}
    lightning = {"step", "epoch", "loss", "val_loss"}
    assert {name for row in rows(run[0]) for name in row} - lightning <= known


@pytest.mark.parametrize("part", ["throughput", "memory", "norms", "ranks"])
def test_a_part_that_is_off_is_not_logged_and_the_others_are(tmp_path: Path, part: str) -> None:
    monitor = lp.AdapterMonitor(every_n_steps=1, **{part: False})
    fit = trainer(tmp_path, monitor, logger=CSVLogger(tmp_path), log_every_n_steps=50, max_steps=2, max_epochs=1)
    fit.fit(Toy(), loader())
    logged = {name for row in rows(tmp_path) for name in row}
    for key in (*keys.OF_RUN, keys.GRADIENT, keys.STEP, keys.UPDATE, keys.EFFECTIVE_RANK):
        name = key.name if key in keys.OF_RUN else keys.of_adapter("default", key)
        if key is not keys.TOKENS:
            assert (name in logged) == (key.part != part), name


def test_ranks_of_dylora_with_accumulated_gradients(tmp_path: Path) -> None:
    method = lp.DyLoRA(r=4, trainable=["head"], seed=1)
    fit = trainer(tmp_path, method=method, logger=CSVLogger(tmp_path), log_every_n_steps=1, accumulate_grad_batches=2)
    fit.fit(Toy(), loader())
    logged = [row for row in rows(tmp_path) if "default/grad_norm" in row]
    assert [int(row["step"]) for row in logged] == list(range(fit.global_step))
    drawn = [1 + method.seed_for(step) % 4 for step in range(fit.global_step)]
    assert [float(row["default/rank"]) for row in logged] == drawn
    assert len(set(drawn)) > 1


def test_runs_of_pytorch_lightning(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.loggers import CSVLogger as Other

    class Module(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(16, 16)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fit = other.Trainer(
        accelerator="cpu", max_steps=2, log_every_n_steps=2, logger=Other(tmp_path), callbacks=[lp.LoRA(r=2)], **quiet
    )
    fit.fit(Module(), loader())
    (row,) = (row for row in rows(tmp_path) if "default/grad_norm" in row)
    assert float(row["default/step_norm"]) == pytest.approx(0.1 * float(row["default/grad_norm"]), rel=1e-4)


def test_bad_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(MisconfigurationException, match="every_n_steps must be an integer of at least 1"):
            lp.AdapterMonitor(every_n_steps=wrong)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"no adapters to monitor\. Add a method"):
        trainer(tmp_path, lp.AdapterMonitor(), method=False, logger=CSVLogger(tmp_path)).fit(Toy(), loader())
    with pytest.warns(UserWarning, match="logs nothing, because the Trainer has logger=False"):
        trainer(tmp_path, lp.AdapterMonitor(), max_steps=1).fit(Toy(), loader())
    with caplog.at_level(logging.INFO):
        one = trainer(tmp_path, lp.AdapterMonitor(), logger=CSVLogger(tmp_path), max_steps=1)
        one.fit(Toy(), loader())
    assert "CSVLogger stores no artifacts" in caplog.text


def test_counting_samples_and_tokens() -> None:
    ids, mask = torch.ones(4, 6, dtype=torch.long), torch.ones(4, 6, dtype=torch.long)
    mask[:, 4:] = 0
    assert samples_in({"meta": "text", "x": [{"y": ids}]}) == 4
    assert samples_in({"meta": "text", "count": torch.tensor(3)}) is None
    clock = Throughput()
    for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}):
        clock.count(batch, stepped=True)  # the first batch starts the clock
    values = clock.take(processes=2)
    assert values[keys.TOKENS.name] / values[keys.SAMPLES.name] == pytest.approx((4 * 4 + 4 * 6) / 8)
    assert values[keys.SAMPLES.name] * values[keys.STEP_TIME.name] == pytest.approx(2 * 4)  # two processes


def test_a_batch_of_unknown_size_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Opaque(Toy):
        def training_step(self, batch: Any, index: int) -> Any:
            return super().training_step(batch.pair, index)

    class Pair:
        def __init__(self, samples: Any) -> None:
            self.pair = torch.utils.data.default_collate(samples)

    with caplog.at_level(logging.INFO):
        fit = trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1, max_steps=3, max_epochs=1)
        fit.fit(Opaque(), loader(collate_fn=Pair))
    assert caplog.text.count("the number of samples in a Pair is not known: pass AdapterMonitor(batch_size_fn") == 1
    logged = {name for row in rows(tmp_path) for name in row}
    assert keys.STEP_TIME.name in logged
    assert keys.SAMPLES.name not in logged


def test_effective_rank_of_known_spectra() -> None:
    a = torch.eye(4, 9, dtype=torch.float64)
    for sigma, rank in (([1, 1, 1, 1], 4), ([5, 0, 0, 0], 1), ([2, 2, 0, 0], 2), ([0, 0, 0, 0], 0)):
        b = torch.eye(7, 4, dtype=torch.float64) * torch.tensor(sigma)
        assert float(effective_ranks((a @ a.mT)[None], (b.mT @ b)[None])) == pytest.approx(rank)
