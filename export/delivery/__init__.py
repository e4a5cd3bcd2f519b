"""Finished results in the format of another runtime: TensorRT engines, float16 files, archives.

`deliver.FORMATS` lists the formats that `compress export --to` accepts. It may import every other part of
`export`. A new format is a function that takes a finished result and a directory, and one line in `FORMATS`.
"""
