"""Perplexity, divergence, tasks and the command, on a tiny llama with a tokenizer of fifty words."""

import json
import random
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from lm_eval.result_schema import EvalResults
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table, sanitize_model_name
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from checkpoint.errors import UserError
from eval import run
from eval.__main__ import main
from eval.lm_eval_file import merged, write_lm_eval
from eval.models import Subject, evaluation_dtype
from eval.perplexity import divergence, error_after_layer, perplexity, token_windows
from eval.presets import PRESETS, QUICK, settings_for
from eval.results import EvaluationSettings
from eval.run import compare, evaluate
from eval.table import format_table
from eval.task_files import task_yaml
from eval.texts import Text, load_text

WORDS = [f"w{number}" for number in range(50)]
TEXT = Text("words", " ".join(random.Random(0).choices(WORDS, k=100)))


def _save_model(directory: Path, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=len(WORDS),
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(directory)
    return model


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    _save_model(tmp_path / "dense", seed=1)
    return tmp_path / "dense"


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    _save_model(tmp_path / "compressed", seed=2)
    return tmp_path / "compressed"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache with two documents for piqa and nothing to download."""
    root = tmp_path / "cache"
    tasks = root / "tasks"
    tasks.mkdir(parents=True)
    documents = [{"goal": "w1 w2", "sol1": "w3", "sol2": f"w4 w{n}", "label": n % 2} for n in range(4)]
    (tasks / "piqa.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tasks / "piqa.yaml").write_text(task_yaml(tasks / "piqa.jsonl", "piqa"))
    monkeypatch.setenv("LAYERPRESS_CACHE", str(root))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return root


@pytest.fixture
def settings(tmp_path: Path) -> EvaluationSettings:
    path = tmp_path / "words.txt"
    path.write_text(TEXT.content)
    return EvaluationSettings(texts=(str(path),), window=16, max_windows=3, tasks=("piqa",), limit=3)


def _loaded(directory: Path) -> Subject:
    return Subject(directory, torch.float32, trust_remote_code=False)


def _log_probabilities(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(directory)(ids[None]).logits[0].double().log_softmax(-1)


def test_perplexity_is_that_of_a_loop_over_tokens(dense: Path) -> None:
    subject = _loaded(dense)
    result = perplexity(subject.model, subject.tokenizer, TEXT, window=16, max_windows=3)
    ids = torch.tensor([WORDS.index(word) for word in TEXT.content.split()])
    nats = 0.0
    for start in (0, 16, 32):
        window = ids[start : start + 16]
        log_p = _log_probabilities(dense, window)
        nats -= sum(float(log_p[place - 1, window[place]]) for place in range(1, 16))
    assert (result.windows, result.stride, result.tokens) == (3, 16, 45)
    assert result.nats_per_token == pytest.approx(nats / 45, rel=1e-5)
    assert result.perplexity == pytest.approx(torch.tensor(nats / 45).exp().item(), rel=1e-5)


@pytest.mark.parametrize(("max_windows", "expected"), [(None, 6), (2, 2), (99, 6)])
def test_windows_do_not_overlap_and_the_rest_is_dropped(dense: Path, max_windows: int | None, expected: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dense)
    windows = token_windows(tokenizer, TEXT, window=16, max_windows=max_windows)
    words = [WORDS[number] for number in windows.flatten()]
    assert windows.shape == (expected, 16)
    assert words == TEXT.content.split()[: 16 * expected]


def test_a_text_shorter_than_a_window_is_an_error(dense: Path) -> None:
    with pytest.raises(UserError, match="100 tokens, a window 128"):
        token_windows(AutoTokenizer.from_pretrained(dense), TEXT, window=128, max_windows=None)


def test_divergence_is_kl_from_the_dense_model(dense: Path, compressed: Path) -> None:
    one, other = _loaded(dense), _loaded(compressed)
    before, after, measured = divergence(one.model, other.model, one.tokenizer, TEXT, 16, 1)
    window = torch.tensor([WORDS.index(word) for word in TEXT.content.split()[:16]])
    p, q = (_log_probabilities(directory, window)[:-1] for directory in (dense, compressed))
    assert measured.kl_nats_per_token == pytest.approx(float((p.exp() * (p - q)).sum()) / 15, rel=1e-5)
    assert measured.excess_nats_per_token == pytest.approx(after.nats_per_token - before.nats_per_token)
    assert before.nats_per_token == perplexity(one.model, one.tokenizer, TEXT, 16, 1).nats_per_token


def test_a_loss_that_is_not_finite_is_an_error(dense: Path) -> None:
    subject = _loaded(dense)
    torch.nn.init.constant_(subject.model.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match="loss on words is nan"):
        perplexity(subject.model, subject.tokenizer, TEXT, window=16)


def test_missing_weights_are_an_error(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="missing keys"):
        _ = _loaded(dense).model


def test_foreign_code_is_an_error_without_trust(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    own = {"model_type": "layerpress_llama", "auto_map": {"AutoConfig": "modeling.Config"}}
    (dense / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(UserError, match="--trust-remote-code"):
        _loaded(dense)


def test_the_evaluation_dtype_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx512_bf16": True})
    assert evaluation_dtype() == (torch.bfloat16, "this CPU has avx512_bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert evaluation_dtype()[0] == torch.float32


def test_figures_come_from_the_cache_the_second_time(
    cache: Path, dense: Path, settings: EvaluationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(dense, settings)
    [task] = first.tasks
    assert (task.documents, task.few_shot, task.offline_copy, task.cached) == (3, 0, True, False)
    assert task.metrics["acc"].value == pytest.approx(sum(task.per_document["acc"]) / 3)
    monkeypatch.setattr(Subject, "model", None)  # would fail if it were used
    second = evaluate(dense, settings)
    assert all(result.cached for result in (*second.perplexities, *second.tasks))
    assert second.perplexities[0].nats_per_token == first.perplexities[0].nats_per_token
    assert second.tasks[0].metrics == task.metrics
    assert [path.suffix for path in (cache / "evaluations").iterdir()] == [".json", ".json"]
    assert second.lm_eval == first.lm_eval


def test_an_interrupted_evaluation_goes_on(
    cache: Path, dense: Path, settings: EvaluationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "run_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(dense, settings)
    resumed = evaluate(dense, settings)
    assert (resumed.perplexities[0].cached, resumed.tasks[0].cached) == (True, False)


def test_the_table_has_both_models(cache: Path, dense: Path, compressed: Path, settings: EvaluationSettings) -> None:
    before, after = compare(compressed, dense, settings)
    [alone] = evaluate(dense, settings).perplexities
    assert alone.cached and alone.nats_per_token == before.perplexities[0].nats_per_token
    table = format_table(before, after)
    assert "excess" in table and "KL" in table and "right now" in table
    assert "3 windows of 16, stride 16, 45 tokens predicted" in table
    assert "piqa: 3 documents, 0-shot, offline copy" in table


def test_the_command_writes_json_and_prints_the_table(
    cache: Path,
    dense: Path,
    compressed: Path,
    settings: EvaluationSettings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "long.txt"
    text.write_text(" ".join(random.Random(0).choices(WORDS, k=200)))
    output = tmp_path / "report" / "evaluation.json"
    arguments = [
        "--model",
        str(compressed),
        "--compare-with",
        str(dense),
        "--evaluate",
        "piqa",
        "--limit",
        "2",
    ]
    assert main([*arguments, "--text", str(text), "--output", str(output), "--verbose"]) == 0
    report = json.loads(output.read_text())
    # A window of 1024 was asked for, the model has 64 positions: the figures say which it was.
    assert report["model"]["perplexities"][0]["window"] == 64
    assert report["model"]["divergences"][0]["kl_nats_per_token"] > 0
    assert report["dense"]["tasks"][0]["documents"] == 2
    assert f"perplexity {text}" in capsys.readouterr().out


def test_lm_eval_reads_the_results_as_its_own(
    cache: Path, dense: Path, settings: EvaluationSettings, tmp_path: Path
) -> None:
    evaluation = evaluate(dense, replace(settings, tasks=("piqa",)))
    path = write_lm_eval(tmp_path / "lm_eval", dense, evaluation.lm_eval, False)
    assert path.parent.name == sanitize_model_name(str(dense)) and path.match("results_*.json")
    results = json.loads(path.read_text())
    assert "piqa" in make_table(results) and "acc_norm" in make_table(results)
    own = EvalResults.__annotations__  # the fields of lm-eval's own type
    assert {name for name in own if name not in results} <= {"samples", "groups"}
    assert results["config"]["model_args"] == {"pretrained": str(dense)}
    assert results["n-samples"]["piqa"]["effective"] == 3


def test_tasks_one_at_a_time_are_merged_as_if_together() -> None:
    one = {"results": {"a": 1}, "versions": {"a": 0}, "date": 1}
    other = {"results": {"b": 2}, "versions": {"b": 0}, "groups": {"g": 3}, "date": 2}
    one["total_evaluation_time_seconds"], other["total_evaluation_time_seconds"] = 1.5, 2.0
    both = {
        "total_evaluation_time_seconds": 3.5,
        "results": {"a": 1, "b": 2},
        "versions": {"a": 0, "b": 0},
        "groups": {"g": 3},
        "date": 2,
    }
    assert merged([one, other]) == both
    assert merged([]) == {}


def test_the_error_of_a_layer_is_relative_to_the_dense_state(dense: Path, compressed: Path) -> None:
    one, other = _loaded(dense), _loaded(compressed)
    ids = torch.arange(8)
    errors = error_after_layer(one.model, other.model, ids)
    with torch.no_grad():
        before, after = (model.model(ids[None]).last_hidden_state for model in (one.model, other.model))
    assert len(errors) == 2
    assert errors[-1] == pytest.approx(float((after - before).norm() / before.norm()))
    assert error_after_layer(one.model, one.model, ids) == [0, 0]


def test_a_text_of_the_hub_is_joined_as_the_papers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(repository: str, **arguments: object) -> datasets.Dataset:
        asked.append((repository, arguments))
        return datasets.Dataset.from_dict({"text": ["one", "", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_text("wikitext-2").content == "one\n\n\n\ntwo"
    assert load_text("c4").content == "one  two"
    assert asked[0] == ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"})


def test_what_cannot_be_had_is_named_where_that_is_allowed(
    cache: Path, dense: Path, settings: EvaluationSettings
) -> None:
    wanted = replace(settings, texts=("ptb", *settings.texts), tasks=())
    with pytest.raises(UserError, match="ptb_text_only cannot be had"):
        evaluate(dense, wanted)
    found = evaluate(dense, replace(wanted, where_available=True))
    assert [item.text for item in found.missing] == ["ptb"] and len(found.perplexities) == 1
    assert "not measured: ptb" in format_table(None, found)


def test_a_chat_template_that_is_not_there_is_an_error(cache: Path, dense: Path, settings: EvaluationSettings) -> None:
    with pytest.raises(UserError, match="no chat template"):
        evaluate(dense, replace(settings, chat_template=True))


def test_presets_are_tasks_that_lm_eval_has() -> None:
    assert settings_for("papers").where_available and len(settings_for("papers").tasks) == 7
    assert settings_for("arc_easy, piqa") == replace(QUICK, tasks=("arc_easy", "piqa"), limit=None)
    with pytest.raises(UserError, match="names nothing"):
        settings_for(",")
    known = TaskManager().all_tasks
    assert all(task in known for _, settings in PRESETS.values() for task in settings.tasks)


@pytest.mark.parametrize(
    "change",
    [
        ["--model", "absent"],
        ["--text", "absent.txt"],
        ["--evaluate", "arc_none"],
        ["--evaluate", "arc_none", "--dry-run"],
    ],
)
def test_the_command_tells_a_users_error_in_one_line(
    cache: Path,
    dense: Path,
    change: list[str],
    settings: EvaluationSettings,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", str(dense), "--text", *settings.texts, "--evaluate", "piqa", "--verbose", *change]
    assert main(arguments) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
