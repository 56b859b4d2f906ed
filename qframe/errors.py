"""One error class per broken promise.

Every message names what was wrong, what was expected, and what to do.

The command line turns an error into one screen of text and its `exit_code`:
2 for a request that cannot be carried out as asked, 3 for numbers that are not right,
4 for a checkpoint that is not what it claims to be.
"""


class QframeError(Exception):
    """The root of all errors that qframe raises on purpose."""

    exit_code = 2


class RecipeError(QframeError):
    """A recipe or scheme has an unknown key, a wrong value, or a pattern that matches nothing."""


class UnsupportedError(QframeError):
    """A combination that a plugin declares it cannot do. Raised before any work is done."""


class PluginError(QframeError):
    """A plugin is broken, breaks a contract, or claims a name that another one has."""


class UnknownNameError(PluginError):
    """No plugin provides the name that was asked for."""


class MissingExtraError(QframeError):
    """A package of an extra is missing. The message holds the exact pip command."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f'run: pip install "qframe[{extra}]"'
        )


class WeightsError(QframeError):
    """A model folder cannot be read: missing, truncated, unsafe or inconsistent files."""


class ModelError(QframeError):
    """A network cannot be walked: no linear layers, or its forward pass fails."""


class CalibrationError(QframeError):
    """Calibration text or tokens cannot serve: not found, too short, not text."""


class UncalibratedLayerError(CalibrationError):
    """A layer that needs statistics saw no tokens."""


class MemoryLimitError(QframeError):
    """A step needs more memory than the machine has free.

    Raised before the step begins where that is known, else naming the layer and the stage.
    """


class OutputError(QframeError):
    """The output folder exists, cannot be written, or is incomplete."""


class LockedError(OutputError):
    """Another run is writing the same output folder."""


class UnfinishedError(OutputError):
    """An unfinished run is in the way, or is not one that can be gone on with as asked."""


class RanksError(QframeError):
    """Processes that do a run together cannot go on: one is gone, has failed, or is elsewhere."""


class NonFiniteError(QframeError):
    """A NaN or an infinity where numbers are needed: in weights, activations or results."""

    exit_code = 3


class HessianError(QframeError):
    """A Hessian could not be factorized with any damping up to the cap."""

    exit_code = 3


class FallbackError(QframeError):
    """More layers fell back to a weaker method than the recipe allows."""

    exit_code = 3


class OverfitError(QframeError):
    """A layer is worse than one rounded to nearest on tokens that were held out."""

    exit_code = 3


class CertificateError(QframeError):
    """A layer breaks a bound that its method claims to keep."""

    exit_code = 3


class VerifyError(QframeError):
    """A checkpoint is not what its manifest says."""

    exit_code = 4
