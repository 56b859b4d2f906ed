"""Wrong on purpose: threads that race."""

import numpy as np

from tests.ptx.seeds import BAR, GET, KEEP, LOAD, MIRROR, PUT, Seed, lines, tree

BUGS = [
    Seed(
        "two warps store one value",
        "race-with-write",
        lines("mov.u32 %r6, 7;", "st.shared.u32 [%r1], %r6; # BUG"),
    ),
    Seed(
        "no barrier before shared memory is read",
        "race-with-write",
        lines(LOAD, PUT, MIRROR, GET + " # BUG", KEEP),
    ),
    Seed(
        "no barrier, seen by the writer",
        "race-with-read",
        lines(LOAD, PUT + " # BUG", MIRROR, GET, KEEP),
    ),
    Seed(
        "no barrier before shared memory is used again",
        "race-with-read",
        lines(LOAD, PUT, BAR, MIRROR, GET, "st.shared.u32 [%r4], %r11; # BUG"),
    ),
    Seed("a tree without barriers inside", "race-with-read", tree("", write=" # BUG")),
    Seed(
        "a tree that ends with a warp in lockstep",
        "race-with-read",
        tree("", write=" # BUG", from_=16),
        block=32,
    ),
    Seed(
        "a tree whose barriers are of warps",
        "race-with-write",
        tree("bar.warp.sync -1;", read=" # BUG", from_=64),
        block=128,
    ),
    Seed(
        "lanes exchange without bar.warp.sync",
        "race-with-write",
        lines(LOAD, PUT, "xor.b32 %r5, %r3, 4; add.u32 %r5, %r1, %r5;", GET + " # BUG", KEEP),
        block=32,
    ),
    Seed(
        "bar.warp.sync of half a warp each",
        "race-with-write",
        lines(
            LOAD,
            PUT,
            "mov.u32 %r6, 0xffff0000;",
            "@%p2 mov.u32 %r6, 0xffff;",
            "bar.warp.sync %r6;",
            "sub.u32 %r5, 124, %r3; add.u32 %r5, %r1, %r5;",
            GET + " # BUG",
            KEEP,
        ),
        block=32,
    ),
    Seed(
        "a barrier of another number",
        "race-with-write",
        lines(
            LOAD, PUT, "@%p1 bar.sync 1, 32;", "@!%p1 bar.sync 2, 32;", MIRROR, GET + " # BUG", KEEP
        ),
    ),
    Seed(
        "a tile filled by one warp, read by another",
        "race-with-write",
        lines(
            LOAD,
            "@%p1 " + PUT,
            "and.b32 %r5, %r3, 124; add.u32 %r5, %r1, %r5;",
            GET + " # BUG",
            KEEP,
        ),
    ),
    Seed(
        "two threads write one cell of shared memory",
        "race-with-write",
        lines(LOAD, "st.shared.u32 [%r1], %r10; # BUG"),
    ),
    Seed(
        "two threads write one cell of global memory",
        "race-with-write",
        lines(
            "shr.u32 %r5, %r2, 1; mul.wide.u32 %d3, %r5, 4; add.u64 %d3, %y, %d3;",
            "st.global.u32 [%d3], %r0; # BUG",
        ),
    ),
    Seed(
        "two blocks write one cell",
        "race-with-write",
        "@%p4 st.global.u32 [%y], %r9; # BUG",
        grid=2,
    ),
    Seed(
        "a block reads what another one writes",
        "race-with-write",
        lines(
            "st.global.u32 [%d2], %r0;",
            BAR,
            "xor.b32 %r5, %r2, 64;",
            "mul.wide.u32 %d3, %r5, 4; add.u64 %d3, %y, %d3;",
            "ld.global.u32 %r6, [%d3]; # BUG",
        ),
        grid=2,
    ),
    Seed(
        "a sum without atomics",
        "race-with-write",
        lines(
            LOAD,
            "ld.global.u32 %r11, [%y]; # BUG",
            "add.u32 %r11, %r11, %r10;",
            "st.global.u32 [%y], %r11;",
        ),
        arrays=lambda: [np.ones(64, np.uint32), np.zeros(1, np.uint32)],
    ),
    Seed(
        "an atomic sum that is set to zero meanwhile",
        "race-with-write",
        lines("@%p4 st.global.u32 [%y], %r0;", "red.global.add.u32 [%y], %r0; # BUG"),
    ),
    Seed(
        "an atomic sum that is read without a barrier",
        "race-with-read",
        lines("red.shared.add.u32 [%r1], %r0; # BUG", "ld.shared.u32 %r11, [%r1];", KEEP),
    ),
    Seed(
        "a stencil in place",
        "race-with-read",
        lines(
            LOAD,
            "setp.lt.u32 %p7, %r0, 63;",
            "@%p7 ld.global.u32 %r11, [%d1+4];",
            "add.u32 %r10, %r10, %r11;",
            "st.global.u32 [%d1], %r10; # BUG",
        ),
    ),
    Seed(
        "a plain read of what is summed by atomics",
        "race-with-write",
        lines(
            "red.global.add.u32 [%y], %r0;",
            "red.global.add.u32 [%y+4], %r0; ld.global.u32 %r11, [%y]; # BUG",
        ),
        arrays=lambda: [np.ones(64, np.uint32), np.zeros(2, np.uint32)],
    ),
    Seed(
        "a reversal in place",
        "race-with-write",
        lines(
            "sub.u32 %r5, 63, %r0; mul.wide.u32 %d3, %r5, 4; add.u64 %d3, %x, %d3;",
            "ld.global.u32 %r6, [%d3]; # BUG",
            "st.global.u32 [%d1], %r6;",
        ),
    ),
]
