"""Training of compressed models: distillation, the training loop, two-stage and pruning-aware training.

It imports `methods`, `sites`, `tasks`, `calibration`, `distributed` and `core`, never `pipeline`. A new loss
is added to `distillation`; a new way of training is a module with a function that takes a model and its data.
"""
