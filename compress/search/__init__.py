"""From candidates and a budget to a plan."""
