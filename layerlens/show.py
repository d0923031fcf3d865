"""Rows of numbers on stdout: an aligned table, or JSON."""

from __future__ import annotations

import json
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def show(rows: list[dict[str, Any]], as_json: bool, columns: list[str] | None = None) -> None:
    """Rows as an aligned table, or as JSON (one object for a single row)."""
    if as_json:
        click.echo(json.dumps(rows if len(rows) != 1 else rows[0], allow_nan=False))
        return
    if not rows:
        return
    names = columns or list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4f}"
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)
