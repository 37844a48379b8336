"""What packed models load as besides the factored format: compressed-tensors with a PEFT adapter, and torch's int4 kernel."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import run_pipeline
from compress import menu, pipeline
from compress.recipe import load_recipe

IDS = torch.arange(5, 45).reshape(2, 20)


def compress(models, text, output, name, recipe, ratio=0.5, **changes):
    """The pipeline with a small text; the report."""
    changes = {
        "calibration": str(text),
        "calibration_tokens": 2048,
        "sequence_length": 64,
        "group_size": "16",
    } | changes
    chosen = load_recipe(recipe).override({"evaluate": "none", "ratio_scope": "decoder"} | changes)
    work = output.with_name(output.name + ".work")
    pipeline.run(pipeline.Request(str(models(name)), (ratio,), chosen, output, work))
    return json.loads((output / "report.json").read_text())


@pytest.mark.parametrize(
    ("name", "ratio", "changes"),
    [
        ("llama", 0.5, {"bits": "4", "correction_rank": "0-4"}),
        ("qwen2", 0.5, {"bits": "3", "correction_rank": "2", "zero_point": "stored", "allocation": "uniform"}),
        ("gemma2", 0.4908, {"bits": "2-6,8", "correction_rank": "0"}),
        ("opt", 0.481, {"bits": "8", "group_size": "0", "correction_rank": "0"}),
    ],
)
def test_an_adapter_loads_without_remote_code_in_the_bytes_of_the_plan(models, text, tmp_path, name, ratio, changes):
    """That its logits are those of the compressed layers is what the run itself checks; 16 bytes more a packed matrix."""
    report = compress(models, text, tmp_path / "out", name, "quantized", ratio, export="adapter", **changes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.model_type == name
    assert any("lora_A" in key for key, _ in loaded.named_parameters()) == (changes["correction_rank"] != "0")
    corrected = changes["correction_rank"] != "0"
    assert report["needs"] == ["compressed-tensors"] + ["peft"] * corrected
    assert ("Without peft" in (tmp_path / "out" / "README.md").read_text()) == corrected
    keys, written = [], 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys += list(file.keys())
            written += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    packed = sum(key.endswith("weight_packed") for key in keys)
    assert packed and written == report["sizes"]["bytes_after"] + 16 * packed


def test_what_an_adapter_cannot_hold_is_refused(models, text, tmp_path, capsys):
    arguments = [
        "--model",
        str(models("gpt2")),
        "--target-ratio",
        "0.5",
        "--calibration",
        str(text),
        "--export",
        "adapter",
    ]
    for more, reason in (
        (["--recipe", "svd-llm"], "menu: packed"),
        (["--recipe", "quantized"], "one number of --bits"),
        (["--recipe", "gptq", "--bits", "4", "--group-size", "16"], "stored transposed"),
    ):
        assert run_pipeline.main([*arguments, *more, "--output", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert reason in told and told.count("\n") == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_packed_runtime_gives_the_logits_of_the_dense_one(models, text, tmp_path, name):
    """Asked for when the checkpoint is written, or when it is loaded; rows of 48 do not go into the kernel, those of 96 do."""
    compress(models, text, tmp_path / "out", name, "quantized", group_size="0", runtime="packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, runtime="dense")
    with torch.no_grad():
        wanted, found = dense(IDS).logits, packed(IDS).logits
    stayed = [item for item in packed.modules() if getattr(item, "kernel", None) is not None]
    assert stayed and not any(getattr(item, "kernel", None) for item in dense.modules())
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    packed.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, found)
    with pytest.raises(ValueError, match="runtime must be"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, runtime="fast")


def test_a_product_on_a_grid_is_chosen_written_and_loaded(text, tmp_path, monkeypatch, request):
    """Of weights of low rank ``auto`` makes products whose factors are integers; the run's own check loads them."""
    monkeypatch.setattr(menu, "DIRECTIONS", 8)
    menu._menu.cache_clear()
    request.addfinalizer(menu._menu.cache_clear)
    source = zoo.write_model(tmp_path / "model", "llama", hidden_size=64, num_hidden_layers=1, intermediate_size=64)
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if ".layers." in name and weight.dim() == 2:
            a, b = (torch.randn(size, 16, generator=generator) / 16**0.5 for size in weight.shape)
            weights[name] = a @ b.T / 4
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    compress(lambda _: source, text, tmp_path / "out", "", "auto", 0.16)
    rows = list(csv.DictReader((tmp_path / "out" / "matrices.csv").open()))
    assert any(row["form"] == "factors" and row["factor_bits"] == "8" and row["rank"] == "16" for row in rows)
