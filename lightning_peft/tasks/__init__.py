"""Ready-made LightningModules. They import transformers and torchmetrics only in their ``__init__``."""

from lightning_peft.tasks.language import LanguageModel
from lightning_peft.tasks.predictions import PredictionWriter
from lightning_peft.tasks.text import TextClassifier, TextRegressor
from lightning_peft.tasks.vision import ImageClassifier

__all__ = ["ImageClassifier", "LanguageModel", "PredictionWriter", "TextClassifier", "TextRegressor"]
