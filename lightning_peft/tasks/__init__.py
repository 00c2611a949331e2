"""Ready-made LightningModules. They import transformers and torchmetrics only in their ``__init__``.

Read ``base`` (steps, optimizer, labels from the data), then one of the others.
"""

from lightning_peft.tasks.audio import AudioClassifier
from lightning_peft.tasks.embedding import TextEmbedder
from lightning_peft.tasks.language import LanguageModel
from lightning_peft.tasks.predictions import PredictionWriter
from lightning_peft.tasks.question import QuestionAnswering
from lightning_peft.tasks.seq2seq import SequenceToSequence
from lightning_peft.tasks.text import TextClassifier, TextRegressor
from lightning_peft.tasks.tokens import TokenClassifier
from lightning_peft.tasks.vision import ImageClassifier

__all__ = [
    "AudioClassifier",
    "ImageClassifier",
    "LanguageModel",
    "PredictionWriter",
    "QuestionAnswering",
    "SequenceToSequence",
    "TextClassifier",
    "TextEmbedder",
    "TextRegressor",
    "TokenClassifier",
]
