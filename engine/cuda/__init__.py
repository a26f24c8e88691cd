"""What only a CUDA device runs. Imported where the configuration names one; needs flashinfer and triton."""
