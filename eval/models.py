"""A model directory as an object to evaluate: identified by content, loaded only when a figure is missing."""

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from checkpoint.errors import UserError
from eval.cache import model_fingerprint

logger = logging.getLogger(__name__)


def evaluation_dtype() -> tuple[torch.dtype, str]:
    """bfloat16 where this CPU multiplies it in hardware, else float32; and the reason, to be logged."""
    capabilities = torch.cpu.get_capabilities()
    for name in ("amx_bf16", "avx512_bf16"):
        if capabilities.get(name):
            return torch.bfloat16, f"this CPU has {name}"
    return torch.float32, "this CPU has neither amx_bf16 nor avx512_bf16"


class Subject:
    """A checkpoint under evaluation. ``release`` frees its memory; it loads again if asked again.

    Raises UserError where the directory is no checkpoint, or brings code that is not trusted.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, trust_remote_code: bool) -> None:
        self.directory = directory
        self.dtype = dtype
        self.trust_remote_code = trust_remote_code
        self._check()

    @cached_property
    def fingerprint(self) -> str:
        """The content hash of all that decides the figures; reads every byte of the weights."""
        return model_fingerprint(self.directory)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The directory's tokenizer."""
        return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in evaluation mode; UserError where weights are missing or have other shapes.

        transformers only warns of those, and fills them with random numbers.
        """
        logger.info("loading %s in %s", self.directory, str(self.dtype).removeprefix("torch."))
        model, info = AutoModelForCausalLM.from_pretrained(
            self.directory,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            output_loading_info=True,
        )
        for problem in ("missing_keys", "mismatched_keys"):
            if info[problem]:
                names = ", ".join(sorted(str(key) for key in info[problem])[:3])
                raise UserError(f"{self.directory} has {problem.replace('_', ' ')} ({names}): write it anew")
        if info["unexpected_keys"]:
            names = ", ".join(sorted(info["unexpected_keys"]))
            logger.warning("%s has weights that its model does not use: %s", self.directory, names)
        return model.eval()

    def release(self) -> None:
        """Drop the loaded model."""
        self.__dict__.pop("model", None)

    def _check(self) -> None:
        path = self.directory / "config.json"
        if not path.is_file():
            raise UserError(f"{self.directory} has no config.json: give the path of a model directory")
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        own_code = "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING
        if own_code and not self.trust_remote_code:
            raise UserError(f"{self.directory} brings its own code: read it, then add --trust-remote-code")
