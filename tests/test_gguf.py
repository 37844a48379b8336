"""A stock checkpoint as GGUF: read by transformers' own loader, and run by llama.cpp itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint import to_gguf

PROMPT = [5, 77, 30, 201, 9, 9, 140, 64]


def dense_logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0]


def by_llama_cpp(file: Path, prompt: list[int] | str, predict: int) -> dict:
    """A greedy completion, with the probabilities of its first tokens."""
    xllamacpp = pytest.importorskip("xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.verbosity = -1
    server = xllamacpp.Server(settings)
    asked = {"prompt": prompt, "n_predict": predict, "temperature": 0, "n_probs": 40}
    return server.handle_completions(asked)


def write_merges(directory: Path) -> None:
    """The zoo's tokenizer has no merges, and llama.cpp wants some."""
    path = directory / "tokenizer.json"
    stored = json.loads(path.read_text())
    vocabulary = stored["model"]["vocab"]
    stored["model"]["vocab"] |= {"th": len(vocabulary), "the": len(vocabulary) + 1}
    stored["model"]["merges"] = [["t", "h"], ["th", "e"]]
    path.write_text(json.dumps(stored))


# grouped heads, tied; a window wider than the text; biases; normed heads wider than the hidden size; frequencies that are scaled
SCALED = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = [
    ("llama", {}),
    ("mistral", {"sliding_window": 64}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("llama", {"rope_parameters": {**SCALED, "original_max_position_embeddings": 32}}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_llama_cpp_gives_the_probabilities_of_transformers(tmp_path, name, changes, dtype):
    directory = zoo.write_model(tmp_path / "model", name, dtype, **changes)
    write_merges(directory)
    assert to_gguf.main([str(directory), str(tmp_path / "model.gguf")]) == 0
    found = by_llama_cpp(tmp_path / "model.gguf", PROMPT, 1)
    expected = dense_logits(directory)[-1].log_softmax(-1)
    first = found["choices"][0]["logprobs"]["content"][0]
    assert first["id"] == int(expected.argmax())
    for item in first["top_logprobs"]:
        assert item["logprob"] == pytest.approx(float(expected[item["id"]]), abs=0.05)


def test_llama_cpp_takes_a_text_as_the_tokenizer_does(tmp_path):
    directory = zoo.write_model(tmp_path / "model", "llama")
    write_merges(directory)
    to_gguf.to_gguf(directory, tmp_path / "model.gguf")
    text = "the other 12 theatres,\nthen the 3rd: don't"
    ids = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    by_text, by_ids = (by_llama_cpp(tmp_path / "model.gguf", prompt, 1) for prompt in (text, ids))
    assert by_text["usage"]["prompt_tokens"] == len(ids)
    assert by_text["choices"][0]["logprobs"] == by_ids["choices"][0]["logprobs"]


def test_transformers_reads_it_too_with_the_same_tokens(tmp_path):
    directory = zoo.write_model(tmp_path / "model", "qwen2")
    write_merges(directory)
    to_gguf.to_gguf(directory, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0]
    assert torch.allclose(logits, dense_logits(directory), atol=1e-4)
    text = "the other 12 theatres\nthen"
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert again(text)["input_ids"] == AutoTokenizer.from_pretrained(directory)(text)["input_ids"]


def test_what_cannot_be_written_is_refused(tmp_path, models, capsys):
    file = tmp_path / "model.gguf"
    assert to_gguf.main([str(models("gpt2")), str(file)]) == 2
    assert "gpt2; as GGUF are written: llama" in capsys.readouterr().err
    linear = {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}
    assert to_gguf.main([str(zoo.write_model(tmp_path / "linear", "llama", **linear)), str(file)]) == 2
    assert "scaled as linear" in capsys.readouterr().err
    other = zoo.write_model(tmp_path / "other", "llama")
    stored = json.loads((other / "tokenizer.json").read_text())
    stored["pre_tokenizer"] = {"type": "Whitespace"}
    (other / "tokenizer.json").write_text(json.dumps(stored))
    assert to_gguf.main([str(other), str(file)]) == 2
    assert "byte-level" in capsys.readouterr().err
    assert not file.exists() and not list(tmp_path.glob("*.partial"))
    assert to_gguf.main([str(models("llama")), str(tmp_path / "nowhere" / "model.gguf")]) == 2
    assert "no directory" in capsys.readouterr().err
    file.write_text("mine")
    assert to_gguf.main([str(models("llama")), str(file)]) == 2
    assert "exists" in capsys.readouterr().err and file.read_text() == "mine"


# as the tokenizers of Llama 3 and Qwen2 write them
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("pattern", "name"), [(LLAMA_3, "llama-bpe"), (LLAMA_3.replace("{1,3}", ""), "qwen2"), (r"\w+", None)]
)
def test_splits_are_known_by_their_patterns(pattern, name):
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    whole = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = whole
    assert to_gguf._split(json.loads(tokenizer.to_str())) == name
    words = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = words
    assert to_gguf._split(json.loads(tokenizer.to_str())) is None
