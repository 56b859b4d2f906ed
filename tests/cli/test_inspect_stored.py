"""qframe inspect on what is quantized already."""

import json

import qframe


def test_a_quantized_folder_is_shown_and_not_planned(run, tiny_llama, tmp_path):
    recipe = {"scheme": {"group_size": 32}, "overrides": {"re:.*down_proj": {"num_bits": 8}}}
    qframe.quantize(tiny_llama, {"method": "rtn", **recipe}, out=tmp_path / "out")
    shown = run("inspect", tmp_path / "out")
    assert shown.code == 0, shown.err
    text = " ".join(shown.out.split())
    assert "by qframe" in text
    assert "method rtn" in text
    assert "compressed-tensors, for transformers" in text
    assert "int8 symmetric" in text
    record = json.loads(run("inspect", tmp_path / "out", "--json").out)
    assert len(record["layers"]) == 14
    layer = record["layers"]["model.layers.0.mlp.down_proj"]
    assert layer["tensors"] == {
        "weight_packed": 64 * 96,
        "weight_scale": 64 * 3 * 2,
        "weight_shape": 16,
    }
    (tmp_path / "out" / "qframe.json").unlink()
    others = run("inspect", tmp_path / "out")
    assert "by others" in " ".join(others.out.split())


def test_a_file_of_weights_is_shown(run, tiny_llama):
    file = tiny_llama / "model.safetensors"
    shown = run("inspect", file)
    assert shown.code == 0, shown.err
    assert "F32" in shown.out
    record = json.loads(run("inspect", file, "--json").out)
    assert record["tensors"]["model.norm.weight"]["shape"] == [64]


def test_what_no_layout_knows_is_said(run, tiny_llama):
    config = json.loads((tiny_llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    (tiny_llama / "config.json").write_text(json.dumps(config))
    shown = run("inspect", tiny_llama)
    assert shown.code == 2
    assert "'fbgemm_fp8', which no layout knows (known: " in shown.said
    assert "compressed-tensors" in shown.said
