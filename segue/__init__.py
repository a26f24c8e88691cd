"""Segue serves one base model and thousands of LoRA adapters from one GPU, without cold starts."""
