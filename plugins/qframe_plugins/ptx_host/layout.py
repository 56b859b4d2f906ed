"""Where the scheduler, the kernels' code and the checker find what they share.

Every thread has a context, a row of 64-bit slots, and every block has a row of its own.
"""

# A thread's context.
TID = 0  # x, y, z
LANE, WARP, THREAD = 3, 4, 5
LOCAL = 6  # address of its local memory
CARRY = 7  # of the last instruction with .cc
SCRATCH = 8  # 12 slots that accesses go to which the checker has refused
STORED = 20  # 4 slots, what is about to be stored, for the checker
INPUT = 24  # 16 slots, what it brings to a barrier or a warp's operation
OUTPUT = 40  # 8 slots, what it gets from it
REGISTERS = 48

# After the registers, where a kernel has cp.async: copies on their way.
COPIES_MOST = 64
COPIES_OPEN, COPIES_GROUP, COPIES_LIST = 0, 1, 2  # count, group that is open, then the copies
COPY_SLOTS = 6  # target, source, bytes, bytes from the source, group, site
COPIES_SLOTS = COPIES_LIST + COPIES_MOST * COPY_SLOTS

# A block's row.
CTAID, NTID, NCTAID = 0, 3, 6  # x, y, z each
SHARED = 9  # address of its shared memory
DYNAMIC, TOTAL = 10, 11  # bytes of dynamic, of all shared memory
BLOCK = 12  # its number
FUEL = 13  # jumps back that are left
EPOCH = 14  # barriers of the whole block so far
COUNTS = 15  # address of the counters of instructions
TRACE, TRACE_COUNT, TRACE_MOST = 16, 17, 18  # address, entries, room
STATE = 19  # address of the checker's arrays
BLOCK_SLOTS = 32

TRACE_SLOTS = 4  # thread, site, address, space

# What a thread's code returns: 0 at its end, the number of the place where it waits, or
TRAP, NO_FUEL, TOO_MANY_COPIES = -1, -2, -3

# What threads wait for.
BARRIER, WARP_OPERATION, ACTIVE = 1, 2, 3
SYNCS = {"barrier": BARRIER, "warp": WARP_OPERATION, "active": ACTIVE}

# A barrier's inputs after its number and count: what it does.
SYNC, ARRIVE = 0, 1

# What a warp's operation found.
FINE, READS_OTHERS, PARTIAL = 0, 1, 2

# Accesses to memory, and spaces.
LOAD, STORE, ATOMIC, ISSUE, ARRIVAL = 0, 1, 2, 3, 4
SPACES = {"global": 0, "": 1, "shared": 2, "local": 3, "const": 4, "param": 5}
