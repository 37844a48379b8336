"""The user's cache: where it is, content hashes, and figures that were measured before.

A figure is filed under the hash of everything it depends on (the model's files, the text or task, the
settings, the library versions), so a stale one cannot be found, only left behind.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.errors import UserError
from checkpoint.files import write_json

# What `from_pretrained` reads of a model directory; a report written beside must not change the hash.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "quantization_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "*.py",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
)


def cache_root() -> Path:
    """``$LAYERPRESS_CACHE``, or ``~/.cache/layerpress``; always absolute, not necessarily there yet."""
    named = os.environ.get("LAYERPRESS_CACHE")
    return (Path(named).expanduser() if named else Path.home() / ".cache" / "layerpress").absolute()


def file_sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_fingerprint(directory: Path) -> str:
    """The sha256 of a model directory's config, weights, code and tokenizer: their names and their bytes."""
    names = {path.name for pattern in _MODEL_FILES for path in directory.glob(pattern) if path.is_file()}
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{file_sha256(directory / name)}\n".encode())
    return digest.hexdigest()


class FigureCache:
    """Measured figures as small JSON files, one a figure, under ``<cache>/evaluations``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, key: Mapping[str, Any]) -> Any | None:
        """The figure filed under ``key`` (plain JSON data), or None. UserError if its file is damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))["figure"]
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(f"the cached figure {path} is damaged ({error}): delete it") from error

    def put(self, key: Mapping[str, Any], figure: Any) -> None:
        """File ``figure`` (plain JSON data) under ``key``, durably."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self._path(key), {"key": dict(key), "figure": figure})

    def _path(self, key: Mapping[str, Any]) -> Path:
        canonical = json.dumps(key, sort_keys=True, ensure_ascii=True)
        return self.directory / f"{hashlib.sha256(canonical.encode()).hexdigest()}.json"
