"""Times single sites and single products on the device at hand, for the latency tables in `cost`.

`onnx_chain` and `torch_chain` write a few copies of a site as an ONNX file and as a torch module, from
the description that its kind gives (`sites.kinds.Kind.body`); `site_timing` times chains of several
widths in turn; `block_layouts` does the same for layouts of block-sparse products. It may import whatever
`export.onnx` and `export.backends` may. An operator that a new kind of site needs is added to both
builders.
"""
