"""The embedded default: a small trained intent classifier and its data."""
