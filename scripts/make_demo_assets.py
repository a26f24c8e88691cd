"""Make the demo's model, tokenizer and LoRA adapters from nothing, or check the ones that are there.

Without options it trains and saves everything: minutes on a GPU, hours on a CPU. With --check it prints the answers of
what is saved and the share of them that show what their adapter should do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from demo_assets.answers import voices
from demo_assets.checks import check_assets
from demo_assets.dataset import adapter_examples, base_examples, pack
from demo_assets.tokenizer import save_tokenizer, train_tokenizer
from demo_assets.training import (
    ADAPTERS,
    AdapterSpec,
    Schedule,
    load_base,
    new_base_model,
    save_adapter,
    save_base,
    train,
    with_lora,
)
from tokenizers import Tokenizer

_ASSETS = Path(__file__).resolve().parent.parent / "segue" / "demo" / "assets"
_VOCAB_SIZE = 1024
_TOKENIZER_EXAMPLES = 20_000


def main() -> None:
    """Parse the command line and run."""
    args = _parsed_arguments()
    # cuBLAS reads the variable when CUDA starts, and without it refuses to run deterministically.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.check:
        check_assets(args.out, device)
        return
    if not args.adapters:
        shutil.rmtree(args.out / "model", ignore_errors=True)
        shutil.rmtree(args.out / "adapters", ignore_errors=True)
        _make_base(args, device)
    for index, spec in enumerate(ADAPTERS):
        if not args.adapters or spec.voice in args.adapters:
            _make_adapter(args, device, spec, args.seed + 1 + index)
    descriptions = {spec.voice: voices()[spec.voice].description for spec in ADAPTERS}
    (args.out / "adapters.json").write_text(json.dumps(descriptions, indent=2) + "\n")


def _parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=_ASSETS, help="folder of the assets")
    parser.add_argument("--check", action="store_true", help="check the saved assets instead of making them")
    parser.add_argument("--adapters", nargs="+", metavar="NAME", help="make only these, on the saved base model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-steps", type=int, default=2500)
    parser.add_argument("--base-rows", type=int, default=128, help="rows of 384 tokens in a batch")
    parser.add_argument("--base-examples", type=int, default=250_000)
    parser.add_argument("--adapter-steps", type=int, default=300)
    parser.add_argument("--adapter-rows", type=int, default=32)
    parser.add_argument("--adapter-examples", type=int, default=20_000)
    return parser.parse_args()


def _make_base(args: argparse.Namespace, device: torch.device) -> None:
    examples = base_examples(args.seed, args.base_examples)
    texts = (text for example in examples[:_TOKENIZER_EXAMPLES] for text in example)
    tokenizer = train_tokenizer(texts, _VOCAB_SIZE)
    rows = pack(tokenizer, examples).to(device)
    print(f"base: {rows.tokens.numel()} tokens in {len(rows.tokens)} rows", flush=True)
    torch.manual_seed(args.seed)
    model = new_base_model(_VOCAB_SIZE)
    torch.nn.Module.to(model, device)
    schedule = Schedule(steps=args.base_steps, batch_rows=args.base_rows, peak_learning_rate=3e-3, weight_decay=0.05)
    train(model, rows, schedule, args.seed, "base")
    save_base(model, args.out / "model")
    save_tokenizer(tokenizer, args.out / "model")


def _make_adapter(args: argparse.Namespace, device: torch.device, spec: AdapterSpec, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_file(str(args.out / "model" / "tokenizer.json"))
    rows = pack(tokenizer, adapter_examples(voices()[spec.voice], args.seed, args.adapter_examples)).to(device)
    adapted = with_lora(load_base(args.out / "model", device), spec)
    schedule = Schedule(
        steps=args.adapter_steps, batch_rows=args.adapter_rows, peak_learning_rate=2e-3, weight_decay=0.0
    )
    train(adapted, rows, schedule, seed, spec.voice)
    save_adapter(adapted, args.out / "adapters" / spec.voice)


if __name__ == "__main__":
    main()
