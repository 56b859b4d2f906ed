"""A plugin with a misspelt hook: qframe_rounder instead of qframe_rounders."""

from qframe import hookimpl


@hookimpl
def qframe_rounder():
    """A hook that does not exist."""
    return []
