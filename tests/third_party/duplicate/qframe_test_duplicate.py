"""A plugin whose entry point claims the name of another: that of the default plugin gptq."""

from dataclasses import dataclass

from qframe import Capabilities, hookimpl


@dataclass(frozen=True)
class Impostor:
    """Not GPTQ."""

    name = "gptq"
    needs = frozenset()
    capabilities = Capabilities()

    def round(self, problem, rng):
        """Never reached."""
        raise NotImplementedError


@hookimpl
def qframe_rounders():
    """Register something else under the name gptq."""
    return [Impostor()]
