"""Mathematics of compression: tensors in, tensors out.

Pruning with refit (OBS), N:M and block sparsity, low rank, quantization, SmoothQuant, permutations and
rotations. It imports nothing but `compress.ir` and `compress.errors`: no models, tasks or files. A new
algorithm is a new module here, with its reference in the docstring and a comparison against a brute-force
or closed-form solution in its test.
"""
