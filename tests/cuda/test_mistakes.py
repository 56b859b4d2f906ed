"""The kernels with one mistake each in their source: the suite finds it on ptx_host."""

import pytest

from qframe_conformance import check_plugin
from qframe_plugins.kernels import cuda_ops
from tests.cuda.extra import need_extra
from tests.mutants.kernels_source import changed

need_extra()

MISTAKES = (
    # name, op, scenario, file, old, new, the check that finds it
    (
        "the largest number is taken, not the largest magnitude",
        "quantize_activations",
        "tokens",
        "tokens.py",
        "int32(bits_of(number) & uint32(_MAGNITUDE))",
        "int32(bits_of(number))",
        "scales_of_tokens",
    ),
    (
        "no barrier between what warps have found and its reading",
        "quantize_activations",
        "tokens",
        "tokens.py",
        "    cuda.syncthreads()\n",
        "",
        "answers",
    ),
    (
        "columns after the last whole vector are not looked at",
        "quantize_activations",
        "tokens",
        "tokens.py",
        "    column = uint32(whole + thread)\n        while column < columns:\n            bits",
        "    column = uint32(whole + thread)\n        while column < whole:\n            bits",
        "scales_of_tokens",
    ),
    (
        "all rows have the zero points of the first",
        "dequantize",
        "int4-asymmetric-group",
        "dequantize.py",
        "zero_point[other]",
        "zero_point[group]",
        "values_of_codes",
    ),
    (
        "a difference of a butterfly has the other sign",
        "hadamard",
        "short",
        "hadamard.py",
        "other - number if lane & distance",
        "number - other if lane & distance",
        "transform",
    ),
    (
        "a tile is overwritten while other warps read it",
        "linear_int8",
        "long",
        "int8_products.py",
        "            cuda.syncthreads()\n            stage = following",
        "            stage = following",
        "answers",
    ),
    (
        "a copy is used before it has come",
        "linear_int8",
        "short",
        "int8_products.py",
        "        wait_for_all_but_one()\n",
        "",
        "answers",
    ),
    (
        "a group's sum goes on in the next group",
        "linear_int8_groups",
        "int4-asymmetric-group",
        "int8_products.py",
        "                        products[k] = int32(0)\n            cuda.syncthreads()",
        "            cuda.syncthreads()",
        "eight_bit_groups",
    ),
    (
        "a zero point counts once for all columns",
        "linear_int8_groups",
        "int4-asymmetric-group",
        "int8_products.py",
        "int32(zero * sum_of_token)",
        "zero",
        "eight_bit_groups",
    ),
    (
        "all lanes take the group of the first",
        "linear_weight_only",
        "int4-asymmetric-group",
        "few_tokens.py",
        "group[uint32(mine // uint32(STEP))]",
        "group[uint32(start // uint32(STEP))]",
        "few_tokens",
    ),
    (
        "what is behind the last column is read",
        "linear_weight_only",
        "int4-asymmetric-group",
        "few_tokens.py",
        "if place >= pitch:",
        "if place > pitch:",
        "few_tokens",
    ),
    (
        "the last rows of a tile are stored, whether they exist or not",
        "linear_weight_only",
        "int4-asymmetric-group",
        "float_tile.py",
        "        if rows & uint32(3) == uint32(0):",
        "        if rows & uint32(3) != uint32(9):",
        "answers",
    ),
    (
        "codes that lie in two words lose what is in the second",
        "attention_kv",
        "token channel int3",
        "cache.py",
        "if uint32(shift + bits) > uint32(32):",
        "if uint32(shift + bits) > uint32(33):",
        "attention_output",
    ),
    (
        "the denominator is not scaled down when a larger logit comes",
        "attention_kv",
        "pieces",
        "attention_steps.py",
        "cuda.fma(total, shrunk, of_block(power, found, False))",
        "total + of_block(power, found, False)",
        "attention_denominator",
    ),
    (
        "a number that is just as large as the threshold is no outlier",
        "linear_int8_outliers",
        "outliers",
        "int8_outliers.py",
        ">= threshold:",
        "> threshold:",
        "eight_bit_decode",
    ),
    (
        "the diagonal is left out",
        "hessian_update",
        "floats",
        "hessian.py",
        "column <= row:",
        "column < row:",
        "second_moments",
    ),
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=[each[0] for each in MISTAKES])
def test_the_suite_finds_it(mistake):
    _, op, scenario, file, old, new, killed_by = mistake
    name = f"mistake_{MISTAKES.index(mistake)}"
    made = changed(cuda_ops, "cuda", op, name, file, old, new, "ptx_host")
    report = check_plugin(
        made(), profile="fast", only=[killed_by], scenarios=[scenario], shrink=False
    )
    assert [record.check for record in report.failures] == [killed_by]
