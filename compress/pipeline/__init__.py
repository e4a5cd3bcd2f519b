"""The stages of a compilation, each a function of a `Job`."""
