"""The right way of what the seeded bugs do."""

import numpy as np

from qframe_plugins.ptx_host import Fresh
from tests.ptx.seeds import (
    BAR,
    COPY,
    FOUR,
    GET,
    KEEP,
    LOAD,
    MIRROR,
    MMA,
    PUT,
    ROW,
    SHFL,
    Seed,
    lines,
    tree,
)

TWINS = [
    Seed("a barrier before shared memory is read", "", lines(LOAD, PUT, BAR, MIRROR, GET, KEEP)),
    Seed(
        "lanes of a warp store one value",
        "",
        lines(
            "shr.u32 %r5, %r3, 7; shl.b32 %r5, %r5, 2; add.u32 %r5, %r1, %r5;",
            "shr.u32 %r6, %r0, 5;",
            "st.shared.u32 [%r5], %r6;",
            BAR,
            GET,
            KEEP,
        ),
    ),
    Seed(
        "a barrier before shared memory is used again",
        "",
        lines(LOAD, PUT, BAR, MIRROR, GET, BAR, "st.shared.u32 [%r4], %r11;"),
    ),
    Seed("a tree with barriers", "", tree(BAR)),
    Seed("a tree of one warp", "", tree("bar.warp.sync -1;", from_=16), block=32),
    Seed(
        "lanes exchange over bar.warp.sync",
        "",
        lines(
            LOAD, PUT, "bar.warp.sync -1;", "xor.b32 %r5, %r3, 4; add.u32 %r5, %r1, %r5;", GET, KEEP
        ),
    ),
    Seed(
        "half warps keep to themselves",
        "",
        lines(
            LOAD,
            PUT,
            "mov.u32 %r6, 0xffff0000;",
            "@%p2 mov.u32 %r6, 0xffff;",
            "bar.warp.sync %r6;",
            "xor.b32 %r5, %r3, 60; add.u32 %r5, %r1, %r5;",
            GET,
            KEEP,
        ),
        block=32,
    ),
    Seed(
        "warps with barriers of their own",
        "",
        lines(
            LOAD,
            PUT,
            "@%p1 bar.sync 1, 32;",
            "@!%p1 bar.sync 2, 32;",
            "xor.b32 %r5, %r3, 124; add.u32 %r5, %r1, %r5;",
            GET,
            KEEP,
        ),
    ),
    Seed(
        "a producer and a consumer",
        "",
        lines(
            "@!%p1 bra LATE;",
            LOAD,
            PUT,
            "bar.arrive 1, 64; bra DONE;",
            "LATE: bar.sync 1, 64;",
            "sub.u32 %r5, %r4, 128;",
            GET,
            KEEP,
            "DONE:",
        ),
    ),
    Seed(
        "all threads read one cell that one has written",
        "",
        lines("@%p4 st.shared.u32 [%r1], %r0;", BAR, "ld.shared.u32 %r11, [%r1];", KEEP),
    ),
    Seed(
        "an atomic sum",
        "",
        lines(
            "@%p4 st.shared.u32 [%r1], %r9;",
            BAR,
            "red.shared.add.u32 [%r1], %r0;",
            BAR,
            "ld.shared.u32 %r11, [%r1];",
            KEEP,
        ),
    ),
    Seed(
        "an atomic sum of blocks",
        "",
        "red.global.add.u32 [%y], %r0;",
        grid=3,
        arrays=lambda: [np.zeros(1, np.uint32), np.zeros(1, np.uint32)],
    ),
    Seed(
        "every index is looked at",
        "",
        lines("@%p6 ld.global.u32 %r11, [%d1];", "@%p6 " + KEEP),
        grid=2,
        arrays=lambda: [np.zeros(64, np.uint32), Fresh(np.zeros(64, np.uint32))],
    ),
    Seed("the last vector", "", "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%x+240];"),
    Seed(
        "dynamic shared memory",
        "",
        lines(LOAD, PUT, BAR, MIRROR, GET, KEEP),
        shared="",
        head=".extern .shared .align 16 .b8 s[];",
        options={"shared_bytes": 256},
    ),
    Seed(
        "local memory",
        "",
        lines("st.local.u32 [mine+12], %r0;", "ld.local.u32 %r11, [mine+12];", KEEP),
    ),
    Seed(
        "four bytes of four are filled",
        "",
        lines(
            "cvt.u16.u32 %h1, %r0;",
            *(f"st.shared.u8 [%r4+{i}], %h1;" for i in range(4)),
            "ld.shared.u32 %r11, [%r4];",
            KEEP,
        ),
    ),
    Seed(
        "a sum that begins with zero",
        "",
        lines(
            "mov.u32 %r11, 0;", KEEP, "ld.global.u32 %r12, [%d2];", "add.u32 %r11, %r12, 1;", KEEP
        ),
    ),
    Seed(
        "each block fills its shared memory", "", lines(LOAD, PUT, BAR, MIRROR, GET, KEEP), grid=3
    ),
    Seed("a barrier for some threads", "", lines("@%p1 bar.sync 1, 32;", BAR)),
    Seed(
        "a mask of those that are there",
        "",
        lines(
            LOAD, "@!%p2 bra DONE;", SHFL.replace("8, 31", "4, 0x1807") + "0xffff;", KEEP, "DONE:"
        ),
        block=32,
    ),
    Seed(
        "the full mask in a warp that is not full",
        "",
        lines(LOAD, SHFL.replace("8, 31", "0, 31") + "-1;", KEEP),
        block=16,
    ),
    Seed(
        "a copy that is waited for",
        "",
        lines(
            COPY,
            "cp.async.wait_all;",
            BAR,
            "xor.b32 %r6, %r6, 16;",
            "ld.shared.u32 %r11, [%r6];",
            KEEP,
        ),
        **FOUR,
    ),
    Seed(
        "two buffers, one group behind",
        "",
        lines(
            "add.u32 %r6, %r4, 256; cp.async.ca.shared.global [%r4], [%d1], 4;",
            "cp.async.commit_group; cp.async.ca.shared.global [%r6], [%d1], 4;",
            "cp.async.commit_group; cp.async.wait_group 1;",
            BAR,
            MIRROR,
            GET,
            "cp.async.wait_group 0;",
            BAR,
            "add.u32 %r5, %r5, 256; ld.shared.u32 %r12, [%r5]; add.u32 %r11, %r11, %r12;",
            KEEP,
        ),
    ),
    Seed(
        "ldmatrix after a barrier",
        "",
        lines(
            ROW,
            "xor.b32 %r6, %r5, 16; st.shared.v4.u32 [%r6], {%r0, %r0, %r0, %r0};",
            BAR,
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r5];",
        ),
        block=32,
    ),
    Seed("a product by a warp", "", MMA, block=32),
]
