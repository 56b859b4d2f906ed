"""The schemes that a layer may get when a recipe has `target_bits`, and what each would take.

Known from headers alone, so that a target that cannot be reached is refused before any work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qframe.allocation import budget_of, check_target
from qframe.contracts import LayerInfo
from qframe.errors import RecipeError, UnsupportedError
from qframe.memory import stored_bits
from qframe.recipe import Recipe, matches, scheme_objections
from qframe.scheme import Scheme
from qframe.strict import by_layers

if TYPE_CHECKING:
    from qframe.pipeline import Job

CANDIDATE_BITS = (2, 3, 4, 5, 6, 8)  # where a recipe names none
FIXED = "num_bits given by the recipe"
UNREACHED = "no token reached it"


@dataclass(frozen=True, slots=True)
class Candidates:
    """What may be chosen.

    target    stored bits per weight, at most
    schemes   layer -> its schemes, fewest bits first; of several, they differ in num_bits alone
    bits      layer -> what it takes with each, in bits, everything included
    sizes     layer -> number of weights
    fixed     layer -> why it has one scheme only
    """

    target: float
    schemes: Mapping[str, tuple[Scheme, ...]]
    bits: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    fixed: Mapping[str, str]

    @property
    def weights(self) -> int:
        """How many weights all layers have."""
        return sum(self.sizes.values())

    @property
    def budget(self) -> int:
        """The bits that all layers may take."""
        return budget_of(self.target, self.weights)

    def range_of(self, layer: str) -> tuple[float, float]:
        """Return the fewest and the most stored bits per weight that a layer may get."""
        bits, size = self.bits[layer], max(self.sizes[layer], 1)
        return min(bits) / size, max(bits) / size

    def keeping(self, layers: Mapping[str, tuple[Scheme, int]], why: str) -> Candidates:
        """Return the same with some layers fixed. Raises RecipeError as `check` does.

        layers   layer -> its scheme, and the bits that it takes
        """
        kept = Candidates(
            self.target,
            {**self.schemes, **{name: (scheme,) for name, (scheme, _) in layers.items()}},
            {**self.bits, **{name: (bits,) for name, (_, bits) in layers.items()}},
            self.sizes,
            {**self.fixed, **dict.fromkeys(layers, why)},
        )
        kept.check()
        return kept

    def check(self) -> None:
        """Raise RecipeError when the target is less, or more, than what can be reached."""
        least = sum(min(each) for each in self.bits.values())
        most = sum(max(each) for each in self.bits.values())
        check_target(self.target, least, most, self.weights)


def candidates_of(job: Job) -> Candidates | None:
    """Return what may be chosen; None for a recipe without a target.

    Raises RecipeError when the target cannot be reached or nothing can be chosen, UnsupportedError
    when the recipe names candidates that the method cannot do.
    """
    recipe = job.recipe
    if recipe.target_bits is None:
        return None
    schemes: dict[str, tuple[Scheme, ...]] = {}
    fixed: dict[str, str] = {}
    refused: list[tuple[str, str]] = []
    for name, scheme in job.plan.schemes.items():
        if _is_fixed(recipe, job.network.layers[name], scheme):
            schemes[name], fixed[name] = (scheme,), FIXED
            continue
        found = []
        for bits in sorted(set(recipe.candidate_bits or CANDIDATE_BITS)):
            changed = scheme if bits == scheme.num_bits else scheme.replace(num_bits=bits)
            reason = next(scheme_objections(job.method, changed, job.host), None)
            if reason is None:
                found.append(changed)
            else:
                refused.append((name, f"num_bits={bits}: {reason}"))
        schemes[name] = tuple(found)
    empty = [name for name, found in schemes.items() if not found]
    if refused and (recipe.candidate_bits is not None or empty):
        said = "\n".join(by_layers(refused))
        raise UnsupportedError(f"candidate_bits: {said}")
    if len(fixed) == len(schemes):
        raise RecipeError(
            "target_bits: the recipe gives num_bits, or a format, of every layer, so there is "
            "nothing to choose"
        )
    made = Candidates(
        target=recipe.target_bits,
        schemes=schemes,
        bits={n: tuple(stored_bits(job, n, s) for s in found) for n, found in schemes.items()},
        sizes={name: job.network.layers[name].size for name in schemes},
        fixed=fixed,
    )
    made.check()
    return made


def _is_fixed(recipe: Recipe, layer: LayerInfo, scheme: Scheme) -> bool:
    """Return whether an override gives the layer's num_bits, or its format does."""
    return scheme.format is not None or any(
        key in ("num_bits", "format")
        for pattern, changes in recipe.overrides.items()
        if matches(pattern, layer)
        for key in _canonical(changes)
    )


def _canonical(changes: Mapping[str, Any]) -> Iterator[str]:
    yield from (Scheme.aliases.get(key, key) for key in changes)
