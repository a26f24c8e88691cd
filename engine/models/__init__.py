"""Base models: configuration, weights and layers."""
