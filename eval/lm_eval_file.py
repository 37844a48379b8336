"""``results_DATE.json`` as ``lm_eval --output_path`` writes it, so that what reads lm-eval's results reads these."""

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker
from lm_eval.utils import sanitize_model_name

from checkpoint.files import write_json

# fields that have an entry a task; the others are the same in every task of one evaluation
_BY_TASK = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "task_hashes",
)

SECONDS = "total_evaluation_time_seconds"  # when the tasks were measured


def merged(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What lm-eval found of several tasks, one at a time, as if it had run them together; empty for none."""
    whole: dict[str, Any] = {}
    for part in found:
        seconds = whole.get(SECONDS, 0.0) + part.get(SECONDS, 0.0)
        joined = {key: {**whole.get(key, {}), **part[key]} for key in _BY_TASK if key in part}
        whole = {**whole, **part, **joined, SECONDS: seconds}
    return whole


def write_lm_eval(directory: Path, model: Path, found: dict[str, Any], trust_remote_code: bool) -> Path:
    """Write ``directory/MODEL/results_DATE.json``; returns its path. The date is that of the writing."""
    name = str(model)
    arguments = {"pretrained": name, **({"trust_remote_code": True} if trust_remote_code else {})}
    about = GeneralConfigTracker()
    about.log_experiment_args("hf", arguments, None, found["chat_template"], found["fewshot_as_multiturn"])
    about.total_evaluation_time_seconds = str(found[SECONDS])
    config = {**found["config"], "model": "hf", "model_args": arguments}
    place = directory / sanitize_model_name(name)
    place.mkdir(parents=True, exist_ok=True)
    date = datetime.now()
    path = place / f"results_{date.isoformat().replace(':', '-')}.json"
    del about.start_time
    write_json(path, {**found, "config": config, "date": time.time(), **vars(about)})
    return path
