"""The frame of a self-contained HTML page: style for wide and narrow, light and dark; no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --surface:#ffffff; --raised:#f3f5f8; --ink:#1b2430; --muted:#5a6675; --rule:#d5dbe3;
  --accent:#1f5fa8; --second:#b4540a; --third:#2f7d4f; --warn:#8a4b00; --warn-surface:#fff4e0; }
@media (prefers-color-scheme: dark) { :root { --surface:#14181e; --raised:#1d232b; --ink:#e4e9f0; --muted:#9aa7b6; --rule:#333c47;
  --accent:#6fb1ff; --second:#ff9f4a; --third:#71cf96; --warn:#ffcf80; --warn-surface:#3a2c12; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--surface); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--rule); }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.muted, caption { color: var(--muted); } caption { text-align: left; }
.warnings { background: var(--warn-surface); color: var(--warn); border-radius: 6px; padding: .6rem 1rem; }
.warnings ul { margin: .3rem 0; padding-left: 1.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--raised); border-radius: 6px; padding: .5rem .8rem; }
.tiles b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; } .tiles span { color: var(--muted); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child, td:has(.bar) { text-align: left; } th { color: var(--muted); font-weight: 600; }
.bar { display: inline-block; height: .7rem; background: var(--accent); border-radius: 2px; min-width: 1px; }
pre { background: var(--raised); padding: .7rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--muted); font: 12px system-ui, sans-serif; }
svg .label { fill: var(--ink); } svg .grid { stroke: var(--rule); } svg .line { fill: none; stroke-width: 1.6; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .3rem 0; font-size: .9rem; }
.legend i { display: inline-block; width: .9rem; height: .9rem; border-radius: 2px; margin-right: .4rem; vertical-align: -.1rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .5rem 1rem; }
.panels svg { min-width: 0 !important; } .panels h3 { font-size: .95rem; margin: .4rem 0 0; }
"""


def page(title: str, body: str) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it; nothing if nothing does."""
    body = "\n".join(filter(None, parts))
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n" if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table of plain texts, and of ``Markup``."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{told}<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


class Markup(str):
    """Text that is HTML already."""


def bar(part: float) -> Markup:
    """A bar of up to eight rem."""
    return Markup(f'<span class="bar" style="width:{8 * min(max(part, 0.0), 1.0):.2f}rem"></span>')


def _cell(cell: str) -> str:
    return cell if isinstance(cell, Markup) else escape(cell)


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """Figures with their names."""
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in items)
    return f'<div class="tiles">{boxes}</div>'


def listed(items: Iterable[str], kind: str = "") -> str:
    """A list of plain texts."""
    return f'<ul class="{kind}">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def paragraph(text: str, kind: str = "") -> str:
    """Plain text."""
    return f'<p class="{kind}">{escape(text)}</p>'
