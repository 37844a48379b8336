"""The command as a user meets it: resume, repeat, ratios, exports, several texts, bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import content

import run_pipeline
from calibration.structure import discover
from calibration.windows import make_windows
from checkpoint.source import Source
from checkpoint.workdir import WorkDirectory
from compress.plan import make_plan
from compress.recipe import load_recipe

ROOT = Path(run_pipeline.__file__).parent
SMALL = ["--calibration-tokens", "1024", "--sequence-length", "64", "--evaluate", "none", "--ratio-scope", "decoder"]


def flags(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model",
        str(model),
        "--calibration",
        str(text),
        "--output",
        str(output),
        "--target-ratio",
        "0.7",
        *SMALL,
        *more,
    ]


@pytest.mark.parametrize("recipe", ["svd-llm", "llm-rom"])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(models, text, tmp_path, monkeypatch, recipe):
    assert run_pipeline.main(flags(models("llama"), text, tmp_path / "whole", "--recipe", recipe)) == 0
    put = WorkDirectory.put
    recorded = []

    def interrupted(self, stage, index, tensors, notes):
        put(self, stage, index, tensors, notes)
        recorded.append(index)
        if recorded == [0, 1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkDirectory, "put", interrupted)
    arguments = flags(models("llama"), text, tmp_path / "out", "--recipe", recipe)
    assert run_pipeline.main(arguments) == 130
    assert not (tmp_path / "out").exists()
    assert run_pipeline.main(arguments) == 0
    assert recorded == [0, 1, 2], "finished layers are not done again"
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_repeating_is_free_and_changing_is_refused(models, text, tmp_path, capsys):
    arguments = flags(models("llama"), text, tmp_path / "out")
    assert run_pipeline.main(arguments) == 0
    before = content(tmp_path / "out")
    assert run_pipeline.main(arguments) == 0
    assert "already done" in capsys.readouterr().err
    assert run_pipeline.main([*arguments, "--seed", "5"]) == 2
    assert "seed was 0, is 5" in capsys.readouterr().err
    assert content(tmp_path / "out") == before
    assert run_pipeline.main([*arguments, "--seed", "5", "--fresh"]) == 0
    assert content(tmp_path / "out") != before
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out.old").exists()


def test_several_ratios_share_the_work_and_equal_single_runs(models, text, tmp_path):
    arguments = flags(models("llama"), text, tmp_path / "all")
    arguments[arguments.index("0.7")] = "0.8"
    arguments.insert(arguments.index("0.8") + 1, "0.6")
    assert run_pipeline.main(arguments) == 0
    single = flags(models("llama"), text, tmp_path / "one", "--work-dir", str(tmp_path / "all.work"))
    single[single.index("0.7")] = "0.6"
    assert run_pipeline.main(single) == 0
    assert content(tmp_path / "all" / "ratio-0.60") == content(tmp_path / "one")
    assert content(tmp_path / "all" / "ratio-0.80") != content(tmp_path / "one")


def test_dense_export_is_the_stock_model(models, text, tmp_path):
    for name in ("gpt2", "llama", "falcon", "mixtral"):
        assert run_pipeline.main(flags(models(name), text, tmp_path / name, "--export", "dense")) == 0
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.model_type == AutoModelForCausalLM.from_pretrained(models(name)).config.model_type
        before, after = (load_file(directory / "model.safetensors") for directory in (models(name), tmp_path / name))
        assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert changed and all(before[key].dim() == 2 for key in changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_half_precision_sources(text, tmp_path, dtype):
    source = zoo.write_model(tmp_path / "source", "mistral", dtype, shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) >= 2
    assert run_pipeline.main(flags(source, text, tmp_path / "out")) == 0
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        kinds = {file.get_tensor(key).dtype for key in file.keys() if not key.endswith(".order")}  # noqa: SIM118
    assert kinds == {dtype}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert report["sizes"]["bytes_after"] == report["run"]["bytes_written"] == size


@pytest.mark.parametrize("scope", ["decoder", "model"])
@pytest.mark.parametrize("ratio", [0.9, 0.8, 0.6, 0.4])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_asked_ratio_is_met(tmp_path_factory, name, ratio, scope):
    directory = tmp_path_factory.getbasetemp() / f"ratio-{name}"
    if not directory.exists():
        zoo.write_model(
            directory, name, **({"n_embd": 96} if name == "gpt2" else {"hidden_size": 96, "intermediate_size": 224})
        )
    source = Source(directory, torch.float32)
    plan = make_plan(source, discover(source), load_recipe("svd").override({"ratio_scope": scope}), ratio, "")
    assert abs(plan.sizes.achieved_ratio - ratio) <= 0.005


def test_the_plan_says_what_the_report_says_and_a_dry_run_leaves_nothing(models, text, tmp_path, capsys):
    assert run_pipeline.main(flags(models("llama"), text, tmp_path / "out", "--dry-run")) == 0
    told = capsys.readouterr().err
    assert "asked 0.7 of the decoder" in told and list(tmp_path.iterdir()) == []
    assert run_pipeline.main(flags(models("llama"), text, tmp_path / "out")) == 0
    sizes = json.loads((tmp_path / "out" / "report.json").read_text())["sizes"]
    assert f"{sizes['achieved_ratio']:.4f} of the decoder" in capsys.readouterr().err
    assert abs(sizes["achieved_ratio"] - 0.7) <= 0.005
    rows = (tmp_path / "out" / "matrices.csv").read_text().splitlines()
    assert len(rows) == 1 + 21 and rows[0].startswith("layer,matrix,d_out,d_in,form,rank")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True" in card and "Not evaluated" in card


def test_text_files_of_every_kind_give_the_same_kind_of_windows(models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models("llama"))
    documents = ["the first one " * 60, "and another " * 80]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": item, "id": 1}) + "\n" for item in documents))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
    (tmp_path / "a.md").write_text("".join(item + "\n\n" for item in documents))
    made = [
        make_windows(tokenizer, [str(tmp_path / name)], 640, 64, 3, 272) for name in ("a.jsonl", "a.parquet", "a.md")
    ]
    assert made[0].tokens == 640 and all(torch.equal(made[0].ids, other.ids) for other in made)
    assert made[0].provenance["token_ids_sha256"] == made[1].provenance["token_ids_sha256"]
    other = make_windows(tokenizer, [str(tmp_path / "a.md")], 640, 64, 4, 272)
    assert not torch.equal(other.ids, made[0].ids), "the seed draws the windows"


def test_a_mixture_takes_an_equal_share_of_each_text(models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models("llama"))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} word " * 400)
    recipe = load_recipe("svd-llm").override({"calibration": f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}"})
    mixed = make_windows(tokenizer, recipe.calibration_texts, 7 * 64, 64, 0, 272)
    alone = [
        make_windows(tokenizer, [str(tmp_path / f"{name}.txt")], count * 64, 64, 0, 272)
        for name, count in (("a", 4), ("b", 3))
    ]
    assert torch.equal(mixed.ids[0::2], alone[0].ids) and torch.equal(mixed.ids[1::2], alone[1].ids)
    assert [item["windows"] for item in mixed.provenance["texts"]] == [4, 3]


def peak_of(directory: Path, text: Path, output: Path, recipe: str = "llm-rom", tokens: int = 2048) -> int:
    arguments = flags(directory, text, output, "--recipe", recipe, "--calibration-tokens", str(tokens))
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    subprocess.run(
        [sys.executable, str(ROOT / "run_pipeline.py"), *arguments], check=True, capture_output=True, env=environment
    )
    return json.loads((output / "report.json").read_text())["run"]["peak_memory_bytes"]


def test_memory_does_not_grow_with_depth(text, tmp_path):
    """24 more layers are 160 MB more weights; the peak differs by less than a third of that.

    The state of the heap moves a peak of 500 MB by up to 40 MB from run to run; keeping the layers would add 160 MB.
    """
    peaks = []
    for depth in (8, 32):
        wide = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": depth, "num_attention_heads": 8}
        source = zoo.write_model(tmp_path / f"source-{depth}", "llama", torch.bfloat16, **wide)
        peaks.append(peak_of(source, text, tmp_path / f"out-{depth}"))
    assert abs(peaks[1] - peaks[0]) < 53e6, peaks


def test_memory_does_not_grow_with_calibration_tokens(tmp_path):
    """The backward pass keeps six states of 28,672 more tokens, 176 MB; the peak differs by less than a third of that."""
    wide = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
    source = zoo.write_model(tmp_path / "source", "llama", torch.bfloat16, **wide)
    text = zoo.write_text(tmp_path / "long.txt", 40000)
    peaks = [peak_of(source, text, tmp_path / f"out-{n}", "loss-aware", n) for n in (4096, 32768)]
    assert abs(peaks[1] - peaks[0]) < 58e6, peaks


def test_loss_aware_predicts_chooses_and_compares_sizes(models, text, tmp_path, capsys):
    """At three sizes ranks are pooled and nested, the prediction falls with size, a page compares them."""
    arguments = flags(models("llama"), text, tmp_path / "out", "--recipe", "loss-aware")
    arguments[arguments.index("0.7") : arguments.index("0.7") + 1] = ["0.9", "0.7", "0.5"]
    assert run_pipeline.main(arguments) == 0
    told = capsys.readouterr()
    assert "predicted loss at 0.7" in told.err and "| 0.7 |" in told.out
    predicted, ranks = [], []
    for ratio in ("0.90", "0.70", "0.50"):
        output = tmp_path / "out" / f"ratio-{ratio}"
        report = json.loads((output / "report.json").read_text())
        assert report["recipe"]["name"] == "loss-aware"
        predicted.append(report["predicted_loss_nats_per_token"])
        rows = (output / "matrices.csv").read_text().splitlines()[1:]
        cells = [row.split(",") for row in rows]
        ranks.append([10**6 if row[4] == "dense" else int(row[5]) for row in cells])
    assert 0 < predicted[0] < predicted[1] < predicted[2]
    assert all(a >= b >= c for a, b, c in zip(*ranks, strict=True)), "a larger budget never lowers a rank"
    assert len(set(ranks[1])) > 5, "ranks are not uniform"
    assert (tmp_path / "out" / "comparison.md").exists() and (tmp_path / "out" / "comparison.png").stat().st_size > 5000


PACKED = ("--recipe", "quantized", "--group-size", "16", "--ratio-scope", "model")


@pytest.mark.parametrize(("more", "stop_after"), [((), 1), ((), 2), (PACKED, 3), (PACKED, 4)])
def test_an_interrupted_backward_pass_goes_on(models, text, tmp_path, monkeypatch, more, stop_after):
    """Record 3 is that of the embedding and the head, which only a quantized model has."""
    assert run_pipeline.main(flags(models("gpt2"), text, tmp_path / "whole", *more)) == 0
    put = WorkDirectory.put
    recorded = []

    def interrupted(self, stage, index, tensors, notes):
        put(self, stage, index, tensors, notes)
        recorded.append(index)
        if len(recorded) == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkDirectory, "put", interrupted)
    assert run_pipeline.main(flags(models("gpt2"), text, tmp_path / "out", *more)) == 130
    assert run_pipeline.main(flags(models("gpt2"), text, tmp_path / "out", *more)) == 0
    assert recorded == ([2, 1, 0, 3] if more else [2, 1, 0])
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_records_without_what_another_choice_needs_are_refused(models, text, tmp_path, capsys):
    """A work directory of the decoder alone has no menu of the embedding; a pool's has not every grid."""
    work = ("--work-dir", str(tmp_path / "work"), "--recipe", "quantized", "--group-size", "16")
    assert run_pipeline.main(flags(models("llama"), text, tmp_path / "one", *work)) == 0
    assert run_pipeline.main(flags(models("llama"), text, tmp_path / "two", *work, "--ratio-scope", "model")) == 2
    assert "ends was False, is True" in capsys.readouterr().err
    assert run_pipeline.main(flags(models("llama"), text, tmp_path / "three", *work, "--allocation", "uniform")) == 2
    assert "only_what_losses_choose was True, is False" in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_fingerprint_had_a_name_goes_on(models, text, tmp_path):
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "lock").touch()
    (work / "fingerprint.json.tmp").write_text('{"weights')
    assert run_pipeline.main(flags(models("llama"), text, tmp_path / "out", "--recipe", "svd-llm")) == 0
