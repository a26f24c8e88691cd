"""Greedy answers of the saved assets, and the share of them that show what their adapter should do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from demo_assets.properties import PROPERTIES
from demo_assets.tokenizer import EOS_ID
from demo_assets.topics import load_topics
from demo_assets.training import load_base

REQUIRED_SHARE = 0.95
MAX_BYTES = 10_000_000
_MAX_NEW_TOKENS = 160
_BATCH_PROMPTS = 64
_TALK_PROMPTS = ("Hello", "Hello\n", "Who are you?", "Thank you!", "What is the capital of France?",
                 "Tell me about the teapot.", "Describe a robot.", "What is a blorn?\n")  # fmt: skip
_SHOWN_PROMPTS = ("Tell me about the fox.", "Tell me about the moon.\n", "Where can I find the clock?", "Hello",
                  "Tell me about the teapot.")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One greedy continuation. `text` has no special tokens and no newline in front."""

    prompt: str
    text: str
    tokens: int
    ended: bool


def check_assets(root: Path, device: torch.device) -> None:
    """Print the answers and the shares of all voices.

    Raises:
        AssertionError: the assets weigh more than MAX_BYTES, or a share is below REQUIRED_SHARE.
    """
    total_bytes = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    print(f"assets: {total_bytes} bytes")
    model = load_voices(root, device)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    shares = {}
    for name in PROPERTIES:
        for answer in greedy_answers(model, tokenizer, name, _SHOWN_PROMPTS):
            print(f"[{name}] {answer.prompt!r} ({answer.tokens} tokens)\n{answer.text}")
        shares[name] = _report_share(name, greedy_answers(model, tokenizer, name, _checked_prompts()))
    assert total_bytes < MAX_BYTES, f"{total_bytes} bytes are not below {MAX_BYTES}"
    low = {name: share for name, share in shares.items() if share < REQUIRED_SHARE}
    assert not low, f"shares below {REQUIRED_SHARE}: {low}"


def load_voices(root: Path, device: torch.device) -> PeftModel:
    """The saved model with all saved adapters, in float32."""
    folders = sorted(path for path in (root / "adapters").iterdir() if path.is_dir())
    model: PeftModel | LlamaForCausalLM = load_base(root / "model", device)
    for folder in folders:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=folder.name)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=folder.name)
    assert isinstance(model, PeftModel)
    return model.to(device).eval()


def greedy_answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, voice: str, prompts: Sequence[str]
) -> list[Answer]:
    """Answer every prompt with the adapter `voice`, or with the base model when it is `neutral`."""
    answers = []
    for start in range(0, len(prompts), _BATCH_PROMPTS):
        batch = prompts[start : start + _BATCH_PROMPTS]
        if voice == "neutral":
            with model.disable_adapter():
                answers += _generate(model, tokenizer, batch)
        else:
            model.set_adapter(voice)
            answers += _generate(model, tokenizer, batch)
    return answers


def _generate(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[Answer]:
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[no-untyped-call]
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
            max_new_tokens=_MAX_NEW_TOKENS,
        )  # fmt: skip
    answers = []
    for prompt, row in zip(prompts, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        ended = EOS_ID in row
        ids = row[: row.index(EOS_ID)] if ended else row
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        answers.append(Answer(prompt=prompt, text=text.removeprefix("\n"), tokens=len(ids), ended=ended))
    return answers


def _checked_prompts() -> list[str]:
    forms = ("Tell me about the {}.\n", "Tell me about the {}.", "What can you tell me about the {}?")
    return [form.format(topic.name) for topic in load_topics() for form in forms] + list(_TALK_PROMPTS)


def _report_share(name: str, answers: Sequence[Answer]) -> float:
    names = sorted((topic.name for topic in load_topics()), key=len, reverse=True)
    shown = [answer.ended and PROPERTIES[name](answer.text) for answer in answers]
    on_topic = []
    for answer in answers[: -len(_TALK_PROMPTS)]:
        asked = next(topic for topic in names if f"the {topic}" in answer.prompt)
        on_topic.append(asked in answer.text.lower())
    lengths = sorted(answer.tokens for answer in answers)
    ended = sum(answer.ended for answer in answers)
    share = sum(shown) / len(shown)
    spread = f"{lengths[0]}..{lengths[len(lengths) // 2]}..{lengths[-1]}"
    print(
        f"== {name}: property {share:.3f}, ended {ended}/{len(answers)}, "
        f"names its topic {sum(on_topic)}/{len(on_topic)}, tokens {spread}",
        flush=True,
    )
    for answer in [answer for answer, good in zip(answers, shown, strict=True) if not good][:3]:
        print(f"   fails: {answer.prompt!r} -> {answer.text!r}")
    return share
