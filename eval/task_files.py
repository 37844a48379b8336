"""The YAML files of the offline tasks: the stock lm-eval task, its documents taken from a file.

An included task takes the place of the stock one of the same name (lm-eval says so in a warning), also in
the stock groups and tags that list it. A tag declared by an included file would replace the stock tag, and
its other tasks would be gone. Hence ``tag: null``.
"""

from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import yaml

from checkpoint.errors import UserError
from checkpoint.files import write_text


@dataclass(frozen=True)
class StockTask:
    """Where lm-eval keeps the task's YAML (below ``lm_eval/tasks``), and the split that it scores."""

    stock: str
    split: str


TASKS = {
    "arc_easy": StockTask("arc/arc_easy.yaml", "test"),
    "arc_challenge": StockTask("arc/arc_challenge.yaml", "test"),
    "hellaswag": StockTask("hellaswag/hellaswag.yaml", "validation"),
    "openbookqa": StockTask("openbookqa/openbookqa.yaml", "test"),
    "piqa": StockTask("piqa/piqa.yaml", "validation"),
    "winogrande": StockTask("winogrande/default.yaml", "validation"),
    "boolq": StockTask("super_glue/boolq/default.yaml", "validation"),
}


def write_task_yaml(directory: Path, name: str) -> None:
    """Write ``directory/name.yaml`` for the installed lm-eval, unless it is there and right."""
    path = directory / f"{name}.yaml"
    content = task_yaml(directory / f"{name}.jsonl", name)
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        write_text(path, content)


def task_yaml(documents: Path, name: str) -> str:
    """The YAML of an offline task; UserError where the installed lm-eval has no such stock task."""
    task = TASKS[name]
    stock = _stock_tasks() / task.stock
    if not stock.is_file():
        raise UserError(f"lm-eval {version('lm-eval')} has no {task.stock}: pip install lm-eval==0.4.13")
    config = {
        "include": str(stock),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {task.split: str(documents)}},
        "training_split": None,
        "validation_split": task.split if task.split == "validation" else None,
        "test_split": task.split if task.split == "test" else None,
        # There are no training documents here; zero in the file cannot be overridden by a flag.
        "num_fewshot": 0,
    }
    return "# Written by python -m eval.offline\n" + yaml.safe_dump(config, sort_keys=False)


def _stock_tasks() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the tasks need lm-eval: pip install lm-eval==0.4.13")
    return Path(spec.submodule_search_locations[0]) / "tasks"
