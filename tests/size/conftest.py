"""Commands for the tests of what a run takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from tests.ran import Ran, command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run `qframe ARGUMENTS`."""
    monkeypatch.delenv("QFRAME_THREADS", raising=False)
    return partial(command, capsys)


@pytest.fixture
def wide(tiny: ModuleType) -> Callable[..., tuple[Path, int]]:
    """Write a Llama of wider layers; return the folder and the bytes of its weights."""

    def write(folder: Path, layers: int = 96) -> tuple[Path, int]:
        with pytest.MonkeyPatch.context() as patch:
            shapes = {"mlp.gate_proj": (768, 256), "mlp.up_proj": (768, 256)}
            shapes |= {f"self_attn.{name}_proj": (256, 256) for name in "qo"}
            shapes |= {f"self_attn.{name}_proj": (128, 256) for name in "kv"}
            patch.setattr(tiny, "SHAPES", {**shapes, "mlp.down_proj": (256, 768)})
            patch.setattr(tiny, "HIDDEN", 256)
            patch.setattr(tiny, "INTERMEDIATE", 768)
            tiny.write_llama(folder, layers=layers)
        return folder, sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    return write
