"""What ``--evaluate`` knows by name; anything else is lm-eval tasks or groups by comma.

To add one: a line in ``PRESETS``. Texts and tasks that only the hub has are measured where it, or its cache, can be reached.
"""

from dataclasses import replace

from checkpoint.errors import UserError
from eval.results import EvaluationSettings
from eval.task_files import TASKS

PRESETS: dict[str, tuple[str, EvaluationSettings]] = {
    "quick": (
        "perplexity on two texts, 50 documents of two tasks",
        EvaluationSettings(tasks=("arc_easy", "piqa"), limit=50),
    ),
    "texts": ("perplexity on those two texts alone", EvaluationSettings()),
    # LLM-ROM (arXiv 2312.07046), section 3: these seven tasks, zero-shot; perplexity where SVD-LLM and SliceGPT report it
    "papers": (
        "WikiText-2, C4 and PTB where they can be had, BoolQ passages, and seven zero-shot tasks, whole",
        EvaluationSettings(
            texts=("wikitext-2", "c4", "ptb", "boolq-validation"),
            where_available=True,
            window=2048,
            max_windows=256,
            tasks=tuple(TASKS),
        ),
    ),
    "leaderboard": (
        "lm-eval's leaderboard group with its own few-shot settings; its documents come from the hub",
        EvaluationSettings(texts=(), tasks=("leaderboard",)),
    ),
}
QUICK = PRESETS["quick"][1]


def settings_for(evaluate: str) -> EvaluationSettings:
    """A preset by name, or the texts of ``quick`` and these tasks on all documents; UserError for an empty list."""
    if evaluate in PRESETS:
        return PRESETS[evaluate][1]
    tasks = tuple(filter(None, (task.strip() for task in evaluate.split(","))))
    if not tasks:
        raise UserError(
            f"--evaluate {evaluate!r} names nothing: say {', '.join(PRESETS)}, none, or lm-eval tasks by comma"
        )
    return replace(QUICK, tasks=tasks, limit=None)
