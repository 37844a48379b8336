"""Content hashes and the store of measured figures."""

from pathlib import Path

import pytest

from checkpoint.errors import UserError
from eval.cache import FigureCache, cache_root, model_fingerprint


def _checkpoint(directory: Path) -> Path:
    directory.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "modeling.py"):
        (directory / name).write_text(name)
    return directory


def test_cache_root_is_the_named_directory_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAYERPRESS_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("LAYERPRESS_CACHE")
    assert cache_root() == Path.home() / ".cache" / "layerpress"


def test_fingerprint_ignores_reports(tmp_path: Path) -> None:
    directory = _checkpoint(tmp_path / "model")
    before = model_fingerprint(directory)
    (directory / "evaluation.json").write_text("{}")
    assert model_fingerprint(directory) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "modeling.py"])
def test_fingerprint_changes_with_every_file_that_is_loaded(tmp_path: Path, name: str) -> None:
    directory = _checkpoint(tmp_path / "model")
    before = model_fingerprint(directory)
    (directory / name).write_text("other")
    assert model_fingerprint(directory) != before


def test_figures_are_found_under_their_whole_key_only(tmp_path: Path) -> None:
    cache = FigureCache(tmp_path / "figures")
    key = {"model": "abc", "text": "def", "window": 8}
    assert cache.get(key) is None
    cache.put(key, {"perplexity": 2.5})
    assert cache.get(dict(reversed(key.items()))) == {"perplexity": 2.5}
    assert cache.get(key | {"window": 16}) is None


def test_only_whole_figures_appear(tmp_path: Path) -> None:
    cache = FigureCache(tmp_path)
    with pytest.raises(TypeError):
        cache.put({"model": "abc"}, object())
    assert list(tmp_path.glob("*.json")) == []


def test_a_damaged_figure_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    cache = FigureCache(tmp_path)
    cache.put({"model": "abc"}, 1)
    [path] = tmp_path.glob("*.json")
    path.write_text("{")
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        cache.get({"model": "abc"})
