"""What an adapter's folder says of tokenisation: its own chat template, and a vocabulary that must be the model's."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from segue.engine.lora.adapter_path import open_folder, open_regular, read_exactly
from segue.engine.lora.catalog import OpenedVersion
from segue.errors import AdapterRejectedError

_TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_DEFAULT_TEMPLATE = "default"
_MAX_FILE_BYTES = 128 << 20
_MAX_TEMPLATE_BYTES = 1 << 20
_REMEMBERED_VERSIONS = 4096
_SHOWN_TOKENS = 3

_Struct = TypeVar("_Struct")


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _TokenizerJson(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []

    def vocabulary(self) -> dict[str, int]:
        vocab = self.model.vocab
        if isinstance(vocab, list):
            vocab = {token: token_id for token_id, (token, _) in enumerate(vocab)}
        return vocab | {token.content: token.id for token in self.added_tokens}


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    chat_template: str | list[_NamedTemplate] | None = None


class AdapterTokenizers:
    """Reads adapter folders, each version once. Its methods read files: they belong off the event loop."""

    def __init__(self, adapters_dir: Path, model_dir: Path, vocabulary: Mapping[str, int] | None) -> None:
        """``vocabulary`` is the base model's, token to id; without one every adapter's will do."""
        self._root = adapters_dir
        self._model_file = None if vocabulary is None else (model_dir / _TOKENIZER_FILE).read_bytes()
        self._vocabulary = vocabulary
        remember = functools.lru_cache(_REMEMBERED_VERSIONS)
        self._checked = remember(self._check_vocabulary)
        self._template = remember(self._read_template)

    def check_vocabulary(self, opened: OpenedVersion) -> None:
        """Raise AdapterRejectedError if the folder has a tokenizer.json with another vocabulary than the model's."""
        self._checked(opened.manifest.version_id, opened.folder)

    def chat_template(self, opened: OpenedVersion) -> str | None:
        """The folder's own chat template, None if it has none. Raises AdapterRejectedError if it cannot be read."""
        return self._template(opened.manifest.version_id, opened.folder)

    def _check_vocabulary(self, _version_id: int, folder: tuple[str, ...]) -> None:
        if self._vocabulary is None:
            return
        content = self._read(folder, _TOKENIZER_FILE, _MAX_FILE_BYTES)
        if content is None or content == self._model_file:
            return
        theirs = _decode(content, _TokenizerJson, _TOKENIZER_FILE).vocabulary()
        if theirs == self._vocabulary:
            return
        differing = sorted(token for token, _ in theirs.items() ^ self._vocabulary.items())
        shown = ", ".join(repr(token) for token in list(dict.fromkeys(differing))[:_SHOWN_TOKENS])
        raise AdapterRejectedError(
            f"the adapter's {_TOKENIZER_FILE} has another vocabulary than the base model: it differs in {shown}"
        )

    def _read_template(self, _version_id: int, folder: tuple[str, ...]) -> str | None:
        template = self._read(folder, _TEMPLATE_FILE, _MAX_TEMPLATE_BYTES)
        if template is not None:
            try:
                return template.decode()
            except UnicodeDecodeError as error:
                raise AdapterRejectedError(f"the adapter's {_TEMPLATE_FILE} is not UTF-8") from error
        content = self._read(folder, _TOKENIZER_CONFIG_FILE, _MAX_TEMPLATE_BYTES)
        if content is None:
            return None
        templates = _decode(content, _TokenizerConfig, _TOKENIZER_CONFIG_FILE).chat_template
        if not isinstance(templates, list):
            return templates
        return next((item.template for item in templates if item.name == _DEFAULT_TEMPLATE), None)

    def _read(self, folder: tuple[str, ...], name: str, max_bytes: int) -> bytes | None:
        root_fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            folder_fd = open_folder(root_fd, folder)
        finally:
            os.close(root_fd)
        try:
            descriptor = open_regular(folder_fd, name)
        finally:
            os.close(folder_fd)
        if descriptor is None:
            return None
        try:
            content = read_exactly(descriptor, max_bytes + 1, 0)
        finally:
            os.close(descriptor)
        if len(content) > max_bytes:
            raise AdapterRejectedError(f"the adapter's {name} is larger than {max_bytes} bytes")
        return content


def _decode(content: bytes, kind: type[_Struct], name: str) -> _Struct:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AdapterRejectedError(f"the adapter's {name} is malformed: {error}") from error
