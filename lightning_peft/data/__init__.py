"""Ready-made LightningDataModules. They import transformers and datasets only in ``setup``."""

from lightning_peft.data.generation import GenerationData
from lightning_peft.data.language import LanguageModelData
from lightning_peft.data.text import TextClassificationData, TextRegressionData
from lightning_peft.data.vision import ImageData

__all__ = ["GenerationData", "ImageData", "LanguageModelData", "TextClassificationData", "TextRegressionData"]
