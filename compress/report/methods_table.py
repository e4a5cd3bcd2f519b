"""The table of what every site was offered: sites down, forms across, the loss of each in its cell."""

from typing import NamedTuple

from compress.formats import DENSE, STRUCTURE
from compress.ir import Offer
from compress.report import charts
from compress.report.formatting import digits
from compress.report.schema import Report, SiteReport

PLAIN = (DENSE, STRUCTURE)


class Cell(NamedTuple):
    """One form at one site: what stands in the table, why it was taken or not, whether it was."""

    text: str
    why: str
    chosen: bool


class Offers(NamedTuple):
    """The columns, and a row of cells by site; `kept` says what a site was given of its units."""

    forms: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]


def table(report: Report) -> Offers | None:
    """What every site was offered, None where nothing but units was looked at."""
    forms = tuple(dict.fromkeys(offer.form for site in report.sites for offer in site.offers))
    if not set(forms) - set(PLAIN):
        return None
    ordered = sorted(forms, key=lambda form: (form not in PLAIN, form))
    rows = tuple(
        (site.name, charts.kept(site.option), tuple(_cell(site, form) for form in ordered))
        for site in report.sites
        if site.offers
    )
    return Offers(tuple(ordered), rows)


def _cell(site: SiteReport, form: str) -> Cell:
    offer = next((one for one in site.offers if one.form == form), None)
    if offer is None:
        return Cell("-", "not offered here", chosen=False)
    return Cell(_text(offer), offer.why, offer.chosen)


def _text(offer: Offer) -> str:
    if offer.loss is not None:
        return f"{'✓ ' if offer.chosen else ''}{digits(offer.loss)}"
    if offer.why.startswith("too slow"):
        return "too slow"
    return "-" if offer.speedup is None else f"no gain, {offer.speedup:.2f}x"
