"""Adapters as PEFT writes them, feature by feature: which modules, which rank and scale, and what the engine says."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from segue.engine.config import HandoffConfig
from segue.engine.lora.checkpoint import open_checkpoint
from segue.engine.lora.host_plan import HostPlan
from segue.engine.lora.manifest import AdapterManifest, Projection
from segue.engine.lora.module_match import module_path, other_paths
from segue.engine.lora.peft_config import parse_peft_config
from segue.engine.memory.adapter_layout import AdapterLayout
from segue.engine.models.config import ModelConfig
from segue.errors import AdapterRejectedError
from segue.types import LoraSource
from tests.checkpoints import (
    ALL_TARGETS,
    TinyModel,
    load_reference,
    reference_greedy,
    reference_logits,
    write_peft_adapter,
    write_random_model,
)
from tests.engine.harness import Answer, EngineHarness
from tests.engine.lora.adapter_folders import peft_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*_pattern keys:RuntimeWarning"),
]

LAYERS = 4
NEW_TOKENS = 24
LOGPROB_TOLERANCE = 1e-4
PROMPT = [17, 203, 5, 88, 140, 9, 61, 250, 33, 72, 19]
SCOPED_EXPRESSION = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attn|mlp|ffn)\.(?:(?:q_proj|o_proj|down_proj)))"
)
# PEFT sorts the keys when it saves them, and the first in the file counts when it loads them: so they are sorted here.
PATTERNS: Mapping[str, Any] = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "rank_pattern": {
        r".*\.3\..*k_proj": 1,
        r"\d+\.mlp\..*": 9,
        "^model.layers.2.self_attn.q_proj": 5,
        "layers.77.mlp.up_proj": 4,
        r"layers\.[01]\.self_attn\.(q|k)_proj": 3,
        "q_proj": 2,
        "self.attn.v.proj": 6,
    },
    "alpha_pattern": {r".*\.(?:2|3)\..*": 5, "^q_proj": 98, "proj": 99, "v_proj$": 7.5},
}
FEATURES: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj", "gate_proj"]},
    "list of paths": {"target_modules": ["layers.1.self_attn.k_proj", "model.layers.3.mlp.down_proj", "o_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.[02]\.self_attn\.(q|v)_proj|model\.layers\.1\.mlp\.(?:up|down)_proj"},
    "regex with look-ahead": {"target_modules": r"^(?!.*(?:mlp|visual)).*(?:q_proj|o_proj|up_proj).*"},
    "regex with look-behind": {"target_modules": r".*(?<!layers\.0\.mlp)\.[a-z]{2,4}_proj"},
    "regex with a scope": {"target_modules": SCOPED_EXPRESSION},
    "exclude list": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.1.mlp.up_proj"]},
    "exclude regex": {"target_modules": list(ALL_TARGETS), "exclude_modules": r".*\.0\..*|.*down_proj"},
    "exclude a container": {"target_modules": r".*(q_proj|self_attn)", "exclude_modules": ["self_attn"]},
    "patterns": dict(PATTERNS),
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "rslora with patterns": {**PATTERNS, "use_rslora": True},
    "layer 0": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
    "layer 2": {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": 2},
    "layers 1 and 2": {"target_modules": list(ALL_TARGETS), "layers_to_transform": [1, 2]},
    "layers beyond": {"target_modules": ["q_proj"], "layers_to_transform": [0, 3, 17]},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers pattern": {"target_modules": ["o_proj"], "layers_to_transform": [3], "layers_pattern": "layers"},
    "layers patterns": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
    "layers regex": {"target_modules": ["v_proj"], "layers_to_transform": [0, 2], "layers_pattern": "(?:h|lay[a-z]+)"},
    "layers pattern empty": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []},
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class World:
    """A model of LAYERS layers and an adapter for each feature, written by PEFT."""

    model_dir: Path
    adapters_dir: Path

    def adapter(self, feature: str) -> Path:
        return self.adapters_dir / feature.replace(" ", "-")


def lora_config(options: Mapping[str, Any]) -> peft.LoraConfig:
    return peft.LoraConfig(r=8, lora_alpha=12, task_type="CAUSAL_LM", **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("features")
    world = World(write_random_model(root / "model", TinyModel(layers=LAYERS), seed=11), root / "adapters")
    for seed, (feature, options) in enumerate(FEATURES.items()):
        write_peft_adapter(world.adapter(feature), world.model_dir, lora_config(options), seed=seed)
    for dtype_name, dtype in DTYPES.items():
        write_peft_adapter(world.adapter(dtype_name), world.model_dir, lora_config(PATTERNS), seed=99, dtype=dtype)
    literal = write_peft_adapter(
        world.adapter("literal all-linear"), world.model_dir, lora_config({"target_modules": "all-linear"}), seed=98
    )
    config = json.loads((literal / "adapter_config.json").read_text())
    (literal / "adapter_config.json").write_text(json.dumps({**config, "target_modules": "all-linear"}))
    return world


ADAPTERS = (*FEATURES, *DTYPES, "literal all-linear")


@pytest.mark.parametrize("feature", ADAPTERS)
def test_each_module_has_the_rank_and_scale_that_peft_gives_it(world: World, feature: str) -> None:
    reference = load_reference(world.model_dir, world.adapter(feature))
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in reference.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    rules = parse_peft_config((world.adapter(feature) / "adapter_config.json").read_bytes(), LAYERS)
    assert {module_path(*module): (rule.rank, rule.scale) for module, rule in rules.items()} == expected


@pytest.fixture(scope="module", params=["hot", "cold"])
def answers(request: pytest.FixtureRequest, world: World) -> Iterator[Mapping[str, Answer]]:
    """What the engine says to PROMPT with each adapter: from the device's pages, or with every delta from the CPU."""
    hot = request.param == "hot"
    handoff = HandoffConfig(mode="fixed", cpu_layers=0 if hot else LAYERS)
    # Slow enough that a cold adapter has not landed when its prefill begins.
    link = None if hot else 500_000
    with EngineHarness(world.model_dir, world.adapters_dir, handoff=handoff, copy_bytes_per_second=link) as harness:
        numbers = {}
        for feature in ADAPTERS:
            name = world.adapter(feature).name
            if hot:
                harness.warm(name)
            numbers[feature] = harness.submit(PROMPT, name, max_tokens=NEW_TOKENS, logprobs=0)
            harness.run()
        source = LoraSource.DEVICE if hot else LoraSource.CPU
        for number in numbers.values():
            finished = harness.answers[number].finished
            assert finished is not None, harness.answers[number].failed
            assert [layer.source for layer in finished.timing.layers] == [source] * LAYERS
        yield {feature: harness.answers[number] for feature, number in numbers.items()}


@pytest.mark.parametrize("feature", ADAPTERS)
def test_the_engine_answers_as_transformers_and_peft(world: World, answers: Mapping[str, Answer], feature: str) -> None:
    reference = load_reference(world.model_dir, world.adapter(feature))
    tokens = list(reference_greedy(reference, PROMPT, NEW_TOKENS))
    logprobs = torch.log_softmax(reference_logits(reference, PROMPT + tokens), dim=-1)
    expected = logprobs[len(PROMPT) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert answers[feature].tokens == tokens
    got = torch.tensor([item.logprob for item in answers[feature].logprobs])
    assert (got - expected).abs().max() < LOGPROB_TOLERANCE


@pytest.mark.parametrize(
    ("feature", "targeted"), [("layer 0", {0}), ("layers 1 and 2", {1, 2}), ("layers pattern", {3})]
)
def test_a_layer_without_modules_takes_no_room(world: World, feature: str, targeted: set[int]) -> None:
    root_fd = os.open(world.adapters_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        parts = (world.adapter(feature).name,)
        checkpoint = open_checkpoint(root_fd, parts, ModelConfig.load(world.model_dir), max_rank=64)
    finally:
        os.close(root_fd)
    os.close(checkpoint.descriptor)
    manifest = AdapterManifest(
        version_id=1, version="v", name="a", identity=checkpoint.weights_identity, layers=checkpoint.layers
    )
    plan = HostPlan.of(manifest, item_bytes=4)
    layout = AdapterLayout.plan(manifest, page_elems=512, chunk_elems=16)
    for layer in range(LAYERS):
        present = layer in targeted
        assert bool(manifest.layers[layer]) is bool(layout.layers[layer]) is present
        assert (plan.layers[layer].host_bytes > 0) is present
    assert plan.host_bytes == sum(layer.host_bytes for layer in plan.layers) == manifest.weight_bytes
    assert layout.pages > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_the_modules_are_those_of_transformers(family: str) -> None:
    config = transformers.AutoConfig.for_model(
        family,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=8,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    served = {module_path(layer, projection) for layer in range(2) for projection in Projection}
    assert {name for name, _ in model.named_modules() if name} == served | set(other_paths(2))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 0}, "layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": []}, "layers_to_transform"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": ".*q_proj", "layers_pattern": []}, "layers_pattern"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": ["q_proj"], "layers_pattern": ["layers"]}, "layers_pattern"),
    ],
)
def test_what_peft_refuses_together_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        lora_config(options)
    with pytest.raises(AdapterRejectedError, match=f"{named} is not supported"):
        parse_peft_config(json.dumps(peft_config(**options)).encode(), LAYERS)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": r".*(q_proj|lm_head)"}, "target_modules: 'lm_head', which"),
        ({"target_modules": r".*(q_proj|embed_tokens)"}, "target_modules: 'model.embed_tokens', which"),
        ({"target_modules": r".*self_attn.*"}, r"target_modules: 'model.layers.0.self_attn', which"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules: 'lm_head'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules: 'embed_tokens'"),
        ({"target_modules": ".*fc1"}, "target_modules means no projection"),
        ({"target_modules": ["q_proj"], "exclude_modules": ".*"}, "target_modules with exclude_modules means no"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 9}, "with layers_to_transform means no"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
            "with layers_to_transform with layers_pattern means no",
        ),
        (
            {"layers_to_transform": 1, "layers_pattern": "h|layers"},
            "with layers_to_transform with layers_pattern means no",
        ),
        ({"layers_to_transform": 1, "layers_pattern": "h)|(?:layers"}, "layers_pattern: .* unbalanced"),
        (
            {"layers_to_transform": 1, "layers_pattern": "(?P<idx>layers)"},
            "layers_pattern: .* redefinition of group name",
        ),
        ({"layers_to_transform": 1, "layers_pattern": [1]}, "layers_pattern must be"),
        ({"layers_to_transform": 0.0}, "layers_to_transform must be"),
        ({"rank_pattern": {"(q_proj": 2}}, "rank_pattern: the pattern .* unterminated"),
        ({"alpha_pattern": {r"(q)\9": 2}}, "alpha_pattern: the pattern .* invalid group reference"),
        ({"exclude_modules": ".*(?i)Q_PROJ"}, "exclude_modules: the pattern .* global flags not at the start"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(AdapterRejectedError, match=rf"adapter_config\.json: .*{named}"):
        parse_peft_config(json.dumps(peft_config(**options)).encode(), LAYERS)


def test_rank_stabilised_scale() -> None:
    rules = parse_peft_config(json.dumps(peft_config(r=16, lora_alpha=8, use_rslora=True)).encode(), 1)
    assert {rule.scale for rule in rules.values()} == {8 / math.sqrt(16)}
