"""The devices that can be a target: the facts of each, their sources, and how far off a prediction is."""

from compress import profiles
from compress.cost import published_latencies
from compress.ir import Document

ORIGINS = ("onnxruntime", "tensorrt", "torch-cuda")


class Device(Document):
    """One target in a row of the list; `costs` says whether times of sites are measured or estimated."""

    name: str
    kind: str
    runtime: str
    baseline: str
    peak_tflops: float | None
    bandwidth_gb_s: float
    memory_gb: float
    costs: str
    description: str


def listed() -> tuple[Device, ...]:
    """Every target in one row."""
    rows = []
    for name in profiles.names():
        profile = profiles.load(name)
        rows.append(
            Device(
                name=name,
                kind=profile.kind,
                runtime=profile.runtime,
                baseline=profile.baseline_precision,
                peak_tflops=profile.peak_tflops.get(profile.baseline_precision),
                bandwidth_gb_s=profile.bandwidth_gb_s,
                memory_gb=profile.memory_gb,
                costs="measured" if profile.measured_here or _tables(name) else "estimated",
                description=profile.description,
            )
        )
    return tuple(rows)


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
                "series": check.series,
                "points": check.points,
                "mean_error": round(check.mean_error, 4),
                "max_error": round(check.max_error, 4),
                "bias": round(check.bias, 4),
            }
            for check in found
        ]
        sources = "; ".join(dict.fromkeys(check.source for check in found))
        document["roofline_against"] = [f"{sources}. Assumed: {published_latencies.ASSUMED}."]
    return document


def _tables(name: str) -> list[str]:
    """The runtimes for which a measured table ships."""
    return [origin for origin in ORIGINS if profiles.measured(name, origin) is not None]
