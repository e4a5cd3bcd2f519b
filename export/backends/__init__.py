"""Runtimes that build, run and time a compressed model."""
