"""Ready-made LightningDataModules. They import transformers and datasets only in ``setup``.

Read ``base`` (splits, checks, loaders), then ``labelled`` (labels from the data), then one of the others.
"""

from lightning_peft.data.audio import AudioFolderData
from lightning_peft.data.chat import ChatData
from lightning_peft.data.generation import GenerationData
from lightning_peft.data.images import ImageFolderData
from lightning_peft.data.language import LanguageModelData
from lightning_peft.data.pairs import TextPairData
from lightning_peft.data.question import QuestionAnsweringData
from lightning_peft.data.seq2seq import SequenceToSequenceData
from lightning_peft.data.text import TextClassificationData, TextRegressionData
from lightning_peft.data.tokens import TokenClassificationData
from lightning_peft.data.vision import ImageData

__all__ = [
    "AudioFolderData",
    "ChatData",
    "GenerationData",
    "ImageData",
    "ImageFolderData",
    "LanguageModelData",
    "QuestionAnsweringData",
    "SequenceToSequenceData",
    "TextClassificationData",
    "TextPairData",
    "TextRegressionData",
    "TokenClassificationData",
]
