"""The numba kernels with one mistake each in their source, and killed by the suite.

A mutant is the folder `numba_cpu`, copied under another name, with one piece of text replaced.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

from qframe import Scheme
from qframe.kernels import OPS, run
from qframe_conformance import kernel_draws_int8
from qframe_plugins.kernels import numba_ops
from tests.mutants import (
    kernels_activations,
    kernels_attention,
    kernels_dequantize,
    kernels_hadamard,
    kernels_int8,
    kernels_outliers,
    kernels_weights,
)
from tests.mutants.mutant import Mutant

SOURCE = Path(numba_ops.__file__).parent
PACKAGE = "qframe_plugins.kernels.numba_cpu"


def of_groups(plugin):
    """Ordinary weights of four bits, and ordinary codes of tokens."""
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        scheme = Scheme(num_bits=4, group_size=32)
        operands = kernel_draws_int8.groups(rng, 5, 96, 8, scheme)
        tensors = [torch.from_numpy(operands[operand.name]) for operand in OPS[plugin.op].operands]
        found.append(run(plugin, tensors).numpy())
    return found


OUTPUTS = {
    "dequantize": kernels_dequantize.outputs,
    "linear_weight_only": kernels_weights.outputs,
    "hadamard": kernels_hadamard.outputs,
    "linear_int8_groups": of_groups,
    "quantize_activations": kernels_activations.outputs,
    "linear_int8": kernels_int8.outputs,
    "linear_int8_outliers": kernels_outliers.outputs,
    "attention_kv": kernels_attention.outputs,
}


@cache
def scratch():
    """Return a folder that is imported from, and goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="qframe-mutants-")
    sys.path.append(folder.name)
    return folder


def changed(name, kernel, file, old, new):
    """Return a function that makes a kernel of changed source."""

    def make():
        package = f"mutant_{name}"
        folder = Path(scratch().name) / package
        if package not in sys.modules:
            folder.mkdir()
            for source in (*SOURCE.joinpath("numba_cpu").glob("*.py"), SOURCE / "numba_ops.py"):
                text = source.read_text(encoding="utf-8")
                if source.name == file:
                    if text.count(old) != 1:
                        raise ValueError(f"{name}: {file} has {text.count(old)} of {old!r}")
                    text = text.replace(old, new)
                folder.joinpath(source.name).write_text(text.replace(PACKAGE, package), "utf-8")
            importlib.invalidate_caches()
        return getattr(importlib.import_module(f"{package}.numba_ops"), kernel)()

    return make


def mutants(kernel, *mistakes):
    right = getattr(numba_ops, kernel)
    return [
        Mutant(
            name=f"{right.op}:numba_{name}",
            kind="kernel",
            bug=f"numba: {bug}",
            make=changed(f"{right.op}_{name}", kernel, file, old, new),
            correct=right,
            killed_by=killed_by,
        )
        for name, file, old, new, killed_by, bug in mistakes
    ]


MUTANTS = (
    *mutants(
        "QuantizeActivations",
        (
            "signs_count",
            "tokens.py",
            "v.const(vector, _MAGNITUDE))",
            "v.const(vector, -1))",
            "scales_of_tokens",
            "the largest number is taken, not the largest magnitude.",
        ),
        (
            "scale_without_the_tail",
            "tokens.py",
            "for column in range(whole, columns):",
            "for column in range(columns, columns):",
            "scales_of_tokens",
            "columns after the last whole stride are not looked at.",
        ),
        (
            "codes_without_the_tail",
            "tokens.py",
            "for column in range(first, columns):",
            "for column in range(first, first):",
            "codes_of_tokens",
            "columns after the last whole register get no codes.",
        ),
        (
            "reciprocal_overflows",
            "tokens.py",
            "_FAINT = np.float32(2.0**-120)",
            "_FAINT = np.float32(0)",
            "codes_of_tokens",
            "faint tokens are multiplied with a reciprocal that is infinite.",
        ),
        (
            "scale_vanishes",
            "tokens.py",
            "max(largest / np.float32(LARGEST), _SMALLEST)",
            "largest / np.float32(LARGEST)",
            "scales_of_tokens",
            "the scale of a token of the smallest numbers is 0.",
        ),
        (
            "zeros_have_a_small_scale",
            "tokens.py",
            "    if bits == 0:\n        return np.float32(1)\n",
            "",
            "scales_of_tokens",
            "a token of zeros has the smallest scale.",
        ),
        (
            "truncates",
            "tokens.py",
            "rounded.add_incoming(whole, before)",
            "rounded.add_incoming(product, before)",
            "codes_of_tokens",
            "codes are cut toward zero.",
        ),
        (
            "last_block_left_out",
            "tokens.py",
            "while block * BLOCK < len(x):",
            "while (block + 1) * BLOCK <= len(x):",
            "few_tokens",
            "tokens after the last whole block get neither codes nor scale.",
        ),
    ),
    *mutants(
        "LinearWeightOnly",
        (
            "scale_of_the_first_group",
            "packed.py",
            "place = builder.add(builder.mul(values[2], groups), values[7])",
            "place = builder.mul(values[2], groups)",
            "weight_only_sums",
            "all groups take the scale of the first.",
        ),
        (
            "scales_of_the_first_panel",
            "packed.py",
            "place = builder.add(builder.mul(values[2], groups), values[7])",
            "place = values[7]",
            "weight_only_sums",
            "all panels take the scales of the first.",
        ),
        (
            "neighbours_for_places",
            "packed.py",
            "stripe = 4 * PANEL * (BYTES * quad + byte)",
            "stripe = 4 * PANEL * (BYTES * quad + byte ^ 1)",
            "exact_where_float32_is",
            "two neighbouring columns change places.",
        ),
        (
            "part_of_the_first_columns",
            "weight_only.py",
            "multiply_tokens(sums, token, x, token, height, first * BYTES, count * BYTES, w)",
            "multiply_tokens(sums, token, x, token, height, 0, count * BYTES, w)",
            "exact_where_float32_is",
            "later parts of a row meet the first columns of the tokens.",
        ),
        (
            "piece_over_the_edge",
            "weight_only.py",
            "piece = min(_PART - count, (group + 1) * width - first - count)",
            "piece = min(_PART - count, quads - first - count)",
            "exact_where_float32_is",
            "a part takes the scale of its first group.",
        ),
        (
            "sums_go_on",
            "weight_only.py",
            "                sums[token, lane] = 0\n        first = 0\n",
            "                sums[token, lane] *= np.float32(panel > 0)\n        first = 0\n",
            "weight_only_sums",
            "a panel begins with the sums of the one before.",
        ),
        (
            "few_take_the_first_scale",
            "weight_only.py",
            "place = (panel, group)",
            "place = (panel, 0)",
            "few_tokens",
            "for a few tokens all groups have the scale of the first.",
        ),
        (
            "few_tokens_are_not_spread",
            "float_tile.py",
            "to = column if spread is None else spread[column]",
            "to = column",
            "few_tokens",
            "of a few tokens, groups of no whole number of steps meet columns of the next.",
        ),
        (
            "few_meet_the_first_columns",
            "few_tokens.py",
            "tokens_at(v, x_at, columns, token, column, height)",
            "tokens_at(v, x_at, columns, token, INT64(0), height)",
            "few_tokens",
            "for a few tokens later groups meet the first columns.",
        ),
        (
            "few_have_no_zero_point",
            "few_tokens.py",
            "b.sitofp(b.sub(numbers, zeros[0]), floats)",
            "b.sitofp(numbers, floats)",
            "few_tokens",
            "for a few tokens codes of symmetric weights begin at zero.",
        ),
        (
            "few_share_zero_points",
            "few_tokens.py",
            "b.fsub(entry(table, fields), lows[r])",
            "b.fsub(entry(table, fields), lows[0])",
            "few_tokens",
            "for a few tokens rows have the zero points of sixteen others.",
        ),
        (
            "few_lose_the_third_bit",
            "few_tokens.py",
            "            shift += width\n",
            "            shift += 0\n",
            "few_tokens",
            "for a few tokens the planes of three bits lie on one another.",
        ),
    ),
    *mutants(
        "Hadamard",
        (
            "not_normalized",
            "hadamard.py",
            "1 / math.sqrt(block)",
            "1 / block",
            "transform",
            "the transform is divided by the block, not by its root.",
        ),
        (
            "signs_of_the_first_block",
            "hadamard.py",
            "x[first + m, start + k] * signs[start + k]",
            "x[first + m, start + k] * signs[k]",
            "transform",
            "every block takes the signs of the first.",
        ),
        (
            "last_butterfly_left_out",
            "hadamard.py",
            "while distance < block:",
            "while 2 * distance < block:",
            "transform",
            "the halves of a block are not joined.",
        ),
        (
            "signs_forgotten",
            "hadamard.py",
            "x[first + m, start + k] * signs[start + k]",
            "x[first + m, start + k]",
            "transform",
            "the signs are not applied.",
        ),
    ),
    *mutants(
        "Dequantize",
        (
            "zero_point_of_the_first_group",
            "dequantize.py",
            "np.int32(zero_point[row, group])",
            "np.int32(zero_point[row, 0])",
            "values_of_codes",
            "all groups take the zero point of the first.",
        ),
        (
            "one_row_of_scales",
            "dequantize.py",
            "step, zero = scale[row, group]",
            "step, zero = scale[0, group]",
            "values_of_codes",
            "all rows take the scales of the first.",
        ),
    ),
    *mutants(
        "LinearInt8",
        (
            "offset_of_126",
            "packed.py",
            "centre = int(points.flat[0]) if",
            "centre = int(points.flat[0]) - 1 if",
            "eight_bit_decode",
            "less is taken off than was added to have no sign.",
        ),
        (
            "last_panel_left_out",
            "int8_products.py",
            "while task < blocks * panels:",
            "while task < blocks * panels - 1:",
            "eight_bit_decode",
            "the last panel is not computed.",
        ),
        (
            "scales_of_the_first_panel",
            "group_tile.py",
            "taken = b.mul(b.add(b.mul(panel, groups), group_), INT64(PANEL))",
            "taken = b.mul(group_, INT64(PANEL))",
            "eight_bit_decode",
            "every panel takes the scales of the first.",
        ),
        (
            "last_part_left_out",
            "int8_products.py",
            "while first < quads:",
            "while first + limit <= quads or first == 0:",
            "eight_bit_decode",
            "of a long row, the last columns are not added.",
        ),
        (
            "tokens_of_the_first_part",
            "int8_products.py",
            "x_from = start * quads + count * first + token * deep",
            "x_from = start * quads + token * deep",
            "eight_bit_decode",
            "later parts of a long row meet the codes of the first.",
        ),
        (
            "weights_of_the_first_part",
            "int8_products.py",
            "w, base = ahead, panel * size + first * QUAD_BYTES",
            "w, base = ahead, panel * size",
            "eight_bit_decode",
            "later parts of a long row are multiplied with the weights of the first.",
        ),
        (
            "outputs_of_the_first_tile",
            "group_tile.py",
            "address(5, b.add(y_from, b.mul(passed, y_row)))",
            "address(5, y_from)",
            "eight_bit_decode",
            "all tiles write over the outputs of the first tokens.",
        ),
        (
            "scales_of_the_first_tokens",
            "group_tile.py",
            "address(0, token_, 2)",
            "address(0, token, 2)",
            "eight_bit_decode",
            "later tiles take the scales of the first tokens.",
        ),
        (
            "tile_of_two_for_four",
            "group_tile.py",
            "_part_4(rows, w, scale, zero, between, y, ahead, columns, tokens, how)",
            "_part_2(rows, w, scale, zero, between, y, ahead, columns, tokens, how)",
            "eight_bit_decode",
            "of four tokens two are computed, from codes that lie otherwise.",
        ),
        (
            "tokens_not_interleaved",
            "dot_tile.py",
            "flat[start + quad * height + m] = x[token + m, first + quad]",
            "flat[start + m * quads + quad] = x[token + m, first + quad]",
            "eight_bit_decode",
            "codes of a tile lie token by token, where it reads column by column.",
        ),
        (
            "registers_not_interleaved",
            "dot_tile.py",
            "if place % height == m else lane",
            "if place % height == 0 else lane",
            "eight_bit_decode",
            "of sixteen quads, those of one token are taken for those of all.",
        ),
        (
            "last_tokens_not_laid_out",
            "dot_tile.py",
            "min(token + BLOCK, tokens), start",
            "min(token + BLOCK - 1, tokens), start",
            "eight_bit_decode",
            "the last token of a task is what memory held.",
        ),
        (
            "registers_change_places",
            "dot_tile.py",
            "v.load(v.at(v.at(w_at, here), BYTES * i * lanes), vector)",
            "v.load(v.at(v.at(w_at, here), BYTES * (i ^ 1) * lanes), vector)",
            "eight_bit_decode",
            "neighbouring registers of a panel change places.",
        ),
        (
            "few_tokens_share_a_scale",
            "int8_products.py",
            "value = made[token, lane] * x_scale[token]",
            "value = made[token, lane] * x_scale[0]",
            "few_tokens",
            "of a few tokens, all take the scale of the first.",
        ),
        (
            "few_tokens_start_over",
            "int8_products.py",
            "        made[:] = _NOTHING\n        for group",
            "        made[:] = made if panel > 0 else _NOTHING\n        for group",
            "few_tokens",
            "of a few tokens, later panels go on with the outputs of the first.",
        ),
        (
            "few_activations_are_scaled_twice",
            "int8_products.py",
            "quantize_token(x, token, codes, x_scale)",
            "quantize_token(x, 0, codes, x_scale)",
            "takes_activations",
            "of a few tokens' activations, only the first are made codes of.",
        ),
    ),
    *mutants(
        "LinearInt8Groups",
        (
            "zero_points_keep_the_lowest",
            "packed.py",
            "zero_point.astype(np.int32) - lowest",
            "zero_point.astype(np.int32)",
            "eight_bit_groups",
            "codes are stored less the lowest, zero points are not.",
        ),
        (
            "fields_from_the_top",
            "packed.py",
            "part = field_of(v, raw, bits, quad % fields, shift)",
            "part = field_of(v, raw, bits, fields - 1 - quad % fields, shift)",
            "eight_bit_groups",
            "the codes of a byte are read from its highest bits on.",
        ),
        (
            "third_bit_lost",
            "packed.py",
            "_plane(quads >> np.uint8(2), 1)",
            "_plane(quads >> np.uint8(3), 1)",
            "eight_bit_groups",
            "of three bits the highest is lost.",
        ),
        (
            "groups_not_filled_up",
            "packed.py",
            "wide[:, self.spread] = x",
            "wide[:, : x.shape[1]] = x",
            "eight_bit_groups",
            "groups of no whole number of steps meet columns of the next.",
        ),
        (
            "sums_begin_with_one",
            "int8_products.py",
            "        made[:count] = _NOTHING\n",
            "        made[:count] = np.float32(1)\n",
            "eight_bit_groups",
            "sums of groups begin with one.",
        ),
        (
            "scales_of_the_first_panel",
            "few_codes.py",
            "taken = b.add(b.mul(panel, groups), group)",
            "taken = group",
            "few_tokens",
            "of a few tokens, all panels take the scales of the first.",
        ),
        (
            "totals_of_the_token",
            "dot_tile.py",
            "_total_of(x, codes, token + m, group * width, width)",
            "_total_of(x, codes, token + m, 0, quads)",
            "eight_bit_groups",
            "zero points are multiplied with the sum of all columns.",
        ),
        (
            "every_part_begins",
            "int8_products.py",
            "if goes_on and first % width == 0:",
            "if goes_on:",
            "eight_bit_groups",
            "of a wide group, the sums of earlier parts are thrown away.",
        ),
        (
            "every_part_is_the_last",
            "group_tile.py",
            'ends = b.icmp_signed("<=", right, after)',
            'ends = b.icmp_signed("<=", left, after)',
            "eight_bit_groups",
            "of a wide group, what is summed so far is added again by every part.",
        ),
        (
            "group_without_its_zero_points",
            "group_tile.py",
            "points[byte] = b.or_(point, b.shl(point, v.const(kind, 16 + 7)))",
            "points[byte] = point",
            "eight_bit_groups",
            "of the sum of a token's codes only the lowest bits meet a zero point.",
        ),
        (
            "every_group_is_the_first",
            "group_tile.py",
            "values.append(b.fadd(before, term))",
            "values.append(term)",
            "eight_bit_groups",
            "only the last group counts.",
        ),
        (
            "sums_of_the_first_tile",
            "group_tile.py",
            "lane = b.mul(row_, INT64(PANEL))",
            "lane = b.mul(row, INT64(PANEL))",
            "eight_bit_groups",
            "all tiles add to the sums of the first tokens.",
        ),
        (
            "all_points_are_bytes",
            "int8_products.py",
            "in_tiles = weight.centre is not None or weight.are_bytes",
            "in_tiles = True",
            "eight_bit_groups",
            "zero points that are no bytes are cut, and what is cut off lies in the wrong place.",
        ),
        (
            "few_activations_are_not_spread",
            "int8_products.py",
            "wide[token, spread[column]] = codes[token, column]",
            "wide[token, column] = codes[token, column]",
            "takes_activations",
            "of a few tokens' activations, groups of no whole number of steps meet the next one's.",
        ),
        (
            "few_tokens_unpack_the_lowest",
            "few_codes.py",
            "raws[i, quad // fields, r], width, quad % fields, shift)",
            "raws[i, quad // fields, r], width, 0, shift)",
            "few_tokens",
            "for a few tokens, all codes of a byte are the lowest.",
        ),
        (
            "few_tokens_without_zero_points",
            "few_codes.py",
            "return b.mul(zeros, v.splat(sums[m], lanes))",
            "return b.mul(zeros, v.splat(sums[0], lanes))",
            "few_tokens",
            "of a few tokens, zero points are multiplied with the codes of the first.",
        ),
        (
            "sums_are_shared",
            "group_tile.py",
            '"sums": address(4, lane, 0),',
            '"sums": address(4, INT64(0), 0),',
            "eight_bit_groups",
            "of a wide group, all tokens add to the sums of the first.",
        ),
    ),
    *mutants(
        "LinearInt8Outliers",
        (
            "above_the_threshold",
            "int8_outliers.py",
            "x.view(np.int32), least, keep)",
            "x.view(np.int32), least + np.int32(1), keep)",
            "eight_bit_decode",
            "a column that reaches the threshold and no more is none of outliers.",
        ),
        (
            "nan_is_an_outlier",
            "int8_outliers.py",
            "most = np.uint32(_INFINITY - least)",
            "most = np.uint32(_MAGNITUDE - least)",
            "nan_comes_out",
            "a NaN makes its column one of outliers for all tokens.",
        ),
        (
            "outliers_stretch_the_scale",
            "tokens.py",
            "                bits = _counted(v, bits, signature.args[1], values[1], here)\n",
            "",
            "eight_bit_decode",
            "the scale of a token must reach its outliers.",
        ),
        (
            "outliers_have_codes",
            "tokens.py",
            "        bits = _counted(v, bits, signature.args[1], values[1], offset)\n",
            "",
            "eight_bit_decode",
            "outliers are multiplied twice, as codes and as they are.",
        ),
        (
            "sums_of_the_panel_before",
            "int8_products.py",
            "                extra[token + m, lane] = 0\n",
            "                extra[token + m, lane] *= np.float32(row > 0)\n",
            "eight_bit_decode",
            "products of outliers are added to those of the panel before.",
        ),
        (
            "outliers_of_the_first_panel",
            "int8_products.py",
            "stripes[k, lane] = columns_of[k, row + lane]",
            "stripes[k, lane] = columns_of[k, lane]",
            "eight_bit_decode",
            "all panels meet the outlier weights of the first.",
        ),
        (
            "half_of_the_registers",
            "int8_outliers.py",
            "_lower(bits, token, first, passes, least, over)",
            "_lower(bits, token, first, passes // 2, least, over)",
            "eight_bit_decode",
            "half of the columns that are looked at together are not.",
        ),
        (
            "columns_of_the_first_task",
            "int8_outliers.py",
            "count = min(_WIDTH, columns - first)",
            "count = min(_WIDTH // 2, columns - first)",
            "eight_bit_decode",
            "every second half of a thousand columns is not looked at.",
        ),
    ),
    *mutants(
        "AttentionKV",
        (
            "pieces_weigh_the_same",
            "attention.py",
            "weight = np.exp(state[first + piece, g, 0] - largest)",
            "weight = np.float32(1)",
            "attention_output",
            "pieces of the text are merged as if their largest logits were the same.",
        ),
        (
            "lse_of_the_last_piece",
            "attention.py",
            "lse[lane, g] = largest + np.log(total)",
            "lse[lane, g] = largest + np.log(state[first + pieces - 1, g, 1])",
            "attention_denominator",
            "the denominator is that of one piece.",
        ),
        (
            "tokens_of_a_cut_group",
            "attention.py",
            "            for t in range(min(step, end - unit * step)):\n"
            "                taken[g, place[t]]",
            "            for t in range(step):\n                taken[g, place[t]]",
            "attention_output",
            "values of a group that was cut weigh as whatever lies behind the weights.",
        ),
        (
            "weights_of_the_group_before",
            "attention.py",
            "        taken[:, :] = 0\n        for g in range(group):\n            for t in",
            "        for g in range(group):\n            for t in",
            "attention_output",
            "tokens that a group lacks weigh as those of the group before.",
        ),
        (
            "sums_of_the_group_before",
            "attention.py",
            "        sums[:, :] = 0\n        row = unit * width\n",
            "        row = unit * width\n",
            "attention_output",
            "logits of a group of tokens are added to those of the group before.",
        ),
        (
            "padding_weighs",
            "attention.py",
            "            logits[g, end - begin : filled] = -np.inf\n",
            "            logits[g, end - begin : filled] = 0\n",
            "attention_denominator",
            "what fills the last register up counts into the denominator.",
        ),
        (
            "short_logarithm",
            "attention.py",
            "            rest = v.muladd(whole, v.const(vector, -_LOG2[1]), rest)\n",
            "",
            "attention_output",
            "log(2) has ten bits.",
        ),
        (
            "pairs_in_a_row",
            "rows.py",
            "place = _in_turn(place, length, each)",
            "place = place + 0 * each",
            "attention_output",
            "codes of 4 bits are taken to lie in their order.",
        ),
        (
            "lonely_word_in_a_pair",
            "rows.py",
            "    return np.where(alone, codes, first",
            "    return np.where(alone & (codes < 0), codes, first",
            "attention_output",
            "the last word of an odd number is looked for among those of a pair.",
        ),
        (
            "no_room_behind_a_lonely_word",
            "rows.py",
            "filled += 8 * (each % 2)",
            "filled += 0 * each",
            "attention_output",
            "eight numbers are written behind the end of a row, into the next.",
        ),
        (
            "scale_of_the_first_group",
            "rows.py",
            "        group = (i, groups)\n        if way",
            "        group = (0, groups)\n        if way",
            "attention_output",
            "all groups of a token have the scale of the first.",
        ),
        (
            "scale_of_the_first_group_in_registers",
            "rows.py",
            "        group = (i, groups)\n        start",
            "        group = (0, groups)\n        start",
            "attention_output",
            "the same, where codes are decoded as they are added up.",
        ),
        (
            "last_registers_are_left_out",
            "rows.py",
            "_TILES = (8, 4, 1)",
            "_TILES = (8, 4)",
            "attention_output",
            "of rows that are decoded as they are added up, what fills no tile is left out.",
        ),
        (
            "weights_of_the_first_rows",
            "attention.py",
            "g * length + first, to",
            "g * length, to",
            "attention_output",
            "rows of some groups have the weights of the first of them, from the next chunk on.",
        ),
        (
            "first_head_for_both",
            "attention.py",
            "flat, g * length + first, to",
            "flat, first, to",
            "attention_output",
            "two heads that share keys have the weights of the first.",
        ),
        (
            "bytes_without_the_tail",
            "rows.py",
            "        if start < stop:",
            "        if start < stop and way != _BYTES:",
            "attention_output",
            "codes of 8 bits after the last whole register are not decoded.",
        ),
        (
            "codes_across_words",
            "rows.py",
            "    if move + bits > _WORD:",
            "    if move + bits > 2 * _WORD:",
            "attention_output",
            "a code that lies in two words lacks its upper bits.",
        ),
    ),
)

TWINS = ()


def outputs(plugin):
    """Return what the tests of the operation look at."""
    return OUTPUTS[plugin.op](plugin)
