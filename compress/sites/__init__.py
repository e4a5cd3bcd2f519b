"""Where a model can be compressed: found in its graph, pruned, expanded."""
