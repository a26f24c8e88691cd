from __future__ import annotations

import json
import shutil

import pytest

from segue import AdapterNotFoundError, AdapterRejectedError, Client, Tier, UnsafePathError
from tests.server.fake_engine import Command
from tests.server.rig import Rig, byte_level_tokenizer, write_adapter


def test_list_tells_what_is_known_and_where_it_is(rig: Rig, client: Client) -> None:
    (rig.adapters_dir / "broken").mkdir()
    client.generate([10], adapter="beta", max_tokens=1)
    alpha, beta, broken = client.adapters.list()
    assert (alpha.name, alpha.tier, alpha.rank, alpha.users, alpha.problem) == ("alpha", Tier.DISK, 4, 0, "")
    assert alpha.target_modules == ("q_proj",)
    assert alpha.weight_bytes == 2 * 2 * 4 * 16 * 4
    assert (beta.name, beta.tier) == ("beta", Tier.DEVICE)
    assert beta.version == client.generate([10], adapter="beta", max_tokens=1).adapter_version
    assert broken.name == "broken"
    assert "adapter_config.json" in broken.problem


def test_an_adapter_is_opened_in_the_engine_once(rig: Rig, client: Client) -> None:
    for adapter in ("alpha", "beta", "alpha", "beta"):
        client.generate([10], adapter=adapter, max_tokens=1)
    assert [message["manifest"]["name"] for message in rig.messages("OpenVersion")] == ["alpha", "beta"]


def test_a_folder_that_is_new_is_served_without_load(rig: Rig, client: Client) -> None:
    write_adapter(rig.adapters_dir / "gamma")
    assert client.generate([10], adapter="gamma", max_tokens=1).adapter_version != ""


def test_load_gives_a_folder_a_name(rig: Rig, client: Client) -> None:
    write_adapter(rig.adapters_dir / "more" / "deep", rank=8)
    info = client.adapters.load("delta", path="more/deep/")
    assert (info.name, info.rank, info.tier) == ("delta", 8, Tier.DISK)
    assert client.generate([10], adapter="delta", max_tokens=1).adapter_version == info.version


def test_load_with_preload_brings_the_weights(rig: Rig, client: Client) -> None:
    assert client.adapters.load("alpha", preload=True).tier is Tier.DEVICE
    (opened,) = rig.messages("OpenVersion")
    (preload,) = rig.messages("Preload")
    assert preload["version_id"] == opened["manifest"]["version_id"]
    client.generate([10], adapter="alpha", max_tokens=1)
    assert len(rig.messages("OpenVersion")) == 1


def test_load_refuses_paths_outside(client: Client) -> None:
    for path in ("../alpha", "/etc", "file:///etc", "alpha/../.."):
        with pytest.raises(UnsafePathError):
            client.adapters.load("delta", path=path)
    with pytest.raises(AdapterNotFoundError):
        client.adapters.load("delta", path="nowhere")


def test_unload_makes_a_name_unknown_until_it_is_loaded_again(rig: Rig, client: Client) -> None:
    client.generate([10], adapter="alpha", max_tokens=1)
    client.adapters.unload("alpha")
    (opened,) = rig.messages("OpenVersion")
    assert rig.wait_for("CloseVersion")[0]["version_id"] == opened["manifest"]["version_id"]
    with pytest.raises(AdapterNotFoundError):
        client.generate([10], adapter="alpha")
    with pytest.raises(AdapterNotFoundError):
        client.adapters.unload("alpha")
    assert [info.name for info in client.adapters.list()] == ["beta"]
    client.adapters.load("alpha")
    assert client.generate([10], adapter="alpha", max_tokens=1).token_ids == (10,)


def test_unload_lets_users_end_first(rig: Rig, client: Client) -> None:
    with client.generate([Command.SILENT], adapter="alpha", stream=True):
        rig.wait_for("Submit")
        client.adapters.unload("alpha")
        with pytest.raises(AdapterNotFoundError):
            client.generate([10], adapter="alpha")
        assert rig.messages("CloseVersion") == []
        assert rig.messages("Cancel") == []
    rig.wait_for("CloseVersion")


def test_evict_keeps_the_name(rig: Rig, client: Client) -> None:
    client.adapters.evict("alpha")
    client.generate([10], adapter="alpha", max_tokens=1)
    client.adapters.evict("alpha")
    assert len(rig.wait_for("Evict")) == 1
    assert client.adapters.list()[0].tier is Tier.DISK
    with pytest.raises(AdapterNotFoundError):
        client.adapters.evict("unknown")


def test_new_content_is_a_new_version_and_the_old_one_ends_with_its_users(rig: Rig, client: Client) -> None:
    with client.generate([Command.SILENT], adapter="alpha", stream=True):
        rig.wait_for("Submit")
        first = rig.messages("OpenVersion")[0]["manifest"]
        shutil.rmtree(rig.adapters_dir / "alpha")
        write_adapter(rig.adapters_dir / "alpha", rank=8)
        reply = client.generate([10], adapter="alpha", max_tokens=1)
        assert reply.adapter_version != first["version"]
        old = client.generate([10], adapter="alpha", adapter_version=first["version"], max_tokens=1)
        assert old.adapter_version == first["version"]
        assert rig.messages("CloseVersion") == []
    assert rig.wait_for("CloseVersion")[0]["version_id"] == first["version_id"]
    with pytest.raises(AdapterNotFoundError, match="is not known any more"):
        client.generate([10], adapter="alpha", adapter_version=first["version"])


def test_an_adapters_own_chat_template_is_used(rig: Rig, client: Client) -> None:
    (rig.adapters_dir / "alpha" / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    config = {"chat_template": "({{ messages[0].content }})"}
    (rig.adapters_dir / "beta" / "tokenizer_config.json").write_text(json.dumps(config))
    for adapter in ("alpha", "beta"):
        client.generate([{"role": "user", "content": "hi"}], adapter=adapter, max_tokens=1)
    rendered = [byte_level_tokenizer().decode(submit["prompt_token_ids"]) for submit in rig.messages("Submit")]
    assert rendered == ["<hi>", "(hi)"]


def test_a_malformed_chat_template_is_the_adapters_fault(rig: Rig, client: Client) -> None:
    (rig.adapters_dir / "alpha" / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(AdapterRejectedError, match="chat template is malformed"):
        client.generate([{"role": "user", "content": "hi"}], adapter="alpha")
    assert client.generate([10], adapter="alpha", max_tokens=1).token_ids == (10,)


def test_an_adapter_with_the_same_vocabulary_is_served(rig: Rig, client: Client) -> None:
    tokenizer = json.loads(byte_level_tokenizer().to_str())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (rig.adapters_dir / "alpha" / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(rig.model_dir / "tokenizer.json", rig.adapters_dir / "beta" / "tokenizer.json")
    for adapter in ("alpha", "beta"):
        assert client.generate([10], adapter=adapter, max_tokens=1).token_ids == (10,)


def test_an_adapter_with_another_vocabulary_is_refused_by_name(rig: Rig, client: Client) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(rig.adapters_dir / "alpha" / "tokenizer.json"))
    with pytest.raises(AdapterRejectedError, match="another vocabulary than the base model: it differs in '<pad>'"):
        client.generate([10], adapter="alpha")
    (rig.adapters_dir / "beta" / "tokenizer.json").write_text("{")
    with pytest.raises(AdapterRejectedError, match=r"tokenizer\.json is malformed"):
        client.generate([10], adapter="beta")
    rig.wait_for("Cancel")
