"""Bad input: one clear line that names the remedy, exit code 2, nothing half-written under the final name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file

import run_pipeline
from checkpoint import workdir
from compress import plan as plan_module

ROOT = Path(run_pipeline.__file__).parent


@pytest.fixture
def refused(tmp_path, text, capsys):
    """A function that runs the command, expects exit code 2 and nothing written, and returns the one line."""

    def run(model: Path | str, *more: str) -> str:
        output = tmp_path / "out"
        before = sorted(output.rglob("*"))
        arguments = [
            "--model",
            str(model),
            "--target-ratio",
            "0.7",
            "--calibration",
            str(text),
            "--output",
            str(output),
        ]
        arguments += ["--calibration-tokens", "1024", "--sequence-length", "64", "--evaluate", "none", *more]
        assert run_pipeline.main(arguments) == 2
        assert sorted(output.rglob("*")) == before
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def copy(models, tmp_path):
    """A copy of the tiny llama to be damaged."""
    return Path(shutil.copytree(models("llama"), tmp_path / "damaged"))


def test_no_such_directory(refused, tmp_path):
    assert "no such directory" in refused(tmp_path / "nowhere")
    assert "no such directory" in refused("just-a-name")


def test_hub_id_that_cannot_be_had(refused):
    assert "name a local directory" in refused("nobody/nothing")


def test_not_a_checkpoint(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path / "empty")


def test_config_that_is_not_json_or_names_nothing(refused, copy):
    (copy / "config.json").write_text("{")
    assert "is not JSON" in refused(copy)
    (copy / "config.json").write_text("[]")
    assert "names no model_type" in refused(copy)
    (copy / "config.json").write_text('{"model_type": "no-such-type"}')
    assert "does not know the model" in refused(copy)


def test_no_weights_and_pickled_weights(refused, copy):
    (copy / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(copy)
    (copy / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled weights only" in refused(copy) and "save_pretrained" in refused(copy)


def test_missing_shard_and_index_that_escapes(refused, tmp_path):
    source = zoo.write_model(tmp_path / "sharded", "llama", shard_size="100KB")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(source) and "missing" in refused(source)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../../secret.safetensors"
    index.write_text(json.dumps(content))
    assert "not a plain file name" in refused(source)
    index.write_text("{}")
    assert "not a safetensors index" in refused(source)


def test_truncated_and_corrupted_weights(refused, copy):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", struct.pack("<Q", 1 << 60) + whole[8:], b"\0" * len(whole)):
        file.write_bytes(damaged)
        assert "truncated or corrupted" in refused(copy)


def test_weights_that_are_not_finite_are_named(refused, copy):
    for value in (float("nan"), float("inf")):
        tensors = load_file(copy / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        assert "model.layers.1.mlp.up_proj.weight" in refused(copy)


def test_weights_of_another_model(refused, copy):
    tensors = load_file(copy / "model.safetensors")
    lacking = {key: value for key, value in tensors.items() if "layers.2.mlp.down_proj" not in key}
    save_file(lacking, copy / "model.safetensors", {"format": "pt"})
    assert "lacks tensor model.layers.2.mlp.down_proj.weight" in refused(copy)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight is [7] on disk" in refused(copy)
    tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int32)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert "bring the unquantized model" in refused(copy)


def test_unknown_recipe_offers_the_nearest(refused, models, tmp_path):
    assert "did you mean svd-llm?" in refused(models("llama"), "--recipe", "svdllm")
    (tmp_path / "mine.yaml").write_text("name: mine\ndecomposition: svd\nmode: one-shot\ndampning: 1.0\n")
    assert "did you mean damping?" in refused(models("llama"), "--recipe", str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("name: mine\ndecomposition: svd\nmode: one-shot\ndamping: lots\n")
    assert "damping must be float" in refused(models("llama"), "--recipe", str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text(": : :")
    assert "mine.yaml" in refused(models("llama"), "--recipe", str(tmp_path / "mine.yaml"))
    assert "no such recipe file" in refused(models("llama"), "--recipe", "gone.yaml")


def test_unreachable_ratio_names_the_smallest(refused, models, text, tmp_path):
    line = refused(models("llama"), "--target-ratio", "0.05")
    smallest = line.rpartition(" ")[2]
    assert "the smallest is" in line
    arguments = ["--model", str(models("llama")), "--recipe", "svd", "--evaluate", "none", "--target-ratio", smallest]
    assert run_pipeline.main([*arguments, "--output", str(tmp_path / "small"), "--dry-run"]) == 0
    for ratio in ("0", "1", "1.5", "-1"):
        assert "must be above 0 and below 1" in refused(models("llama"), "--target-ratio", ratio)


def test_too_little_or_unreadable_text(refused, models, tmp_path):
    short = zoo.write_text(tmp_path / "short.txt", 300)
    assert "gives 300 tokens, 1,024 are asked for" in refused(models("llama"), "--calibration", str(short))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 900)
    assert "is not UTF-8" in refused(models("llama"), "--calibration", str(tmp_path / "latin.txt"))
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert "no field 'text'" in refused(models("llama"), "--calibration", str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("nonsense\n")
    assert "line 1" in refused(models("llama"), "--calibration", str(tmp_path / "a.jsonl"))
    (tmp_path / "a.parquet").write_text("nonsense\n")
    assert "parquet" in refused(models("llama"), "--calibration", str(tmp_path / "a.parquet"))
    assert "no dataset could be loaded" in refused(models("llama"), "--calibration", "nowhere/nothing.txt")
    assert "less than one window" in refused(models("llama"), "--calibration-tokens", "10")
    assert "128 positions" in refused(models("llama"), "--sequence-length", "256")


def test_no_room_on_disk(refused, models, monkeypatch):
    monkeypatch.setattr(plan_module, "free_bytes", lambda path: 1000)
    assert "no room on disk" in refused(models("llama"))


def test_the_disk_fills_up_later(refused, models, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "record")

    monkeypatch.setattr(workdir, "write_tensors", full)
    assert "the disk is full" in refused(models("llama"))


def test_output_that_is_not_ours_or_the_source(refused, models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    for more in ((), ("--fresh",)):
        assert "is not an output of layerpress" in refused(models("llama"), *more)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "dear"
    assert "is the source itself" in refused(models("llama"), "--output", str(models("llama")))
    assert "is not a layerpress work directory" in refused(
        models("llama"), "--output", str(tmp_path / "new"), "--work-dir", str(models("llama")), "--fresh"
    )


def test_a_second_run_on_the_same_work_directory(refused, models, tmp_path):
    holder = workdir.WorkDirectory(tmp_path / "out.work", {}, fresh=False)
    assert "another layerpress run" in refused(models("llama"))
    holder.close()


def test_unsupported_and_misunderstood_models(refused, tmp_path):
    config = transformers.T5Config(d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=99)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert "unsupported model class T5Config" in refused(tmp_path / "t5")
    config = transformers.JambaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=99,
        attn_layer_period=2,
        attn_layer_offset=1,
    )
    transformers.JambaForCausalLM(config).save_pretrained(tmp_path / "jamba")
    assert "structure of JambaForCausalLM not understood" in refused(tmp_path / "jamba")


def test_a_checkpoint_without_its_tokenizer(refused, copy):
    (copy / "tokenizer.json").unlink()
    assert "tokenizer" in refused(copy)


def test_our_own_output_and_quantized_models_are_no_source(refused, models, text, copy, tmp_path):
    arguments = ["--model", str(models("llama")), "--recipe", "svd", "--target-ratio", "0.8", "--evaluate", "none"]
    assert run_pipeline.main([*arguments, "--output", str(tmp_path / "ours")]) == 0
    assert "was written by layerpress" in refused(tmp_path / "ours")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "already quantized" in refused(copy)


def test_remote_code_in_the_source_is_not_run(refused, copy, tmp_path):
    ran = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((copy / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (copy / "config.json").write_text(json.dumps(config))
    assert "--trust-remote-code" in refused(copy) and not ran.exists()


def test_usage_errors_and_the_command_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, str(ROOT / "run_pipeline.py")]
    for arguments in (["--model", str(tmp_path / "gone"), "--target-ratio", "0.5"], ["--target-ratio", "much"], []):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    done = subprocess.run([*command, "--list-recipes"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "llm-rom" in done.stdout and "arxiv.org" in done.stdout


def test_whoever_reads_may_stop_reading():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, str(ROOT / "run_pipeline.py"), "--list-recipes"]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
