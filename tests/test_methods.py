"""The published methods against brute force, and every recipe on every architecture."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch
import zoo
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerpress
import run_pipeline
from calibration.moments import Cross, GroupCollector, Moments
from calibration.structure import discover
from calibration.windows import make_windows
from checkpoint.forms import stored_module
from checkpoint.source import Source
from checkpoint.workdir import WorkDirectory
from compress import driver, output
from compress.allocations.sensitivity import RATIOS, at_ratio
from compress.methods import METHODS
from compress.methods.channels import channel_scores, kept_channels
from compress.plan import make_plan
from compress.recipe import load_recipe, recipe_names
from compress.records import DENSE_STAGE, part_of
from compress.refit import refit
from compress.sizes import curve_of

SHAPES = [(12, 20), (20, 12), (16, 16), (6, 20)]  # the last: the few key/value heads of grouped queries


def correlated(tokens: int, width: int, seed: int, rank: int | None = None) -> torch.Tensor:
    """Inputs with a mean, correlated channels and some outliers, of a given rank."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, rank or width, generator=generator, dtype=torch.float64)
    mixed = base @ torch.randn(rank or width, width, generator=generator, dtype=torch.float64)
    return mixed * torch.logspace(0, -2, width, dtype=torch.float64) + torch.randn(width, generator=generator)


def moments_of(x: torch.Tensor, weight: torch.Tensor) -> Moments:
    y = x @ weight.T
    return Moments(
        tokens=len(x),
        input_power=float(x.square().mean()),
        input=(x.T @ x / len(x)).float(),
        output=(y.T @ y / len(x)).float(),
        mean=x.mean(0).float(),
        mean_square=x.square().mean(0).float(),
    )


@pytest.mark.parametrize("tokens", [200, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_afm_is_the_best_low_rank_map_with_a_free_bias(shape, tokens):
    """Against the SVD of the centred outputs, which is the optimum (Eckart and Young) once the bias takes the mean."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = correlated(tokens, shape[1], 2)
    rank = 3
    found = METHODS["afm"].decompose(weight, moments_of(x, weight), rank, 1e-9).at_rank(rank)
    assert found.shift is not None
    y = x @ weight.T
    error = (y - (x @ (found.a @ found.b).T + found.shift)).square().sum()
    best = torch.linalg.svdvals(y - y.mean(0))[rank:].square().sum()
    assert error <= best * (1 + 1e-3) + 1e-6 * float(y.square().sum())
    plain = METHODS["llm-rom"].decompose(weight, moments_of(x, weight), rank, 1e-9).at_rank(rank)
    assert error <= (y - x @ (plain.a @ plain.b).T).square().sum() * (1 + 1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_diagonal_weightings_are_svds_of_the_scaled_weight(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = correlated(50, shape[1], 4)
    fisher = torch.rand(shape[0], generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
    moments = replace(moments_of(x, weight), row_fisher=fisher)
    rows, columns = torch.ones(shape[0], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
    for name, left, right in (("awsvd", rows, x.square().mean(0).sqrt()), ("fwsvd", fisher.sqrt(), columns)):
        u, s, v = torch.linalg.svd(left[:, None] * weight * right, full_matrices=False)
        expected = (u[:, :4] * s[:4] @ v[:4]) / left[:, None] / right
        found = METHODS[name].decompose(weight, moments, 4, 1e-12)
        assert torch.allclose(found.a @ found.b, expected, atol=1e-5)
        assert torch.allclose(found.loss, torch.stack([s[r:].square().sum() for r in range(5)]), rtol=1e-5)


def test_row_fisher_is_the_fisher_of_every_weight_summed_over_its_row():
    generator = torch.Generator().manual_seed(6)
    linear = torch.nn.Linear(7, 5, bias=False)
    collector = GroupCollector({"a": (5, 7)}, ["a"], frozenset({"row_fisher"}))
    collector.hooks({"a": linear})
    x = torch.randn(2, 11, 7, generator=generator, requires_grad=True)
    g = torch.randn(2, 11, 5, generator=generator)
    torch.autograd.grad(linear(x), x, g)
    per_weight = torch.einsum("bti,btj->btij", g, x.detach()).square().mean((0, 1))
    assert torch.allclose(collector.moments(22)["a"].row_fisher, per_weight.sum(1), rtol=1e-5)


@pytest.mark.parametrize("rank_of_inputs", [None, 3])
def test_a_refit_is_least_squares(rank_of_inputs):
    x, target = correlated(100, 12, 7, rank_of_inputs), correlated(100, 8, 8)
    b = torch.randn(5, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    a = torch.randn(8, 5, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    z = x @ b.T
    cross = Cross(target.T @ z / len(x), z.T @ z / len(x))
    found = refit(a, cross, 1e-10)
    best = torch.linalg.lstsq(z, target, driver="gelsd").solution.T
    error, least = ((target - z @ one.T).square().sum() for one in (found, best))
    assert error <= least * (1 + 1e-6)
    assert torch.allclose(refit(a, cross, 1e9), a, rtol=1e-6), "a heavy ridge keeps the factor"
    assert torch.equal(refit(a, Cross(torch.zeros(8, 5), torch.zeros(5, 5)), 1e-3), a), "no inputs: kept"


# all are packed menus with other numbers in them: where quantized runs on an architecture, so do they
PACKED = ("rtn", "gptq", "lqer", "l2qer", "eora")
UNLIKE = ("llama", "gpt2", "phi3", "falcon")  # separate linears, transposed ones, fused ones, and no gate


@pytest.mark.parametrize(
    ("name", "recipe_name"),
    [(name, recipe) for recipe in recipe_names() for name in (UNLIKE if recipe in PACKED else zoo.CONTRACT)],
)
def test_every_recipe_on_every_architecture(models, text, tmp_path, name, recipe_name):
    """Collected, cut, and run: finite logits, of a model that is closer to the dense one the more is kept."""
    source = Source(models(name), torch.float32)
    structure = discover(source)
    recipe = load_recipe(recipe_name).override(
        {"ratio_scope": "decoder", "calibration_tokens": 512, "sequence_length": 32}
    )
    ratio = 0.7
    if recipe.quantizer != "none":  # groups that divide these narrow linears, and a ratio where bits are scarce
        ratio, recipe = 0.25, recipe.override({"group_size": "16", "correction_rank": "0-6"})
    if recipe.decomposition == "none":
        ratio = 0.667  # two layers of three
    if recipe.feed_forward == "prune" and name == "falcon":
        recipe = recipe.override(
            {"ratio_scope": "model"}
        )  # its fused qkv and wide network meet the decoder's 0.7 coarsely
    plan = make_plan(source, structure, recipe, ratio, "")
    windows = make_windows(AutoTokenizer.from_pretrained(models(name)), [str(text)], 512, 32, 0, zoo.VOCABULARY)
    work = WorkDirectory(tmp_path / "work", {}, fresh=False)
    plan, collected, _ = driver.collect(plan, windows if recipe.needs else None, work)
    assert abs(plan.sizes.achieved_ratio - ratio) <= 0.005
    logits = output.expected_logits(plan, work, windows.ids[:1])
    assert torch.isfinite(logits).all()
    rows = output.matrix_rows(plan, work, collected)
    assert len(rows) == len(plan.units)
    assert max(row["relative_error"] or 0 for row in rows) <= 1, rows
    work.close()


@pytest.mark.parametrize(("name", "export"), [("qwen2", "factored"), ("llama", "factored"), ("gpt2", "dense")])
def test_a_changed_bias_is_stored(models, text, tmp_path, name, export):
    """LORD's bias lands in the checkpoint: in the factored format everywhere, else where the architecture has one."""
    out = tmp_path / "out"
    arguments = ["--model", str(models(name)), "--recipe", "lord", "--target-ratio", "0.7", "--ratio-scope", "decoder"]
    arguments += ["--calibration", str(text), "--calibration-tokens", "1024", "--sequence-length", "64"]
    assert run_pipeline.main([*arguments, "--export", export, "--evaluate", "none", "--output", str(out)]) == 0
    stored = load_file(out / "model.safetensors")
    if export == "factored":
        biased = [key for key in stored if key.endswith("factor_out.bias")]
        assert len(biased) == len(json.loads((out / "config.json").read_text())["layerpress"]["linears"])
        assert all(bool(stored[key].any()) for key in biased)
    else:
        before = load_file(models(name) / "model.safetensors")
        assert any(not torch.equal(before[key], stored[key]) for key in before if key.endswith(".bias"))


def test_a_walk_with_an_allocation_that_reads_losses_sweeps_the_dense_model_first(models, text, tmp_path):
    arguments = [
        "--model",
        str(models("llama")),
        "--recipe",
        "llm-rom",
        "--target-ratio",
        "0.7",
        "--ratio-scope",
        "decoder",
    ]
    arguments += ["--calibration", str(text), "--calibration-tokens", "1024", "--sequence-length", "64"]
    arguments += [
        "--allocation",
        "pooled",
        "--refit",
        "anchored",
        "--evaluate",
        "none",
        "--output",
        str(tmp_path / "out"),
    ]
    assert run_pipeline.main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [stage["stage"] for stage in report["stages"]][:4] == [
        "tokenising",
        "verifying weights",
        "decomposing",
        "walking",
    ]
    ranks = {row.split(",")[5] for row in (tmp_path / "out" / "matrices.csv").read_text().splitlines()[1:]}
    assert len(ranks) > 3, "ranks are pooled, not uniform"


@pytest.mark.parametrize("refit", ["update", "anchored"])
def test_a_refit_sees_all_windows_where_few_go_backward(models, text, tmp_path, refit):
    chosen = layerpress.load_recipe("loss-aware").override({"gradient_tokens": 64, "form": "factors", "refit": refit})
    settings = {"calibration": str(text), "calibration_tokens": 1024, "sequence_length": 64, "evaluate": "none"}
    result = layerpress.compress(
        models("llama"), 0.7, chosen, output=tmp_path / "out", ratio_scope="decoder", **settings
    )
    assert [stage["stage"] for stage in result.report["stages"]][2:6] == [
        "forward",
        "loss gradient",
        "backward",
        "walking",
    ]


def test_channel_pruning_keeps_the_best_and_the_least_one_percent():
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0] * 40) + torch.arange(200) * 1e-3
    kept = kept_channels(scores, 150, 0.01)
    order = scores.argsort()
    assert kept.tolist() == sorted([*order[:2].tolist(), *order[52:].tolist()])
    gate, up, down = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((9, 4), (9, 4), (4, 9))
    )
    x, h = torch.rand(4) + 0.1, torch.rand(9) + 0.1
    by_hand = [
        sum(float((w[i].abs() * x.sqrt()).norm()) for w in (gate, up)) + float((down[:, i].abs() * h[i].sqrt()).norm())
        for i in range(9)
    ]
    assert torch.allclose(channel_scores([gate, up], down, x, h), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "gpt_neox"])
def test_pruned_widths_export_to_the_stock_architecture(models, text, tmp_path, name):
    """lorap under --export dense: no remote code, a smaller feed-forward width, and all weights used."""
    arguments = [
        "--model",
        str(models(name)),
        "--recipe",
        "lorap-repair",
        "--target-ratio",
        "0.7",
        "--calibration",
        str(text),
    ]
    arguments += ["--ratio-scope", "decoder", "--calibration-tokens", "1024", "--sequence-length", "64"]
    assert (
        run_pipeline.main([*arguments, "--export", "dense", "--evaluate", "none", "--output", str(tmp_path / "out")])
        == 0
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = AutoModelForCausalLM.from_pretrained(models(name))
    assert model.config.model_type == before.config.model_type and model.num_parameters() < before.num_parameters()


def test_least_squares_repair_brings_the_logits_closer(models, text, tmp_path):
    errors = []
    for recipe in ("lorap", "lorap-repair"):
        arguments = [
            "--model",
            str(models("llama")),
            "--recipe",
            recipe,
            "--target-ratio",
            "0.6",
            "--calibration",
            str(text),
        ]
        arguments += ["--ratio-scope", "decoder", "--calibration-tokens", "2048", "--sequence-length", "64"]
        assert run_pipeline.main([*arguments, "--evaluate", "none", "--output", str(tmp_path / recipe)]) == 0
        ids = torch.tensor([AutoTokenizer.from_pretrained(models("llama"))(text.read_text()[:2048])["input_ids"]]).view(
            -1, 64
        )
        compressed = AutoModelForCausalLM.from_pretrained(tmp_path / recipe, trust_remote_code=True)
        dense = AutoModelForCausalLM.from_pretrained(models("llama"))
        with torch.no_grad():
            errors.append(float((compressed(ids).logits - dense(ids).logits).norm()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_removed_blocks_are_those_that_turn_the_states_least(models, text, tmp_path, name):
    """Against the whole model's hidden states; what is written is the stock architecture without that layer."""
    out = tmp_path / "out"
    arguments = [
        "--model",
        str(models(name)),
        "--recipe",
        "block-removal",
        "--target-ratio",
        "0.667",
        "--calibration",
        str(text),
    ]
    arguments += ["--ratio-scope", "decoder", "--calibration-tokens", "1024", "--sequence-length", "64"]
    assert run_pipeline.main([*arguments, "--evaluate", "none", "--output", str(out)]) == 0
    windows = make_windows(AutoTokenizer.from_pretrained(models(name)), [str(text)], 1024, 64, 0, zoo.VOCABULARY)
    dense = AutoModelForCausalLM.from_pretrained(models(name)).eval()
    layers = next(m for m in dense.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    turned: list[float] = []

    def see(_, args, kwargs, y):
        x, y = args[0] if args else kwargs["hidden_states"], y[0] if isinstance(y, tuple) else y
        turned.append(float(1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()))

    for layer in layers:
        layer.register_forward_hook(see, with_kwargs=True)
    with torch.no_grad():
        dense(windows.ids)
    rows = [row.split(",") for row in (out / "matrices.csv").read_text().splitlines()[1:]]
    assert {int(row[0]) for row in rows if row[4] == "removed"} == {turned.index(min(turned))}
    small, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert small.config.num_hidden_layers == 2
    del layers[turned.index(min(turned))]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    ids = windows.ids[:1, :16]
    with torch.no_grad():
        dense.config.num_hidden_layers = 2
        assert torch.allclose(small.eval()(ids, use_cache=False).logits, dense(ids, use_cache=False).logits, atol=1e-4)


def test_the_search_measures_the_model_with_one_linear_compressed(models, text, tmp_path):
    """Against the whole model with that linear replaced; then one threshold on the losses picks every ratio."""
    source = Source(models("llama"), torch.float32)
    recipe = load_recipe("asvd-search").override({"ratio_scope": "decoder", "sequence_length": 32, "search_tokens": 96})
    plan = make_plan(source, discover(source), recipe, 0.7, "")
    windows = make_windows(AutoTokenizer.from_pretrained(models("llama")), [str(text)], 256, 32, 0, zoo.VOCABULARY)
    work = WorkDirectory(tmp_path / "work", {}, fresh=False)
    plan, collected, _ = driver.collect(plan, windows, work)
    linear = plan.structure.linears[8]
    whole = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32).eval()
    for ratio, loss in list(zip(RATIOS, collected.sensitivity[linear.name], strict=True))[::2]:
        rank = at_ratio(curve_of(recipe.storage, linear), ratio)
        part = part_of(work.get(DENSE_STAGE, linear.layer), linear, recipe.storage.spec(linear, rank))
        before = whole.get_submodule(linear.name)
        whole.set_submodule(linear.name, stored_module(part, None, torch.float32))
        with torch.no_grad():
            expected = whole(windows.ids[:3], labels=windows.ids[:3]).loss
        whole.set_submodule(linear.name, before)
        assert abs(loss - float(expected)) < 1e-4
    curves = [curve_of(recipe.storage, item, collected) for item in plan.structure.linears]
    odd = 0
    for threshold in sorted({loss for curve in curves for loss in curve.sensitivity}):
        picked = []
        for curve in curves:
            fitting = [r for r, loss in zip(RATIOS, curve.sensitivity, strict=True) if loss <= threshold]
            picked.append(at_ratio(curve, fitting[0]) if fitting else None)
        size = sum(curve.nbytes(rank) for curve, rank in zip(curves, picked, strict=True))
        if size <= plan.sizes.achieved_ratio * sum(curve.dense for curve in curves):
            odd = sum(
                plan.choices[item.name] != rank for item, rank in zip(plan.structure.linears, picked, strict=True)
            )
            break
    assert odd <= 1, "one threshold explains all ranks but that of the linear that got the remainder"
    work.close()


def test_welore_tells_its_components(models, text, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "--model",
        str(models("llama")),
        "--recipe",
        "welore",
        "--target-ratio",
        "0.8",
        "--ratio-scope",
        "decoder",
    ]
    assert run_pipeline.main([*arguments, "--evaluate", "none", "--output", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert (out / "spectra.png").stat().st_size > 5000
    rows = list(csv.DictReader((out / "matrices.csv").open(encoding="utf-8")))
    full = {row["matrix"]: min(int(row["d_out"]), int(row["d_in"])) for row in rows}
    kept = sum(full[row["matrix"]] if row["form"] == "dense" else int(row["rank"]) for row in rows)
    whole = sum(full[row["matrix"]] for row in rows)
    assert abs(report["sizes"]["effective_rank_reduction"] - (1 - kept / whole)) < 1e-9
    assert all(int(row["parameters"]) <= int(row["d_out"]) * int(row["d_in"]) for row in rows), "no matrix is enlarged"
    assert "data-free" in (out / "README.md").read_text()
