"""Latency, energy and bytes of a site: from measured tables, or a roofline."""
