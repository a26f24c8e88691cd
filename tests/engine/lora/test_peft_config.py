from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

from segue.engine.lora.manifest import Projection
from segue.engine.lora.module_match import module_path
from segue.engine.lora.peft_config import ModuleRule, parse_peft_config
from segue.errors import AdapterRejectedError
from tests.engine.lora.adapter_folders import peft_config

LAYERS = 12


def parse(config: Any, layers: int = LAYERS) -> Mapping[tuple[int, Projection], ModuleRule]:
    return parse_peft_config(json.dumps(config).encode(), layers)


def test_plain_lora() -> None:
    rules = parse(peft_config([Projection.Q, Projection.DOWN], r=4, lora_alpha=6))
    assert rules.keys() == {
        (layer, projection) for layer in range(LAYERS) for projection in (Projection.Q, Projection.DOWN)
    }
    assert {(rule.rank, rule.scale) for rule in rules.values()} == {(4, 1.5)}


def test_a_target_may_be_a_dotted_suffix() -> None:
    rules = parse(peft_config(target_modules=["self_attn.q_proj", "model.layers.3.mlp.up_proj", "1.mlp.up_proj"]))
    assert {layer for layer, projection in rules if projection is Projection.UP} == {1, 3}
    assert sum(projection is Projection.Q for _, projection in rules) == LAYERS


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"q_proj": 2}},
        {"rank_pattern": {"q_proj": 2, "v_proj": 16}, "alpha_pattern": {"v_proj": 3.5}},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 3}},
        {"rank_pattern": {"q_proj": 3, "layers.1.self_attn.q_proj": 2}},
        {"alpha_pattern": {"1.self_attn.q_proj": 5, "self_attn.q_proj": 7, "model.layers.11.self_attn.v_proj": 1}},
        {"rank_pattern": {"model.layers.1.self_attn.v_proj": 5, "k_proj": 9}, "alpha_pattern": {"mlp.up_proj": 2}},
    ],
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:.*_pattern keys:RuntimeWarning")
def test_patterns_resolve_as_in_peft(tmp_path: Path, patterns: dict[str, Any]) -> None:
    config = peft_config(target_modules=["q_proj", "self_attn.v_proj", "up_proj"], **patterns)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=8,
        )
    )
    adapted = peft.get_peft_model(llama, peft.LoraConfig.from_pretrained(str(tmp_path)))
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    rules = parse(config)
    assert {module_path(*module): (rule.rank, rule.scale) for module, rule in rules.items()} == expected


def test_every_default_of_peft_is_served(tmp_path: Path) -> None:
    peft.LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.1).save_pretrained(
        str(tmp_path)
    )
    assert len(parse_peft_config((tmp_path / "adapter_config.json").read_bytes(), LAYERS)) == LAYERS


@pytest.mark.parametrize("initialisation", [True, False, "gaussian", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_model_alone_are_served(initialisation: Any) -> None:
    assert parse(peft_config(init_lora_weights=initialisation))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", "ADALORA"),
        ("peft_type", "PREFIX_TUNING"),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("use_rslora", "yes"),
        ("exclude_modules", ["q_proj", 7]),
        ("exclude_modules", 7),
        ("exclude_modules", ["self_attn.q_proj", "k_proj", "v_proj", "o_proj"]),
        ("exclude_modules", ".*"),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [0, 1.5]),
        ("layers_to_transform", True),
        ("layers_to_transform", 99),
        ("layers_to_transform", {"0": 1}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("layers_pattern", "layers"),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [5, 6]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.up"]),
        ("arrow_config", {"top_k": 3}),
        ("velora_config", {"scale": 1.0}),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"samples": 2}),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"corda_method": "ipm"}),
        ("loftq_config", {"loftq_bits": 4}),
        ("lora_ga_config", {"direction": "x"}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("ensure_weight_tying", True),
        ("use_something_new", True),
        ("a_new_number", 0.5),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", 3),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", ["embed_tokens"]),
        ("target_modules", ["proj"]),
        ("target_modules", [".*q_proj"]),
        ("target_modules", ["q_proj", 7]),
        ("target_modules", ["self_attn"]),
        ("target_modules", ["layers.99.self_attn.q_proj"]),
        ("target_modules", "q_proj"),
        ("target_modules", "dummy-target-modules"),
        ("target_modules", ".*(q_proj|lm_head)"),
        ("target_modules", "model.*[sj]"),
        ("target_modules", ""),
        ("target_modules", 7),
        ("target_modules", []),
        ("target_modules", None),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 2.5}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "2"}),
        ("alpha_pattern", {"q_proj": True}),
        ("r", 0),
        ("r", -4),
        ("r", 8.5),
        ("r", True),
        ("r", None),
        ("lora_alpha", "16"),
        ("lora_alpha", 10**350),
    ],
)
def test_what_is_not_served_is_refused_by_name(option: str, value: Any) -> None:
    named = "r must be" if option == "r" else option
    with pytest.raises(AdapterRejectedError, match=rf"adapter_config\.json: .*({re.escape(named)}|rank of)"):
        parse(peft_config(**{option: value}))


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_option_that_is_off_does_not_matter(value: Any) -> None:
    assert parse(peft_config(use_something_new=value))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"r": 1, "r": 2}', "twice"),
        (b'{"r": NaN}', "NaN"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"r": 8', "not JSON"),
    ],
)
def test_malformed_json_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(AdapterRejectedError, match=problem):
        parse_peft_config(data, LAYERS)
