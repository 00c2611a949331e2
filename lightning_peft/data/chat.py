"""Data for instruction tuning: conversations in a tokenizer's chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.data.base import Example, TextDataModule
from lightning_peft.data.packing import collate_packs, pack
from lightning_peft.data.sources import find_file
from lightning_peft.pretrained import InputError

if TYPE_CHECKING:
    from datasets import Dataset

#: a template for tokenizers without one
PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


class ChatData(TextDataModule):
    """Conversations; the loss is on the assistant's messages only.

    A row is a list of messages ``{"role": ..., "content": ...}`` with the roles ``system``, ``user`` and ``assistant``.
    The tokenizer's chat template turns it into text. The loss is on the assistant's messages, including the tokens with
    which the template ends them.

    Args:
        source: The path of a json, jsonl or parquet file, or the id of a hub dataset.
        validation: If ``source`` is a file: another file. For a hub dataset: the split's name, if not ``"validation"``.
        test: The same for the test split.
        messages: The column of messages.
        role: The entry of a message that names its role (``"from"`` in ShareGPT files).
        content: The entry with its text (``"value"`` in ShareGPT files).
        chat_template: ``None`` for the tokenizer's own, ``"plain"`` for lines such as ``User: ...``, or the path of a
            file with a Jinja template.
        packing: Put several conversations into one training example of ``max_length`` tokens. They do not attend to one
            another, and no computation is spent on padding.
        batch_size: Conversations, or packs, per batch and process.
        max_length: Longer conversations are cut at the end.
        **options: ``tokenizer``, ``predict``, ``validation_fraction`` and the others of :class:`TextDataModule`.
            ``predict`` answers the last message that is not from the assistant.

    Example::

        ChatData("chats.jsonl", validation_fraction=0.05, max_length=1024, packing=True)
    """

    objective = "causal"

    def __init__(
        self,
        source: str,
        validation: str | None = None,
        test: str | None = None,
        messages: str = "messages",
        role: str = "role",
        content: str = "content",
        chat_template: str | None = None,
        packing: bool = False,
        batch_size: int = 8,
        max_length: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(
            source, validation=validation, test=test, batch_size=batch_size, max_length=max_length, **options
        )
        self.messages, self.role, self.content = messages, role, content
        self.chat_template, self.packing = chat_template, packing
        self.columns = (messages,)

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer and its template, and check the conversations."""
        self.load_tokenizer()
        if self.chat_template is not None:
            plain = self.chat_template == "plain"
            self.tokenizer.chat_template = PLAIN if plain else find_file(Path(self.chat_template)).read_text("utf-8")
        if self.tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template, so it cannot turn messages into text: pass chat_template='plain', "
                "or the path of a Jinja file, to ChatData."
            )
        super().setup(stage)

    def check(self, table: Dataset, split: str) -> None:
        """Check that every row has messages, and an answer to learn except in ``predict``."""
        for row, value in enumerate(table[self.messages][:]):
            roles = [message["role"] for message in self.conversation(value, split, row)]
            if split != "predict" and "assistant" not in roles:
                raise InputError(
                    f"row {row} of {self.where(split)!r} has no message of the assistant, so there is nothing to learn."
                )

    def conversation(self, value: Any, split: str, row: int) -> list[dict[str, str]]:
        """The messages of a row, with the entries ``role`` and ``content``.

        Raises:
            InputError: if the value is not a list of messages.
        """
        try:
            found = [{"role": str(m[self.role]), "content": m[self.content].strip()} for m in value]
        except (TypeError, KeyError, AttributeError):
            found = []
        if not found:
            raise InputError(
                f"row {row} of {self.where(split)!r} does not have a list of messages with {self.role!r} and "
                f"{self.content!r} in the column {self.messages!r}, but {str(value)[:80]!r}."
            )
        return [{**message, "role": _ROLES.get(message["role"], message["role"])} for message in found]

    def examples(self, rows: list[dict[str, Any]], split: str) -> list[Example]:
        """Tokenize conversations; ``labels`` are -100 except on the assistant's messages."""
        found = [self._example(self.conversation(row[self.messages], split, i), split, i) for i, row in enumerate(rows)]
        self.check_lengths([len(example["input_ids"]) for example in found], split)
        return pack(found, self.max_length) if self.packing and split == "train" else found

    def collate(self, examples: list[Example], split: str) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, ``(batch, longest)``; packed examples have ``position_ids``
        instead of a mask. In ``predict``, prompts are padded on the left and have no labels."""
        if split == "predict":
            return self.pad(examples, "left")
        if "position_ids" in examples[0]:
            return collate_packs(examples, self.tokenizer.pad_token_id)
        from transformers import DataCollatorForTokenClassification

        fields = [{name: example[name] for name in ("input_ids", "labels")} for example in examples]
        return dict(DataCollatorForTokenClassification(self.tokenizer)(fields))

    def _example(self, messages: list[dict[str, str]], split: str, row: int) -> Example:
        if split == "predict":
            while messages[-1]["role"] == "assistant" and len(messages) > 1:
                messages = messages[:-1]
            return {"input_ids": self._ids(self._render(messages, prompt=True))[-self.max_length :]}
        ids: list[int] = []
        labels: list[int] = []
        for text, is_answer in self._pieces(messages, split, row):
            piece = self._ids(text)
            end = self.tokenizer.eos_token
            if is_answer and end is not None and end not in text:  # generation must learn where an answer ends
                piece.append(self.tokenizer.eos_token_id)
            ids += piece
            labels += piece if is_answer else [-100] * len(piece)
        if all(label == -100 for label in labels[: self.max_length]):
            first = next(i for i, label in enumerate(labels) if label != -100)
            raise InputError(
                f"row {row} of {self.where(split)!r}: its first answer begins after {first} tokens, beyond "
                f"max_length={self.max_length}: pass a larger max_length, or shorten the row."
            )
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}

    def _pieces(self, messages: list[dict[str, str]], split: str, row: int) -> list[tuple[str, bool]]:
        """The text of a conversation up to its last answer, in pieces; True marks an answer with its end tokens."""
        pieces: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._render(messages[:i], prompt=True), self._render(messages[: i + 1])
            if not (before.startswith(done) and after.startswith(before)):
                raise InputError(
                    f"row {row} of {self.where(split)!r}: the chat template changes earlier text when it adds a "
                    "message, so the answers cannot be located: pass another chat_template."
                )
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return pieces

    def _render(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prepared_with(self) -> str:
        return f"{super()._prepared_with()} {self.tokenizer.chat_template}"
