"""A mixture's experts: moments of the tokens that the router sends them, and whose moments those with few tokens get."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_gradients import difference, streamed
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerpress
from calibration.experts import lent
from calibration.labels import NO_LABEL, next_tokens
from calibration.moments import Moments
from calibration.structure import Linear, discover
from checkpoint.device import CPU
from checkpoint.errors import UserError
from checkpoint.modeling_template import separate_experts
from checkpoint.source import Source
from compress import pipeline
from compress.footprint import in_passes

MIXTURE = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_experts_moments_are_of_its_own_tokens_and_its_loss_of_all(models, tmp_path, name):
    """Against the stock model with its stacked weights: what the router sent, and the gradient that came back."""
    structure, moments, ids = streamed(models(name), tmp_path, "empirical")
    model = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32).eval()
    seen = {}

    def keep(_, args, output):
        output.retain_grad()
        seen.update(x=args[0].detach(), index=args[1], weight=args[2].detach(), output=output)

    model.get_submodule(MIXTURE).register_forward_hook(keep)
    logits = model(ids, use_cache=False).logits
    labels = torch.stack([next_tokens(row) for row in ids])
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=NO_LABEL
    ).backward()
    compared = 0
    for expert in range(4):
        tokens, places = torch.where(seen["index"] == expert)
        x = seen["x"][tokens]
        g = seen["output"].grad[tokens] * seen["weight"][tokens, places, None]
        inner, outer = (moments[f"{MIXTURE}.{expert}.{which}_proj"] for which in ("gate_up", "down"))
        if inner.borrowed:
            continue
        compared += 1
        assert inner.tokens == outer.tokens == len(tokens)
        assert difference(inner.input, x.T @ x / len(x)) < 1e-5
        assert difference(outer.gradient, g.T @ g / ids.numel()) < 1e-5, "per token of the text"
        samples = outer.gradient_samples
        assert len(samples) == len(tokens)
        assert difference(samples.T @ samples / len(samples), outer.gradient) < 1e-5
    assert compared >= 2
    names = [linear.name for linear in structure.linears]
    assert not any("router" in name or name.endswith("mlp.gate") for name in names)


def linear(local: str, mixture: str = "moe.down_proj", d_out: int = 4, d_in: int = 6) -> Linear:
    return Linear(f"layer.{local}", local, 0, d_out, d_in, False, False, torch.float32, "down", mixture)


def moments_of(x: torch.Tensor, g: torch.Tensor, text: int) -> Moments:
    """Of ``x`` that came, of which the first, with the gradients ``g``, went backward."""
    n = max(len(x), 1)
    samples = {"input_samples": x[: len(g)], "gradient_samples": g * (len(g) / text) ** 0.5} if len(g) else {}
    return Moments(
        len(x),
        float(x.square().sum()) / n / x.shape[1],
        input=x.T @ x / n,
        gradient_tokens=text,
        gradient_seen=len(g),
        gradient_power=float(g.square().sum()) / max(text, 1) / g.shape[1],
        gradient=g.T @ g / max(text, 1),
        **samples,
    )


@pytest.mark.parametrize("backward", [[30, 2, 10, 0], [15, 2, 1, 0]], ids=["all went backward", "some did"])
def test_experts_with_few_tokens_are_lent_the_layers_moments(backward):
    generator = torch.Generator().manual_seed(0)
    counts = [30, 2, 10, 0]
    came, text = sum(counts), sum(backward)
    x = [torch.randn(count, 6, generator=generator) for count in counts]
    g = [torch.randn(count, 4, generator=generator) for count in backward]
    linears = [linear(f"moe.{number}.down_proj") for number in range(4)]
    own = {item.local: moments_of(a, b, text) for item, a, b in zip(linears, x, g, strict=True)}
    found = lent(dict(own), linears, CPU)
    assert [found[item.local].borrowed for item in linears] == [False, True, backward[2] < 4, True]
    assert found["moe.0.down_proj"] is own["moe.0.down_proj"]
    every_x, every_g = torch.cat(x), torch.cat(g)
    item = found["moe.3.down_proj"]
    assert found["moe.1.down_proj"] is item
    assert item.tokens == item.gradient_seen == 4, "as many as the smaller side has dimensions"
    assert torch.allclose(item.input, every_x.T @ every_x / came, atol=1e-6)
    assert torch.allclose(item.gradient, every_g.T @ every_g / text * 4 / text, atol=1e-6)
    assert item.gradient_power == pytest.approx(float(item.gradient.diagonal().mean()))
    scale = item.gradient_samples.square().sum(1).mean() / (g[0].square().sum(1).mean())
    assert float(scale) == pytest.approx(4 / text)


def test_an_expert_that_is_collected_alone_is_not_thrown_away():
    alone = [linear("moe.0.down_proj")]
    weight = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for rows in (0, 1):
        own = moments_of(torch.ones(rows, 6), torch.zeros(0, 4), 0)
        by_output = replace(own, input=None, output=torch.zeros(4, 4))
        for given in (own, by_output):
            (item,) = lent({"moe.0.down_proj": given}, alone, CPU).values()
            assert item.borrowed and float(torch.linalg.eigvalsh(item.input).min()) > 0.5
            if not rows:
                assert torch.allclose(item.of_output(weight), weight @ weight.T), "as plain SVD would have it"


def test_only_experts_are_lent_to():
    few = {"down_proj": moments_of(torch.ones(1, 6), torch.ones(1, 4), 9)}
    assert lent(dict(few), [linear("down_proj", mixture="")], CPU) == few


def test_experts_of_a_mixture_are_collected_together(models):
    source = Source(models("qwen3_moe"), torch.float32, separate_experts=True)
    structure = discover(source)
    layer = structure.layers[0]
    experts = [item for item in layer.linears if item.mixture]
    assert len(experts) == 12 and {item.mixture for item in experts} == {
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert all(item.share == pytest.approx(2 / 6) for item in experts)
    recipe = layerpress.load_recipe("loss-aware")
    for passes in (1, 2, 3, 99):
        runs = in_passes(layer, recipe, passes)
        assert [item for run in runs for item in run] == layer.linears
        assert sum(any(item.mixture for item in run) for run in runs) == 1


def test_more_passes_change_no_byte(models, text, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "within", lambda source, structure, recipe, limit: (recipe, limit or 1))
    settings = {"calibration": str(text), "calibration_tokens": 1024, "sequence_length": 64, "evaluate": "none"}
    found = [
        layerpress.compress(
            models("deepseek_v3"), 0.7, "loss-aware", output=tmp_path / str(passes), memory_limit=passes, **settings
        )
        for passes in (1, 3)
    ]
    assert zoo.content(found[0].output) == zoo.content(found[1].output)


@pytest.mark.parametrize("recipe", ["auto", "loss-aware"])
def test_few_tokens_that_go_backward_are_enough(models, text, tmp_path, recipe):
    chosen = layerpress.load_recipe(recipe).override({"gradient_tokens": 64})
    settings = {"calibration": str(text), "calibration_tokens": 2048, "sequence_length": 64, "evaluate": "none"}
    result = layerpress.compress(
        models("qwen3_moe"), 0.7, chosen, output=tmp_path / "out", ratio_scope="decoder", **settings
    )
    assert any("too few tokens" in what for what in result.report["mended"])


def test_a_refit_leaves_experts_alone_and_says_so(models, text, tmp_path):
    for refit in ("update", "anchored"):
        settings = {"calibration": str(text), "calibration_tokens": 1024, "sequence_length": 64, "evaluate": "none"}
        result = layerpress.compress(
            models("mixtral"), 0.8, "svd-llm", output=tmp_path / refit, refit=refit, ratio_scope="decoder", **settings
        )
        assert result.report["mended"]["matrices of experts that were not refitted"] == 24


def test_formats_of_a_mixture_do_not_share_a_work_directory(models, text, tmp_path):
    settings = {"calibration": str(text), "calibration_tokens": 1024, "sequence_length": 64, "evaluate": "none"}
    settings |= {"work_dir": tmp_path / "work", "ratio_scope": "decoder"}
    layerpress.compress(models("mixtral"), 0.8, "svd-llm", output=tmp_path / "dense", export="dense", **settings)
    with pytest.raises(UserError, match="experts"):
        layerpress.compress(models("mixtral"), 0.8, "svd-llm", output=tmp_path / "out", **settings)


def test_a_linear_as_wide_as_there_are_experts_is_no_router(tmp_path):
    directory = zoo.write_model(tmp_path / "model", "qwen3_moe", num_experts=24, head_dim=12)
    structure = discover(Source(directory, torch.float32, separate_experts=True))
    kept = {item.local for item in structure.layers[0].linears}
    assert {"self_attn.k_proj", "self_attn.v_proj"} <= kept
    assert [name for name, _ in structure.left_dense] == [
        "model.layers.0.mlp.gate.weight",
        "model.layers.2.mlp.gate.weight",
    ]


def test_layers_of_a_mixture_can_be_removed(models, text, tmp_path):
    settings = {"calibration": str(text), "calibration_tokens": 1024, "sequence_length": 64, "evaluate": "none"}
    result = layerpress.compress(
        models("mixtral"), 0.667, "block-removal", output=tmp_path / "out", ratio_scope="decoder", **settings
    )
    assert result.load().config.num_hidden_layers == 2


def test_an_expert_that_the_router_never_chooses_is_kept_and_reported(models, text, tmp_path):
    source = zoo.write_model(tmp_path / "model", "deepseek_v3")
    weights = load_file(source / "model.safetensors")
    for name, bias in weights.items():
        if name.endswith("e_score_correction_bias"):
            bias[2:] = -1000
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    settings = {"calibration": str(text), "calibration_tokens": 1024, "sequence_length": 64, "evaluate": "none"}
    result = layerpress.compress(source, 0.7, "loss-aware", output=tmp_path / "out", ratio_scope="decoder", **settings)
    (borrowed,) = [count for what, count in result.report["mended"].items() if "too few tokens" in what]
    assert borrowed == 2 * 2 * 2, "two experts of two layers, two matrices each"
    rows = [row for row in csv.DictReader((result.output / "matrices.csv").open()) if ".experts." in row["matrix"]]
    assert len(rows) == 2 * 4 * 2 and all(int(row["bytes"]) > 0 for row in rows)


def test_predicted_loss_of_a_mixture_is_near_the_measured(models, text, tmp_path):
    """To second order, on the calibration text itself, with little taken away: between a third and three times."""
    settings = {"calibration": str(text), "calibration_tokens": 4096, "sequence_length": 64, "evaluate": "none"}
    result = layerpress.compress(
        models("mixtral"), 0.93, "loss-aware", output=tmp_path / "out", ratio_scope="decoder", **settings
    )
    dense = AutoModelForCausalLM.from_pretrained(models("mixtral"), dtype=torch.float32).eval()
    model = result.load(dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(models("mixtral"))(text.read_text()[:4096])["input_ids"])[:4096]
    with torch.no_grad():
        p, q = (each(ids.view(-1, 64)).logits.log_softmax(-1) for each in (dense, model))
    measured = float((p.exp() * (p - q)).sum(-1).mean())
    assert measured / 3 < result.predicted_loss < measured * 3


def test_other_exports_leave_experts_stacked_and_say_so(models, text, tmp_path):
    settings = {"calibration": str(text), "calibration_tokens": 1024, "sequence_length": 64, "evaluate": "none"}
    result = layerpress.compress(
        models("mixtral"), 0.8, "svd-llm", output=tmp_path / "out", ratio_scope="decoder", export="dense", **settings
    )
    assert sum("experts" in item["name"] for item in result.report["left_dense"]) == 6
    assert type(result.load()).__name__ == "MixtralForCausalLM"


def test_a_layer_argument_that_depends_on_the_tokens_is_refused(tmp_path):
    """Small gemma4 models hand every layer an embedding of its own, which zero weights would hide."""
    changes = {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": zoo.VOCABULARY,
        "enable_moe_block": False,
    }
    directory = zoo.write_model(tmp_path / "model", "gemma4", **changes)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(UserError, match="depends on the tokens"):
            discover(Source(directory, dtype))


def test_experts_that_the_model_has_not_are_refused(models, text, tmp_path):
    settings = {"calibration": str(text), "calibration_tokens": 1024, "sequence_length": 64, "evaluate": "none"}
    result = layerpress.compress(
        models("mixtral"), 0.8, "svd-llm", output=tmp_path / "out", ratio_scope="decoder", **settings
    )
    config = json.loads((result.output / "config.json").read_text())
    config["layerpress"]["experts"] = ["layers.0.self_attn"]
    (result.output / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="which this model has not"):
        result.load()
    for paths, reason in ((["anywhere"], "which this model has not"), ("layers", "must list"), ([3], "must list")):
        with pytest.raises(ValueError, match=reason):
            separate_experts(torch.nn.Module(), paths)
