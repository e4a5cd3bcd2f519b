"""Why a compressed model is not faster: what no move can touch, and what every form gains."""

from collections import Counter

from compress.job import Job
from compress.loop import Round
from compress.pricing import Costs

ROUNDED = {"int8": "int8-dynamic", "int8-static": "int8-static", "int4": "int4", "fp8": "fp8"}  # by move


def untouched(job: Job, costs: Costs) -> list[str]:
    """Why it is not faster: what no move can touch, and what was not there to choose."""
    share = costs.fixed_ms / costs.dense_ms
    said = "" if costs.source == "measured" else " (estimate)"
    lines = [
        f"{costs.fixed_ms:.2f} of {costs.dense_ms:.2f} ms{said} ({share:.0%}) lie outside every site: "
        "embeddings, norms, the head, and calls; no structure removed can save them."
    ]
    lines += [f"{skip.place}: not a site, because {skip.reason}" for skip in job.found.skipped]
    if job.found.fallback:
        lines.append(f"Sites come from names, not from the program: {job.found.fallback}")
    if "2:4" not in (*job.profile.patterns, *job.recipe.options.moves):
        lines.append(f"2:4 sparsity was not considered: {job.profile.name} gains no time from it.")
    looked = {form for row in costs.gains.values() for form in (*row, *costs.untimed)}
    for move, form in ROUNDED.items():
        if move in job.recipe.options.moves and form not in looked:
            lines.append(
                f"{move} was not considered: no site is multiplied in it on {job.profile.name} here."
            )
    return lines


def gains(costs: Costs, turn: Round) -> list[str]:
    """What every form that was looked at gains on the target, and where it was chosen."""
    said = "" if costs.source == "measured" else " (estimate)"
    chosen = Counter(option.form for option in turn.choices.values())
    saved: dict[str, list[float]] = {}
    for row in costs.gains.values():
        for form, gain in row.items():
            saved.setdefault(form, []).append(gain)
    lines = []
    for form in costs.untimed:
        lines.append(f"{form}: not offered, since no site could be timed in it here.")
    for form, found in sorted(saved.items()):
        count = chosen[form]
        why = f"chosen at {count} of {len(turn.choices)} sites" if count else "not chosen"
        if not count:
            pays = any(form in row for row in costs.rows.values())
            why += ": other moves cost less for the same time" if pays else ": it saves no time here"
        span = f"{min(found):.2f}x" if len(found) == 1 else f"{min(found):.2f}x to {max(found):.2f}x"
        lines.append(f"{form}: {span} on a whole site{said}; {why}.")
    return lines
