"""The module ``layerpress``: the command's run, from Python."""

from __future__ import annotations

import pytest
import torch
import zoo

import layerpress
import run_pipeline

SETTINGS = {"calibration_tokens": 1024, "sequence_length": 64, "evaluate": "none", "ratio_scope": "decoder"}
FLAGS = ["--calibration-tokens", "1024", "--sequence-length", "64", "--evaluate", "none", "--ratio-scope", "decoder"]


def test_a_call_writes_what_the_command_writes(models, text, tmp_path):
    result = layerpress.compress(
        models("llama"), 0.7, "svd-llm", output=tmp_path / "call", calibration=str(text), **SETTINGS
    )
    given = [
        "--model",
        str(models("llama")),
        "--target-ratio",
        "0.7",
        "--recipe",
        "svd-llm",
        "--calibration",
        str(text),
    ]
    assert run_pipeline.main([*given, *FLAGS, "--output", str(tmp_path / "command")]) == 0
    assert zoo.content(result.output) == zoo.content(tmp_path / "command")
    assert abs(result.sizes.achieved_ratio - 0.7) <= 0.005
    assert (result.predicted_loss, result.evaluation) == (None, None)
    model = result.load(dtype=torch.float32)
    assert model(torch.arange(5, 15)[None]).logits.shape == (1, 10, zoo.VOCABULARY)


def test_one_work_directory_serves_several_ratios_and_a_finished_call_returns_at_once(models, text, tmp_path, capsys):
    def call(ratio: float) -> layerpress.Result:
        return layerpress.compress(
            models("llama"),
            ratio,
            "loss-aware",
            output=tmp_path / f"at-{ratio}",
            work_dir=tmp_path / "work",
            calibration=str(text),
            **SETTINGS,
        )

    first, again, other = call(0.8), call(0.8), call(0.6)
    assert "already done" in capsys.readouterr().err
    assert first.report == again.report
    assert other.predicted_loss > first.predicted_loss > 0


def test_a_plan_says_what_compress_would_do(models):
    found = layerpress.plan(models("llama"), 0.7, "svd", ratio_scope="decoder")
    assert abs(found.sizes.achieved_ratio - 0.7) <= 0.005 and found.estimate.memory_bytes > 0
    assert layerpress.load_recipe("svd").override({"ratio_scope": "decoder"}) == found.recipe


def test_what_the_caller_can_mend_is_a_user_error(models, tmp_path):
    for settings, reason in (({"evaluates": "none"}, "no field 'evaluates'"), ({"form": "square"}, "form")):
        with pytest.raises(layerpress.UserError, match=reason):
            layerpress.compress(models("llama"), 0.7, "svd", output=tmp_path / "out", **settings)
    with pytest.raises(layerpress.UserError, match="not known"):
        layerpress.plan(models("llama"), 0.7, "svdllm")
