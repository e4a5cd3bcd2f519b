"""Finished outputs in the format of another runtime: engines, half precision, archives."""
