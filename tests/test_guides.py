"""docs/guides: every command that they show is run, on a tiny model in the place of the offline one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
import zoo
from transformers import AutoTokenizer

import run_pipeline
from compress import children
from eval import __main__ as evaluation
from eval import compare
from eval.task_files import TASKS, task_yaml

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
QUESTION = {"id": "1", "question": "ab?", "choices": {"text": ["c", "d"], "label": ["A", "B"]}, "answerKey": "A"}
DOCUMENTS = {"piqa": {"goal": "ab", "sol1": "cd", "sol2": "ef", "label": 0}, "arc_easy": QUESTION}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A user's cache and files: the offline model, texts and tasks are tiny ones."""
    root = tmp_path_factory.mktemp("guides")
    model = zoo.write_model(root / "cache" / "models" / "SmolLM2-135M-Instruct", max_position_embeddings=2048)
    chat = Path(shutil.copytree(model, root / "chat-model"))
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chat)
    tasks, texts, mixed = (root / "cache" / name for name in ("tasks", "texts", "task-texts"))
    for directory in (tasks, texts, mixed):
        directory.mkdir()
    for name in TASKS:
        document = str(DOCUMENTS.get(name, {})).replace("'", '"') + "\n"
        (tasks / f"{name}.jsonl").write_text(document * 4)
        (tasks / f"{name}.yaml").write_text(task_yaml(tasks / f"{name}.jsonl", name))
    for name in ("boolq-train", "boolq-validation", "sciq-validation"):
        zoo.write_text(texts / f"{name}.txt", 40_000)
    zoo.write_text(mixed / "tasks-train.txt", 40_000, seed=1)
    zoo.write_text(root / "train.txt", 80_000, seed=2)
    zoo.write_text(root / "test.txt", 5_000, seed=3)
    return root


def blocks(guide: Path) -> list[tuple[str, str]]:
    """The kind and the text of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", guide.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_here(command: str) -> None:
    """One of our commands in this process, any other in a shell."""
    expanded = os.path.expandvars(command)
    words = [os.path.expanduser(word) for word in shlex.split(expanded)]
    assert "$" not in expanded, f"a variable that nobody set: {command}"
    for start, main in (
        (["python", "run_pipeline.py"], run_pipeline.main),
        (["python", "-m", "eval"], evaluation.main),
        (["python", "-m", "eval.compare"], compare.main),
    ):
        if words[: len(start)] == start:
            assert main(words[len(start) :]) == 0, command
            return
    assert words[0] == "python", f"only our own commands are run: {command}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *words[1:]], check=True, env=environment, stdin=subprocess.DEVNULL)


def evaluate_here(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The evaluation of a run, in this process."""
    code = evaluation.main([*arguments, "--verbose"])
    return subprocess.CompletedProcess([], code, "a table\n")


def of_home(place: Path, text: str) -> str:
    """The guides name the cache as users have it."""
    return text.replace("~/.cache/layerpress", str(place / "cache"))


@pytest.fixture
def there(place, tmp_path, monkeypatch) -> Path:
    """An empty directory with that cache, and the variables that guides ask their reader to set."""
    monkeypatch.setenv("LAYERPRESS_CACHE", str(place / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "datasets"))
    variables = {
        "MODEL": place / "cache" / "models" / "SmolLM2-135M-Instruct",
        "CHAT_MODEL": place / "chat-model",
        "TRAIN": place / "train.txt",
        "TEST": place / "test.txt",
    }
    for name, path in variables.items():
        monkeypatch.setenv(name, str(path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "guide", [guide for guide in GUIDES if guide.stem != "adding-a-method"], ids=lambda guide: guide.stem
)
def test_the_commands_of_a_guide_run(guide, there, place, monkeypatch):
    monkeypatch.setattr(children, "run_evaluation", evaluate_here)
    run = 0
    for kind, text in blocks(guide):
        if kind == "python":
            name, _, code = text.partition("\n")
            (there / name.removeprefix("# file: ")).write_text(code)
        elif kind == "bash":
            for command in text.splitlines():
                run_here(of_home(place, command))
                run += 1
    assert run


def test_a_method_is_added_as_the_guide_says(there, place):
    """In a copy of the repository, whose files the guide's blocks change."""
    copy = there / "copy"
    for name in ("calibration", "checkpoint", "compress", "configs", "eval"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "run_pipeline.py", copy)
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    for kind, text in blocks(ROOT / "docs" / "guides" / "adding-a-method.md"):
        if kind in ("python", "yaml"):
            name, _, content = text.partition("\n")
            (copy / name.removeprefix("# file: ")).write_text(content)
        elif kind == "diff":
            path = copy / text.splitlines()[0].removeprefix("--- a/")
            changed = path.read_text()
            for hunk in text.split("@@\n")[1:]:
                old = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] == " ")
                new = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in " +")
                assert changed.count(old) == 1
                changed = changed.replace(old, new)
            path.write_text(changed)
        elif kind == "bash":
            for command in text.splitlines():
                words = shlex.split(os.path.expandvars(command))
                subprocess.run(
                    [sys.executable, *words[1:]], check=True, env=environment, cwd=copy, stdin=subprocess.DEVNULL
                )
    assert (copy / "linear" / "report.json").is_file() and (copy / "linear-welore" / "spectra.png").is_file()
