"""The hidden width: features of the residual stream, which every block reads and writes."""

from compress.errors import CompressError
from compress.ir import Matmul, Site
from compress.sites.kinds.kind import Kind


class Residual(Kind):
    """One site for the whole model; `methods.hidden_width` chooses its directions and narrows it.

    All other sites lie inside it, so the search does not mix it with them: `pipeline.width_search` tries
    a few widths and searches a plan at each.
    """

    name = "residual"
    label = "hidden width"
    color = "#8a6d00"
    dark_color = "#d9b84a"
    searched = False

    def parts(self, site: Site) -> tuple[Matmul, list[Matmul]]:
        """Nothing: the width is priced with the whole model.

        Raises:
            CompressError: always.
        """
        raise CompressError(f"{site.name}: the hidden width is timed with the whole model, not alone")


RESIDUAL = Residual()
