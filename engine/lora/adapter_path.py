"""Opening adapter folders and files without ever leaving the adapters folder.

Names and paths come from requests, and the folders from whoever writes there. Every component is opened relative to its
parent's descriptor and no symbolic link is followed, so what was checked is what is read.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import NoReturn

from segue.engine.lora.strict_json import quoted
from segue.errors import AdapterNotFoundError, AdapterRejectedError, UnsafePathError

MAX_COMPONENT_BYTES = 255
MAX_PATH_BYTES = 1024

FileIdentity = tuple[int, int, int, int, int]
"""Device, inode, size, mtime_ns and ctime_ns: as long as they are the same, so is the content."""

_URL = re.compile(r"^(?:[A-Za-z][A-Za-z0-9+.-]*://|(?:https?|ftp|file|s3|gs|hf|data):)", re.IGNORECASE)
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def identity_of(status: os.stat_result) -> FileIdentity:
    """The identity of a file's content."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def check_adapter_name(name: str) -> None:
    """Raise UnsafePathError unless ``name`` can be the name of one visible folder."""
    _refuse_url(name, "adapter.name")
    _check_component(name, "adapter.name")


def split_adapter_path(path: str) -> tuple[str, ...]:
    """The folder names of ``path``, which is relative to the adapters folder and may end in a slash.

    Raises UnsafePathError for an absolute path, a URL, ``..`` or any other name that is not one visible folder's.
    """
    _refuse_url(path, "path")
    if path.startswith("/"):
        raise UnsafePathError.of("path", "must be relative to the adapters folder")
    if len(path.encode("utf-8", "replace")) > MAX_PATH_BYTES:
        raise UnsafePathError.of("path", f"must not be longer than {MAX_PATH_BYTES} bytes")
    parts = tuple(path.removesuffix("/").split("/"))
    for part in parts:
        _check_component(part, "path")
    return parts


def open_folder(root_fd: int, parts: tuple[str, ...]) -> int:
    """A descriptor of the folder ``parts`` below ``root_fd``; the caller owns it.

    Raises AdapterNotFoundError when there is no such folder, UnsafePathError when a component is a symbolic link, a
    FIFO, a device or a socket, and AdapterRejectedError when it must not be read.
    """
    name = "/".join(parts)
    parent = os.dup(root_fd)
    for part in parts:
        try:
            child = os.open(part, _FOLDER_FLAGS, dir_fd=parent)
        except FileNotFoundError:
            raise AdapterNotFoundError(f"no adapter {quoted(name)}") from None
        except PermissionError:
            raise AdapterRejectedError(f"the folder of adapter {quoted(name)} may not be read") from None
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            _refuse_non_folder(parent, part, name)
        finally:
            os.close(parent)
        parent = child
    return parent


def open_regular(folder_fd: int, name: str) -> int | None:
    """A descriptor of the regular file ``name`` in a folder, None when there is none; the caller owns it.

    Never blocks on a FIFO. Raises UnsafePathError for a symbolic link or anything else that is not a regular file, and
    AdapterRejectedError when it must not be read.
    """
    try:
        descriptor = os.open(name, _FILE_FLAGS, dir_fd=folder_fd)
    except FileNotFoundError:
        return None
    except PermissionError:
        raise AdapterRejectedError(f"{name} may not be read") from None
    except OSError as error:
        # ENXIO: a socket, or a device without a driver.
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV):
            raise UnsafePathError.of("path", f"{name} is not a regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafePathError.of("path", f"{name} is not a regular file")
    return descriptor


def stat_identity(folder_fd: int, name: str) -> FileIdentity | None:
    """The identity of ``name`` in a folder, a symbolic link's own if it is one; None when there is no such file.

    Raises AdapterRejectedError when the folder must not be searched.
    """
    try:
        return identity_of(os.stat(name, dir_fd=folder_fd, follow_symlinks=False))
    except FileNotFoundError:
        return None
    except PermissionError:
        raise AdapterRejectedError(f"{name} may not be read") from None


def read_exactly(descriptor: int, size_bytes: int, offset: int) -> bytes:
    """``size_bytes`` bytes at ``offset``, fewer only where the file ends before."""
    pieces = []
    while size_bytes > 0:
        piece = os.pread(descriptor, size_bytes, offset)
        if not piece:
            break
        pieces.append(piece)
        size_bytes -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def _refuse_url(text: str, field: str) -> None:
    if _URL.match(text):
        raise UnsafePathError.of(field, "must not be a URL: adapters are folders of the adapters folder")


def _check_component(part: str, field: str) -> None:
    problem = ""
    if not part:
        problem = "must not be empty or have empty parts"
    elif part in (".", ".."):
        problem = "must not contain '.' or '..'"
    elif part.startswith("."):
        problem = "must not start with a dot"
    elif "/" in part:
        problem = "must not contain '/'"
    elif "\0" in part or not part.isprintable():
        problem = "must not contain NUL or other control characters"
    elif len(part.encode("utf-8", "replace")) > MAX_COMPONENT_BYTES:
        problem = f"must not be longer than {MAX_COMPONENT_BYTES} bytes"
    if problem:
        raise UnsafePathError.of(field, problem)


def _refuse_non_folder(parent_fd: int, part: str, name: str) -> NoReturn:
    """Raise what the component that could not be opened as a folder deserves."""
    try:
        mode = os.stat(part, dir_fd=parent_fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        raise AdapterNotFoundError(f"no adapter {quoted(name)}") from None
    if stat.S_ISREG(mode):
        raise AdapterNotFoundError(f"no adapter {quoted(name)}: it is a file, an adapter is a folder")
    raise UnsafePathError.of("path", f"{quoted(part)} is not an ordinary folder")
