"""The base model's tokenizer: text and chats to token ids, tokens to text. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerFast

from segue.errors import AdapterRejectedError, InvalidRequestError
from segue.server.detokenize import Detokenizer, DetokenizerFactory, SilentDetokenizer
from segue.types import Message

_TOKENIZER_FILE = "tokenizer.json"
_NO_TOKENIZER = "the model has no tokenizer"


class TokenizerError(ValueError):
    """The model folder's tokenizer cannot be used. The message is one line for the operator."""


class ModelTokenizer:
    """A model's tokenizer.json and chat template. Safe for use by several threads."""

    has_text = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A file may ask for both; a prompt must be neither cut nor filled.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._detokenizers = DetokenizerFactory(self._backend)

    @classmethod
    def load(cls, model_dir: Path) -> ModelTokenizer:
        """Read the tokenizer of a model folder; nothing is downloaded. Raises TokenizerError."""
        if not (model_dir / _TOKENIZER_FILE).is_file():
            raise TokenizerError(f"{model_dir}: has no {_TOKENIZER_FILE}")
        try:
            return cls(PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise TokenizerError(f"{model_dir}: the tokenizer cannot be read: {_first_line(error)}") from error

    def vocabulary(self) -> dict[str, int]:
        """Every token, added ones too, and its id."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text, with the special tokens that the model puts around one."""
        return list(self._backend.encode(text, add_special_tokens=True).ids)

    def encode_chat(self, messages: Sequence[Message], template: str | None) -> list[int]:
        """The ids of a conversation up to where the answer begins; ``template`` takes the place of the model's own.

        Raises InvalidRequestError when there is no template or it refuses the messages, AdapterRejectedError when the
        given one is malformed.
        """
        if template is None and not self._tokenizer.chat_template:
            raise InvalidRequestError.of("chat", "neither the model nor the adapter has a chat template")
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateSyntaxError as error:
            raise AdapterRejectedError(f"the chat template is malformed: {_first_line(error)}") from error
        except jinja2.TemplateError as error:
            raise InvalidRequestError.of("chat", f"the chat template refuses it: {_first_line(error)}") from error
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def detokenizer(self) -> Detokenizer:
        """One for a new answer."""
        return self._detokenizers.create()


class NoTokenizer:
    """Takes a tokenizer's place where a model has none: prompts must be token ids, and answers have no text."""

    has_text = False

    def vocabulary(self) -> None:
        return None

    def encode(self, text: str) -> list[int]:  # noqa: ARG002
        """Raises InvalidRequestError."""
        raise InvalidRequestError.of("text", f"{_NO_TOKENIZER}: send token_ids")

    def encode_chat(self, messages: Sequence[Message], template: str | None) -> list[int]:  # noqa: ARG002
        """Raises InvalidRequestError."""
        raise InvalidRequestError.of("chat", f"{_NO_TOKENIZER}: send token_ids")

    def detokenizer(self) -> Detokenizer:
        return SilentDetokenizer()


def load_tokenizer(model_dir: Path, *, required: bool) -> ModelTokenizer | NoTokenizer:
    """The tokenizer of a model folder. Without tokenizer.json there is none, unless it is ``required``.

    Raises TokenizerError.
    """
    if required or (model_dir / _TOKENIZER_FILE).exists():
        return ModelTokenizer.load(model_dir)
    return NoTokenizer()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
