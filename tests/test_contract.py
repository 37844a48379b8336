"""Every architecture: streamed states are the model's own, full rank gives the model back, and the result loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM

from calibration.replay import OpenLayer, opened, streamed_logits
from calibration.structure import discover
from calibration.sweep import Sweep
from calibration.windows import Windows
from checkpoint.source import Source
from compress import linears, pipeline
from compress.install import install
from compress.parts import LowRank
from compress.plan import make_plan
from compress.recipe import load_recipe

LENGTH = 24


def opened_source(directory: Path):
    source = Source(directory, torch.float32, separate_experts=True)
    return source, discover(source)


def same(found: torch.Tensor, expected: torch.Tensor, source: Source) -> bool:
    """Bit by bit; stacked experts go through another kernel, which sums in another order."""
    if not source.experts:
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def make_windows(count: int = 6) -> Windows:
    generator = torch.Generator().manual_seed(3)
    return Windows(torch.randint(3, zoo.VOCABULARY, (count, LENGTH), generator=generator), {})


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_streamed_hidden_states_are_those_of_the_whole_model(models, name, tmp_path):
    source, structure = opened_source(models(name))
    windows = make_windows()
    whole = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32).eval()
    batches = [windows.ids[:4], windows.ids[4:]]
    expected: list[list[torch.Tensor]] = [[] for _ in structure.layers]
    for index, layer in enumerate(structure.layers):
        whole.get_submodule(layer.path).register_forward_pre_hook(
            lambda _, args, kwargs, index=index: expected[index].append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    with torch.no_grad():
        logits = [whole(batch, use_cache=False).logits for batch in batches]
    sweep = Sweep(source, structure, windows, tmp_path / "hidden", micro_batch=4)
    sweep.embed()
    for layer in structure.layers[:-1]:
        with opened(source, layer) as open_layer:
            sweep.advance(open_layer)
    for index in range(len(structure.layers)):
        stored = torch.frombuffer(bytearray(sweep.path(index).read_bytes()), dtype=torch.float32)
        assert same(stored, torch.cat(expected[index]).flatten(), source), f"input of layer {index}"
    assert same(streamed_logits(source, structure, batches[0], lambda _: None), logits[0], source)
    assert all(parameter.is_meta for parameter in source.model.parameters()), "everything was evicted"


@pytest.mark.parametrize("recipe_name", ["svd-llm", "llm-rom"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_full_rank_reproduces_the_logits(models, name, recipe_name, tmp_path):
    source, structure = opened_source(models(name))
    plan = make_plan(source, structure, load_recipe(recipe_name).override({"ratio_scope": "decoder"}), 0.8, "")
    windows = make_windows()
    needs = frozenset({"second"})
    parts: dict[str, LowRank] = {}
    sweep = Sweep(source, structure, windows, tmp_path / "hidden", micro_batch=4)
    sweep.embed()
    for layer in structure.layers:
        with opened(source, layer) as open_layer:
            moments = sweep.collect(open_layer, layer.linears, needs, advance=True)
            for linear in layer.linears:
                full = min(linear.d_out, linear.d_in)
                factors = linears.decompose(plan, open_layer, linear, moments[linear.local], full)
                parts[linear.name] = LowRank(factors.a.float(), factors.b.float())

    def prepare(open_layer: OpenLayer) -> None:
        for linear in open_layer.layer.linears:
            install(plan, open_layer, linear, parts[linear.name])

    whole = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(windows.ids[:2], use_cache=False).logits
    logits = streamed_logits(source, structure, windows.ids[:2], prepare)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


USE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
found = {}
for directory in sys.argv[2:]:
    load = lambda where: AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True, output_loading_info=True)
    model, info = load(directory)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        logits = model(ids).logits
        generated = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        again_at = Path(sys.argv[1]) / Path(directory).name
        model.save_pretrained(again_at)
        again, again_info = load(again_at)
        same = torch.allclose(again(ids).logits, logits, rtol=1e-5, atol=1e-5)  # expert kernels sum by alignment
    base = AutoModel.from_pretrained(directory, trust_remote_code=True)
    keys = [list(map(str, i[k])) for i in (info, again_info) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    found[directory] = {
        "keys": sum(keys, []), "finite": bool(torch.isfinite(logits).all()), "generated": generated.shape[1],
        "same": same, "type": model.config.model_type, "base": type(base).__name__,
        "forms": sorted({kind.__name__ for m in model.modules() for kind in type(m).__mro__}),
        "tokens": AutoTokenizer.from_pretrained(directory, trust_remote_code=True)("ab")["input_ids"],
    }
print(json.dumps(found))
"""


# corrections everywhere, their factors packed too; in the model's scope embedding and head are packed as well
PACKED = {
    **{"group_size": "8", "zero_point": "stored", "correction_rank": "1-4", "factor_bits": 8},
    **{"ratio_scope": "model"},
}


@pytest.mark.parametrize(
    ("ratio", "recipes", "changes", "modules"),
    [
        (0.8, ("svd-llm", "llm-rom"), {"form": "factors"}, {"FactoredLinear"}),
        pytest.param(
            *(0.8, ("svd-llm", "llm-rom"), {"form": "pivoted"}, {"PivotedLinear"}),
            marks=pytest.mark.checks_in_fresh_processes,
        ),
        (0.4, ("quantized", "quantized"), PACKED, {"PackedLinear", "PackedTable"}),
    ],
    ids=["factors", "pivoted", "packed"],
)
def test_compressed_checkpoints_load_generate_and_save_again(models, text, tmp_path, ratio, recipes, changes, modules):
    """Many architectures in one fresh process, after the run's own check (of the pivoted ones in a process each, as ever)."""
    outputs = []
    # factors are the simpler form: where a pivoted one goes, so do they
    for name in ("llama", "gpt2", "phi3", "mixtral") if modules == {"FactoredLinear"} else zoo.ARCHITECTURES:
        recipe = load_recipe(recipes[name in ("gpt2", "falcon", "mixtral", "gpt_oss")]).override(
            {
                **{"calibration": str(text), "calibration_tokens": 2048, "sequence_length": 64},
                **{"evaluate": "none", "ratio_scope": "decoder"},
                **changes,
            }
        )
        output = tmp_path / name
        kept = max(ratio, 0.62) if name == "llama4" else ratio  # its experts stay dense
        pipeline.run(pipeline.Request(str(models(name)), (kept,), recipe, output, tmp_path / f"{name}.work"))
        outputs.append(output)
        report = json.loads((output / "report.json").read_text())
        assert abs(report["sizes"]["achieved_ratio"] - kept) <= 0.005
        assert bool(report["left_dense"]) == (name in zoo.MIXTURES), "what is left dense is listed"
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path / "again"), *map(str, outputs)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    for output in outputs:
        what = found[str(output)]
        assert what["keys"] == [] and what["finite"] and what["same"] and what["generated"] == 9, what
        assert what["type"].startswith("layerpress_") and what["base"] == "LayerpressModel", what
        assert modules <= set(what["forms"]), what
        assert len(what["tokens"]) == 2


def test_without_the_flag_the_checkpoint_says_what_it_needs(models, text, tmp_path):
    recipe = load_recipe("svd").override({"evaluate": "none", "ratio_scope": "decoder"})
    pipeline.run(pipeline.Request(str(models("llama")), (0.7,), recipe, tmp_path / "out", tmp_path / "work"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
