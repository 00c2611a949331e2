"""Ready LightningDataModules. They import transformers and datasets when they are set up, not before."""

from lightning_peft.data.language import LanguageModelData
from lightning_peft.data.text import TextClassificationData

__all__ = ["LanguageModelData", "TextClassificationData"]
