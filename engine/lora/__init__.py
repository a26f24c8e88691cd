"""LoRA adapters in the engine: opening them, bringing them to the device, and adding their deltas."""
