"""The devices that can be a target: the facts of each, their sources, and how far off a prediction is."""

from compress import profiles
from compress.cost import published_latencies

ORIGINS = ("onnxruntime", "tensorrt", "torch-cuda")


def listed() -> dict[str, object]:
    """Every target in one row."""
    rows = []
    for name in profiles.names():
        profile = profiles.load(name)
        rows.append(
            {
                "name": name,
                "kind": profile.kind,
                "runtime": profile.runtime,
                "baseline": profile.baseline_precision,
                "peak_tflops": profile.peak_tflops.get(profile.baseline_precision),
                "bandwidth_gb_s": profile.bandwidth_gb_s,
                "memory_gb": profile.memory_gb,
                "costs": "measured" if profile.measured_here or _tables(name) else "estimated",
                "description": profile.description,
            }
        )
    return {"targets": rows}


def facts(name: str) -> dict[str, object]:
    """What is known of one target: its profile with sources, its tables, the roofline's error.

    Raises:
        CompressError: there is no such target (with the nearest names).
    """
    profile = profiles.load(name)
    document: dict[str, object] = profile.model_dump(mode="json", exclude_none=True)
    document["measured_tables"] = _tables(name)
    found = published_latencies.checks(name)
    if found:
        document["roofline"] = [
            {
                "table": check.origin,
                "points": len(check.points),
                "mean_error": round(check.mean_error, 4),
                "max_error": round(check.max_error, 4),
                "held_out_mean_error": round(check.held_out_error, 4),
            }
            for check in found
        ]
        document["roofline_against"] = [
            f"{check.origin}: {check.title}. {check.source}. Assumed: {check.assumed}." for check in found
        ]
        document["published"] = [_row(point) for check in found for point in check.points]
    return document


def _row(point: published_latencies.Point) -> dict[str, object]:
    """One published figure with the roofline's, and both errors."""
    unseen = point.held_out_error
    return {
        "figure": point.name,
        "unit": point.unit,
        "published": point.published,
        "predicted": round(point.predicted, 4),
        "error": round(point.error, 4),
        "held_out_error": None if unseen is None else round(unseen, 4),
    }


def _tables(name: str) -> list[str]:
    """The runtimes for which a measured table ships."""
    return [origin for origin in ORIGINS if profiles.measured(name, origin) is not None]
