"""The adapters that requests may name, and the version that each name stands for at this moment.

A version is a folder's content. It keeps its id for as long as device, inode, size and both times of its two files are
the same; each look-up asks the file system, so new folders and new content are served without a restart, and new
content never answers for old. Publish by renaming a finished folder into place.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from segue.config import ConfigError
from segue.engine.lora.adapter_path import (
    FileIdentity,
    check_adapter_name,
    identity_of,
    open_folder,
    open_regular,
    split_adapter_path,
    stat_identity,
)
from segue.engine.lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, ModelShapes, open_checkpoint
from segue.engine.lora.manifest import AdapterManifest
from segue.engine.lora.strict_json import quoted
from segue.errors import AdapterNotFoundError, AdapterRejectedError, EngineUnavailableError, SegueError

_LOCK_STRIPES = 64
# A file's times advance in ticks of up to 10 ms: a second write within one tick would leave them as they were.
_SETTLE_NS = 20_000_000
_MAX_SETTLE_ROUNDS = 25

_Identities = tuple[FileIdentity | None, FileIdentity | None]


@dataclass(slots=True, kw_only=True, eq=False)
class _Version:
    manifest: AdapterManifest
    parts: tuple[str, ...]
    identities: _Identities
    pins: int = 0
    superseded: bool = False
    handed_over: bool = False
    rejection: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """An adapter that requests may name: its manifest, or else the ``problem`` that a request for it would meet."""

    name: str
    manifest: AdapterManifest | None
    problem: SegueError | None
    users: int


class OpenedVersion:
    """A counted hold on one version: until ``close`` the version stays known, even when its folder has new content.

    ``fileno`` is the weights file's descriptor while the engine does not have it, else None. Whoever sends it to the
    engine calls ``handed_over`` right after.
    """

    def __init__(self, catalog: AdapterCatalog, version: _Version, descriptor: int | None) -> None:
        self._catalog = catalog
        self._version = version
        self._descriptor = descriptor
        self._closed = False

    @property
    def manifest(self) -> AdapterManifest:
        return self._version.manifest

    @property
    def folder(self) -> tuple[str, ...]:
        """The names of the adapter's folder, below the adapters folder."""
        return self._version.parts

    @property
    def fileno(self) -> int | None:
        """Raises EngineUnavailableError when the engine that had the descriptor is gone; look the version up again."""
        if self._version.handed_over:
            return None
        if self._descriptor is None:
            raise EngineUnavailableError("the engine was restarted")
        return self._descriptor

    def handed_over(self) -> None:
        """The engine has its own copy of the descriptor from now on."""
        self._catalog._mark_handed_over(self._version)
        self._drop_descriptor()

    def close(self) -> None:
        """End the hold: the request has ended. May be called twice."""
        if not self._closed:
            self._closed = True
            self._drop_descriptor()
            self._catalog._unpin(self._version)

    def __enter__(self) -> OpenedVersion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_descriptor(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class AdapterCatalog:
    """The adapters folder. Each visible subfolder is an adapter by its folder's name.

    Safe for use by many threads; look-ups read the file system, so they belong off the event loop. At rest it holds no
    file descriptor.
    """

    def __init__(self, root: Path, model: ModelShapes, max_rank: int) -> None:
        """``root`` itself may be a symbolic link. Raises ConfigError when it is not a folder."""
        if not root.is_dir():
            raise ConfigError(f"adapters: {root} is not a folder")
        self._root = root
        self._model = model
        self._max_rank = max_rank
        self._lock = threading.Lock()
        self._name_locks = tuple(threading.Lock() for _ in range(_LOCK_STRIPES))
        self._last_version_id = 0
        self._loaded_paths: dict[str, tuple[str, ...]] = {}
        self._unloaded: set[str] = set()
        self._current: dict[str, _Version] = {}
        self._held: dict[tuple[str, str], _Version] = {}
        self._by_id: dict[int, _Version] = {}
        self._retired: list[int] = []

    def lookup(self, name: str, version: str | None = None) -> OpenedVersion:
        """Hold the version that ``name`` stands for now, or the given one if it is that or still held by a request.

        Raises UnsafePathError, AdapterNotFoundError or AdapterRejectedError.
        """
        check_adapter_name(name)
        held = self._pin_held(name, version)
        if held is not None:
            return held
        opened = self._open_current(name)
        if version is None or version == opened.manifest.version:
            return opened
        opened.close()
        held = self._pin_held(name, version)
        if held is None:
            raise AdapterNotFoundError(f"version {quoted(version)} of adapter {quoted(name)} is not known any more")
        return held

    def load(self, name: str, path: str = "") -> OpenedVersion:
        """Make ``name`` stand for the folder ``path``, relative to the root (empty: the folder of that name).

        Raises as ``lookup``; ``name`` then stands for what it stood for before.
        """
        check_adapter_name(name)
        parts = split_adapter_path(path or name)
        with self._name_lock(name):
            opened = self._open_parts(name, parts)
            with self._lock:
                self._loaded_paths[name] = parts
                self._unloaded.discard(name)
        return opened

    def unload(self, name: str) -> None:
        """Forget ``name`` until it is loaded again or the server restarts; its users end first.

        Raises UnsafePathError or AdapterNotFoundError.
        """
        check_adapter_name(name)
        with self._name_lock(name):
            parts = self._parts(name)
            if name not in self._current:
                self._require_folder(parts)
            with self._lock:
                self._loaded_paths.pop(name, None)
                self._unloaded.add(name)
                self._supersede(name)

    def list(self) -> tuple[CatalogEntry, ...]:
        """Every adapter by name, each looked up now: this reads the headers of those that were never used."""
        root_fd = self._open_root()
        try:
            with os.scandir(root_fd) as folder:
                names = {entry.name for entry in folder if entry.is_dir(follow_symlinks=False)}
        finally:
            os.close(root_fd)
        with self._lock:
            names = (names | self._loaded_paths.keys() | self._current.keys()) - self._unloaded
        entries = (self._list_one(name) for name in sorted(names) if not name.startswith("."))
        return tuple(entry for entry in entries if entry is not None)

    def reject(self, version_id: int, message: str) -> None:
        """The engine found that a version cannot be served; new requests for it meet AdapterRejectedError."""
        with self._lock:
            version = self._by_id.get(version_id)
            if version is not None:
                version.rejection = message

    def reopen(self, version_id: int) -> None:
        """The engine could not serve a version whose content is not to blame: new requests get it as a new version."""
        with self._lock:
            version = self._by_id.get(version_id)
            if version is not None and self._current.get(version.manifest.name) is version:
                self._supersede(version.manifest.name)

    def take_retired(self) -> tuple[int, ...]:
        """Versions that the engine has and that no request will name again, each reported once."""
        with self._lock:
            retired, self._retired = tuple(self._retired), []
        return retired

    def engine_restarted(self) -> None:
        """A new engine has no version yet: each is handed over anew when it is next looked up."""
        with self._lock:
            self._retired.clear()
            for version in self._by_id.values():
                version.handed_over = False

    def _list_one(self, name: str) -> CatalogEntry | None:
        try:
            with self.lookup(name) as opened:
                users = opened._version.pins - 1
                return CatalogEntry(name=name, manifest=opened.manifest, problem=None, users=users)
        except AdapterNotFoundError:
            return None
        except SegueError as error:
            return CatalogEntry(name=name, manifest=None, problem=error, users=0)

    def _open_current(self, name: str) -> OpenedVersion:
        with self._name_lock(name):
            return self._open_parts(name, self._parts(name))

    def _open_parts(self, name: str, parts: tuple[str, ...]) -> OpenedVersion:
        root_fd = self._open_root()
        try:
            version, descriptor = self._refresh(name, parts, root_fd)
        finally:
            os.close(root_fd)
        return self._pin(version, descriptor)

    def _refresh(self, name: str, parts: tuple[str, ...], root_fd: int) -> tuple[_Version, int | None]:
        """The version of what the folder holds now, and its weights' descriptor unless the engine has it."""
        current = self._current.get(name)
        if current is not None and current.parts != parts:
            current = None
        try:
            identities, descriptor = self._look(parts, root_fd, current)
            known = current is not None and current.identities == identities
            if current is not None and known and (current.handed_over or descriptor is not None):
                return current, descriptor
            checkpoint = self._open_settled(parts, root_fd)
        except SegueError:
            if current is not None:
                with self._lock:
                    self._supersede(name)
            raise
        with self._lock:
            self._supersede(name)
            return self._add_version(name, parts, checkpoint), checkpoint.descriptor

    def _look(self, parts: tuple[str, ...], root_fd: int, current: _Version | None) -> tuple[_Identities, int | None]:
        """Both files' identities, and the weights' descriptor if they are those of ``current`` and it is needed."""
        folder_fd = open_folder(root_fd, parts)
        try:
            identities = stat_identity(folder_fd, WEIGHTS_FILE), stat_identity(folder_fd, CONFIG_FILE)
            if current is None or current.identities != identities or current.handed_over:
                return identities, None
            descriptor = open_regular(folder_fd, WEIGHTS_FILE)
        finally:
            os.close(folder_fd)
        if descriptor is not None and identity_of(os.fstat(descriptor)) != identities[0]:
            os.close(descriptor)
            descriptor = None
        return identities, descriptor

    def _open_settled(self, parts: tuple[str, ...], root_fd: int) -> Checkpoint:
        """Open the folder once its files' times are old enough to tell a later write from the last one."""
        for _ in range(_MAX_SETTLE_ROUNDS):
            identities, _ = self._look(parts, root_fd, None)
            newest_ns = max((max(identity[3:]) for identity in identities if identity is not None), default=0)
            age_ns = time.time_ns() - newest_ns
            if 0 <= age_ns < _SETTLE_NS:
                time.sleep((_SETTLE_NS - age_ns) / 1e9)
                continue
            checkpoint = open_checkpoint(root_fd, parts, self._model, self._max_rank)
            if (checkpoint.weights_identity, checkpoint.config_identity) == identities:
                return checkpoint
            os.close(checkpoint.descriptor)
        raise AdapterRejectedError("the adapter's files are being written; publish by renaming a finished folder")

    def _add_version(self, name: str, parts: tuple[str, ...], checkpoint: Checkpoint) -> _Version:
        self._last_version_id += 1
        content = repr((name, checkpoint.weights_identity, checkpoint.config_identity)).encode()
        manifest = AdapterManifest(
            version_id=self._last_version_id,
            version=f"{hashlib.sha256(content).hexdigest()[:6]}-{self._last_version_id}",
            name=name,
            identity=checkpoint.weights_identity,
            layers=checkpoint.layers,
        )
        identities = (checkpoint.weights_identity, checkpoint.config_identity)
        version = _Version(manifest=manifest, parts=parts, identities=identities)
        self._current[name] = self._by_id[manifest.version_id] = version
        return version

    def _supersede(self, name: str) -> None:
        """The name's present version answers no new request, unless one that still holds it is named by version."""
        version = self._current.pop(name, None)
        if version is not None:
            version.superseded = True
            self._held[name, version.manifest.version] = version
            self._retire_if_unused(version)

    def _retire_if_unused(self, version: _Version) -> None:
        if version.superseded and version.pins == 0:
            manifest = version.manifest
            self._held.pop((manifest.name, manifest.version), None)
            if self._by_id.pop(manifest.version_id, None) is not None and version.handed_over:
                self._retired.append(manifest.version_id)

    def _pin(self, version: _Version, descriptor: int | None) -> OpenedVersion:
        with self._lock:
            rejection = version.rejection
            if rejection is None:
                version.pins += 1
        if rejection is not None:
            if descriptor is not None:
                os.close(descriptor)
            raise AdapterRejectedError(rejection)
        return OpenedVersion(self, version, descriptor)

    def _pin_held(self, name: str, version: str | None) -> OpenedVersion | None:
        with self._lock:
            held = None if version is None else self._held.get((name, version))
            if held is None or not held.handed_over or name in self._unloaded or held.rejection is not None:
                return None
            held.pins += 1
        return OpenedVersion(self, held, None)

    def _unpin(self, version: _Version) -> None:
        with self._lock:
            version.pins -= 1
            self._retire_if_unused(version)

    def _mark_handed_over(self, version: _Version) -> None:
        with self._lock:
            version.handed_over = True

    def _parts(self, name: str) -> tuple[str, ...]:
        with self._lock:
            if name in self._unloaded:
                raise AdapterNotFoundError(f"adapter {quoted(name)} was unloaded")
            return self._loaded_paths.get(name, (name,))

    def _require_folder(self, parts: tuple[str, ...]) -> None:
        root_fd = self._open_root()
        try:
            os.close(open_folder(root_fd, parts))
        finally:
            os.close(root_fd)

    def _open_root(self) -> int:
        try:
            return os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise AdapterNotFoundError("the adapters folder cannot be opened") from error

    def _name_lock(self, name: str) -> threading.Lock:
        return self._name_locks[hash(name) % _LOCK_STRIPES]
