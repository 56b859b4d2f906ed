"""fp16 and bf16: every one of them is converted, and every boundary between two."""

import numpy as np
import pytest

from tests.ptx import exact
from tests.ptx.snippets import kernel
from tests.ptx.test_device import INDEX, run


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_every_short_float_is_converted_exactly_and_back(kind):
    body = """mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x;
        mad.lo.u32 %r0, %r0, %r1, %r2; cvt.u16.u32 %h0, %r0;
        cvt.f32.KIND %f0, %h0; cvt.rn.KIND.f32 %h1, %f0; cvt.u32.u16 %r3, %h1;
        mul.wide.u32 %d0, %r0, 8; add.u64 %d0, %d0, %x;
        st.global.f32 [%d0], %f0; st.global.u32 [%d0+4], %r3;""".replace("KIND", kind)
    x = np.zeros((1 << 16, 2), np.uint32)
    run(kernel(body, "x"), x, grid=64, block=1024, check=False)
    for bits, (wide, back) in enumerate(x.tolist()):
        assert wide == exact.encode(*exact.number(bits, kind), "f32")
        assert back == (exact.nan(kind) if exact.is_nan(bits, kind) else bits)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_rounding_to_short_floats_is_right_at_every_boundary(kind, mode):
    """Every short float, every half-way point between two, and the float32 beside each."""
    every = np.arange(1, exact.infinity(kind), dtype=np.int64)
    wide = np.array([exact.encode(*exact.number(int(b), kind), "f32") for b in every], np.int64)
    low, high, near = every[:-1], every[1:], mode == "rn"
    middle = (wide[:-1] + wide[1:]) // 2  # of one binade, in which bits are as far as numbers
    even = low + (low & 1) * near
    pairs = [
        (wide, every), (middle - 1, low), (middle, even), (middle + 1, high if near else low),
        (wide[1:] - 1, high if near else low),
    ]  # fmt: skip
    ends = [0, 1, int(wide[0]) - 1, int(wide[0]) // 2, int(wide[-1]) + 1, 0x7F7FFFFF, 0x7F800000]
    ends += [int(wide[0]) - (1 << 23) + k for k in (-1, 0, 1)]  # around half of the least number
    ends += [int(2 * wide[-1] - wide[-2] + wide[-1]) // 2 + k for k in (-1, 0, 1)]
    ends = [end for end in ends if 0 <= end <= 0x7F800000]
    pairs.append((ends, [exact.encode(*exact.number(b, "f32"), kind, mode) for b in ends]))
    points, expected = (np.concatenate([pair[k] for pair in pairs]) for k in range(2))
    points = np.concatenate([points, points | 1 << 31]).astype(np.uint32)
    expected = np.concatenate([expected, expected | exact.sign_bit(kind)])
    made = np.resize(points, -(-points.size // 1024) * 1024)
    body = (
        INDEX.format(4)
        + f"""
        mov.u32 %r1, %ctaid.x; mul.wide.u32 %d2, %r1, 4096; add.u64 %d1, %d1, %d2;
        ld.global.f32 %f0, [%d1]; cvt.{mode}.{kind}.f32 %h1, %f0; cvt.u32.u16 %r3, %h1;
        st.global.u32 [%d1], %r3;"""
    )
    run(kernel(body, "x"), made, grid=made.size // 1024, block=1024, check=False)
    wrong = made[: points.size] != expected
    assert [hex(bits) for bits in points[wrong]] == []
