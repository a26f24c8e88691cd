"""Maker of the demo assets: a corpus written from templates, a tokenizer, a tiny Llama model and its LoRA adapters."""
