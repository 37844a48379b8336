"""Durable files: a name appears only when its bytes are on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def fsync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Flush the bytes of an already written file to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file (or directory) its final name: fsync, rename, fsync of the directory."""
    fsync_file(temporary)
    os.replace(temporary, final)
    fsync_directory(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` under ``path`` atomically and durably."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON under ``path`` atomically and durably."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
