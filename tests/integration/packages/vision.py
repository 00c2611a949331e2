"""Vision models: torchvision, timm, segmentation-models-pytorch, MONAI, diffusers, open_clip, kornia, lightly."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tests.integration.packages.case import METHODS, Case


def images(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)),)


def of(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a function that calls ``name`` of a package's ``module``, which builds a model."""
    return lambda: getattr(import_module(module), name)(**options)


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return of("timm", "create_model", model_name=name, num_classes=5, **options)


def torchvision_resnet() -> nn.Module:
    block = import_module("torchvision.models.resnet").BasicBlock
    return of("torchvision.models", "ResNet", block=block, layers=[1, 1, 1, 1], num_classes=5)()


def open_clip() -> nn.Module:
    tower = {"layers": 2, "width": 16}
    vision, text = (
        {**tower, "head_width": 8, "image_size": 16, "patch_size": 8},
        {**tower, "heads": 2, "vocab_size": 32},
    )
    return import_module("open_clip").CLIP(8, vision, {**text, "context_length": 6})


class SimCLR(nn.Module):
    """A small backbone with a projection head of lightly."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = import_module("lightly.models").ResNetGenerator("resnet-9", width=0.125)
        self.head = import_module("lightly.models.modules.heads").SimCLRProjectionHead(10, 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).flatten(1))


CONVOLUTIONS = {"LoRA": {"targets": "type:Conv2d"}}
VIT = {"num_layers": 2, "num_heads": 2, "mlp_dim": 32}

CASES = {
    "torchvision ResNet": Case("torchvision", torchvision_resnet, images(3, 32, 32), CONVOLUTIONS),
    "torchvision VisionTransformer": Case(
        "torchvision",
        of("torchvision.models", "VisionTransformer", image_size=32, patch_size=8, hidden_dim=16, num_classes=5, **VIT),
        images(3, 32, 32),
        {method: {"trainable": ["heads"]} for method in METHODS},  # its head starts at zero
    ),
    "torchvision SwinTransformer": Case(
        "torchvision",
        of(
            "torchvision.models",
            "SwinTransformer",
            patch_size=[4, 4],
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=[4, 4],
            num_classes=5,
        ),
        images(3, 32, 32),
    ),
    "timm VisionTransformer": Case(
        "timm", timm("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2), images(3, 32, 32)
    ),
    "timm SwinTransformer": Case(
        "timm",
        timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)),
        images(3, 32, 32),
    ),
    "timm Eva": Case(
        "timm",
        timm("eva02_tiny_patch14_224", img_size=28, embed_dim=16, depth=2, num_heads=2),
        images(3, 28, 28),
        # Its head starts near zero. The attention reads the weight of qkv and never calls the layer.
        {
            "LoRA": {"trainable": ["head"]},
            "SSF": {"exclude": ["attn.qkv"], "trainable": ["head"]},
            "BitFit": {"trainable": ["head"]},
        },
    ),
    "timm ConvNeXt": Case("timm", timm("test_convnext"), images(3, 32, 32), {"LoRA": {"trainable": ["head.fc"]}}),
    "timm EfficientNet": Case("timm", timm("test_efficientnet"), images(3, 32, 32), CONVOLUTIONS),
    "timm ResNet": Case("timm", timm("test_resnet"), images(3, 32, 32), CONVOLUTIONS),
    "smp Unet": Case(
        "segmentation-models-pytorch",
        of(
            "segmentation_models_pytorch",
            "Unet",
            encoder_name="timm-mobilenetv3_small_minimal_100",
            encoder_weights=None,
            decoder_channels=(16, 16, 16, 8, 8),
        ),
        images(3, 32, 32),
        CONVOLUTIONS,
    ),
    "MONAI ViT": Case(
        "monai",
        of(
            "monai.networks.nets",
            "ViT",
            in_channels=1,
            img_size=16,
            patch_size=8,
            hidden_size=16,
            spatial_dims=2,
            classification=True,
            num_classes=5,
            post_activation="none",
            **VIT,
        ),
        images(1, 16, 16),
        {m: {"exclude": ["norm_cross_attn"]} for m in ("SSF", "BitFit")},  # ViT has a norm layer that it never calls
        result=lambda out: out[0],
    ),
    "MONAI UNet": Case(
        "monai",
        of(
            "monai.networks.nets",
            "UNet",
            spatial_dims=2,
            in_channels=1,
            out_channels=2,
            channels=(4, 8),
            strides=(2,),
            norm="batch",
        ),
        images(1, 16, 16),
        CONVOLUTIONS,
    ),
    "diffusers UNet2DConditionModel": Case(
        "diffusers",
        of(
            "diffusers",
            "UNet2DConditionModel",
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            layers_per_block=1,
        ),
        lambda: (*images(4, 8, 8)(), 3, *images(5, 16)()),
        result=lambda out: out.sample,
    ),
    "diffusers DiTTransformer2DModel": Case(
        "diffusers",
        of(
            "diffusers",
            "DiTTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=10,
        ),
        lambda: (*images(4, 8, 8)(), torch.tensor([1, 2]), torch.tensor([1, 2])),
        result=lambda out: out.sample,
    ),
    "open_clip CLIP": Case(
        "open-clip-torch",
        open_clip,
        lambda: (*images(3, 16, 16)(), torch.arange(12).view(2, 6)),
        result=lambda out: out[0] @ out[1].T * out[2],
    ),
    "kornia VisionTransformer": Case(
        "kornia",
        of(
            "kornia.models.vit",
            "VisionTransformer",
            image_size=16,
            patch_size=8,
            embed_dim=16,
            depth=2,
            num_heads=2,
        ),
        images(3, 16, 16),
    ),
    "lightly SimCLR": Case("lightly", SimCLR, images(3, 32, 32), CONVOLUTIONS),
}
