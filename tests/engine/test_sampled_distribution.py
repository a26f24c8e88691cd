"""What an engine draws follows the probabilities that transformers and PEFT give, with and without an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.checkpoints import TinyModel, load_reference, reference_logits, write_random_adapter, write_random_model
from tests.engine.chi_square import chi_square
from tests.engine.harness import EngineHarness

DRAWS = 20_000
# Answers to one request, as the server submits them.
ANSWERS = 100
AT_A_TIME = 250
PROMPT = [17, 203, 5, 88, 140, 9, 61, 203, 33, 72, 19, 5]
BIAS = {33: 1.5, 61: -2.0, 140: 3.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Options of a request, and the processors of transformers that do the same."""

    options: dict[str, Any]
    processors: list[Any]


CASES = {
    "temperature": Case(options={"temperature": 0.8}, processors=[TemperatureLogitsWarper(0.8)]),
    "filters": Case(
        options={"temperature": 1.4, "top_k": 120, "top_p": 0.9, "min_p": 0.01},
        processors=[
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(120),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.01),
        ],
    ),
    "changed logits": Case(
        options={"temperature": 1.1, "repetition_penalty": 1.5, "logit_bias": BIAS},
        processors=[
            SequenceBiasLogitsProcessor([[[token_id], bias] for token_id, bias in BIAS.items()]),
            RepetitionPenaltyLogitsProcessor(1.5),
            TemperatureLogitsWarper(1.1),
        ],
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("draws")
    model_dir = write_random_model(root / "model", TinyModel(layers=2), seed=5)
    write_random_adapter(root / "adapters" / "a", model_dir, rank=8, seed=6)
    return model_dir, root / "adapters"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("adapter", [None, "a"])
def test_first_tokens_follow_the_probabilities_of_transformers(
    folders: tuple[Path, Path], adapter: str | None, case: Case, device: str
) -> None:
    model_dir, adapters_dir = folders
    reference = load_reference(model_dir, None if adapter is None else adapters_dir / adapter)
    logits = reference_logits(reference, PROMPT)[-1:]
    processed = LogitsProcessorList(case.processors)(torch.tensor([PROMPT]), logits)  # type: ignore[arg-type]
    settings = {
        "device": device,
        "cpu_workers": 0,
        "max_running": AT_A_TIME,
        "max_waiting": AT_A_TIME,
        "page_tokens": 4,
    }
    with EngineHarness(model_dir, adapters_dir, pages=4000, **settings) as harness:
        drawn: list[int] = []
        for start in range(0, DRAWS, AT_A_TIME):
            numbers = [
                harness.submit(
                    PROMPT,
                    adapter,
                    max_tokens=1,
                    **{**case.options, "seed": index // ANSWERS, "sample": index % ANSWERS},
                )
                for index in range(start, start + AT_A_TIME)
            ]
            harness.run_until(lambda numbers=numbers: all(harness.answers[number].ended for number in numbers))  # type: ignore[misc]
            drawn += [token_id for number in numbers for token_id in harness.answers[number].tokens]
    assert len(drawn) == DRAWS
    assert abs(chi_square(torch.tensor(drawn), processed[0].double().softmax(-1))) < 5
