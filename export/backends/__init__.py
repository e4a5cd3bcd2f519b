"""Runtimes that build, run and time a compressed model.

`backend` holds the seam: `Capabilities`, which options the runtime of a target executes, and `Backend`, what
runs on this machine. `onnx_file` and `torch_module` implement it; `select.BACKENDS` lists the known ones in
order of preference. It may import `measure`, `cost`, `sites`, `export.onnx` and `export.microbench`. A new
runtime is one module with a `Backend` and one line in `BACKENDS`, as `tests/support/toy_backend.py` shows.
"""
