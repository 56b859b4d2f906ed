"""The operations that kernels compute: their operands, their answers, their oracles.

A kernel (`qframe.contracts.Kernel`) computes one of `OPS` on one backend. An `Op` says what goes in
and what comes out; whether an answer is right is said by its oracle (`qframe.reference_ops`) and
its bounds (`qframe.kernel_judges`), never by a tolerance. docs/kernels.md says the same in prose.

This module imports neither torch nor numba.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from qframe import bounds, reference_ops
from qframe.contracts import OpCall
from qframe.errors import UnsupportedError

ACTIVATIONS: Final = ("float32", "bfloat16", "float16")
"""The dtypes that activations may have; all of them are float32 numbers."""

# Schemas --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand, or one part of the answer.

    name      e.g. "codes"
    dtype     of the tensor, e.g. "int16"; "int", "float" or "scheme" for what is no tensor; for
              activations another of `ACTIVATIONS`, where the call (`OpCall.dtype`) says so
    shape     in words, e.g. ("rows", "columns"); "rows or 1" is either
    meaning   what it holds
    constant  known before the first call, such as a weight: `prepare` may lay it out
    in_place  changed by the call; it is C-contiguous

    activation   activations, or outputs that have their dtype
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    meaning: str
    constant: bool = False
    in_place: bool = False
    activation: bool = False

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor and not a plain number."""
        return self.dtype not in ("int", "float", "scheme")


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation.

    operands   in the order in which a kernel takes them, constants last
    answer     what it returns: one tensor, or a tuple of them; () for an op that works in place
    call       what `OpCall.shape` holds, in words
    along      the dimension of which a call may have any number: tokens, rows, sequences
    oracle     takes the operands as NumPy arrays, returns the answer in float64
    """

    name: str
    operands: tuple[Operand, ...]
    answer: tuple[Operand, ...]
    call: tuple[str, ...]
    along: str
    oracle: Callable[..., Any]

    @property
    def takes_activations(self) -> bool:
        """Whether an operand is activations, which may have 16 bits."""
        return any(operand.activation for operand in self.operands)

    @property
    def in_place(self) -> tuple[str, ...]:
        """The names of the operands that a call changes."""
        return tuple(operand.name for operand in self.operands if operand.in_place)


def _weight() -> tuple[Operand, ...]:
    return (
        Operand("codes", "int16", ("rows", "columns"), "codes of the weight", constant=True),
        Operand("scale", "float32", ("rows or 1", "groups"), "> 0", constant=True),
        Operand("zero_point", "int16", ("rows or 1", "groups"), "code of zero", constant=True),
        Operand("group_index", "int32", ("columns",), "group of each column", constant=True),
    )


def _cache(letter: str, word: str) -> tuple[Operand, ...]:
    groups = ("batch", "kv heads", f"{letter} token groups", f"{letter} channel groups")
    return (
        Operand(
            f"{letter}_words",
            "int32",
            ("batch", "kv heads", f"{letter} rows", f"{letter} words"),
            f"codes of the {word}, packed",
        ),
        Operand(f"{letter}_scale", "float32", groups, "> 0"),
        Operand(f"{letter}_offset", "float32", groups, "what code 0 stands for"),
        Operand(f"{letter}_scheme", "scheme", (), "a KVScheme: bits, axis, group_size"),
    )


_INT8_WEIGHT = (
    Operand("w_codes", "int8", ("rows", "columns"), "codes, -127..127", constant=True),
    Operand("w_scale", "float32", ("rows",), "> 0, one per channel", constant=True),
)
_X = Operand("x", "float32", ("tokens", "columns"), "activations", activation=True)
_Y = Operand("y", "float32", ("tokens", "rows"), "outputs", activation=True)
_SUMS = Operand("y", "float32", ("tokens", "rows"), "outputs")
_X_CODES = Operand("x_codes", "int8", ("tokens", "columns"), "codes, -127..127")
_PAST = ("batch", "kv heads", "tokens", "head_dim")
_X_SCALE = Operand("x_scale", "float32", ("tokens",), "> 0, one per token")

_DEFINED = (
    Op(
        name="dequantize",
        operands=_weight(),
        answer=(Operand("weight", "float32", ("rows", "columns"), "scale * (code - zero_point)"),),
        call=("rows", "columns"),
        along="rows",
        oracle=reference_ops.dequantize,
    ),
    Op(
        name="linear_weight_only",
        operands=(_X, *_weight()),
        answer=(_Y,),
        call=("tokens", "columns", "rows"),
        along="tokens",
        oracle=reference_ops.linear_weight_only,
    ),
    Op(
        name="quantize_activations",
        operands=(_X,),
        answer=(_X_CODES, _X_SCALE),
        call=("tokens", "columns"),
        along="tokens",
        oracle=reference_ops.quantize_activations,
    ),
    Op(
        name="linear_int8",
        operands=(_X_CODES, _X_SCALE, *_INT8_WEIGHT),
        answer=(_SUMS,),
        call=("tokens", "columns", "rows"),
        along="tokens",
        oracle=reference_ops.linear_int8,
    ),
    Op(
        name="linear_int8_groups",
        operands=(_X_CODES, _X_SCALE, *_weight()),
        answer=(_SUMS,),
        call=("tokens", "columns", "rows"),
        along="tokens",
        oracle=reference_ops.linear_int8_groups,
    ),
    Op(
        name="linear_int8_outliers",
        operands=(
            _X,
            Operand("threshold", "float", (), "columns with any |x| >= threshold are outliers"),
            *_INT8_WEIGHT,
            Operand("weight", "float32", ("rows", "columns"), "for the outliers", constant=True),
        ),
        answer=(_Y,),
        call=("tokens", "columns", "rows"),
        along="tokens",
        oracle=reference_ops.linear_int8_outliers,
    ),
    Op(
        name="hadamard",
        operands=(
            _X,
            Operand("signs", "float32", ("columns",), "+1 or -1"),
            Operand("block", "int", (), "columns of a block, a power of two that divides them"),
        ),
        answer=(
            Operand(
                "y",
                "float32",
                ("tokens", "columns"),
                "x diag(signs) H / sqrt(block)",
                activation=True,
            ),
        ),
        call=("tokens", "columns", "block"),
        along="tokens",
        oracle=reference_ops.hadamard,
    ),
    Op(
        name="rms_norm",
        operands=(
            _X,
            Operand("weight", "float32", ("columns",), "what each column is multiplied with"),
            Operand("eps", "float", (), "added to the mean of the squares, at least 2^-100"),
        ),
        answer=(
            Operand(
                "y",
                "float32",
                ("tokens", "columns"),
                "weight x / sqrt(mean(x^2) + eps)",
                activation=True,
            ),
        ),
        call=("tokens", "columns"),
        along="tokens",
        oracle=reference_ops.rms_norm,
    ),
    Op(
        name="attention_kv",
        operands=(
            Operand(
                "q",
                "float32",
                ("batch", "heads", "head_dim"),
                "the newest token's queries",
                activation=True,
            ),
            *_cache("k", "keys"),
            *_cache("v", "values"),
            Operand("tokens", "int", (), "how many there are"),
        ),
        answer=(
            Operand(
                "out",
                "float32",
                ("batch", "heads", "head_dim"),
                "softmax(z) v, z = q k",
                activation=True,
            ),
            Operand("lse", "float32", ("batch", "heads"), "log sum exp z"),
        ),
        call=("batch", "heads", "kv heads", "tokens", "head_dim"),
        along="batch",
        oracle=reference_ops.attention_kv,
    ),
    Op(
        name="attention_rotary",
        operands=(
            Operand(
                "q",
                "float32",
                ("batch", "heads", "head_dim"),
                "the newest token's queries",
                activation=True,
            ),
            Operand("k", "float32", ("batch", "kv heads", "head_dim"), "its keys", activation=True),
            Operand(
                "v", "float32", ("batch", "kv heads", "head_dim"), "its values", activation=True
            ),
            Operand("cos", "float32", ("batch", "head_dim"), "of the angles of its position"),
            Operand("sin", "float32", ("batch", "head_dim"), "of the same"),
            Operand("keys", "float32", _PAST, "of those before, turned", activation=True),
            Operand("values", "float32", _PAST, "of those before", activation=True),
            Operand("scaling", "float", (), "what logits are multiplied with"),
        ),
        answer=(
            Operand(
                "out", "float32", ("batch", "heads", "head_dim"), "softmax(z) V", activation=True
            ),
            Operand(
                "k_turned",
                "float32",
                ("batch", "kv heads", "head_dim"),
                "k, turned",
                activation=True,
            ),
        ),
        call=("batch", "heads", "kv heads", "tokens", "head_dim"),
        along="batch",
        oracle=reference_ops.attention_rotary,
    ),
    Op(
        name="hessian_update",
        operands=(
            Operand(
                "hessian",
                "float64",
                ("columns", "columns"),
                "x^T x is added on and below the diagonal",
                in_place=True,
            ),
            _X,
        ),
        answer=(),
        call=("tokens", "columns"),
        along="tokens",
        oracle=reference_ops.hessian_update,
    ),
)

OPS: Final[Mapping[str, Op]] = {op.name: op for op in _DEFINED}
"""Every operation by name."""


def op_of(name: str) -> Op:
    """Return an operation. Raises UnsupportedError for one that is not defined."""
    if name not in OPS:
        raise UnsupportedError(f"there is no operation {name!r}; there are {', '.join(OPS)}")
    return OPS[name]


# Calls ----------------------------------------------------------------------------------------


def run(kernel: Any, operands: Sequence[Any]) -> Any:
    """Call a kernel with the operands of its op, in order; return what it returns.

    A kernel with a method `prepare` is given the constant operands first, once, and what that
    returns in their place: so it is called as kernel(*variables, kernel.prepare(*constants)).
    """
    if not hasattr(kernel, "prepare"):
        return kernel(*operands)
    defined = op_of(kernel.op).operands
    variables = [each for each, o in zip(operands, defined, strict=True) if not o.constant]
    constants = [each for each, o in zip(operands, defined, strict=True) if o.constant]
    return kernel(*variables, kernel.prepare(*constants))


def short_dtypes(kernel: Any, call: OpCall) -> tuple[str, ...]:
    """Return the dtypes of 16 bits that activations of a call may have.

    Those that the kernel declares in its attribute `activations`, "float32" alone unless it does,
    and that it supports: nobody has to know of others.
    """
    declared = getattr(kernel, "activations", ACTIVATIONS[:1])
    asked = (replace(call, dtype=dtype) for dtype in ACTIVATIONS[1:] if dtype in declared)
    return tuple(each.dtype for each in asked if kernel.supports(each) is None)


# Arithmetic -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a kernel adds up.

    unit     unit roundoff of its sums
    inputs   relative error of rounding an operand before it is multiplied, 0 for none
    depth    roundings to `unit` that a product passes at most in a call; None: whatever the order
    outputs  the dtype to which outputs are rounded, once and at the end
    """

    unit: float
    inputs: float = 0.0
    depth: int | None = None
    outputs: str = "float32"


_TRUNCATED = 2 * bounds.UNIT["float32"]  # sums that are cut, not rounded, as in matrix units

ARITHMETICS: Final[Mapping[str, Arithmetic]] = {
    "float64": Arithmetic(bounds.UNIT["float64"]),
    "float32": Arithmetic(bounds.UNIT["float32"]),
    "float32 truncated": Arithmetic(_TRUNCATED),
    "tf32": Arithmetic(_TRUNCATED, 2 * bounds.UNIT["float16"]),
    "float16": Arithmetic(_TRUNCATED, bounds.UNIT["float16"]),
    "bfloat16": Arithmetic(_TRUNCATED, bounds.UNIT["bfloat16"]),
}
"""What a kernel may declare as its `accumulator`.

The last three name the dtype to which operands are rounded; their sums are float32, cut or rounded.
TF32 has the 11 significant bits of float16, and hardware may cut them off instead of rounding.
"""


def arithmetic_of(
    kernel: Any, operands: Mapping[str, Any] | None = None, dtype: str = "float32"
) -> Arithmetic:
    """Return what a kernel declares in its attribute `accumulator`, "float32" unless it does.

    operands   name -> array or number of a call, for a kernel that declares its `depth`
    dtype      of the activations, and so of outputs

    Raises UnsupportedError for a word that is not in `ARITHMETICS`.
    """
    declared = getattr(kernel, "accumulator", "float32")
    if declared not in ARITHMETICS:
        raise UnsupportedError(
            f"kernel {kernel.op}/{kernel.backend}: accumulator={declared!r} is not known; "
            f"choose one of {', '.join(ARITHMETICS)}"
        )
    arithmetic = replace(ARITHMETICS[declared], outputs=dtype)
    if operands is None or not hasattr(kernel, "depth"):
        return arithmetic
    return replace(arithmetic, depth=int(kernel.depth(operands)))
