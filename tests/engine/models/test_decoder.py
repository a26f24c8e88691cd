"""The model against transformers: prefill, chunks, decode over paged KV, for every shape and rotary variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segue.engine.batch import SequenceInput
from tests.checkpoints import (
    ROPE_DEFAULT,
    ROPE_LINEAR,
    ROPE_LLAMA3,
    ROPE_YARN,
    TinyModel,
    load_reference,
    reference_greedy,
    reference_logits,
    write_random_model,
)
from tests.engine.models.passes import logprob_error, make_runner, random_tokens

LOGPROB_TOLERANCE = 1e-4

SHAPES = {
    "one_kv_head": TinyModel(kv_heads=1),
    "two_kv_heads": TinyModel(),
    "three_kv_heads": TinyModel(hidden_size=96, heads=6, kv_heads=3),
    "no_grouping": TinyModel(heads=4, kv_heads=4, head_dim=8),
    "wide_heads": TinyModel(heads=4, kv_heads=2, head_dim=32),
    "tied": TinyModel(tied=True),
    "linear": TinyModel(rope=ROPE_LINEAR),
    "yarn": TinyModel(rope=ROPE_YARN),
    "yarn_scaled": TinyModel(rope={**ROPE_YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}),
    "yarn_fixed": TinyModel(rope={**ROPE_YARN, "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0}),
    "llama3": TinyModel(rope=ROPE_LLAMA3),
    "llama_biases": TinyModel(extra={"attention_bias": True, "mlp_bias": True}),
    "mistral": TinyModel(family="mistral", extra={"sliding_window": None}),
    "mistral_window": TinyModel(family="mistral", kv_heads=1, extra={"sliding_window": 40}),
    "mistral_window_within_a_page": TinyModel(family="mistral", head_dim=32, extra={"sliding_window": 5}),
    "mistral_window_of_a_page": TinyModel(family="mistral", extra={"sliding_window": 16}),
    "mistral_window_of_two": TinyModel(family="mistral", extra={"sliding_window": 2}),
    "qwen2": TinyModel(family="qwen2", tied=True, rope={**ROPE_DEFAULT, "rope_theta": 1e6}),
    "qwen2_yarn": TinyModel(family="qwen2", rope=ROPE_YARN),
    "qwen2_windows": TinyModel(
        family="qwen2", extra={"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1}
    ),
    "qwen3": TinyModel(family="qwen3", head_dim=32, tied=True),
    "qwen3_biases": TinyModel(family="qwen3", hidden_size=96, heads=6, kv_heads=3, extra={"attention_bias": True}),
    "qwen3_layer_types": TinyModel(
        family="qwen3",
        extra={
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
WINDOW = TinyModel(family="mistral", extra={"sliding_window": 20})


@pytest.fixture(params=SHAPES, scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp(request.param), SHAPES[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("tokens", [1, 2, 63, 129])
def test_prefill_logits(checkpoint: Path, tokens: int) -> None:
    runner, prompt = make_runner(checkpoint), random_tokens(tokens, seed=tokens)
    logits = runner.run([(runner.add(prompt, tokens), tokens, tokens)])
    assert logits.dtype == torch.float32
    assert logprob_error(logits, reference_logits(load_reference(checkpoint), prompt)) < LOGPROB_TOLERANCE


@pytest.mark.parametrize("chunks", [(129,), (128, 1), (1, 128), (16, 48, 65), (31, 1, 1, 96), (43, 43, 43)])
def test_chunked_prefill(checkpoint: Path, chunks: tuple[int, ...]) -> None:
    runner, prompt = make_runner(checkpoint), random_tokens(sum(chunks), seed=1)
    sequence = runner.add(prompt, len(prompt))
    logits = torch.cat([runner.run([(sequence, rows, rows)]) for rows in chunks])
    assert logprob_error(logits, reference_logits(load_reference(checkpoint), prompt)) < LOGPROB_TOLERANCE


def test_greedy_decode_of_unequal_sequences(checkpoint: Path) -> None:
    """64 tokens of five sequences of very unequal length, decoded together over interleaved pages."""
    prompts = [random_tokens(length, seed=length) for length in (1, 15, 16, 17, 200)]
    runner, reference = make_runner(checkpoint), load_reference(checkpoint)
    for prompt, tokens in zip(prompts, runner.greedy(prompts, 64), strict=True):
        assert tokens == reference_greedy(reference, prompt, 64)


def test_decode_step_logits(checkpoint: Path) -> None:
    runner, prompt = make_runner(checkpoint), random_tokens(80, seed=7)
    sequence = runner.add(prompt, len(prompt))
    logits = [runner.run([(sequence, 40, 40)])]
    logits += [runner.run([(sequence, 1, 1)]) for _ in range(40)]
    assert logprob_error(torch.cat(logits), reference_logits(load_reference(checkpoint), prompt)) < LOGPROB_TOLERANCE


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("windowed"), WINDOW)


@pytest.mark.parametrize("page_tokens", [1, 4, 64])
@pytest.mark.parametrize("name", ["plain", "windowed"])
def test_page_sizes(request: pytest.FixtureRequest, name: str, page_tokens: int) -> None:
    checkpoint = request.getfixturevalue(name)
    prompts = [random_tokens(length, seed=length) for length in (3, 33)]
    runner = make_runner(checkpoint, pages=256 // page_tokens + 2, page_tokens=page_tokens)
    reference = load_reference(checkpoint)
    assert runner.greedy(prompts, 20) == [reference_greedy(reference, prompt, 20) for prompt in prompts]


def test_mixed_batch_of_prefill_chunks_and_decodes(checkpoint: Path) -> None:
    """One pass with decodes, a fresh prompt and a later chunk, logits wanted from some of them only."""
    runner, reference = make_runner(checkpoint), load_reference(checkpoint)
    prompts = [random_tokens(90, seed=seed) for seed in range(5)]
    decode, other, fresh, chunk, silent = (runner.add(prompt, 90) for prompt in prompts)
    runner.run([(decode, 20, 0), (chunk, 33, 0), (other, 70, 0)])
    logits = runner.run([(decode, 1, 1), (fresh, 40, 3), (silent, 9, 0), (chunk, 31, 1), (other, 1, 1)])
    exact = [reference_logits(reference, prompt) for prompt in prompts]
    expected = torch.cat([exact[0][20:21], exact[2][37:40], exact[3][63:64], exact[1][70:71]])
    assert logits.shape == expected.shape
    assert logprob_error(logits, expected) < LOGPROB_TOLERANCE


def test_passes_interleave_at_their_yields(plain: Path) -> None:
    """A pass rests between any two layers while another one runs over the same pool."""
    runner, reference = make_runner(plain), load_reference(plain)
    prompts = [random_tokens(50, seed=seed) for seed in range(2)]
    sequences = [runner.add(prompt, 50) for prompt in prompts]
    passes = [
        runner.forward([SequenceInput(token_ids=prompt, context_tokens=0, pages=sequence.pages)])
        for prompt, sequence in zip(prompts, sequences, strict=True)
    ]
    with torch.inference_mode():
        next(passes[0])
        next(passes[1])
        next(passes[0])
    for prompt, forward in zip(prompts, passes, strict=True):
        assert logprob_error(runner.drive(forward), reference_logits(reference, prompt)[-1:]) < LOGPROB_TOLERANCE


def test_yields_once_between_two_layers(plain: Path) -> None:
    runner = make_runner(plain)
    runner.run([(runner.add((5, 6, 7), 3), 3, 1)])
    assert runner.yields == runner.model.config.layers - 1


def test_pool_holds_nothing_but_the_rows_keys_and_values(plain: Path) -> None:
    """KV of 21 tokens fills 21 slots; every other slot of the pool is still poisoned."""
    runner = make_runner(plain)
    runner.run([(runner.add(random_tokens(21, seed=0), 64), 21, 1)])
    config = runner.model.config
    written = int(runner.pool.data.isfinite().sum())
    assert written == config.layers * 21 * 2 * config.kv_heads * config.head_dim


def test_keys_before_the_window_are_not_read(windowed: Path) -> None:
    """NaN in all pages that lie before every row's window changes nothing, in a chunk and in a decode."""
    runner, prompt = make_runner(windowed), random_tokens(120, seed=5)
    sequence = runner.add(prompt, 120)
    runner.run([(sequence, 100, 0)])
    runner.pool.data[:, list(sequence.pages[: (100 - 19) // 16])] = torch.nan
    logits = torch.cat([runner.run([(sequence, 10, 10)]), *(runner.run([(sequence, 1, 1)]) for _ in range(10))])
    exact = reference_logits(load_reference(windowed), prompt)[100:]
    assert logprob_error(logits, exact) < LOGPROB_TOLERANCE


def test_a_window_changes_the_answer_only_behind_it(tmp_path: Path) -> None:
    """The first 20 rows of a window of 20 tokens see all before them, so agreeing on the others means something."""
    prompt = random_tokens(60, seed=2)
    logits = []
    for window in (20, None):
        model = TinyModel(family="mistral", extra={"sliding_window": window})
        runner = make_runner(write_random_model(tmp_path / str(window), model))
        logits.append(runner.run([(runner.add(prompt, 60), 60, 60)]))
    assert logprob_error(logits[0][:20], logits[1][:20]) < LOGPROB_TOLERANCE
    for row in range(20, 60):
        assert logprob_error(logits[0][row], logits[1][row]) > 100 * LOGPROB_TOLERANCE


def test_a_window_of_one_token(tmp_path: Path) -> None:
    """Every row sees itself alone. Transformers' cache cannot hold such a window, so one pass is its reference."""
    model = TinyModel(family="mistral", extra={"sliding_window": 1})
    checkpoint, prompt = write_random_model(tmp_path, model), random_tokens(40, seed=2)
    runner = make_runner(checkpoint)
    sequence = runner.add(prompt, 40)
    logits = torch.cat([runner.run([(sequence, rows, rows)]) for rows in (17, 1, 1, 21)])
    reference = load_reference(checkpoint)
    with torch.inference_mode():
        exact = reference(torch.tensor([list(prompt)]), use_cache=False).logits[0]
    assert logprob_error(logits, exact) < LOGPROB_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_follow_transformers_in_the_same_dtype(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Rounding differs in place and order, so both are compared to float32 of the same rounded weights."""
    model = TinyModel(family=family, extra={"sliding_window": 30} if family == "mistral" else {})
    checkpoint = write_random_model(tmp_path, model, dtype=dtype, max_shard_bytes=100_000)
    prompt = random_tokens(100, seed=3)
    exact = reference_logits(load_reference(checkpoint), prompt)
    runner = make_runner(checkpoint, dtype=dtype)
    sequence = runner.add(prompt, 100)
    logits = torch.cat([runner.run([(sequence, 60, 60)])] + [runner.run([(sequence, 1, 1)]) for _ in range(40)])
    theirs = reference_logits(load_reference(checkpoint, dtype=dtype), prompt)
    error, their_error = (float((other - exact).square().mean().sqrt()) for other in (logits, theirs))
    assert error < 1.5 * their_error


def test_rope_default_differs_from_every_variant(tmp_path: Path) -> None:
    """The variants change logits at all, so that agreeing with transformers on each of them means something."""
    prompt = random_tokens(100, seed=0)
    logits = []
    for index, rope in enumerate((ROPE_DEFAULT, ROPE_LINEAR, ROPE_YARN, ROPE_LLAMA3)):
        runner = make_runner(write_random_model(tmp_path / str(index), TinyModel(rope=rope)))
        logits.append(runner.run([(runner.add(prompt, 100), 100, 1)]))
    for variant in logits[1:]:
        assert logprob_error(variant, logits[0]) > 100 * LOGPROB_TOLERANCE
