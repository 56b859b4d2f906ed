"""docs/ptx.md lists what the table has, and what the checker can find."""

import re
import subprocess
import sys
from pathlib import Path

from qframe_plugins.ptx_host import KINDS, document
from qframe_plugins.ptx_host.forms import TABLE

DOCUMENT = (Path(__file__).parents[2] / "docs" / "ptx.md").read_text(encoding="utf-8")


def test_the_list_of_instructions_is_current():
    """If not: python -m qframe_plugins.ptx_host.document docs/ptx.md."""
    assert document.written(DOCUMENT) == DOCUMENT
    listed = re.findall(r"^- `(\w+)", DOCUMENT, re.MULTILINE)
    assert sorted(listed) == sorted(form.name for form in TABLE)


def test_importing_is_light():
    """numba is imported by the first launch."""
    code = "import sys, qframe_plugins.ptx_host; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_finding_is_explained():
    assert tuple(re.findall(r"^\| `([a-z-]+)` \|", DOCUMENT, re.MULTILINE)) == KINDS


def test_a_form_is_written_as_ptx_writes_it():
    [form] = [form for form in TABLE if form.pattern.startswith("shfl")]
    assert document.syntax(form) == "shfl.sync.(up|down|bfly|idx).b32"
    assert document.operands(form) == "d{|p}, a, b, c, mask"
    [form] = [f for f in TABLE if f.pattern.startswith("add") and f.pattern.endswith("{T:f32}")]
    assert document.syntax(form) == "add{.rn|.rz|.rm|.rp}{.ftz}{.sat}.f32"


def test_writing_replaces_the_list_and_nothing_else(tmp_path):
    path = tmp_path / "ptx.md"
    path.write_text(
        f"before\n{document.START}\nwhat was\n{document.END}\nafter\n", encoding="utf-8"
    )
    document.main(str(path))
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{document.START}\n")
    assert text.endswith(f"{document.END}\nafter\n")
    assert "what was" not in text
    assert "`trap`" in text
