from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from segue.engine.lora.adapter_path import check_adapter_name, open_folder, open_regular, split_adapter_path
from segue.errors import AdapterNotFoundError, InvalidRequestError, StatusCode, UnsafePathError
from tests.descriptors import open_descriptors

BAD_COMPONENTS = ("", ".", "..", ".hidden", "nul\0byte", "tab\there", "line\nfeed", "x" * 256, "ü" * 128, "\udcff")
URLS = ("http://host/adapter", "https:host", "file:///etc", "s3://bucket/key", "hf:owner", "git+ssh://host/x")


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("name", [*BAD_COMPONENTS, *URLS, "a/b", "/etc", "a/"])
def test_a_name_that_is_not_one_visible_folder_is_unsafe(name: str) -> None:
    with pytest.raises(UnsafePathError) as caught:
        check_adapter_name(name)
    assert caught.value.code is StatusCode.INVALID_ARGUMENT
    assert isinstance(caught.value, InvalidRequestError)
    assert [violation.field for violation in caught.value.violations] == ["adapter.name"]


@pytest.mark.parametrize("name", ["shout", "Pirate 2", "a.b-c_d", "x" * 255, "größe", "user:tone"])
def test_ordinary_names_are_taken(name: str) -> None:
    check_adapter_name(name)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "..",
        "../other",
        "a/../../b",
        "a/./b",
        "a//b",
        "a/.git",
        "",
        "/",
        "a\0/b",
        "x/" * 600 + "x",
        *URLS,
    ],
)
def test_a_path_that_could_leave_the_folder_is_unsafe(path: str) -> None:
    with pytest.raises(UnsafePathError):
        split_adapter_path(path)


def test_a_path_may_be_nested_and_end_in_a_slash() -> None:
    assert split_adapter_path("team/pirate/") == ("team", "pirate")


def test_nested_folders_are_opened(tmp_path: Path, root_fd: int) -> None:
    (tmp_path / "team" / "pirate").mkdir(parents=True)
    descriptor = open_folder(root_fd, ("team", "pirate"))
    assert os.path.samestat(os.fstat(descriptor), (tmp_path / "team" / "pirate").stat())
    os.close(descriptor)


@pytest.mark.parametrize("parts", [("missing",), ("there", "missing"), ("file",), ("file", "below")])
def test_what_is_no_folder_is_not_found(tmp_path: Path, root_fd: int, parts: tuple[str, ...]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    before = open_descriptors()
    with pytest.raises(AdapterNotFoundError):
        open_folder(root_fd, parts)
    assert open_descriptors() == before


@pytest.mark.parametrize("target", ["outside", "root/inside"])
@pytest.mark.parametrize("nested", [False, True])
def test_links_to_folders_are_unsafe_wherever_they_point(tmp_path: Path, target: str, nested: bool) -> None:
    root = tmp_path / "root"
    (root / "inside" / "below").mkdir(parents=True)
    (tmp_path / "outside" / "below").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / target)
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    before = open_descriptors()
    with pytest.raises(UnsafePathError):
        open_folder(root_fd, ("link", "below") if nested else ("link",))
    assert open_descriptors() == before
    os.close(root_fd)


def test_a_fifo_instead_of_a_folder_is_unsafe(tmp_path: Path, root_fd: int) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafePathError):
        open_folder(root_fd, ("pipe",))


def test_only_regular_files_are_opened(tmp_path: Path, root_fd: int) -> None:
    (tmp_path / "plain").write_bytes(b"x")
    descriptor = open_regular(root_fd, "plain")
    assert descriptor is not None
    os.close(descriptor)
    assert open_regular(root_fd, "missing") is None

    (tmp_path / "link").symlink_to(tmp_path / "plain")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        before = open_descriptors()
        for name in ("link", "folder", "pipe", "socket"):
            with pytest.raises(UnsafePathError):
                open_regular(root_fd, name)
        assert open_descriptors() == before


def test_a_device_is_unsafe() -> None:
    root_fd = os.open("/dev", os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(UnsafePathError):
        open_regular(root_fd, "null")
    os.close(root_fd)
