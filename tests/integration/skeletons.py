"""LightningModules as users of different fields write them, with tiny random models instead of pretrained ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PatchTSTConfig,
    PatchTSTForPrediction,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
    get_linear_schedule_with_warmup,
)

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def pretrained(build: Callable[[], nn.Module]) -> Any:
    """Build a model in eval mode with fixed weights, as ``from_pretrained`` does."""
    return seeded(build).eval()


def seeded(build: Callable[[], nn.Module]) -> Any:
    """Build new layers, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def llama() -> Any:
    config = LlamaConfig(vocab_size=32, num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, **TEXT)
    return pretrained(lambda: LlamaForCausalLM(config))


class CausalLM(L.LightningModule):
    """Builds the model in ``setup``; uses weight decay for matrices only, warm-up and perplexity."""

    def __init__(self, lr: float = 1e-2, weight_decay: float = 0.1, warmup: int = 2):
        super().__init__()
        self.save_hyperparameters()
        self.model = None

    def setup(self, stage: str) -> None:
        if self.model is None:
            self.model = llama()

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self(**batch, labels=batch["input_ids"]).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        loss = self(**batch, labels=batch["input_ids"]).loss
        self.log_dict({"val_loss": loss, "perplexity": loss.exp()})

    def predict_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(**batch).logits

    def configure_optimizers(self) -> Any:
        flat = [p for p in self.model.parameters() if p.ndim < 2]
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        groups = [{"params": matrices, "weight_decay": self.hparams.weight_decay}, {"params": flat, "weight_decay": 0}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr)
        total = self.trainer.estimated_stepping_batches
        schedule = get_linear_schedule_with_warmup(optimizer, self.hparams.warmup, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Projector(L.LightningModule):
    """A frozen vision encoder, a projector and a language model; checkpoints omit the encoder."""

    def __init__(self, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        vision = CLIPVisionConfig(image_size=8, patch_size=4, **TEXT)
        self.encoder = pretrained(lambda: CLIPVisionModel(vision))
        self.encoder.requires_grad_(False)
        self.projector = seeded(lambda: nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)))
        self.llm = llama()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        with torch.no_grad():
            features = self.encoder(pixel_values).last_hidden_state[:, 1:]
        image = self.projector(features)
        embeds = torch.cat([image, self.llm.get_input_embeddings()(input_ids)], dim=1)
        if labels is not None:
            labels = torch.cat([labels.new_full(image.shape[:2], -100), labels], dim=1)
        return self.llm(inputs_embeds=embeds, labels=labels)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(**batch, labels=batch["input_ids"]).loss

    def predict_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(**batch).logits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key in [key for key in checkpoint["state_dict"] if key.startswith("encoder.")]:
            del checkpoint["state_dict"][key]

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.projector.parameters(), "lr": 10 * self.hparams.lr},
            {"params": [p for p in self.llm.parameters() if p.requires_grad]},
        ]
        return torch.optim.AdamW(groups, lr=self.hparams.lr)


class WithCallables(L.LightningModule):
    """Gets optimizer and scheduler as callables, as LightningCLI passes them."""

    def __init__(
        self,
        width: int = 16,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.model = pretrained(
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=width, n_layer=2, n_head=2))
        )

    def forward(self, batch: dict[str, Tensor], **options: Any) -> Any:
        return self.model(**batch, **options)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(batch, labels=batch["input_ids"]).loss

    def predict_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(batch).logits

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


class Whisper(L.LightningModule):
    """Speech recognition with labels; validation generates."""

    def __init__(self, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 24))}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 8}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = WhisperConfig(
            vocab_size=32, d_model=16, num_mel_bins=4, max_target_positions=16, **sizes, **heads, **tokens
        )
        self.model = pretrained(lambda: WhisperForConditionalGeneration(config))
        self.model.generation_config.forced_decoder_ids = None

    def forward(self, input_features: Tensor, labels: Tensor) -> Any:
        return self.model(input_features=input_features, labels=labels)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        ids = self.model.generate(batch["input_features"], max_new_tokens=4)
        self.log("val_len", float(ids.shape[1]))
        self.log("val_loss", self(**batch).loss)

    def predict_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(**batch).logits

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=self.hparams.lr)


class CLIP(L.LightningModule):
    """Two towers and a symmetric contrastive loss with a learned temperature."""

    def __init__(self, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        text = {"vocab_size": 32, "max_position_embeddings": 16, "eos_token_id": 31, **TEXT}
        vision = {"image_size": 8, "patch_size": 4, **TEXT}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        self.clip = pretrained(lambda: CLIPModel(config))

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        logits = self.clip(**batch).logits_per_image
        target = torch.arange(len(logits), device=self.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
        self.log_dict({"loss": loss, "scale": self.clip.logit_scale.exp()})
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.clip.logit_scale.data.clamp_(0, 4.6052)

    def predict_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.clip(**batch).logits_per_image

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)]


class SpeechToLLM(L.LightningModule):
    """A frozen speech encoder, frames stacked and projected in front of a prompt; checkpoints hold what trains."""

    def __init__(self, lr: float = 1e-2, stack: int = 2):
        super().__init__()
        self.save_hyperparameters()
        conv = {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_conv_pos_embedding_groups": 2}
        config = Wav2Vec2Config(
            vocab_size=32, num_conv_pos_embeddings=4, mask_time_prob=0.0, feat_extract_norm="layer", **conv, **TEXT
        )
        self.speech = pretrained(lambda: Wav2Vec2Model(config))
        self.speech.freeze_feature_encoder()
        for parameter in self.speech.parameters():
            parameter.requires_grad = False
        self.adapter = seeded(lambda: nn.Sequential(nn.LayerNorm(16 * stack), nn.Linear(16 * stack, 16)))
        self.llm = llama()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.speech.eval()
        return self

    def forward(self, audio: Tensor, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        frames = self.speech(audio).last_hidden_state
        k = self.hparams.stack
        frames = frames[:, : frames.shape[1] // k * k].reshape(len(frames), -1, frames.shape[2] * k)
        speech, text = self.adapter(frames), self.llm.model.embed_tokens(input_ids)
        if labels is not None:
            labels = torch.cat([labels.new_full(speech.shape[:2], -100), labels], dim=1)
        return self.llm(inputs_embeds=torch.cat([speech, text], dim=1), labels=labels)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(**batch, labels=batch["input_ids"]).loss

    def predict_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(**batch).logits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=self.hparams.lr)


class Triplet(L.LightningModule):
    """Mean-pooled, normalised sentence embeddings and the triplet loss; one backbone for three inputs."""

    def __init__(self, lr: float = 1e-2, margin: float = 0.5):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = pretrained(lambda: BertModel(BertConfig(vocab_size=32, max_position_embeddings=16, **TEXT)))
        self.loss = nn.TripletMarginLoss(margin)

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = (input_ids != 0).long()
        hidden = self.backbone(input_ids, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(pooled, dim=-1)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.loss(self(batch["anchor"]), self(batch["positive"]), self(batch["negative"]))
        self.log("triplet", loss, on_step=True, on_epoch=True)
        return loss

    def predict_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(batch["anchor"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class AudioHead(L.LightningModule):
    """A spectrogram transformer and a fresh head with batch norm; manual optimization of two optimizers."""

    def __init__(self, lr: float = 1e-2, classes: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        config = ASTConfig(max_length=12, num_mel_bins=8, patch_size=4, frequency_stride=4, time_stride=4, **TEXT)
        self.backbone = pretrained(lambda: ASTModel(config))
        self.classifier = seeded(lambda: nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, classes)))

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.classifier(self.backbone(spectrogram).pooler_output)

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        loss = F.cross_entropy(self(batch["spectrogram"]), batch["label"])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.log("loss", loss)

    def predict_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(batch["spectrogram"])

    def configure_optimizers(self) -> Any:
        body = torch.optim.AdamW(self.backbone.parameters(), lr=self.hparams.lr)
        return body, torch.optim.SGD(self.classifier.parameters(), lr=self.hparams.lr)


class TimeSeries(L.LightningModule):
    """A patch transformer that forecasts; the learning rate drops on a plateau."""

    def __init__(self, lr: float = 1e-2, **sizes: int):
        super().__init__()
        self.save_hyperparameters()
        options = {"context_length": 16, "prediction_length": 4, "patch_length": 4, "patch_stride": 4, **sizes}
        shape = {"d_model": 16, "num_attention_heads": 2, "ffn_dim": 24, "num_hidden_layers": 2}
        config = PatchTSTConfig(num_input_channels=2, norm_type="layernorm", **options, **shape)
        self.model = pretrained(lambda: PatchTSTForPrediction(config))

    def forward(self, past_values: Tensor) -> Tensor:
        return self.model(past_values=past_values).prediction_outputs

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = F.mse_loss(self(batch["past_values"]), batch["future_values"])
        self.log("loss", loss, on_epoch=True)
        return loss

    def predict_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(batch["past_values"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}
