"""A mixture's experts: moments of the tokens that the router sends them, and whose moments those with few tokens get."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_gradients import difference, streamed
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerpress
from calibration.experts import kind_of, lent
from calibration.labels import NO_LABEL, next_tokens
from calibration.moments import Moments
from calibration.structure import Linear, discover
from checkpoint.errors import UserError
from checkpoint.modeling_template import separate_experts
from checkpoint.source import Source

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


def linear(local: str, d_out: int = 4, d_in: int = 6) -> Linear:
    return Linear(f"layer.{local}", local, 0, d_out, d_in, False, False, torch.float32, "down")


def moments_of(x: torch.Tensor, g: torch.Tensor, text: int) -> Moments:
    n = max(len(x), 1)
    samples = {"input_samples": x, "gradient_samples": g * (len(x) / text) ** 0.5} if len(x) else {}
    return Moments(
        len(x),
        float(x.square().sum()) / n / x.shape[1],
        input=x.T @ x / n,
        gradient_tokens=text,
        gradient_power=float(g.square().sum()) / text / g.shape[1],
        gradient=g.T @ g / text,
        **samples,
    )


def test_experts_with_few_tokens_are_lent_the_layers_moments():
    generator = torch.Generator().manual_seed(0)
    counts, text = [30, 2, 10, 0], 42
    x = [torch.randn(count, 6, generator=generator) for count in counts]
    g = [torch.randn(count, 4, generator=generator) for count in counts]
    linears = [linear(f"moe.{number}.down_proj") for number in range(4)]
    own = {item.local: moments_of(a, b, text) for item, a, b in zip(linears, x, g, strict=True)}
    found = lent(dict(own), linears, ("moe",))
    assert [found[item.local].borrowed for item in linears] == [False, True, False, True]
    assert found["moe.0.down_proj"] is own["moe.0.down_proj"]
    every_x, every_g = torch.cat(x), torch.cat(g)
    for local in ("moe.1.down_proj", "moe.3.down_proj"):
        item = found[local]
        assert item.tokens == 4, "as many as the smaller side has dimensions"
        assert torch.allclose(item.input, every_x.T @ every_x / text, atol=1e-6)
        assert torch.allclose(item.gradient, every_g.T @ every_g / text * 4 / text, atol=1e-6)
        assert item.gradient_power == pytest.approx(float(item.gradient.diagonal().mean()))
        scale = item.gradient_samples.square().sum(1).mean() / (g[0].square().sum(1).mean())
        assert float(scale) == pytest.approx(4 / text)


def test_an_expert_that_is_collected_alone_is_not_thrown_away():
    alone = [linear("moe.0.down_proj")]
    nothing = lent({"moe.0.down_proj": moments_of(torch.zeros(0, 6), torch.zeros(0, 4), 9)}, alone, ("moe",))
    assert torch.equal(nothing["moe.0.down_proj"].input, torch.eye(6))
    one = lent({"moe.0.down_proj": moments_of(torch.ones(1, 6), torch.zeros(1, 4), 9)}, alone, ("moe",))
    assert float(torch.linalg.eigvalsh(one["moe.0.down_proj"].input).min()) > 0.5


def test_only_experts_are_lent_to():
    assert kind_of("mlp.experts.12.gate_up_proj", ("mlp.experts",)) == "mlp.experts.gate_up_proj"
    assert kind_of("mlp.shared_experts.down_proj", ("mlp.experts",)) is None
    few = {"down_proj": moments_of(torch.ones(1, 6), torch.ones(1, 4), 9)}
    assert lent(dict(few), [linear("down_proj")], ("moe",)) == few


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
    with pytest.raises(ValueError, match="which this model has not"):
        separate_experts(torch.nn.Module(), ["anywhere"])
