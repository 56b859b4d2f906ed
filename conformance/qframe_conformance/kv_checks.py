"""The checks of KV-cache quantizers, in four parts, and the caches that they are tried on.

    kv_contract    what every store owes: it takes, reads, shows and refuses as `KVStore` says
    kv_algebra     what must be the same: lanes, pieces, a life of crops and selections, bytes
    kv_bounds      theorems about what is stored, as claimed
    kv_attention   theorems about what attention makes of it

Which of them apply follows from capabilities and claims. `kv_scenarios` draws the cases.
"""

from __future__ import annotations

from qframe_conformance import kv_algebra, kv_attention, kv_bounds, kv_contract
from qframe_conformance.kv_cases import KVCase
from qframe_conformance.kv_scenarios import scenarios

__all__ = ["KVCase", "kv_algebra", "kv_attention", "kv_bounds", "kv_contract", "scenarios"]
