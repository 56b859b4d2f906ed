"""Budgets: every limit is kept or broken as it says; a file that is wrong says where."""

import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qframe.errors import MissingExtraError
from qframe_plugins.cuda_build import Figures, judge, read_budgets, sass, tools
from qframe_plugins.cuda_build.budgets import (
    COUNTS,
    NEVER,
    TREASURED,
    BudgetError,
    strangers,
    written,
)

SASS = """
	.section	.text.first,"ax",@progbits
.text.first:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0020*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0030*/               @P1 IDP.4A.S8.S8 R3, R4, R5, R3 ;
        /*0040*/                   IDP.4A.U8.S8 R3, R4, R5, R3 ;
        /*0050*/                   REDUX.SUM.S32 UR4, R2 ;
        /*0060*/                   RED.E.ADD.STRONG.GPU [R2.64], R3 ;
        /*0070*/                   EXIT ;
.L_x_1:
        /*0080*/                   BRA `(.L_x_1);
        /*0090*/                   NOP;
	.section	.nv.info.first,"",@SHT_CUDA_INFO
	.section	.text.second,"ax",@progbits
        /*0000*/                   I2F.F64.U32 R4, R2 ;
        /*0010*/                   DADD R4, R4, R4 ;
        /*0020*/                   MUFU.RCP64H R5, R5 ;
        /*0030*/                   F2F.F32.F64 R5, R4 ;
        /*0040*/                   HMMA.16816.F32 R4, R4, R5, R6 ;
        /*0050*/                   IMMA.16832.S8.S8 R4, R4.ROW, R5.COL, R6 ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0070*/                   STL [R1], R2 ;
        /*0080*/                   LDS.U.128 R4, [R3] ;
        /*0090*/                   LDG.E.U8 R4, [R2.64] ;
"""


def test_a_listing_is_counted_by_function():
    found = {name: sass.mix(counted) for name, counted in sass.opcodes(SASS).items()}
    some = {name: {k: v for k, v in counts.items() if v} for name, counts in found.items()}
    assert some == {
        "first": {"instructions": 9, "dp4a": 2, "load128": 1, "shuffle": 1, "atomic": 1},
        "second": {
            "instructions": 10,
            "mma": 2,
            "shared128": 1,
            "cp_async": 1,
            "fp64": 4,
            "local": 1,
        },
    }


counts = st.fixed_dictionaries({word: st.integers(0, 9) for word in COUNTS})
limits = st.dictionaries(st.sampled_from(COUNTS), st.integers(0, 9), max_size=4)
sides = st.fixed_dictionaries({}, optional={"at_most": limits, "at_least": limits})


def toml(head, given):
    lines = []
    for side, entries in given.items():
        lines += [f"[{head}.{side}]", *(f"{word} = {limit}" for word, limit in entries.items())]
    return lines


@given(counts, sides, sides, sides, sides)
def test_each_limit_is_judged_and_the_nearest_one_counts(
    tmp_path_factory, numbers, every, kernel, here, elsewhere
):
    file = tmp_path_factory.mktemp("budgets") / "budgets.toml"
    lines = [*toml("every", every), "[kernels.k]", *toml("kernels.k", kernel)]
    lines += [*toml("kernels.k.sm_90", here), *toml("kernels.k.sm_80", elsewhere)]
    file.write_text("\n".join(lines), encoding="utf-8")
    verdicts = judge("k", Figures("mangled", "sm_90", numbers), read_budgets(file))
    assert {(v.kernel, v.arch) for v in verdicts} <= {("k", "sm_90")}
    found = {(v.limit.rpartition(" ")[0].replace(" ", "_"), v.what): v for v in verdicts}
    assert len(found) == len(verdicts)
    for side in ("at_most", "at_least"):
        for word in COUNTS:
            wanted = [g[side][word] for g in (every, kernel, here) if word in g.get(side, {})]
            if not wanted:
                assert (side, word) not in found
                continue
            verdict = found[side, word]
            limit, got = wanted[-1], numbers[word]
            assert verdict.limit.endswith(f" {limit}")
            assert verdict.got == str(got)
            assert verdict.holds == (got <= limit if side == "at_most" else got >= limit)


@given(st.lists(counts, min_size=1, max_size=3))
def test_what_is_accepted_is_kept_and_nothing_more(tmp_path_factory, measured):
    """As soon as a kernel gets what it never had, or loses what it had, the budget is broken."""
    file = tmp_path_factory.mktemp("budgets") / "budgets.toml"
    arches = ["sm_80", "sm_90", "sm_100"][: len(measured)]
    figures = [Figures("k", arch, each) for arch, each in zip(arches, measured, strict=True)]
    file.write_text(written({"k": figures}, "13.5"), encoding="utf-8")
    budget = read_budgets(file)
    for each in figures:
        assert all(verdict.holds for verdict in judge("k", each, budget))
        for word in (*NEVER, "shared"):
            most = max(other.counts[word] for other in figures)
            worse = Figures("k", each.arch, {**each.counts, word: most + 1})
            assert [v.what for v in judge("k", worse, budget) if not v.holds] == [word]
        for word in TREASURED:
            least = min(other.counts[word] for other in figures)
            if least:
                worse = Figures("k", each.arch, {**each.counts, word: least - 1})
                assert [v.what for v in judge("k", worse, budget) if not v.holds] == [word]
        worse = Figures("k", each.arch, {**each.counts, "registers": 17})
        assert [v.what for v in judge("k", worse, budget) if not v.holds] == ["registers"]
    [unknown] = judge("other", figures[0], budget)
    assert not unknown.holds
    assert [v.kernel for v in strangers(["other"], budget) if not v.holds] == ["k"]
    assert strangers(["k"], budget) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[kernel.k.at_most]\nregisters = 1", "unknown key kernel; did you mean 'kernels'"),
        ("[kernels.k.at_mots]\nregisters = 1", "kernels.k.at_mots"),
        ("[kernels.k.at_most]\nregister = 1", "kernels.k.at_most.register"),
        ("[kernels.k.sm_90.at_most]\nshard = 1", "kernels.k.sm_90.at_most.shard"),
        ("[every.at_most]\nfp64 = true", "every.at_most.fp64 is True"),
        ("[every.at_most]\nfp64 = -1", "every.at_most.fp64 is -1"),
        ("[every]\nat_most = 3", "every.at_most is 3, expected a table"),
        ("kernels = 3", "kernels is 3, expected a table"),
        ("[kernels", "no TOML"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, said):
    file = tmp_path / "budgets.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BudgetError) as caught:
        read_budgets(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BudgetError, match="expected a file of budgets"):
        read_budgets(tmp_path / "none.toml")


def test_without_the_packages_the_error_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tools.find.cache_clear()
    try:
        with pytest.raises(MissingExtraError, match=r'nvidia-cuda-nvcc.*"qframe\[cuda\]"'):
            tools.find("ptxas")
    finally:
        tools.find.cache_clear()
