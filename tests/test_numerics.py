"""Models and texts at the edge of what numbers can hold: whatever the recipe, the result is finite or the run says why."""

from __future__ import annotations

import json
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
# groups that divide a width of 48; and of one number of bits for all, the size that 3 or, of float32, 6 take
MORE = {name: ("--group-size", "16") for name in ("quantized", "auto")}
MORE["gptq"] = ("--group-size", "16", "--target-ratio", "0.25")
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
    for recipe in RECIPES:
        output = tmp_path / recipe
        code = run_pipeline.main(flags(source, text, output, "--recipe", recipe, *MORE.get(recipe, ()), *few))
        told = capsys.readouterr().err
        if recipe == "auto" and code == 2:  # a pool of so few matrices may find nothing better that fits
            assert "cannot be met to 0.005" in told.splitlines()[-1], told
            continue
        assert code == 0, (recipe, told)
        for path in output.glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), (recipe, name)
        predicted = [line for line in told.splitlines() if line.startswith("predicted loss")]
        assert all(math.isfinite(float(line.split()[-4])) for line in predicted), (recipe, predicted)


@pytest.mark.parametrize(
    ("damage", "recipe", "expected"),
    [
        (nothing, "svd-llm", "moments damped"),
        (layer_of_zeros, "quantized", "groups of zeros, of scale one"),
        (layer_of_zeros, "loss-aware", "directions of length zero, not balanced"),
        (dead_channels, "gptq", "inputs that the text never excites, counted a little"),
        (no_gradient, "loss-aware", "moments of zero, one put in their diagonal"),
        (nothing, "svd-llm", "eigenvalues below zero, by rounding, taken as zero"),
    ],
)
def test_what_was_mended_is_counted_in_the_report(tmp_path, damage, recipe, expected):
    """And the load check takes a model whose logits are all zero for what it is."""
    source = zoo.write_model(tmp_path / "model", "llama", num_hidden_layers=2)
    weights = load_file(source / "model.safetensors")
    damage(weights)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    text = zoo.write_text(tmp_path / "text.txt", 4000)
    few = [
        "--calibration-tokens",
        "32",
        "--sequence-length",
        "16",
    ]  # fewer than dimensions: some eigenvalues are nothing
    assert (
        run_pipeline.main(flags(source, text, tmp_path / "out", "--recipe", recipe, *MORE.get(recipe, ()), *few)) == 0
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["mended"].get(expected, 0) > 0, report["mended"]
    assert expected in (tmp_path / "out" / "README.md").read_text()
