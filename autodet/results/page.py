"""HTML by hand: every value that comes from outside goes through `escape`."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #e2e2e2; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #999; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
code, pre { font: .88rem/1.45 ui-monospace, monospace; background: #f5f5f5; overflow-wrap: anywhere; }
pre { padding: .6rem .8rem; white-space: pre-wrap; } code { padding: 0 .2rem; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption, .quiet { color: #666; font-size: .88rem; }
@media (max-width: 44rem) {
  table { display: block; overflow-x: auto; } td code { display: inline-block; min-width: 14rem; }
  figure { overflow-x: auto; } figure img { max-width: 150%; }
}
"""


def escape(value: object) -> str:
    """A value as text that is safe in HTML, also within quotes."""
    return html.escape(str(value), quote=True)


def page(title: str, sections: Iterable[str]) -> str:
    """A whole document that needs nothing beside itself."""
    body = "\n".join(section for section in sections if section)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading with what belongs to it; nothing where there is nothing to show."""
    content = "\n".join(part for part in parts if part)
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def paragraph(text: str, quiet: bool = False) -> str:
    """Escaped running text."""
    return f'<p class="quiet">{escape(text)}</p>' if quiet else f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Escaped text that keeps its lines."""
    return f"<pre>{escape(text)}</pre>"


def bullets(items: Iterable[str]) -> str:
    """Escaped texts as a list."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], code: Sequence[str] = ()) -> str:
    """A table; numbers are aligned right, columns named in `code` are set as code. Nothing without rows."""
    if not rows:
        return ""
    numeric = [all(isinstance(row[i], (int, float, Number)) for row in rows) for i in range(len(columns))]
    head = "".join(f"<th{_class(n)}>{escape(c)}</th>" for c, n in zip(columns, numeric, strict=True))
    lines = []
    for row in rows:
        cells = zip(columns, numeric, row, strict=True)
        lines.append("".join(f"<td{_class(n)}>{_cell(value, name in code)}</td>" for name, n, value in cells))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


class Number(str):
    """A number that is already formatted."""


def points(ap: Any) -> Number:
    """An AP of 0–1 as 0–100; nothing for NaN."""
    return Number("" if pd.isna(ap) else f"{ap * 100:.1f}")


def signed_points(difference: Any) -> Number:
    """A difference of APs of 0–1 in AP points, with its sign; nothing for NaN."""
    return Number("" if pd.isna(difference) else f"{difference * 100:+.1f}")


def range_of_points(low: Any, high: Any) -> Number:
    """An interval of APs of 0–1 in AP points; nothing for NaN."""
    return Number("" if pd.isna(low) else f"{low * 100:.1f} to {high * 100:.1f}")


def picture(png: bytes, caption: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _class(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _cell(value: object, code: bool) -> str:
    return f"<code>{escape(value)}</code>" if code else escape(value)
