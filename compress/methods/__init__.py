"""How a site may be compressed: pruning, sparsity, low rank, quantization."""
