"""How kernels are written that are wrong on purpose, and twins that do the same rightly.

Each line of a body is a line of "kernel.py" from 101 on, told by `.loc`. The line that ends with
"# BUG" is the one that the checker has to name.
"""

from dataclasses import dataclass, field

import numpy as np

from qframe_plugins.ptx_host import Fresh
from tests.ptx.snippets import kernel

START = """mov.u32 %r0, %tid.x; mov.u32 %r9, %ctaid.x; mov.u32 %r8, %ntid.x; mov.u32 %r1, s;
mad.lo.u32 %r2, %r9, %r8, %r0; mul.wide.u32 %d0, %r2, 4; add.u64 %d1, %x, %d0; add.u64 %d2, %y, %d0;
shl.b32 %r3, %r0, 2; add.u32 %r4, %r1, %r3; setp.lt.u32 %p1, %r0, 32; setp.lt.u32 %p2, %r0, 16;
and.b32 %r7, %r0, 1; setp.eq.u32 %p3, %r7, 0; setp.eq.u32 %p4, %r0, 0; setp.lt.u32 %p5, %r9, 1;
setp.lt.u32 %p6, %r2, 64;"""
"""thread %r0, block %r9, index %r2, its cells of x and y %d1 and %d2, its word of s %r4; p1: thread
< 32, p2: < 16, p3: even, p4: first, p5: first block, p6: index < 64."""


@dataclass
class Seed:
    """One kernel; `finding` is "" for a twin."""

    name: str
    finding: str
    body: str
    grid: int = 1
    block: int = 64
    options: dict = field(default_factory=dict)
    arrays: object = None
    shared: str = ".shared .align 16 .b8 s[512];"
    head: str = ".const .align 4 .u32 fixed[4] = {1, 2, 3, 4};"

    def text(self):
        lines = []
        for number, line in enumerate(self.body.strip().splitlines()):
            lines += [f".loc 1 {101 + number} 0", line.strip().replace("# BUG", "")]
        registers = self.shared + "\n.local .align 4 .b8 mine[16];"
        head = '.file 1 "/src/kernel.py"\n' + self.head
        return kernel(START + "\n" + "\n".join(lines), registers=registers, head=head)

    def line(self):
        [found] = [n for n, line in enumerate(self.body.strip().splitlines()) if "# BUG" in line]
        return f"kernel.py:{101 + found}"

    def given(self):
        if self.arrays:
            return self.arrays()
        count = self.grid * self.block
        return [np.arange(count, dtype=np.uint32), Fresh(np.zeros(count, np.uint32))]


LOAD = "ld.global.u32 %r10, [%d1];"
PUT = "st.shared.u32 [%r4], %r10;"
MIRROR = "sub.u32 %r5, 252, %r3; add.u32 %r5, %r1, %r5;"
GET = "ld.shared.u32 %r11, [%r5];"
KEEP = "st.global.u32 [%d2], %r11;"
BAR = "bar.sync 0;"
COPY = """shl.b32 %r6, %r0, 4; add.u32 %r6, %r1, %r6; shl.b64 %d5, %d0, 2; add.u64 %d5, %x, %d5;
cp.async.cg.shared.global [%r6], [%d5], 16;"""
FOUR = {
    "block": 32,
    "arrays": lambda: [np.arange(128, dtype=np.uint32), Fresh(np.zeros(32, np.uint32))],
}
TREE = """{load}
{put}
{bar}
mov.u32 %r12, {from_};
AGAIN: setp.ge.u32 %p7, %r0, %r12;
@%p7 bra SKIP;
shl.b32 %r13, %r12, 2; add.u32 %r13, %r4, %r13;
ld.shared.u32 %r14, [%r13];{read}
ld.shared.u32 %r15, [%r4]; add.u32 %r15, %r15, %r14;
st.shared.u32 [%r4], %r15;{write}
SKIP: {inner}
shr.u32 %r12, %r12, 1; setp.ne.u32 %p8, %r12, 0;
@%p8 bra AGAIN;
@!%p4 bra DONE;
ld.shared.u32 %r11, [%r4];
{keep}
DONE:"""


def tree(inner, read="", write="", from_=32):
    return TREE.format(
        load=LOAD, put=PUT, bar=BAR, from_=from_, inner=inner, read=read, write=write, keep=KEEP
    )


def lines(*given):
    return "\n".join(given)


ROW = """and.b32 %r5, %r0, 31; shl.b32 %r5, %r5, 4; add.u32 %r5, %r1, %r5;"""
SHFL = "shfl.sync.down.b32 %r11, %r10, 8, 31, "
MMA = (
    "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 "
    "{%r20, %r21, %r22, %r23}, {%r0, %r0}, {%r0}, {%r0, %r0, %r0, %r0};"
)


def locked(array):
    array.flags.writeable = False
    return array
