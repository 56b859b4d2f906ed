"""What is done to every weight of a layer: each of it in one pass over memory, compiled.

Elementwise arithmetic is float32 as it is written, neither reordered nor contracted: the same bits
on every processor, and those that the same formula has in torch. Sums are taken lane by lane first,
in an order that depends on the shape alone.

Arrays are contiguous. `scale` is [rows or 1, groups] float32, `zero` the same of int16; `runs` says
which columns belong to which group (`runs_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from qframe.compiling import kept

F = TypeVar("F", bound=Callable[..., Any])

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int16 = npt.NDArray[np.int16]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_LANES = 256  # weights of a row that are looked at together
_SIGNS = 0x8000_8000_8000_8000  # of four numbers of 16 bits
_ONES = 0x0001_0001_0001_0001
_HALVES = 0x0000_0001_0000_0001
_WORD = 0xFFFF_FFFF
_MAGNITUDE = 0x7FFF_FFFF  # the bits of a float32 but for its sign


def compiled(function: F) -> F:
    """Return the function, compiled, and such that other threads run meanwhile."""
    return cast("F", kept(function, nogil=True, error_model="numpy"))


def runs_of(index: npt.NDArray[np.integer[Any]]) -> Int64:
    """Return columns in a row that have one group, [runs, 3]: the first, the one after the last,
    and the group.

    index   [columns], the group of each column

    >>> runs_of(np.array([0, 0, 2, 1, 1])).tolist()
    [[0, 2, 0], [2, 3, 2], [3, 5, 1]]
    """
    first = np.flatnonzero(np.diff(index, prepend=-1))
    last = np.append(first[1:], len(index))[: len(first)]
    return np.stack([first, last, index[first]], axis=1).astype(np.int64)


def part_of(values: npt.NDArray[Any], rows: slice) -> npt.NDArray[Any]:
    """Return some rows, contiguous; the only one where one stands for all."""
    return np.ascontiguousarray(values[rows] if len(values) > 1 else values)


@compiled
def ends(bits: Int32, lowest: Int32, highest: Int32) -> None:
    """Write the smallest and the largest number of each strip; of zeros, -0 is the smaller one.

    bits              [strips, width], those of float32 numbers, of which none is NaN
    lowest, highest   [strips], the same
    """
    magnitude = np.int32(_MAGNITUDE)
    for strip in range(len(bits)):
        own, least, most = bits[strip], magnitude, ~magnitude
        for place in range(len(own)):
            # Without a sign they are in the order of the numbers; with one, in the opposite one.
            key = own[place] ^ (own[place] >> np.int32(31) & magnitude)
            least, most = min(least, key), max(most, key)
        lowest[strip] = least ^ (least >> np.int32(31) & magnitude)
        highest[strip] = most ^ (most >> np.int32(31) & magnitude)


@compiled
def encode(
    weight: Float32,
    scale: Float32,
    zero: Int16,
    runs: Int64,
    qmin: int,
    qmax: int,
    codes: Int16,
) -> None:
    """Write the nearest codes, clip(rint(w / s) + z, qmin, qmax); weights are not NaN."""
    lowest, highest = np.float32(qmin), np.float32(qmax)
    for row in range(len(weight)):
        steps, shifts = scale[min(row, len(scale) - 1)], zero[min(row, len(zero) - 1)]
        for first, last, group in runs:
            step, shift = steps[group], np.float32(shifts[group])
            own, found = weight[row, first:last], codes[row, first:last]
            for place in range(last - first):
                code = np.rint(own[place] / step) + shift
                code = lowest if code < lowest else code
                code = highest if code > highest else code
                found[place] = np.int16(np.int32(code))


@compiled
def differences(
    weight: Float32,
    codes: Int16,
    scale: Float32,
    zero: Int16,
    runs: Int64,
    table: Float32,
    qmin: int,
    qmax: int,
    most: Float64,
) -> tuple[float, float]:
    """Return the sums of the squares of the weights, and of what codes stand for less the weights.

    table   what codes stand for at scale 1, from qmin on; empty where they stand for themselves
            less the zero point
    most    [rows, runs], becomes how many half steps codes are at most away from weights that are
            moved to the ends of the grid first; of a table it means nothing
    """
    signal, noise = np.zeros(_LANES), np.zeros(_LANES)
    value, apart = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    cell = np.empty(1, np.float32)
    bits, bit = apart.view(np.int32), cell.view(np.int32)  # in whose order |x| is, too
    for row in range(len(weight)):
        steps, shifts = scale[min(row, len(scale) - 1)], zero[min(row, len(zero) - 1)]
        for run in range(len(runs)):
            first, last, group = runs[run, 0], runs[run, 1], runs[run, 2]
            step, shift = steps[group], np.float32(shifts[group])
            lowest, highest = step * (np.float32(qmin) - shift), step * (np.float32(qmax) - shift)
            farthest = np.int32(0)
            for start in range(first, last, _LANES):
                own = weight[row, start : min(start + _LANES, last)]
                found = codes[row, start : min(start + _LANES, last)]
                if len(table):
                    for lane in range(len(own)):
                        code = min(max(found[lane] - qmin, 0), len(table) - 1)  # in memory
                        value[lane] = table[code] * step
                else:
                    for lane in range(len(own)):
                        value[lane] = (np.float32(found[lane]) - shift) * step
                for lane in range(len(own)):
                    whole, change = np.float64(own[lane]), np.float64(value[lane] - own[lane])
                    signal[lane] += whole * whole
                    noise[lane] += change * change
                for lane in range(len(own)):
                    inside = own[lane]
                    inside = lowest if inside < lowest else inside
                    inside = highest if inside > highest else inside
                    apart[lane] = abs(value[lane] - inside)
                for lane in range(len(own)):
                    farthest = bits[lane] if bits[lane] > farthest else farthest
            bit[0] = farthest
            most[row, run] = np.float64(cell[0]) / (np.float64(step) / 2)
    energy, lost = 0.0, 0.0
    for lane in range(_LANES):
        energy += signal[lane]
        lost += noise[lane]
    return energy, lost


@compiled
def closest(
    weight: Float32,
    codes: Int16,
    scale: Float64,
    zero: Float64,
    strips: Int64,
    qmin: int,
    qmax: int,
    gamma: float,
    added: float,
    place: Int64,
    error: Float64,
    allowed: Float64,
) -> None:
    """Write of some strips where `bounds.nearest` for equal steps comes closest, and what it says.

    weight, codes   [all strips, width]
    scale, zero     [all strips, 1 or width]
    strips          their numbers
    gamma           of the weight, and `added` of the scale, is allowed besides half a step
    place           [strips], becomes the first number of those with the largest error / allowed
    """
    width, lowest, highest = weight.shape[1], np.int16(qmin), np.int16(qmax)
    steps, zeros = np.empty(width), np.empty(width)
    errors, limits, ratios = np.empty(width), np.empty(width), np.empty(width)
    bits = ratios.view(np.int64)  # in whose order numbers are that are not negative
    for number in range(len(strips)):
        strip = strips[number]
        own, found = weight[strip], codes[strip]
        if scale.shape[1] > 1:
            steps[:], zeros[:] = scale[strip], zero[strip]
        else:
            steps[:], zeros[:] = scale[strip, 0], zero[strip, 0]
        for column in range(width):
            step, w = steps[column], np.float64(own[column])
            delta = (np.float64(found[column]) - zeros[column]) * step - w
            above = (found[column] == lowest) & (delta > 0)
            below = (found[column] == highest) & (delta < 0)
            excused = (above | below) & (abs(delta) < np.inf)
            errors[column] = 0.0 if excused else abs(delta)
            limits[column] = step / 2 + (gamma * abs(w) + added * step)
        for column in range(width):
            ratio = errors[column] / limits[column]
            ratio = 0.0 if errors[column] == 0 else ratio
            good = (errors[column] < np.inf) & (limits[column] >= 0)
            ratios[column] = ratio if good else np.inf
        largest = np.int64(0)
        for column in range(width):
            largest = bits[column] if bits[column] > largest else largest
        first = 0
        while bits[first] != largest:
            first += 1
        place[number], error[number], allowed[number] = first, errors[first], limits[first]


@compiled
def joined(low: np.uint64, high: np.uint64, bits: int, lowest: int) -> np.uint64:
    """Return eight codes of 16 bits, four in each number, as a word of eight times `bits`."""
    # With their signs turned, numbers of 16 bits are not negative, and do not borrow.
    signs, moved = np.uint64(_SIGNS), np.uint64(_ONES) * np.uint64(0x8000 + lowest)
    one, two, four = np.uint64(16 - bits), np.uint64(32 - 2 * bits), np.uint64(4 * bits)
    pairs, fours = np.uint64(_HALVES * ((1 << 2 * bits) - 1)), np.uint64((1 << 4 * bits) - 1)
    low, high = (low ^ signs) - moved, (high ^ signs) - moved
    low, high = (low | low >> one) & pairs, (high | high >> one) & pairs
    low, high = (low | low >> two) & fours, high | high >> two
    return low | high << four  # and what is above eight codes is of no account


@compiled
def parted(word: np.uint64, bits: int, lowest: int) -> tuple[np.uint64, np.uint64]:
    """Return the codes that `joined` has made a word of."""
    signs, moved = np.uint64(_SIGNS), np.uint64(_ONES) * np.uint64(0x8000 + lowest)
    one, two, four = np.uint64(16 - bits), np.uint64(32 - 2 * bits), np.uint64(4 * bits)
    ones, pairs = np.uint64(_ONES * ((1 << bits) - 1)), np.uint64(_HALVES * ((1 << 2 * bits) - 1))
    low, high = word & np.uint64((1 << 4 * bits) - 1), word >> four
    low, high = (low | low << two) & pairs, (high | high << two) & pairs
    low, high = (low | low << one) & ones, (high | high << one) & ones
    return (low + moved) ^ signs, (high + moved) ^ signs


@compiled
def pack(codes: npt.NDArray[np.uint64], bits: int, lowest: int, stream: npt.NDArray[Any]) -> None:
    """Write codes one after the other, lowest bits first.

    codes    numbers of 16 bits, four in each, in all a multiple of eight; every one less `lowest`
             has at most so many bits
    stream   uint32 for 4 and 8 bits, uint8 for others: `bits` bytes for each eight codes
    """
    if bits == 4:
        for octet in range(len(stream)):
            word = joined(codes[2 * octet], codes[2 * octet + 1], bits, lowest)
            stream[octet] = np.uint32(word & np.uint64(_WORD))
    elif bits == 8:
        for octet in range(len(stream) // 2):
            word = joined(codes[2 * octet], codes[2 * octet + 1], bits, lowest)
            stream[2 * octet] = np.uint32(word & np.uint64(_WORD))
            stream[2 * octet + 1] = np.uint32(word >> np.uint64(32))
    else:
        for octet in range(len(stream) // bits):
            word = joined(codes[2 * octet], codes[2 * octet + 1], bits, lowest)
            for byte in range(bits):
                stream[octet * bits + byte] = np.uint8(word >> np.uint64(8 * byte) & np.uint64(255))


@compiled
def unpack(stream: npt.NDArray[Any], bits: int, lowest: int, codes: npt.NDArray[np.uint64]) -> None:
    """Write the codes that `pack` packed; arguments as there."""
    if bits == 4:
        for octet in range(len(stream)):
            word = np.uint64(stream[octet])
            codes[2 * octet], codes[2 * octet + 1] = parted(word, bits, lowest)
    elif bits == 8:
        for octet in range(len(stream) // 2):
            word = np.uint64(stream[2 * octet]) | np.uint64(stream[2 * octet + 1]) << np.uint64(32)
            codes[2 * octet], codes[2 * octet + 1] = parted(word, bits, lowest)
    else:
        for octet in range(len(stream) // bits):
            word = np.uint64(0)
            for byte in range(bits):
                word |= np.uint64(stream[octet * bits + byte]) << np.uint64(8 * byte)
            codes[2 * octet], codes[2 * octet + 1] = parted(word, bits, lowest)
