"""Where a model can be compressed: sites found in its traced program, checked, pruned and expanded.

`trace` exports the model as tensor operations and splits it into regions between linear products;
`grouping` finds the units of a region by what depends on what; `kinds` says which kind of site a region
is; `equivalence` checks on a copy that the shrunk module computes what the masked one does; `discovery`
runs all of these. `prune` masks and shrinks, `expand` undoes it, `permutation` reorders columns,
`residual_stream` finds the hidden width. It may import `core`, `ir`, `artifacts` and `sites.kinds`. A new
kind of site is added in `sites.kinds`; a new way of writing a linear product in `trace`.
"""
