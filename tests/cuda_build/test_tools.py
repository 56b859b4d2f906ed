"""NVIDIA's tools on PTX of our own. They come with the extra "cuda"; without it this is skipped."""

import subprocess

import pytest

from qframe.errors import MissingExtraError
from qframe_plugins.cuda_build import ToolError, assemble, release, tools
from qframe_plugins.cuda_build.assembly import resources_of
from qframe_plugins.ptx_host import PtxError

ARCHES = ("sm_80", "sm_90", "sm_100")
HEAD = ".version 8.6\n.target sm_80\n.address_size 64\n"
KERNEL = """
.visible .entry {name}(.param .u64 x, .param .u64 n)
{{
    .reg .b32 %r<9>; .reg .b64 %a<9>; .reg .f32 %f<3>; .reg .f64 %d<3>;
    .shared .align 4 .b8 tile[512];
    ld.param.u64 %a1, [x];
    cvta.to.global.u64 %a1, %a1;
    {body}
    ret;
}}
"""
BODIES = {
    "load128": "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%a1]; add.u32 %r1, %r1, %r2;"
    "xor.b32 %r3, %r3, %r4; add.u32 %r1, %r1, %r3; st.global.u32 [%a1], %r1;",
    "dp4a": "ld.global.u32 %r1, [%a1]; ld.global.u32 %r2, [%a1+4];"
    "dp4a.s32.s32 %r3, %r1, %r2, %r1; st.global.u32 [%a1], %r3;",
    "fp64": "ld.global.f64 %d1, [%a1]; add.f64 %d2, %d1, %d1; st.global.f64 [%a1], %d2;",
    "div64": "ld.param.u64 %a2, [n]; ld.global.u64 %a3, [%a1]; div.s64 %a4, %a3, %a2;"
    "st.global.u64 [%a1], %a4;",
    "shuffle": "mov.u32 %r1, %tid.x; shfl.sync.down.b32 %r2, %r1, 1, 31, -1;"
    "st.global.u32 [%a1], %r2;",
    "ftz": "ld.global.f32 %f1, [%a1]; mul.ftz.f32 %f2, %f1, %f1; st.global.f32 [%a1], %f2;",
    "shared": "mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.u32 %r3, tile; add.u32 %r3, %r3, %r2;"
    "st.shared.u32 [%r3], %r1; bar.sync 0; xor.b32 %r2, %r2, 4; mov.u32 %r3, tile;"
    "add.u32 %r3, %r3, %r2; ld.shared.u32 %r4, [%r3]; st.global.u32 [%a1], %r4;",
}


@pytest.fixture(autouse=True)
def _with_tools():
    try:
        tools.find("ptxas")
    except MissingExtraError as error:
        pytest.skip(str(error))


def kernel(name):
    return KERNEL.format(name=name, body=BODIES[name])


@pytest.mark.parametrize("arch", ARCHES)
def test_what_is_written_is_found_and_nothing_else(arch):
    found = {each.kernel: each for each in assemble(HEAD + "".join(map(kernel, BODIES)), arch)}
    assert set(found) == set(BODIES)
    for name, figures in found.items():
        assert figures.arch == arch
        counts = figures.counts
        assert 0 < counts["registers"] <= 255
        assert counts["shared"] >= 512 if name == "shared" else counts["shared"] <= 1024
        for sort in ("load128", "dp4a", "fp64", "div64", "shuffle", "ftz"):
            assert (counts[sort] > 0) == (sort == name), (name, sort)
        assert (counts["barrier"] > 0) == (name == "shared")
        assert (counts["stack"], counts["spills"], counts["local"]) == (0, 0, 0)


def test_spills_are_seen():
    """More live numbers than there are registers."""
    loads = "\n".join(f"ld.global.f32 %f{i}, [%a1+{4 * i}];" for i in range(300))
    sums = "\n".join(
        f"fma.rn.f32 %f{i}, %f{i}, %f{299 - i}, %f{(7 * i) % 300};" for i in range(300)
    )
    stores = "\n".join(f"st.global.f32 [%a1+{4 * i}], %f{i};" for i in range(300))
    text = (
        HEAD + ".visible .entry many(.param .u64 x) { .reg .f32 %f<300>; .reg .b64 %a<2>;\n"
        "ld.param.u64 %a1, [x]; cvta.to.global.u64 %a1, %a1;\n"
        f"{loads}\nbar.sync 0;\n{sums}\nbar.sync 0;\n{stores}\nret; }}"
    )
    [figures] = assemble(text, "sm_80")
    assert figures.counts["registers"] > 200
    assert min(figures.counts[word] for word in ("spills", "stack", "local")) > 0


def test_what_is_kept(tmp_path):
    assemble(HEAD + kernel("dp4a"), "sm_90", tmp_path / "dp4a.sm_90")
    assert (tmp_path / "dp4a.sm_90.ptx").read_text(encoding="utf-8") == HEAD + kernel("dp4a")
    assert (tmp_path / "dp4a.sm_90.cubin").read_bytes().startswith(b"\x7fELF")
    assert "IDP.4A" in (tmp_path / "dp4a.sm_90.sass").read_text(encoding="utf-8")


def test_a_newer_target_than_the_architecture_is_refused():
    text = HEAD.replace("sm_80", "sm_90") + kernel("dp4a")
    with pytest.raises(ToolError, match=r"refuses it: .*\.target"):
        assemble(text, "sm_80")


@pytest.mark.parametrize("arch", ["90", "compute_90", "sm_", "sm_90; rm"])
def test_what_is_no_architecture(arch):
    with pytest.raises(ToolError, match="expected something like sm_90"):
        assemble(HEAD + kernel("dp4a"), arch)


def test_what_is_no_ptx():
    with pytest.raises(PtxError, match="no PTX"):
        assemble("", "sm_80")


def test_silence_of_a_tool_is_no_zero():
    with pytest.raises(ToolError, match="says nothing of registers"):
        resources_of("Compiling entry function 'k' for 'sm_80'\n 0 bytes stack frame")


def test_the_release_is_that_of_the_program():
    said = subprocess.run([tools.find("ptxas"), "--version"], capture_output=True, text=True)
    assert f"release {release()}," in said.stdout
    assert "site-packages" in str(tools.find("ptxas"))  # and not a system's CUDA
