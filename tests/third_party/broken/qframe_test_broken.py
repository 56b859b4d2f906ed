"""A plugin that cannot be imported: it needs a package that nobody has."""

import qframe_test_a_package_that_nobody_has  # noqa: F401

from qframe import hookimpl


@hookimpl
def qframe_rounders():
    """Never reached."""
    return []
