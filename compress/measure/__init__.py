"""Timing on this machine and the statistics of what was measured."""
