"""The least that a run has to do: its stages, how it grows, its products counted by torch; and the shapes of published models."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from least_work import Work, work
from machine import CHOLESKY, DTYPES, Machine
from roofline import limits, planned
from synthetic import meta_model, shape_config, write_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.replay import Replay, opened
from checkpoint.source import Source
from compress.footprint import footprints
from compress.recipe import load_recipe, recipe_names


class EverySide(dict):
    """The same seconds for a decomposition of any side."""

    def __missing__(self, side: int) -> float:
        return 1e-3


MACHINE = Machine(dict.fromkeys([*DTYPES, CHOLESKY], 1e9), EverySide(), EverySide(), 1e9, 1e8)


def tiny(model, recipe, tokens=64):
    """A plan that the recipe can keep on a model of three layers: two of them, or a good part of 32 bits or of the ranks."""
    own = load_recipe(recipe)
    changes = {"sequence_length": 16, "ratio_scope": "decoder", "calibration_tokens": tokens}
    if own.quantizer != "none":
        changes |= {"group_size": "16", "correction_rank": "0" if own.correction_rank == "0" else "4"}
    ratio = 2 / 3 if own.decomposition == "none" else 0.3 if own.menu == "packed" else 0.7
    return planned(model, recipe, ratio, **changes)


@pytest.mark.parametrize("recipe", recipe_names())
def test_limits_have_the_stages_of_the_run_and_are_positive(models, recipe):
    plan = tiny(models("llama"), recipe)
    found = limits(plan, MACHINE)
    assert set(found) == {item.stage for item in footprints(plan.source, plan.structure, plan.recipe)}
    without = {stage for stage, seconds in found.items() if seconds <= 0}
    assert without == (set() if plan.recipe.needs else {"tokenising"})


@pytest.mark.parametrize("recipe", ["svd-llm", "gptq", "svd-llm-update", "loss-aware", "auto"])
def test_arithmetic_grows_with_tokens_alone(models, recipe):
    """Twice the tokens are twice the work of stages that only run layers; of the others the part that grows with them doubles."""
    one, two, four = (work(tiny(models("llama"), recipe, tokens)) for tokens in (64, 128, 256))
    for stage in set(one) - {"tokenising", "verifying weights", "writing", "checking"}:
        assert one[stage].eigen == two[stage].eigen
        for kind in one[stage].flops:
            counts = [item[stage].flops[kind] for item in (one, two, four)]
            assert counts[2] - counts[1] == pytest.approx(2 * (counts[1] - counts[0])), (stage, kind)
    for stage in {"forward", "loss gradient"} & set(one):
        assert {kind: 2 * count for kind, count in one[stage].flops.items()} == dict(two[stage].flops)


def test_forward_and_backward_are_those_that_torch_counts(models):
    """A layer under autograd, its weights frozen; of attention, which torch does not count on a CPU, the half that is not masked."""
    plan = tiny(models("llama"), "fwsvd")
    source, structure, length = plan.source, plan.structure, plan.recipe.sequence_length
    layer = structure.layers[0]
    heads = next(item.d_in for item in layer.linears if item.role == "attention output")
    with opened(source, layer):
        hidden = torch.randn(4, length, 48, dtype=source.compute_dtype, requires_grad=True)
        with torch.enable_grad(), FlopCounterMode(display=False) as forward:
            output = Replay(source, structure, length).run_layer(0, hidden)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(output, hidden, torch.ones_like(output))
    attention, tokens, stages = 64 * 2 * heads * length, 64, work(plan)
    fisher = tokens * sum(item.d_out for item in layer.linears)
    once, back = forward.get_total_flops(), backward.get_total_flops()
    assert stages["forward"].flops["float32"] == len(structure.layers) * (once + attention)
    assert stages["backward"].flops["float32"] == len(structure.layers) * (once + back + 3 * attention + fisher)


def test_seconds_are_the_longer_of_arithmetic_and_disk():
    side = Work(eigen=Counter({5000: 2}))
    machine = Machine({"float32": 10.0}, {4096: 8.0}, {}, 4.0, 2.0)
    assert side.seconds(machine) == pytest.approx(16 * (5000 / 4096) ** 3)
    assert Work(reads=8.0, writes=8.0).seconds(machine) == 6.0
    assert (Work(reads=8.0) + Work(flops=Counter({"float32": 30}))).seconds(machine) == 3.0


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("llama-2-7b", 6.738e9), ("llama-3-8b", 8.030e9), ("qwen3-14b", 14.768e9), ("llama-3-70b", 70.554e9)],
)
def test_shapes_have_the_published_parameters(tmp_path, shape, parameters):
    shape_config(shape).save_pretrained(tmp_path)
    model = meta_model(AutoConfig.from_pretrained(tmp_path))
    assert sum(item.numel() for item in model.parameters()) == pytest.approx(parameters, rel=1e-4)


def test_a_slice_of_a_shape_is_written_and_loads(tmp_path):
    config = shape_config("qwen3-14b", layers=1, vocabulary=320)
    config.update({"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2})
    assert write_config(tmp_path, config) == Source(tmp_path, torch.bfloat16).nbytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.dtype == torch.bfloat16
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()
