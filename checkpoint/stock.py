"""A stock architecture that lost channels or layers: its shapes, keys and configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from checkpoint.source import Source


class Renumbering:
    """The keys and the configuration of a model without some of its decoder layers."""

    def __init__(self, source: Source, removed: Sequence[str]) -> None:
        self._source = source
        self._list = removed[0].split(".")[-2] if removed else ""
        self._gone = sorted(int(path.rpartition(".")[2]) for path in removed)

    def key(self, key: str) -> str | None:
        """The new name of a stored tensor; None if its layer is gone."""
        found = re.search(rf"(?:^|\.){re.escape(self._list)}\.(\d+)\.", key) if self._gone else None
        if not found:
            return key
        index = int(found.group(1))
        if index in self._gone:
            return None
        return f"{key[: found.start(1)]}{index - sum(gone < index for gone in self._gone)}{key[found.end(1) :]}"

    def config(self) -> dict[str, Any]:
        """config.json with fewer layers, and those entries less in every field that has one a layer."""
        config: dict[str, Any] = json.loads((self._source.directory / "config.json").read_text(encoding="utf-8"))
        settings = self._source.config
        depth = settings.num_hidden_layers
        config[settings.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = depth - len(self._gone)
        for name, value in settings.to_dict().items():  # some are computed from the depth, and would come out otherwise
            if isinstance(value, list) and len(value) == depth:
                config[name] = [item for index, item in enumerate(value) if index not in self._gone]
        return config


def pruned_config(source: Source, widths: set[int]) -> dict[str, Any] | None:
    """The source's config.json with the field changed that holds the pruned width; None where nothing is pruned.

    ``widths`` are the numbers of channels that layers keep: raises ValueError if the configuration cannot hold them.
    """
    if not widths:
        return None
    config: dict[str, Any] = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
    fields = [name for name in WIDTHS if hasattr(source.config.get_text_config(), name)]
    if len(widths) != 1 or len(fields) != 1:
        raise ValueError(f"no stock configuration holds the pruned widths {sorted(widths)} (fields: {fields})")
    config[fields[0]] = next(iter(widths))
    return config


# what the configurations of transformers call the width of the feed-forward network
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
