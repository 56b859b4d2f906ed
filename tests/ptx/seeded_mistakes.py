"""Wrong on purpose: memory, barriers, masks and copies."""

import numpy as np

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
    locked,
)

BUGS = [
    Seed(
        "one element too many is read",
        "out-of-bounds",
        lines("add.u64 %d3, %d1, 4;", "ld.global.u32 %r10, [%d3]; # BUG"),
    ),
    Seed(
        "one element too many is written",
        "out-of-bounds",
        lines("setp.le.u32 %p7, %r2, 64;", "@%p7 st.global.u32 [%d2], %r0; # BUG"),
        grid=2,
        arrays=lambda: [np.zeros(64, np.uint32), np.zeros(64, np.uint32)],
    ),
    Seed(
        "an index below zero",
        "out-of-bounds",
        lines(
            "sub.u32 %r5, %r2, 1; mul.wide.s32 %d3, %r5, 4; add.u64 %d3, %x, %d3;",
            "ld.global.u32 %r10, [%d3]; # BUG",
        ),
    ),
    Seed(
        "an index of 32 bits that overflows",
        "out-of-bounds",
        lines(
            "add.u32 %r5, %r2, 0x40000000; mul.wide.u32 %d3, %r5, 4; add.u64 %d3, %x, %d3;",
            "ld.global.u32 %r10, [%d3]; # BUG",
        ),
    ),
    Seed(
        "a vector that crosses the end",
        "out-of-bounds",
        lines(
            "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%x+240];",
            "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%x+256]; # BUG",
        ),
    ),
    Seed("an atomic outside", "out-of-bounds", "red.global.add.u32 [%y+256], %r0; # BUG"),
    Seed(
        "shared memory is too small",
        "out-of-bounds",
        lines(LOAD, PUT + " # BUG"),
        shared=".shared .align 16 .b8 s[128];",
    ),
    Seed(
        "dynamic shared memory is forgotten",
        "out-of-bounds",
        lines(LOAD, PUT + " # BUG"),
        shared="",
        head=".extern .shared .align 16 .b8 s[];",
        options={"shared_bytes": 64},
    ),
    Seed(
        "a generic pointer leaves shared memory",
        "out-of-bounds",
        lines(
            "cvt.u64.u32 %d3, %r1; cvta.shared.u64 %d3, %d3;",
            "st.u32 [%d3+508], %r0;",
            "st.u32 [%d3+512], %r0; # BUG",
        ),
        block=1,
    ),
    Seed("local memory is too small", "out-of-bounds", "st.local.u32 [mine+16], %r0; # BUG"),
    Seed(
        "a null pointer",
        "out-of-bounds",
        lines("mov.u64 %d3, 0;", "st.global.u32 [%d3], %r0; # BUG"),
    ),
    Seed(
        "a store to constant memory",
        "read-only",
        lines("mov.u64 %d3, fixed; cvta.const.u64 %d3, %d3;", "st.u32 [%d3], %r0; # BUG"),
    ),
    Seed(
        "a store to an array that is read-only",
        "read-only",
        "st.global.u32 [%d1], %r0; # BUG",
        arrays=lambda: [locked(np.zeros(64, np.uint32)), np.zeros(64, np.uint32)],
    ),
    Seed(
        "a 16-byte load at 4 bytes",
        "misaligned",
        "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%x+4]; # BUG",
    ),
    Seed(
        "an 8-byte store in shared memory at 4 bytes",
        "misaligned",
        "st.shared.u64 [%r1+4], %d0; # BUG",
    ),
    Seed("a 2-byte load at an odd byte", "misaligned", "ld.global.u16 %h1, [%x+1]; # BUG"),
    Seed(
        "half of shared memory is filled",
        "uninitialized",
        lines(LOAD, "@%p3 " + PUT, BAR, MIRROR, GET + " # BUG", KEEP),
    ),
    Seed(
        "one byte of four is filled",
        "uninitialized",
        lines(
            "cvt.u16.u32 %h1, %r0;", "st.shared.u8 [%r4], %h1;", "ld.shared.u32 %r11, [%r4]; # BUG"
        ),
    ),
    Seed(
        "a sum of what was never set to zero",
        "uninitialized",
        lines("ld.global.u32 %r11, [%d2]; # BUG", "add.u32 %r11, %r11, 1;", KEEP),
    ),
    Seed(
        "an atomic sum of what was never set to zero",
        "uninitialized",
        "red.shared.add.u32 [%r1], %r0; # BUG",
    ),
    Seed(
        "shared memory of the block before",
        "uninitialized",
        lines(LOAD, "@%p5 " + PUT, BAR, "ld.shared.u32 %r11, [%r4]; # BUG", KEEP),
        grid=2,
    ),
    Seed(
        "a barrier in one branch",
        "divergent-barrier",
        lines("@%p1 bra DONE;", BAR + " # BUG", "DONE:"),
    ),
    Seed(
        "a barrier in each branch",
        "divergent-barrier",
        lines("@%p1 bra LOW;", BAR, "bra DONE;", "LOW: " + BAR + " # BUG", "DONE:"),
        options={"order": "reverse"},
    ),
    Seed(
        "threads leave a loop with a barrier early",
        "divergent-barrier",
        lines(
            "mov.u32 %r12, 0;",
            "AGAIN: add.u32 %r12, %r12, 1;",
            BAR + " # BUG",
            "setp.lt.u32 %p7, %r12, %r0;",
            "@%p7 bra AGAIN;",
        ),
    ),
    Seed("a barrier for 40 threads", "bad-barrier", "bar.sync 0, 40; # BUG", block=40),
    Seed("a barrier that does not exist", "bad-barrier", "bar.sync 16; # BUG"),
    Seed("a barrier for more threads than there are", "deadlock", "bar.sync 1, 96; # BUG"),
    Seed(
        "the consumer waits at another barrier",
        "deadlock",
        lines(
            "@%p1 bra LOW;", "bar.arrive 1, 64; bra DONE;", "LOW: bar.sync 2, 64; # BUG", "DONE:"
        ),
    ),
    Seed(
        "a full mask in one branch",
        "ended-lane",
        lines(LOAD, "@!%p2 bra DONE;", SHFL + "-1; # BUG", KEEP, "DONE:"),
        block=32,
    ),
    Seed(
        "a shuffle from outside the mask",
        "absent-lane",
        lines(LOAD, "@!%p2 bra DONE;", SHFL + "0xffff; # BUG", KEEP, "DONE:"),
        block=32,
    ),
    Seed(
        "a mask without the lane itself",
        "bad-mask",
        lines(LOAD, SHFL + "0xfffe; # BUG", KEEP),
        block=32,
    ),
    Seed(
        "a mask of lanes that do not exist",
        "bad-mask",
        lines(LOAD, SHFL + "0xffffff; # BUG", KEEP),
        block=16,
    ),
    Seed(
        "lanes with different masks",
        "deadlock",
        lines(LOAD, "mov.u32 %r6, -1;", "@%p2 mov.u32 %r6, 0xfffffff;", SHFL + "%r6; # BUG", KEEP),
        block=32,
    ),
    Seed(
        "a shuffle in each branch",
        "deadlock",
        lines(
            LOAD, "@%p2 bra LOW;", SHFL + "-1; # BUG", "bra DONE;", "LOW: " + SHFL + "-1;", "DONE:"
        ),
        block=32,
    ),
    Seed("a product by half a warp", "bad-mask", MMA + " # BUG", block=16),
    Seed(
        "no wait for cp.async",
        "missing-wait",
        lines(COPY, BAR, "ld.shared.u32 %r11, [%r6]; # BUG", KEEP),
        **FOUR,
    ),
    Seed(
        "a wait that lets the last group go on",
        "missing-wait",
        lines(
            COPY,
            "cp.async.commit_group; cp.async.wait_group 1;",
            BAR,
            "ld.shared.u32 %r11, [%r6]; # BUG",
            KEEP,
        ),
        **FOUR,
    ),
    Seed(
        "a wait for groups without a group",
        "missing-wait",
        lines(COPY, "cp.async.wait_group 0;", BAR, "ld.shared.u32 %r11, [%r6]; # BUG", KEEP),
        **FOUR,
    ),
    Seed(
        "another thread's copy without a wait",
        "missing-wait",
        lines(
            COPY,
            "@%p2 cp.async.wait_all;",
            BAR,
            "xor.b32 %r6, %r6, 256;",
            "ld.shared.u32 %r11, [%r6]; # BUG",
            KEEP,
        ),
        **FOUR,
    ),
    Seed(
        "a wait for cp.async, and no barrier",
        "race-with-write",
        lines(
            COPY,
            "cp.async.wait_all;",
            "xor.b32 %r6, %r6, 16;",
            "ld.shared.u32 %r11, [%r6]; # BUG",
            KEEP,
        ),
        **FOUR,
    ),
    Seed(
        "cp.async into what is still read",
        "race-with-read",
        lines(
            COPY.splitlines()[0],
            "st.shared.v4.u32 [%r6], {%r0, %r0, %r0, %r0};",
            BAR,
            "xor.b32 %r5, %r6, 16; ld.shared.u32 %r11, [%r5];",
            COPY.splitlines()[1] + " # BUG",
            "cp.async.wait_all;",
            KEEP,
        ),
        **FOUR,
    ),
    Seed(
        "cp.async from beyond the end",
        "out-of-bounds",
        lines(
            *COPY.splitlines()[:1],
            "cp.async.cg.shared.global [%r6], [%d5+16], 16; # BUG",
            "cp.async.wait_all;",
        ),
        **FOUR,
    ),
    Seed(
        "cp.async to 8 bytes",
        "misaligned",
        lines(
            *COPY.splitlines()[:1],
            "add.u32 %r6, %r6, 8;",
            COPY.splitlines()[1] + " # BUG",
            "cp.async.wait_all;",
        ),
        **{**FOUR, "block": 31},
    ),
    Seed(
        "ldmatrix of rows at 8 bytes",
        "misaligned",
        lines(
            "mov.u32 %r5, %r1;",
            "add.u32 %r5, %r5, 8;",
            "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r5]; # BUG",
        ),
        block=32,
    ),
    Seed(
        "ldmatrix of what was never stored",
        "uninitialized",
        lines(
            ROW, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r5]; # BUG"
        ),
        block=32,
    ),
    Seed(
        "ldmatrix without a barrier",
        "race-with-write",
        lines(
            ROW,
            "xor.b32 %r6, %r5, 16; st.shared.v4.u32 [%r6], {%r0, %r0, %r0, %r0};",
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r5]; # BUG",
        ),
        block=32,
    ),
    Seed(
        "stmatrix outside",
        "out-of-bounds",
        lines(
            ROW,
            "add.u32 %r5, %r5, 16;",
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {%r0, %r0, %r0, %r0}; # BUG",
        ),
        block=32,
    ),
]
