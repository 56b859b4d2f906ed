"""Every form of the table is held against a model by some test."""

import numpy as np
import pytest

from qframe_plugins.ptx_host.forms import TABLE
from tests.ptx import test_device, test_matrices, test_opcodes, test_refused, test_warps
from tests.ptx.snippets import chosen, kernel, named
from tests.ptx.test_device import INDEX, name_of, run


@pytest.mark.parametrize("form", named("bra", "end", "fence", "prefetch", "nanosleep"), ids=name_of)
def test_what_leaves_no_number_leaves_all_others(form):
    """Threads with x > 5 skip a store by a jump or an end; the rest of these does nothing."""
    for opcode, _ in chosen(form):
        line = {
            "bra": f"@%p1 {opcode} DONE;", "end": f"@%p1 {opcode};", "nanosleep": f"{opcode} 20;",
            "prefetch": f"{opcode} [%d1];",
        }.get(form.emit.__name__, f"{opcode};")  # fmt: skip
        body = (
            INDEX.format(4)
            + f"""setp.gt.u32 %p1, %r0, 5;
            {line}
            st.global.u32 [%d1], 7;
            DONE:"""
        )
        x = np.zeros(32, np.uint32)
        run(kernel(body.replace("], 7", "], %r7").replace("setp", "mov.u32 %r7, 7; setp"), "x"), x)
        skips = form.emit.__name__ in ("bra", "end")
        assert x.tolist() == [7] * 6 + [0 if skips else 7] * 26, opcode


ELSEWHERE = {
    test_device.test_carries_make_long_integers: "add_carry mad_carry",
    test_device.test_generic_addresses_lead_to_every_space: "cvta",
    test_device.test_loads_and_stores_move_bytes: "load",
    test_device.test_stores_write_what_they_say_and_no_more: "store",
    test_device.test_atomics_take_turns: "atomic",
    test_device.test_compare_and_swap_swaps_once: "cas",
    test_device.test_a_copy_arrives_at_its_wait_and_not_before: (
        "cp_async commit wait_group wait_all"
    ),
    test_what_leaves_no_number_leaves_all_others: "bra end fence prefetch nanosleep",
    test_refused.test_what_cannot_go_on_ends_with_an_error: "trap",
    test_warps.test_shuffles_read_other_lanes: "shfl",
    test_warps.test_lanes_vote_match_and_reduce: "vote ballot match_any match_all redux elect",
    test_warps.test_active_lanes_are_those_that_come_together: "activemask",
    test_warps.test_a_warp_exchanges_through_shared_memory: "warp_barrier",
    test_warps.test_barriers_order_memory_and_count: "barrier reduce_all reduce_some",
    test_warps.test_a_producer_arrives_and_a_consumer_waits: "arrive",
    test_matrices.test_matrices_of_halves_are_spread_over_lanes: "ldmatrix stmatrix",
    test_matrices.test_products_of_matrices_are_exact: "mma",
}
"""Test -> the forms, by the functions that translate them, that it holds against a model."""


@pytest.mark.parametrize("form", TABLE, ids=name_of)
def test_every_form_of_the_table_has_a_model(form):
    name = form.emit.__name__
    if form in test_opcodes.PURE:
        assert name in test_opcodes.APPROXIMATE or test_opcodes.model_of(form) is not None
    else:
        assert name in " ".join(ELSEWHERE.values()).split()
