"""Recovery: distillation, pruning-aware and quantization-aware training."""
