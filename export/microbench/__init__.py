"""Times single sites and single products on the device at hand, for the latency tables in `cost`.

`onnx_chain` and `torch_chain` write a few copies of a site as an ONNX file and as a torch module, from
the description that its kind gives (`sites.kinds.Kind.body`); `site_timing` times chains of several
widths in turn, in whatever way a backend runs them (`ChainRuntime`). It may import `core`, `cost`, `measure`,
`sites` and `export.onnx`; `export.backends` imports it. An operator that a new kind of site needs is added to
both builders.
"""
