"""Evaluate one model directory, or a compressed one beside its dense model, figure by cached figure."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from checkpoint import processes
from checkpoint.errors import UserError
from eval.cache import FigureCache, cache_root
from eval.harness import has_offline_copies, run_task, task_manager
from eval.lm_eval_file import merged
from eval.models import Subject, evaluation_dtype
from eval.perplexity import divergence, perplexity
from eval.results import DivergenceResult, Evaluation, EvaluationSettings, Missing, PerplexityResult, TaskResult
from eval.texts import Text, load_text

logger = logging.getLogger(__name__)

# Raise when a change here changes a figure: figures cached under another number are not found.
_PROTOCOL = 2
_LIBRARIES = ("torch", "transformers", "lm-eval")


def check(model_dir: Path, settings: EvaluationSettings, trust_remote_code: bool = False) -> None:
    """Raise UserError for what would stop an evaluation before its first figure; measures nothing."""
    dtype, reason = evaluation_dtype()
    Subject(model_dir, dtype, trust_remote_code)
    _Session(settings, dtype, reason)


def evaluate(model_dir: Path, settings: EvaluationSettings, trust_remote_code: bool = False) -> Evaluation:
    """All figures of one model directory, from the cache where they were measured before."""
    dtype, reason = evaluation_dtype()
    subject = Subject(model_dir, dtype, trust_remote_code)
    session = _Session(settings, dtype, reason)
    perplexities = [session.perplexity(subject, text) for text in session.texts]
    return session.evaluation(subject, perplexities, *session.tasks(subject))


def compare(
    model_dir: Path, dense_dir: Path, settings: EvaluationSettings, trust_remote_code: bool = False
) -> tuple[Evaluation, Evaluation]:
    """The dense model's figures and the compressed one's with its divergences, on the same windows.

    ``trust_remote_code`` concerns ``model_dir`` alone. Both models are in memory while texts are measured.
    """
    dtype, reason = evaluation_dtype()
    compressed, dense = Subject(model_dir, dtype, trust_remote_code), Subject(dense_dir, dtype, False)
    session = _Session(settings, dtype, reason)
    pairs = [session.pair(dense, compressed, text) for text in session.texts]
    dense.release()
    after = session.tasks(compressed)
    compressed.release()
    before = session.tasks(dense)
    return (
        session.evaluation(dense, [pair[0] for pair in pairs], *before),
        session.evaluation(compressed, [pair[1] for pair in pairs], *after, [pair[2] for pair in pairs]),
    )


class _Session:
    """What the figures of one call share: texts and task names checked before any model is loaded."""

    def __init__(self, settings: EvaluationSettings, dtype: torch.dtype, dtype_reason: str) -> None:
        self.settings = settings
        self.dtype_name, self.dtype_reason = str(dtype).removeprefix("torch."), dtype_reason
        logger.info("evaluating in %s: %s", self.dtype_name, self.dtype_reason)
        # one process says which texts there are: of several each might reach others
        self.texts, self.missing = processes.of_main(lambda: _texts(settings))
        with processes.main_first():  # what is not in the user's cache yet is brought once
            self.manager = task_manager(settings.tasks, settings.online)
        self.versions = {name: version(name) for name in _LIBRARIES}
        self.cache = FigureCache(cache_root() / "evaluations")

    def perplexity(self, subject: Subject, text: Text) -> PerplexityResult:
        def measure() -> list[Any]:
            window = self._window(subject)
            result = perplexity(subject.model, subject.tokenizer, text, window, self.settings.max_windows)
            return [asdict(result)]

        keys = [self._text_key("perplexity", text, subject)]
        [figure], marks = self._figures(f"{subject.directory.name}: {text.name}", keys, measure)
        return PerplexityResult.from_json(figure | marks | {"text": text.name})

    def pair(
        self, dense: Subject, compressed: Subject, text: Text
    ) -> tuple[PerplexityResult, PerplexityResult, DivergenceResult]:
        """Both perplexities and the divergence. One forward of each model gives all three."""

        def measure() -> list[Any]:
            _same_tokens(dense, compressed, text)
            window = min(self._window(dense), self._window(compressed))
            results = divergence(
                dense.model, compressed.model, dense.tokenizer, text, window, self.settings.max_windows
            )
            return [asdict(result) for result in results]

        keys = [
            self._text_key("perplexity", text, dense),
            self._text_key("perplexity", text, compressed),
            self._text_key("divergence", text, dense, compressed),
        ]
        figures, marks = self._figures(f"both models: {text.name}", keys, measure)
        before, after, measured = (figure | marks | {"text": text.name} for figure in figures)
        return (
            PerplexityResult.from_json(before),
            PerplexityResult.from_json(after),
            DivergenceResult.from_json(measured),
        )

    def tasks(self, subject: Subject) -> tuple[list[TaskResult], dict[str, Any]]:
        """Every task's figures, and lm-eval's own words of them."""
        found = [self._task(subject, task) for task in self.settings.tasks]
        return [result for results, _ in found for result in results], merged([told for _, told in found])

    def _task(self, subject: Subject, task: str) -> tuple[list[TaskResult], dict[str, Any]]:
        limit, chat_template = self.settings.limit, self.settings.chat_template

        def measure() -> list[Any]:
            results, told = run_task(subject.model, subject.tokenizer, task, self.manager, limit, chat_template)
            return [{"tasks": [asdict(result) for result in results], "lm_eval": told}]

        key = self._key("task", subject) | {
            "task": task,
            "limit": limit,
            "offline": has_offline_copies(self.manager),
            "chat_template": chat_template,
        }
        [figure], marks = self._figures(f"{subject.directory.name}: {task}", [key], measure)
        return [TaskResult.from_json(result | marks) for result in figure["tasks"]], figure["lm_eval"]

    def _figures(
        self, what: str, keys: list[dict[str, Any]], measure: Callable[[], list[Any]]
    ) -> tuple[list[Any], dict[str, bool]]:
        """The figures filed under ``keys``, or all measured and filed now; and how to mark them."""
        started = time.monotonic()
        found = processes.of_main(lambda: [self.cache.get(key) for key in keys])
        cached = None not in found
        if not cached:
            found = measure()
            for key, figure in zip(keys, found, strict=True) if processes.is_main() else ():
                self.cache.put(key, figure)
        logger.info("%s: %s", what, "measured before" if cached else f"{time.monotonic() - started:.1f} s")
        return found, {"cached": cached}

    def evaluation(
        self,
        subject: Subject,
        perplexities: Sequence[PerplexityResult],
        tasks: Sequence[TaskResult],
        lm_eval: dict[str, Any],
        divergences: Sequence[DivergenceResult] = (),
    ) -> Evaluation:
        return Evaluation(
            model=str(subject.directory),
            fingerprint=subject.fingerprint,
            dtype=self.dtype_name,
            dtype_reason=self.dtype_reason,
            versions=self.versions,
            perplexities=tuple(perplexities),
            tasks=tuple(tasks),
            divergences=tuple(divergences),
            missing=tuple(self.missing),
            lm_eval=lm_eval,
        )

    def _window(self, subject: Subject) -> int:
        """The window asked for, or as many positions as the model has; the result says which it was."""
        positions = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
        return min(self.settings.window, positions or self.settings.window)

    def _key(self, kind: str, *subjects: Subject) -> dict[str, Any]:
        models = [subject.fingerprint for subject in subjects]
        # documents that are shared out are batched otherwise, which changes last bits
        shared = {"processes": processes.count()} if processes.count() > 1 else {}
        return {
            "protocol": _PROTOCOL,
            "kind": kind,
            "models": models,
            "dtype": self.dtype_name,
            **self.versions,
            **shared,
        }

    def _text_key(self, kind: str, text: Text, *subjects: Subject) -> dict[str, Any]:
        settings = {"window": self.settings.window, "max_windows": self.settings.max_windows}
        return self._key(kind, *subjects) | {"text": text.sha256} | settings


def _texts(settings: EvaluationSettings) -> tuple[list[Text], list[Missing]]:
    """The texts, and which of them cannot be had where that is allowed."""
    texts, missing = list[Text](), list[Missing]()
    for name in settings.texts:
        try:
            texts.append(load_text(name))
        except UserError as error:
            if not settings.where_available:
                raise
            logger.warning("not measured: %s: %s", name, error)
            missing.append(Missing(name, str(error)))
    return texts, missing


def _same_tokens(dense: Subject, compressed: Subject, text: Text) -> None:
    sample = text.content[:100_000]
    before, after = (each.tokenizer(sample, verbose=False)["input_ids"] for each in (dense, compressed))
    if before != after:
        raise UserError(
            f"{dense.directory} and {compressed.directory} turn {text.name} into different tokens: "
            "compare a model with the one that it was made from"
        )
