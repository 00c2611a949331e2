"""transformers models whose optional methods raise instead of returning None."""

import lightning as L
import pytest
import torch
import transformers as tr
from torch import nn

import lightning_peft as lp
from lightning_peft.core.optional import config_value, input_embedding, output_embedding
from lightning_peft.formats.directory.files import read_files

TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BODY = {k: v for k, v in TEXT.items() if k != "vocab_size"}
VISION = {**BODY, "image_size": 16, "patch_size": 8}
SPEECH = {**BODY, "conv_dim": [8], "conv_stride": [4], "conv_kernel": [4], "num_feat_extract_layers": 1}
SPEECH |= {"num_conv_pos_embedding_groups": 1, "num_conv_pos_embeddings": 4, "vocab_size": 12}
SEQ2SEQ = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SEQ2SEQ |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 40}
SEQ2SEQ |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
CONV = {"hidden_sizes": [8] * 4, "depths": [1] * 4}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}

MODELS = {
    "ResNetForImageClassification": lambda: tr.ResNetConfig(embedding_size=8, **CONV),
    "ConvNextForImageClassification": lambda: tr.ConvNextConfig(**CONV),
    "MobileNetV2ForImageClassification": lambda: tr.MobileNetV2Config(depth_multiplier=0.25),
    "CLIPModel": lambda: tr.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8),
    "CLIPVisionModel": lambda: tr.CLIPVisionConfig(**VISION),
    "ViTForImageClassification": lambda: tr.ViTConfig(**VISION),
    "Wav2Vec2ForCTC": lambda: tr.Wav2Vec2Config(**SPEECH),
    "HubertForCTC": lambda: tr.HubertConfig(**SPEECH),
    "WhisperForConditionalGeneration": lambda: tr.WhisperConfig(**SEQ2SEQ, num_mel_bins=8),
    "Speech2TextForConditionalGeneration": lambda: tr.Speech2TextConfig(**SEQ2SEQ, conv_channels=8),
    "BlipForConditionalGeneration": lambda: tr.BlipConfig(
        text_config={**TEXT, "encoder_hidden_size": 16}, vision_config=VISION
    ),
    "PatchTSTForPrediction": lambda: tr.PatchTSTConfig(d_model=16, num_hidden_layers=1, num_attention_heads=2),
    "T5ForConditionalGeneration": lambda: tr.T5Config(**T5),
    "BartForConditionalGeneration": lambda: tr.BartConfig(**SEQ2SEQ),
}
TASKS = {"T5ForConditionalGeneration": "SEQ_2_SEQ_LM", "BartForConditionalGeneration": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_saved_with_the_right_task_and_loaded(name, tmp_path):
    torch.manual_seed(0)
    model = getattr(tr, name)(MODELS[name]())
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    lp.apply(model, lp.LoRA(r=2, targets=f"re:{first}"))
    lp.save_adapter(model, tmp_path)
    assert read_files(tmp_path).config["task_type"] == TASKS.get(name)
    lp.unload(model)
    lp.load_adapter(model, tmp_path)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = tr.ResNetForImageClassification(MODELS["ResNetForImageClassification"]())

    def training_step(self, batch, i):
        return self.net(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_the_trainers_checkpoint_is_saved(tmp_path):
    method = lp.LoRA(r=2, targets="type:Conv2d")
    trainer = L.Trainer(
        callbacks=[method], max_steps=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False
    )
    trainer.fit(Module(), torch.utils.data.DataLoader([0, 1]))
    assert list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("error", [NotImplementedError, AttributeError, ValueError, TypeError])
def test_a_model_method_that_raises_counts_as_missing(error):
    class Raises(nn.Linear):
        def get_input_embeddings(self):
            raise error

        get_output_embeddings = get_input_embeddings
        hidden_size = property(get_input_embeddings)

    module = Raises(2, 2)
    assert input_embedding(module) is output_embedding(module) is None
    assert config_value(module, "hidden_size", 3) == 3
    lp.inspect(nn.Sequential(module, nn.Linear(2, 2)), lp.LoRA(r=1))
