from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from segue.config import ConfigError
from segue.engine.lora.catalog import AdapterCatalog, OpenedVersion
from segue.engine.lora.checkpoint import Checkpoint, ModelShapes, open_checkpoint
from segue.errors import AdapterNotFoundError, AdapterRejectedError, EngineUnavailableError, UnsafePathError
from tests.descriptors import open_descriptors
from tests.engine.lora.adapter_folders import MODEL, peft_config, random_tensors, write_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder


@pytest.fixture
def catalog(root: Path) -> Iterator[AdapterCatalog]:
    before = open_descriptors()
    yield AdapterCatalog(root, MODEL, 64)
    assert open_descriptors() == before, "a descriptor was left open"


def version_of(catalog: AdapterCatalog, name: str = "one") -> str:
    with catalog.lookup(name) as opened:
        return opened.manifest.version


def hand_over(opened: OpenedVersion) -> None:
    assert opened.fileno is not None
    opened.handed_over()
    assert opened.fileno is None


def test_a_version_is_kept_as_long_as_the_files_are(root: Path, catalog: AdapterCatalog) -> None:
    write_folder(root / "one")
    write_folder(root / "two")
    first = version_of(catalog)
    assert version_of(catalog) == first
    assert version_of(catalog, "two") != first
    with catalog.lookup("one", first) as opened:
        assert opened.manifest.name == "one"
        assert opened.manifest.identity[2] == (root / "one" / WEIGHTS).stat().st_size
        assert opened.manifest.max_rank == 4


def test_the_descriptor_is_given_until_the_engine_has_it(root: Path, catalog: AdapterCatalog) -> None:
    write_folder(root / "one")
    with catalog.lookup("one") as first, catalog.lookup("one") as second:
        assert first.fileno is not None
        assert os.path.samestat(os.fstat(first.fileno), (root / "one" / WEIGHTS).stat())
        hand_over(first)
        assert second.fileno is None
    with catalog.lookup("one") as third:
        assert third.fileno is None
        catalog.engine_restarted()
        with pytest.raises(EngineUnavailableError):
            _ = third.fileno
    with catalog.lookup("one") as fourth:
        assert fourth.manifest.version == third.manifest.version
        hand_over(fourth)


def test_new_folders_are_served_without_a_restart(root: Path, catalog: AdapterCatalog) -> None:
    with pytest.raises(AdapterNotFoundError):
        catalog.lookup("late")
    write_folder(root / "late")
    assert version_of(catalog, "late")


@pytest.mark.parametrize(
    "change", ["folder renamed", "weights renamed", "config renamed", "in place", "touch", "config"]
)
def test_new_content_is_a_new_version_and_the_old_is_kept_by_its_users(
    root: Path, catalog: AdapterCatalog, tmp_path: Path, change: str
) -> None:
    folder = write_folder(root / "one")
    old = catalog.lookup("one")
    hand_over(old)
    new = write_folder(tmp_path / "new", tensors=random_tensors(seed=1))
    if change == "folder renamed":
        folder.rename(tmp_path / "aside")
        new.rename(folder)
    elif change == "weights renamed":
        (new / WEIGHTS).rename(folder / WEIGHTS)
    elif change == "config renamed":
        (new / CONFIG).rename(folder / CONFIG)
    elif change == "in place":
        data = (new / WEIGHTS).read_bytes()
        assert len(data) == (folder / WEIGHTS).stat().st_size
        with (folder / WEIGHTS).open("r+b") as file:
            file.write(data)
    elif change == "touch":
        os.utime(folder / WEIGHTS)
    else:
        (folder / CONFIG).write_text(json.dumps(peft_config(lora_alpha=6)))
    with catalog.lookup("one") as opened:
        assert opened.manifest.version != old.manifest.version
        assert opened.fileno is not None
        with catalog.lookup("one", old.manifest.version) as again:
            assert again.manifest is old.manifest
    assert catalog.take_retired() == ()
    old.close()
    assert catalog.take_retired() == (old.manifest.version_id,)
    assert catalog.take_retired() == ()
    with pytest.raises(AdapterNotFoundError, match="not known any more"):
        catalog.lookup("one", old.manifest.version)


def test_a_second_write_right_after_the_first_is_seen(root: Path, catalog: AdapterCatalog) -> None:
    folder = write_folder(root / "one")
    first, second = ((folder / WEIGHTS).read_bytes(), bytes(8))
    versions = set()
    for round_number in range(6):
        with (folder / WEIGHTS).open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(second if round_number % 2 == 0 else first[-8:])
        versions.add(version_of(catalog))
    assert len(versions) == 6


def test_a_folder_is_opened_only_when_its_times_tell_a_later_write(
    root: Path, catalog: AdapterCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    ages_ns = []

    def record_age(root_fd: int, parts: tuple[str, ...], model: ModelShapes, max_rank: int) -> Checkpoint:
        ages_ns.append(time.time_ns() - (root / "one" / WEIGHTS).stat().st_ctime_ns)
        return open_checkpoint(root_fd, parts, model, max_rank)

    monkeypatch.setattr("segue.engine.lora.catalog.open_checkpoint", record_age)
    write_folder(root / "one")
    version_of(catalog)
    clock_tick_ns = 10_000_000
    assert len(ages_ns) == 1
    assert ages_ns[0] > clock_tick_ns


def test_a_version_nobody_had_sent_to_the_engine_is_not_reported_as_retired(
    root: Path, catalog: AdapterCatalog
) -> None:
    write_folder(root / "one")
    version_of(catalog)
    os.utime(root / "one" / WEIGHTS)
    version_of(catalog)
    assert catalog.take_retired() == ()


def test_a_deleted_folder_is_not_found_and_its_users_end_first(root: Path, catalog: AdapterCatalog) -> None:
    write_folder(root / "one")
    opened = catalog.lookup("one")
    hand_over(opened)
    shutil.rmtree(root / "one")
    with pytest.raises(AdapterNotFoundError):
        catalog.lookup("one")
    with catalog.lookup("one", opened.manifest.version) as again:
        assert again.manifest is opened.manifest
    opened.close()
    assert catalog.take_retired() == (opened.manifest.version_id,)


def test_corrupt_new_content_is_refused_and_the_old_is_not_served_instead(root: Path, catalog: AdapterCatalog) -> None:
    write_folder(root / "one")
    old = version_of(catalog)
    (root / "one" / WEIGHTS).write_bytes(b"short")
    for _ in range(2):
        with pytest.raises(AdapterRejectedError, match="truncated"):
            catalog.lookup("one")
    write_folder(root / "one")
    assert version_of(catalog) != old


def test_a_version_that_the_engine_rejected_stays_refused_until_its_files_change(
    root: Path, catalog: AdapterCatalog
) -> None:
    write_folder(root / "one")
    with catalog.lookup("one") as opened:
        hand_over(opened)
        catalog.reject(opened.manifest.version_id, "layer 1 q_proj lora_A holds NaN")
        for version in (None, opened.manifest.version):
            with pytest.raises(AdapterRejectedError, match="holds NaN"):
                catalog.lookup("one", version)
    os.utime(root / "one" / WEIGHTS)
    assert version_of(catalog) != opened.manifest.version
    assert catalog.take_retired() == (opened.manifest.version_id,)


def test_content_that_is_not_to_blame_is_a_new_version_after_a_failure(root: Path, catalog: AdapterCatalog) -> None:
    write_folder(root / "one")
    with catalog.lookup("one") as opened:
        hand_over(opened)
        catalog.reopen(opened.manifest.version_id)
        catalog.reopen(opened.manifest.version_id)
        with catalog.lookup("one") as again:
            assert again.manifest.version_id != opened.manifest.version_id
            assert again.manifest.identity == opened.manifest.identity
            assert again.fileno is not None
            hand_over(again)
            catalog.reopen(opened.manifest.version_id)
            assert version_of(catalog) == again.manifest.version
    assert catalog.take_retired() == (opened.manifest.version_id,)
    catalog.reopen(opened.manifest.version_id)


def test_load_gives_a_name_to_a_nested_folder(root: Path, catalog: AdapterCatalog) -> None:
    write_folder(root / "team" / "pirate-v2")
    with catalog.load("pirate", "team/pirate-v2/") as opened:
        assert opened.manifest.name == "pirate"
    assert version_of(catalog, "pirate") == opened.manifest.version


def test_a_load_that_fails_changes_nothing(root: Path, catalog: AdapterCatalog) -> None:
    write_folder(root / "one")
    version = version_of(catalog)
    (root / "broken").mkdir()
    for path, error in (("broken", AdapterRejectedError), ("gone", AdapterNotFoundError), ("../x", UnsafePathError)):
        with pytest.raises(error):
            catalog.load("one", path)
        assert version_of(catalog) == version


def test_unload_makes_a_name_unknown_until_it_is_loaded_again(root: Path, catalog: AdapterCatalog) -> None:
    write_folder(root / "one")
    opened = catalog.lookup("one")
    hand_over(opened)
    catalog.unload("one")
    for version in (None, opened.manifest.version):
        with pytest.raises(AdapterNotFoundError):
            catalog.lookup("one", version)
    with pytest.raises(AdapterNotFoundError):
        catalog.unload("one")
    assert catalog.list() == ()
    assert catalog.take_retired() == ()
    opened.close()
    assert catalog.take_retired() == (opened.manifest.version_id,)
    with catalog.load("one") as again:
        assert again.manifest.version != opened.manifest.version
    assert version_of(catalog) == again.manifest.version


def test_unload_of_an_unknown_name_is_not_found(root: Path, catalog: AdapterCatalog) -> None:
    with pytest.raises(AdapterNotFoundError):
        catalog.unload("nobody")
    write_folder(root / "unused")
    catalog.unload("unused")
    with pytest.raises(AdapterNotFoundError):
        catalog.lookup("unused")


def test_list_names_what_a_request_could_name(root: Path, catalog: AdapterCatalog, tmp_path: Path) -> None:
    write_folder(root / "one")
    write_folder(root / ".hidden")
    write_folder(root / "team" / "nested")
    write_folder(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "README.md").touch()
    with catalog.load("loaded", "team/nested"), catalog.lookup("one"):
        entries = {entry.name: entry for entry in catalog.list()}
    assert entries.keys() == {"one", "loaded", "team"}
    assert entries["one"].manifest is not None
    assert entries["one"].users == 1
    assert entries["one"].problem is None
    assert entries["team"].manifest is None
    assert isinstance(entries["team"].problem, AdapterRejectedError)
    shutil.rmtree(root / "one")
    assert {entry.name for entry in catalog.list()} == {"loaded", "team"}


@pytest.mark.parametrize("name", ["../adapters/one", "..", "/one", "one/", "http://x/one", "one\0", ""])
def test_hostile_names_are_unsafe_everywhere(root: Path, catalog: AdapterCatalog, name: str) -> None:
    write_folder(root / "one")
    for call in (catalog.lookup, catalog.load, catalog.unload):
        with pytest.raises(UnsafePathError):
            call(name)


def test_links_are_unsafe_but_the_root_may_be_one(root: Path, tmp_path: Path) -> None:
    write_folder(root / "one")
    write_folder(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root-link").symlink_to(root)
    catalog = AdapterCatalog(tmp_path / "root-link", MODEL, 64)
    assert version_of(catalog)
    with pytest.raises(UnsafePathError):
        catalog.lookup("link")
    (root / "one").rename(tmp_path / "moved")
    (root / "one").symlink_to(tmp_path / "moved")
    with pytest.raises(UnsafePathError):
        catalog.lookup("one")


def test_the_root_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapters: .*missing is not a folder"):
        AdapterCatalog(tmp_path / "missing", MODEL, 64)


def test_many_threads_see_one_version_and_every_hold_ends(root: Path, catalog: AdapterCatalog) -> None:
    write_folder(root / "one")
    barrier = threading.Barrier(8)

    def look() -> set[str]:
        barrier.wait()
        return {version_of(catalog) for _ in range(20)}

    with ThreadPoolExecutor(8) as threads:
        results = [threads.submit(look) for _ in range(8)]
        versions = set().union(*(result.result() for result in results))
    assert len(versions) == 1
    assert [entry.users for entry in catalog.list()] == [0]
