"""``--device``: layers run elsewhere, on the same path and to the same result."""

from __future__ import annotations

import json
from pathlib import Path

import pretended
import pytest
import torch
import zoo

from calibration import products
from checkpoint.device import find_device
from checkpoint.errors import UserError
from compress import parallel, pipeline, plan
from compress.recipe import load_recipe, recipe_names

SHORT = {"calibration_tokens": 512, "sequence_length": 32, "evaluate": "none", "search_tokens": 64}


def compressed(model: Path, text: Path, output: Path, recipe: str, device: torch.device) -> dict:
    wanted, ratio = load_recipe(recipe).override({**SHORT, "calibration": str(text)}), 0.7
    if wanted.quantizer != "none":  # groups that divide these narrow linears, and a ratio where bits are scarce
        ratio, wanted = 0.25, wanted.override({"group_size": "16", "correction_rank": "0-6"})
    if wanted.decomposition == "none":
        ratio = 0.667  # two layers of three
    wanted = wanted.override({"ratio_scope": "decoder"})
    pipeline.run(pipeline.make_request(str(model), [ratio], wanted, output, device=device))
    return json.loads((output / "report.json").read_text())


@pytest.fixture
def elsewhere(monkeypatch):
    """A device that only pretends: see pretended.py."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the pretence is a thread's own
    monkeypatch.setattr(parallel, "FEW", -1)
    monkeypatch.setattr(
        products, "OPENBLAS_IS_WIDER", False
    )  # numpy's library knows of no device; here too it is torch's, then
    monkeypatch.setattr(plan, "name_of", str)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for name in ("name_of", "kind_of", "peak_on"):
        monkeypatch.setattr(pipeline, name, str)
    monkeypatch.setattr(pipeline, "check_free", lambda *_: None)
    # as it is between real devices: a module's parameter cannot be given another's memory in place
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with pretended.Pretended():
        yield pretended.DEVICE
    torch.__future__.set_overwrite_module_params_on_conversion(False)


# a bias in every linear and weights that lie transposed; experts; rotary embeddings that differ by layer
OTHERS = ("gpt2", "qwen3_moe", "gemma3")


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", recipe) for recipe in recipe_names()] + [(name, "auto") for name in OTHERS]
)
def test_every_recipe_gives_the_same_bytes_elsewhere(models, text, tmp_path, elsewhere, name, recipe):
    here = compressed(models(name), text, tmp_path / "here", recipe, torch.device("cpu"))
    there = compressed(models(name), text, tmp_path / "there", recipe, elsewhere)
    assert there["run"]["device"] == "cuda:0"
    assert there["predicted_loss_nats_per_token"] == here["predicted_loss_nats_per_token"]
    assert zoo.content(tmp_path / "there") == zoo.content(tmp_path / "here")


def test_the_pretended_device_refuses_what_a_gpu_would(elsewhere):
    there, here = torch.ones(3, device=elsewhere), torch.ones(3)
    assert torch.equal((there * 2).cpu(), here * 2)
    assert (there @ there).device == elsewhere
    with pytest.raises(RuntimeError, match="two devices"):
        there + here
    with pytest.raises(TypeError):
        there.numpy()


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", "cuda:-1"])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(UserError, match="--device"):
        find_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_says_so():
    with pytest.raises(UserError, match="sees no GPU"):
        find_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["auto", "loss-aware", "llm-rom", "gptq"])
def test_a_gpu_gives_what_the_processor_does(models, text, tmp_path, recipe):
    here = compressed(models("llama"), text, tmp_path / "here", recipe, torch.device("cpu"))
    there = compressed(models("llama"), text, tmp_path / "there", recipe, find_device("cuda"))
    assert there["run"]["device_peak_memory_bytes"] > 0
    assert there["sizes"]["bytes_after"] == pytest.approx(here["sizes"]["bytes_after"], rel=0.01)
    if here["predicted_loss_nats_per_token"] is not None:
        assert there["predicted_loss_nats_per_token"] == pytest.approx(here["predicted_loss_nats_per_token"], rel=0.02)
