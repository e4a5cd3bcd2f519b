"""How a site may be compressed: pruning, sparsity, low rank, quantization.

May import core, sites, tasks, calibration and export. A move is added here as one module with a subclass of
`move.Move` as `MOVE`, and one line in `compress.formats.MOVES`, which states its facts without torch.
"""
