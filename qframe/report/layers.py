"""One record per layer, and the summary of a run."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qframe.allocation import Allocation
from qframe.certificates import Certificate
from qframe.contracts import Event

if TYPE_CHECKING:
    from qframe.folds import Division

SCHEMA_VERSION = 3
_ELSEWHERE = frozenset({"source", "source_dtype", "rewritten", "input_group", "certificates"})
"""Fields that are not figures: they are recorded apart, or for verifying alone."""


@dataclass(kw_only=True)
class LayerReport:
    """What was done to one layer.

    Errors are relative output errors ||X (W - Q)^T|| / ||X W^T|| (Frobenius norms) over the
    inputs X that the layer really gets in the quantized network: `error` over the calibration
    tokens, `held_out_error` over tokens that nothing was fitted on; `rtn_...` is what rounding
    to nearest does on the same inputs and scheme. None without calibration.

    drift          how far outputs had moved before the layer was quantized, as its inputs had:
                   ||(Y - X)W|| / ||XW||, Y the inputs in the original network. Then errors are
                   ||YW - XQ|| / ||XW||. None for methods that do not ask for Y
    sqnr_db        10 log10(||W||^2 / ||W - Q||^2), of the weights
    clipped        share of weights more than half a step outside the range of the codes
    tokens         calibration tokens that reached the layer
    certificates   what became of each claim of the method, on the layer as it is stored
    inputs         what became of the layer's inputs: "error", how much of the output is lost by
                   quantizing them alone, relative as above; "step", a stored scale, and "clipped",
                   the share of inputs beyond its reach; and what outlier handlers told
    source         fingerprint of the weight that it was made of, as it was stored, in
                   `source_dtype`; `rewritten` of what outlier handlers made of it, float32, None
                   without any
    input_group    the first of the layers that read the same input
    folded         the norm, or the layer before it, that divides by the scale of the layer's input;
                   None where nothing does
    seconds        by stage; not part of the checkpoint, which must not depend on time
    """

    name: str
    method: str
    scheme: str
    rows: int
    columns: int
    bits_per_weight: float
    error: float | None = None
    held_out_error: float | None = None
    rtn_error: float | None = None
    rtn_held_out_error: float | None = None
    drift: float | None = None
    sqnr_db: float = math.nan
    clipped: float = 0.0
    tokens: int = 0
    tokens_held_out: int = 0
    info: Mapping[str, float | int | str] = field(default_factory=dict)
    inputs: Mapping[str, float | int | str] = field(default_factory=dict)
    certificates: Sequence[Certificate] = ()
    source: str = ""
    source_dtype: str = ""
    rewritten: str | None = None
    input_group: str = ""
    folded: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> LayerReport:
        """Return the report whose fields, as plain values, came back from JSON."""
        certificates = tuple(
            Certificate(**{**each, "place": tuple(each["place"])})
            for each in fields["certificates"]
        )
        return cls(**{**fields, "certificates": certificates})

    def become(self, other: LayerReport) -> None:
        """Take over all fields of another report."""
        for each in dataclasses.fields(self):
            setattr(self, each.name, getattr(other, each.name))

    @property
    def gain(self) -> float | None:
        """How many times smaller the error is than RTN's, on the calibration tokens."""
        return _ratio(self.rtn_error, self.error)

    @property
    def held_out_gain(self) -> float | None:
        """The same on held-out tokens; below 1 the method does harm there."""
        return _ratio(self.rtn_held_out_error, self.held_out_error)

    def record(self, *, timings: bool) -> dict[str, Any]:
        """Return the report as plain values; without timings it is the same for every run."""
        values = self.line(timings=timings)
        values["certificates"] = [certificate.record() for certificate in self.certificates]
        finite: dict[str, Any] = words_for_infinities(values)
        return finite

    def line(self, *, timings: bool) -> dict[str, Any]:
        """Return the same without its certificates."""
        left = _ELSEWHERE if timings else {*_ELSEWHERE, "seconds"}
        names = [each.name for each in dataclasses.fields(self) if each.name not in left]
        values = {name: getattr(self, name) for name in names}
        return {**values, "gain": self.gain, "held_out_gain": self.held_out_gain}


@dataclass(kw_only=True)
class Coverage:
    """How much of the network was quantized.

    parameters_quantized / parameters   of all parameters (tied ones once)
    matrix_fraction                     of the weights in linear layers and 3-D expert weights
    left                                name -> why, for every matrix that was left
    """

    parameters: int
    parameters_quantized: int
    matrix_fraction: float
    left: Mapping[str, str]

    def line(self) -> str:
        """Return the one-line summary with reasons counted."""
        share = 100 * self.parameters_quantized / max(self.parameters, 1)
        reasons: dict[str, int] = {}
        for reason in self.left.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        return (
            f"quantized {share:.1f} % of parameters "
            f"({100 * self.matrix_fraction:.1f} % of the weights in linear layers); "
            f"{len(self.left)} {'matrix' if len(self.left) == 1 else 'matrices'} left"
            f"{f': {why}' if why else ''}"
        )


@dataclass(kw_only=True)
class Folding:
    """What became of the scales that outlier handlers gave the inputs of layers.

    Of layers that read the same input, the first stands for all.

    folded   layer -> the norm, or the layer before it, that divides by the scale
    left     layer -> why the layers divide when they run; it goes on a sentence about the input
    """

    folded: dict[str, str]
    left: dict[str, str]

    def line(self) -> str:
        """Return the one-line summary with reasons counted."""
        reasons: dict[str, int] = {}
        for reason in self.left.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        why = "; ".join(f"{count}, as the input {why}" for why, count in sorted(reasons.items()))
        return (
            f"{len(self.folded)} of {len(self.folded) + len(self.left)} input scales are folded "
            f"into norms and layers{f', the others stay in the layers: {why}' if why else ''}"
        )


@dataclass(kw_only=True)
class RunReport:
    """All layers of a run, what happened, and what it was run with.

    allocation   how bits were given to layers, where the recipe had a target of them
    folding      what became of input scales, where there are some that were to be folded
    divisions    of layers whose rows divide by such a scale; in the manifest, not in the report
    storage      how the folder stores its layers, and who reads it; "" for none
    """

    layers: Sequence[LayerReport]
    events: Sequence[Event]
    coverage: Coverage
    calibration: Mapping[str, Any] | None
    allocation: Allocation | None = None
    folding: Folding | None = None
    divisions: Mapping[str, Division] = field(default_factory=dict)
    storage: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    def fallbacks(self) -> list[Event]:
        """Return the events in which a layer got a weaker method than asked for."""
        return [event for event in self.events if event.kind == "fallback"]

    def record(self, *, timings: bool = True) -> dict[str, Any]:
        """Return the report as plain values."""
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "coverage": dataclasses.asdict(self.coverage),
            "calibration": self.calibration,
            "events": [dataclasses.asdict(event) for event in self.events],
            "layers": [layer.record(timings=timings) for layer in self.layers],
        }
        if self.storage:
            content["storage"] = self.storage
        if self.folding is not None:
            content["folding"] = dataclasses.asdict(self.folding)
        if self.allocation is not None:
            content["allocation"] = words_for_infinities(self.allocation.record())
        if timings:
            content["seconds"] = dict(self.seconds)
        return content

    def to_json(self, *, timings: bool = True) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.record(timings=timings), indent=2) + "\n"

    def to_csv(self, *, timings: bool = True) -> str:
        """Return one line per layer."""
        rows = []
        for layer in self.layers:
            record = words_for_infinities(layer.line(timings=timings))
            info, stages = record.pop("info"), record.pop("seconds", {})
            inputs = record.pop("inputs")
            fallback = next((e.message for e in self.fallbacks() if e.layer == layer.name), "")
            rows.append(
                {
                    **record,
                    "damp": info.get("damp", ""),
                    "input_error": inputs.get("error", ""),
                    "kept_columns": inputs.get("kept_columns", ""),
                    "certificates": len(layer.certificates),
                    "certificates_violated": sum(not c.holds for c in layer.certificates),
                    "fallback": fallback,
                    **({"seconds": sum(stages.values())} if timings else {}),
                }
            )
        stream = io.StringIO()
        writer = csv.DictWriter(
            stream, fieldnames=list(rows[0]) if rows else ["name"], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()


def _ratio(above: float | None, below: float | None) -> float | None:
    if above is None or below is None:
        return None
    if below == 0:
        return 1.0 if above == 0 else math.inf
    return above / below


def words_for_infinities(value: Any) -> Any:
    """Return plain values with NaN and infinities as words: JSON has no numbers for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: words_for_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [words_for_infinities(item) for item in value]
    return value
