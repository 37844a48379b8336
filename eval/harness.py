"""lm-eval tasks on a loaded model: stock tasks, seven of them from offline copies of their documents."""

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, hash_string
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint import processes
from checkpoint.errors import UserError, told
from checkpoint.progress import Stage
from eval.offline import ensure
from eval.results import Metric, TaskResult
from eval.task_files import TASKS

# lm-eval would ask git about the directory in which the user happens to stand, and git complains on the terminal where it is no repository
evaluator.get_git_commit_hash = lambda: None

# Fixed, because the shape of a batch changes the last bits of bfloat16 logits: same flags, same figures.
_BATCH = 8


def task_manager(tasks: Sequence[str], online: bool = False) -> TaskManager:
    """lm-eval's task manager for these tasks, groups or tags, all loaded once to know that they can be.

    Raises UserError for a name that lm-eval does not know, and where a task's documents cannot be had.
    """
    offline = [not online and task in TASKS for task in tasks]
    # Reading lm-eval's thousands of own files takes seconds, so only where one of them is asked for.
    manager = TaskManager(include_path=ensure("tasks") if any(offline) else None, include_defaults=not all(offline))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-eval has no task {', '.join(unknown)}: see `lm_eval ls tasks`")
    try:
        manager.load(list(tasks))
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"{told(error)}: evaluate offline tasks ({', '.join(TASKS)}), or mend the network (or fill the hub's cache)"
        ) from error
    except ImportError as error:
        raise UserError(f"{told(error)}; for the leaderboard: pip install 'lm-eval[ifeval,math]'") from error
    return manager


def has_offline_copies(manager: TaskManager) -> bool:
    """Whether the seven tasks are the offline copies in this manager, also as members of groups and tags."""
    return manager.include_path is not None


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    manager: TaskManager,
    limit: int | None = None,
    chat_template: bool = False,
) -> tuple[list[TaskResult], dict[str, Any]]:
    """Evaluate one task, or every task of a group, on its first ``limit`` documents; few-shot as the task says.

    Also returns what lm-eval found in its own words, without the documents. Log-probabilities are taken from logits turned
    to float32. UserError where the model has no chat template to put around the documents.
    """
    if chat_template and tokenizer.chat_template is None:
        raise UserError("the model has no chat template: leave --chat-template out")
    started = time.monotonic()
    wrapped = _Harness(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH, softmax_dtype=torch.float32)
    wrapped.name = task
    found = simple_evaluate(
        model=wrapped,
        tasks=[task],
        task_manager=manager,
        limit=limit,
        cache_requests=False,
        log_samples=True,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
    )
    seconds = round(time.monotonic() - started, 2)
    offline = set(TASKS) if has_offline_copies(manager) else set()

    def told_by_main() -> tuple[list[TaskResult], dict[str, Any]]:
        samples = found.pop("samples")
        found["chat_template"] = tokenizer.chat_template if chat_template else None
        found["fewshot_as_multiturn"] = chat_template
        found["task_hashes"] = {
            name: hash_string(
                "".join(each["doc_hash"] + each["prompt_hash"] + each["target_hash"] for each in documents)
            )
            for name, documents in samples.items()
        }
        found["total_evaluation_time_seconds"] = seconds
        plain = json.loads(json.dumps(found, default=handle_non_serializable))
        return [_task_result(found, samples[name], name, name in offline, seconds) for name in samples], plain

    return processes.of_main(told_by_main)


class _Harness(HFLM):
    """The stock wrapper with our line of progress in the place of its bar; several processes share the documents."""

    name = ""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if processes.count() > 1:  # the wrapper looks for them only where it loads the model itself
            self.accelerator = Accelerator(cpu=True)
            self._rank, self._world_size = processes.index(), processes.count()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        with self._progress(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        with self._progress(requests):
            return super().generate_until(requests, disable_tqdm=True)

    def _progress(self, requests: Any) -> Stage:
        stage = Stage(self.name, len(requests), "answers")
        self.set_cache_hook(_Answered(stage))
        return stage


class _Answered(CacheHook):
    """lm-eval tells its cache of every answer; this one only counts them."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(None)
        self._stage = stage

    def add_partial(self, *answer: Any) -> None:
        self._stage.step()


def _task_result(found: Any, samples: Any, name: str, offline: bool, seconds: float) -> TaskResult:
    """One leaf task of lm-eval's results, where metrics are keyed "metric,filter"."""
    values = found["results"][name]
    metrics: dict[str, Metric] = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else key
            metrics[label] = Metric(value, error if isinstance(error, float) else None)
    per_document: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):  # once for each filter of its answer
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                label = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                per_document.setdefault(label, []).append(float(sample[metric]))
    return TaskResult(
        task=name,
        documents=found["n-samples"][name]["effective"],
        few_shot=found["n-shot"][name],
        offline_copy=offline,
        metrics=metrics,
        per_document=per_document,
        seconds=seconds,
    )
