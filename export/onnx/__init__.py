"""A model as an ONNX file, and what its products are lowered to."""
