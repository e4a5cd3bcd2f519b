"""The one exception for mistakes a user can mend: what was asked, what was found, what to do."""


class CompressError(ValueError):
    """A request that cannot be carried out; its message is shown to the user without a trace."""
