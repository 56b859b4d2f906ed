"""The store gives back what was put into it, or nothing: whatever happened to its files."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qframe.comparison.identity import package_source
from qframe.comparison.store import Store, key_of, plain
from qframe.errors import OutputError

IDENTITY = {"model": {"a": "1"}, "bits": 4}
CONTENT = {"score": {"kl": 0.1, "worst": math.inf, "none": math.nan}, "layers": [1, 2, None]}


def filled(folder):
    store = Store(folder)
    with store.claim("cells-x") as work:
        store.put("cells", IDENTITY, CONTENT, work)
    return store


def test_what_is_put_is_what_comes_back(tmp_path):
    store = filled(tmp_path)
    assert store.get("cells", IDENTITY) == plain(CONTENT)
    assert store.get("cells", {**IDENTITY, "bits": 3}) is None
    assert Store(tmp_path).get("cells", IDENTITY) == plain(CONTENT)
    assert (store.count("cells"), store.events) == (1, [])


def test_the_order_of_keys_does_not_change_an_identity():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of({"a": 1, "b": 2}) != key_of({"a": 2, "b": 1})
    assert key_of({"a": "1"}) != key_of({"a": 1})


@given(data=st.data())
def test_a_damaged_entry_is_never_believed(data, tmp_path_factory):
    """Cut anywhere, or with any byte changed: nothing is given, and an event says which file."""
    folder = tmp_path_factory.mktemp("store")
    store = filled(folder)
    file = store.file("cells", IDENTITY)
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 2))  # the last byte ends the line
    if data.draw(st.booleans()):
        file.write_bytes(whole[:at])
    else:
        byte = data.draw(st.integers(0, 255).filter(lambda b: b != whole[at]))
        file.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
    found = store.get("cells", IDENTITY)
    if found is not None:  # a byte between the values, such as a space
        assert json.loads(file.read_bytes()) == json.loads(whole)
        assert found == plain(CONTENT)
        return
    [event] = store.events
    assert event.kind == "damaged entry"
    assert file.name in event.message
    store.get("cells", IDENTITY)
    assert store.events == [event]  # said once


def test_an_entry_under_the_name_of_another_is_not_believed(tmp_path):
    store = filled(tmp_path)
    other = {**IDENTITY, "bits": 3}
    shutil.copy(store.file("cells", IDENTITY), store.file("cells", other))
    assert store.get("cells", other) is None
    assert "something else" in store.events[0].message


def test_an_array_comes_back_bit_for_bit(tmp_path):
    values = np.array([0.0, -0.0, 1e-45, np.inf, -np.inf, np.nan, 3.5], np.float32)
    store = Store(tmp_path)
    with store.claim("x") as work:
        store.put_array("logits/x/0000.f32", values.reshape(1, 7), work)
    found = store.get_array("logits/x/0000.f32")
    assert found.tobytes() == values.tobytes()
    assert store.get_array("logits/x/0001.f32") is None
    assert store.events == []


@pytest.mark.parametrize("damage", ["empty", "cut", "hash alone", "changed", "longer"])
def test_a_damaged_array_is_never_believed(tmp_path, damage):
    store = Store(tmp_path)
    with store.claim("x") as work:
        store.put_array("logits/x/0000.f32", np.arange(50, dtype=np.float32), work)
    file = tmp_path / "logits" / "x" / "0000.f32"
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[100] ^= 1
    file.write_bytes(
        {
            "empty": b"",
            "cut": whole[:-4],
            "hash alone": whole[:32],
            "changed": bytes(changed),
            "longer": whole + b"\0" * 4,
        }[damage]
    )
    assert store.get_array("logits/x/0000.f32") is None
    assert [event.kind for event in store.events] == ["damaged entry"]


def test_only_one_holds_a_claim_and_its_folder_is_empty(tmp_path):
    store, other = Store(tmp_path), Store(tmp_path)
    with store.claim("cells-x") as work:
        (work / "half").write_text("done")
        with other.claim("cells-x", wait=False) as nothing:
            assert nothing is None
        with other.claim("cells-y", wait=False) as free:
            assert free is not None
        Store(tmp_path)  # which clears what nobody holds
        assert (work / "half").exists()
    with other.claim("cells-x", wait=False) as work:
        assert list(work.iterdir()) == []
    assert list((tmp_path / "work").iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / "work" / "cells-x"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    left.with_suffix(".lock").touch()
    Store(tmp_path)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_claim_is_given_back_when_its_work_fails(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError), store.claim("x"):
        raise ZeroDivisionError
    with store.claim("x", wait=False) as work:
        assert work is not None


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="give another"):
        Store(tmp_path / "file")


def test_a_package_is_known_by_the_names_and_the_content_of_its_modules(tmp_path):
    def source(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "inner").mkdir(parents=True)
        for name, text in files.items():
            (folder / f"{name.replace('_in_', 'inner/')}.py").write_text(text, encoding="utf-8")
        (folder / "data.txt").write_text(str(folder), encoding="utf-8")
        return package_source(folder)

    first = source(a="x = 1\n", _in_b="y = 1\n")
    assert source(a="x = 1\n", _in_b="y = 1\n") == first
    others = [
        source(a="x = 2\n", _in_b="y = 1\n"),
        source(a="x = 1\n", _in_b="y = 2\n"),
        source(a="x = 1\n", b="y = 1\n"),
        source(a="x = 1\n"),
    ]
    assert len({first, *others}) == 5
