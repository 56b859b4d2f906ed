"""Every opcode of the table against its model: integers, bit patterns and Fractions."""

import pytest

from qframe_plugins.ptx_host.forms import TABLE, count_of
from tests.ptx import float_models, models
from tests.ptx.snippets import Columns

APPROXIMATE = {"transcendental": ("ex2", "lg2", "sin", "cos", "tanh"), "rsqrt": ("rsqrt",)}
LONGER = ("add_carry", "mad_carry", "cvta")  # they need more than one instruction: test_device
PURE = [
    form
    for form in TABLE
    if form.group in ("integer", "logic", "float", "convert") and form.emit.__name__ not in LONGER
]
PAIRED = {"unpack"}


def name_of(form):
    return f"{form.pattern} {form.operands}".replace(" ", "_")


def model_of(form):
    name = form.emit.__name__
    if name == "minmax":
        name = "int_minmax" if form.group == "integer" else "float_minmax"
    return getattr(models, name, None) or getattr(float_models, name, None)


def halves(name, m, operands, results):
    """Say of an approximate result, or of both halves of a pair, what is wrong."""
    kind = m["T"]
    if not kind.endswith("x2"):
        cases = [(kind, operands[0], results[0])]
    else:
        cases = [(kind[:-2], operands[0] >> k & 0xFFFF, results[0] >> k & 0xFFFF) for k in (0, 16)]
    for one, operand, result in cases:
        allowed = float_models.approximate(name, {**m, "T": one}, operand)
        if allowed is not None and result not in allowed:
            return f"{operand:#x} -> {result:#x}, allowed {[hex(bits) for bits in allowed]}"
    return ""


@pytest.mark.parametrize("form", PURE, ids=name_of)
def test_opcodes_do_what_their_models_do(form):
    name = form.emit.__name__
    columns = Columns(form)
    tried = 0
    for opcode, m, operands, results in columns.run(check=False):
        tried += 1
        if name in APPROXIMATE:
            [function] = [one for one in APPROXIMATE[name] if f"={one}" in m]
            problem = halves(function, m, operands, results)
            assert not problem, f"{opcode}: {problem}"
            continue
        model = model_of(form)
        assert model is not None, f"{form.pattern} has no model"
        if any(slot.kind == "number" for slot in columns.slots):
            operands = [*operands, columns.immediate]
        if name in PAIRED:
            operands = [*operands, count_of(columns.slots[0], m)]
        expected = model(m, *operands)
        expected = list(expected) if isinstance(expected, tuple) else [expected]
        shown = f"{opcode} {[hex(v) for v in operands]}"
        assert [hex(v) for v in results] == [hex(v) for v in expected], shown
    assert tried >= 100
