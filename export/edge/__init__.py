"""Bundles that are measured on another device, and their results."""
