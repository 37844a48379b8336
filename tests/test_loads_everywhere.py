"""What people do with a compressed checkpoint once they have it: pipelines, batches, fine-tuning, lm-eval, other dtypes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import zoo
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import layerpress

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
FORMS = {
    "factors": {"recipe": "svd-llm", "form": "factors"},
    "pivoted": {"recipe": "loss-aware"},
    "packed": {"recipe": "quantized", "group_size": "16", "correction_rank": "1-4"},
    "dense": {"recipe": "svd-llm", "export": "dense"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A chat model with everything beside its weights that one may have."""
    directory = zoo.write_model(tmp_path_factory.mktemp("source") / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5], "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.fixture(scope="module")
def outputs(source, text, tmp_path_factory) -> dict[str, layerpress.Result]:
    """A compression in every form."""
    root, found = tmp_path_factory.mktemp("everywhere"), {}
    settings = {"calibration": str(text), "calibration_tokens": 2048, "sequence_length": 64, "evaluate": "none"}
    for name, changes in FORMS.items():
        ratio = 0.4 if name == "packed" else 0.7
        found[name] = layerpress.compress(
            source, ratio, output=root / name, ratio_scope="decoder", **settings, **changes
        )
    return found


@pytest.fixture(params=FORMS)
def output(request, outputs) -> layerpress.Result:
    return outputs[request.param]


def test_what_stands_beside_the_weights_comes_along_unchanged(source, output):
    beside = [path for path in source.iterdir() if path.suffix != ".safetensors" and path.name != "config.json"]
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json"} <= {path.name for path in beside}
    for path in beside:
        assert (output.output / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_pipeline_writes_and_chats(output):
    made = pipeline("text-generation", model=str(output.output), trust_remote_code=True)
    told = made("the cat", max_new_tokens=5, min_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert told.startswith("the cat") and len(told) > len("the cat")
    chat = made([{"role": "user", "content": "hello"}], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"


def test_a_batch_padded_on_the_left_gives_what_each_gives_alone(output):
    model = output.load(dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(output.output, trust_remote_code=True)
    tokenizer.padding_side = "left"
    prompts = ["a longer prompt than", "the other"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **settings)[:, -6:]
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **settings)[0, -6:]
        assert torch.equal(row, alone)
    slow = model.generate(**tokenizer(prompts[0], return_tensors="pt"), use_cache=False, **settings)[0, -6:]
    assert torch.equal(slow, together[0]), "with and without the cache"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_loads_in_either_dtype(output, dtype):
    model = output.load(dtype=dtype).eval()
    exact = output.load(dtype=torch.float32).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        found, wanted = model(ids).logits, exact(ids).logits
    assert model.dtype == dtype and bool(torch.isfinite(found).all())
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.05


def test_the_factors_themselves_can_be_trained_with_gradient_checkpointing(outputs):
    for name in ("factors", "pivoted"):
        gradients = []
        for checkpointing in (False, True):
            model = outputs[name].load(dtype=torch.float32).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            ids = torch.arange(5, 25)[None]
            model(ids, labels=ids).loss.backward()
            found = {key: p.grad for key, p in model.named_parameters() if "factor_" in key}
            assert found and all(g is not None and bool(g.any()) for g in found.values())
            gradients.append(found)
        assert all(torch.allclose(gradients[0][key], gradients[1][key], rtol=1e-4, atol=1e-6) for key in gradients[0])
        with torch.no_grad():
            before = float(model(ids, labels=ids).loss)
            for parameter in model.parameters():
                parameter -= 0.02 * (0 if parameter.grad is None else parameter.grad / parameter.grad.norm())
            assert float(model(ids, labels=ids).loss) < before


def test_peft_puts_adapters_on_the_factors(outputs, tmp_path):
    model = outputs["factors"].load(dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(target_modules=["factor_in", "factor_out"], r=2, task_type="CAUSAL_LM"))
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    ids = torch.arange(5, 25)[None]
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    again = outputs["factors"].load(dtype=torch.float32)
    again.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, adapted(input_ids=ids).logits, atol=1e-5)


def test_stock_lm_eval_scores_it(output):
    model = HFLM(pretrained=str(output.output), trust_remote_code=True, batch_size=2, dtype="float32", device="cpu")
    asked = [Instance("loglikelihood", {}, ("the cat", " sat"), 0), Instance("loglikelihood", {}, ("a", " b"), 1)]
    found = model.loglikelihood(asked, disable_tqdm=True)
    assert all(score < 0 for score, _ in found)


def test_pruned_feed_forward_is_a_stock_model_of_fewer_channels(source, text, tmp_path):
    settings = {"calibration": str(text), "calibration_tokens": 2048, "sequence_length": 64, "evaluate": "none"}
    changes = {"feed_forward": "prune", "mode": "layerwise", "ratio_scope": "decoder"}
    recipe = layerpress.load_recipe("lorap").override({**settings, **changes, "export": "dense"})
    result = layerpress.compress(source, 0.7, recipe, output=tmp_path / "pruned")
    shutil.rmtree(tmp_path / "pruned.work")
    model, info = AutoModelForCausalLM.from_pretrained(result.output, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__module__.startswith("transformers.") and model.config.intermediate_size < 96
