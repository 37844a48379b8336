"""Models and texts at the edge of what numbers can hold: whatever the recipe, the result is finite or the run says why."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_pipeline import flags

import run_pipeline
from compress import pipeline

FIRST = "model.layers.0."
Weights = dict[str, torch.Tensor]


def dead_channels(weights: Weights) -> None:
    weights[FIRST + "input_layernorm.weight"][:5] = 0
    weights[FIRST + "mlp.gate_proj.weight"][:7] = 0


def layer_of_zeros(weights: Weights) -> None:
    for name, weight in weights.items():
        if name.startswith(FIRST) and weight.dim() == 2:
            weight.zero_()


def outlier_channels(weights: Weights) -> None:
    weights[FIRST + "input_layernorm.weight"][3] *= 1e4
    weights[FIRST + "mlp.up_proj.weight"][4] *= 1e4


def subnormal_weights(weights: Weights) -> None:
    for name in weights:
        if name.startswith(FIRST + "mlp"):
            weights[name] *= 1e-39


def no_gradient(weights: Weights) -> None:
    weights["model.embed_tokens.weight"].zero_()  # tied: the logits are zero, and every gradient


def nothing(weights: Weights) -> None:
    """The text is what is odd."""


RECIPES = ("asvd", "svd-llm", "llm-rom", "loss-aware", "fwsvd", "lorap", "gptq", "quantized", "auto")
DAMAGED: list[tuple[Callable[[Weights], None], torch.dtype, str]] = [
    (dead_channels, torch.float32, "text"),
    (layer_of_zeros, torch.float32, "text"),
    (outlier_channels, torch.bfloat16, "text"),
    (subnormal_weights, torch.bfloat16, "text"),
    (no_gradient, torch.float32, "text"),
    (nothing, torch.float32, "constant"),
    (nothing, torch.float32, "fewer tokens than dimensions"),
]


@pytest.mark.parametrize(("damage", "dtype", "kind"), DAMAGED, ids=lambda item: getattr(item, "__name__", None))
def test_results_are_finite_or_the_run_says_why(tmp_path, capsys, monkeypatch, damage, dtype, kind):
    monkeypatch.setattr(pipeline, "check_written", lambda *_: 0)  # a process each; what it would load is looked at here
    source = zoo.write_model(tmp_path / "model", "llama", dtype, num_hidden_layers=2)
    weights = load_file(source / "model.safetensors")
    damage(weights)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text.txt"
    if kind == "constant":
        text.write_text("a" * 4000)
    else:
        zoo.write_text(text, 4000)
    few = ["--calibration-tokens", "32", "--sequence-length", "16"] if kind.startswith("fewer") else []
    written = 0
    for recipe in RECIPES:
        output = tmp_path / recipe
        more = ["--group-size", "16"] if recipe in ("gptq", "quantized", "auto") else []
        code = run_pipeline.main(flags(source, text, output, "--recipe", recipe, *more, *few))
        told = capsys.readouterr().err
        if code:  # a pool that has nothing to gain leaves bytes, and the run says how many
            assert code == 2 and "cannot be met to 0.005" in told.splitlines()[-1], (recipe, told)
            continue
        written += 1
        for path in output.glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), (recipe, name)
        predicted = [line for line in told.splitlines() if line.startswith("predicted loss")]
        assert all(math.isfinite(float(line.split()[-4])) for line in predicted), (recipe, predicted)
    assert written >= 5
