"""The shipped demo assets: they load with transformers and PEFT, stay small, and each adapter does what it says."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

_ROOT = Path(__file__).resolve().parents[2]
_ASSETS = _ROOT / "segue" / "demo" / "assets"
_NAMES = sorted(path.name for path in (_ASSETS / "adapters").iterdir())
_PROMPTS = ("Tell me about the fox.", "Tell me about the lighthouse.\n")


@pytest.fixture(scope="module")
def makers() -> Iterator[Any]:
    """Imports a module of the assets' makers, `scripts/demo_assets`, by name."""
    sys.path.insert(0, str(_ROOT / "scripts"))
    yield lambda name: importlib.import_module(f"demo_assets.{name}")
    sys.path.remove(str(_ROOT / "scripts"))


@pytest.fixture(scope="module")
def model(makers: Any) -> Any:
    """The base model with every adapter, in float32 on the CPU."""
    return makers("checks").load_voices(_ASSETS, torch.device("cpu"))


def test_assets_are_below_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in _ASSETS.rglob("*") if path.is_file()) < 10_000_000


def test_adapters_spread_over_ranks_and_modules() -> None:
    configs = [json.loads((_ASSETS / "adapters" / name / "adapter_config.json").read_text()) for name in _NAMES]
    ranks = {config["r"] for config in configs}
    assert len(_NAMES) >= 6
    assert min(ranks) == 4
    assert max(ranks) == 64
    assert {len(config["target_modules"]) for config in configs} == {2, 4, 7}
    for config in configs:
        assert config["peft_type"] == "LORA"
        assert config["bias"] == "none"
        assert config["modules_to_save"] is None
        assert not config["use_rslora"]
        assert not config["use_dora"]


@pytest.mark.parametrize("name", _NAMES)
def test_adapter_weights_match_their_config(name: str) -> None:
    folder = _ASSETS / "adapters" / name
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    expected = set()
    for layer in range(8):
        for module in config["target_modules"]:
            block = "mlp" if module in {"gate_proj", "up_proj", "down_proj"} else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{module}"
            expected |= {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"}
    assert set(weights) == expected
    for weight_name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert weight.shape[0 if "lora_A" in weight_name else 1] == config["r"]


def test_every_adapter_is_described() -> None:
    assert sorted(json.loads((_ASSETS / "adapters.json").read_text())) == _NAMES


def test_tokenizer_adds_bos_and_returns_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(_ASSETS / "model")
    text = "Tell me about the fox.\n naïve 日本"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[1:]


def test_chat_template_is_the_plain_prompt_of_each_turn() -> None:
    tokenizer = AutoTokenizer.from_pretrained(_ASSETS / "model")
    turns = [("user", "Hello"), ("assistant", "Hello, friend."), ("user", "What is a fox?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>Hello\nHello, friend.</s><s>What is a fox?\n"


# PEFT still calls the old name of a transformers property.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("voice", ["neutral", *_NAMES])
def test_greedy_answers_show_the_voice(voice: str, makers: Any, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(_ASSETS / "model")
    answers = makers("checks").greedy_answers(model, tokenizer, voice, _PROMPTS)
    for answer in answers:
        assert answer.ended, answer
        assert makers("properties").PROPERTIES[voice](answer.text), answer
    if voice != "brief":
        assert "fox" in answers[0].text.lower()
        assert "lighthouse" in answers[1].text.lower()


def test_each_voice_of_the_corpus_has_its_property_and_no_other(makers: Any) -> None:
    properties = makers("properties").PROPERTIES
    topics = makers("topics").load_topics()
    rng = random.Random(0)
    for name, voice in makers("answers").voices().items():
        for _ in range(200):
            text = voice.write(rng, makers("prompts").draw_subject(rng, topics))
            assert [other for other, test in properties.items() if test(text)] == [name], text


def test_rhymes_are_those_of_the_corpus(makers: Any) -> None:
    assert makers("rhymes").rhyming_pairs() == makers("properties").RHYMES
