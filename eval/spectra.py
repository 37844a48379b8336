"""The plot of a threshold on singular values: every weight's normalised spectrum, by role, cut where its rank is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_spectra(path: Path, plan: Any, spectra: Mapping[str, Sequence[float]]) -> None:
    """``spectra`` are normalised. One panel a role, one line a layer (dark to light with depth).

    A dot where it is cut, none where it stays dense.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    linears = [linear for linear in plan.structure.linears if linear.name in spectra]
    roles = list(dict.fromkeys(linear.role for linear in linears))
    columns = min(len(roles), 4)
    rows = -(-len(roles) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.6 * rows), squeeze=False, sharey=True)
    depth = max(len(plan.structure.layers) - 1, 1)
    for axes, role in zip(panels.flat, roles, strict=False):
        for linear in linears:
            if linear.role != role:
                continue
            normal = spectra[linear.name]
            shares = [index / len(normal) for index in range(len(normal))]
            colour = plt.get_cmap("viridis")(linear.layer / depth)
            axes.plot(shares, normal, color=colour, linewidth=0.8)
            rank = plan.choices[linear.name]
            if rank is not None and rank < len(normal):
                axes.plot(shares[rank], normal[rank], "o", color=colour, markersize=3)
        axes.set(title=role, xlabel="share of the ranks")
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(roles) :]:
        axes.set_visible(False)
    panels[0][0].set_ylabel("normalised singular value")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
