"""Ready LightningModules. They import transformers and torchmetrics when they are built, not before."""

from lightning_peft.tasks.language import LanguageModel
from lightning_peft.tasks.text import TextClassifier

__all__ = ["LanguageModel", "TextClassifier"]
