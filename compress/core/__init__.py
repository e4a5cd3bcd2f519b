"""The mathematics: tensors in, tensors out, with no model, file or device in it."""
