"""What analyses found, as sections of the page: sentences, figures, tables."""

import html as html_text
import re
from collections.abc import Mapping
from pathlib import Path

from trd_jax.analyze import formats, look
from trd_jax.analyze.analysis import (
  Cell,
  Column,
  Figure,
  Number,
  Result,
  Table,
  registry,
)
from trd_jax.analyze.report.escaping import text
from trd_jax.experiment import printing

_OPEN_ROWS = 12  # of a table that is shown at once
_WIDTH = re.compile(r'<svg [^>]*?width="([0-9.]+)pt"')


def html(results: Mapping[str, Result], outputs: Path) -> str:
  """Returns all sections as HTML, in the order of the results.

  Args:
    results: by the name of the analysis.
    outputs: where `figures/` and `tables/` lie; what is there is linked to.
  """
  return "\n".join(
    _section(name, result, outputs) for name, result in results.items()
  )


def contents(results: Mapping[str, Result]) -> str:
  """Returns the list of the sections, as links."""
  items = "".join(
    f'<li><a href="#{text(name)}">{text(_title(name))}</a></li>'
    for name in results
  )
  return f"<ol>{items}</ol>" if items else ""


def _title(name: str) -> str:
  found = registry().get(name)
  return found.title if found else name


def _section(name: str, result: Result, outputs: Path) -> str:
  found = registry().get(name)
  safe = "".join(one for one in name if one.isalnum())
  parts = [f'<section class="analysis" id="{text(name)}">']
  parts.append(f"<h2>{text(_title(name))}</h2>")
  if found:
    asks = text(found.question)
    if found.paper:
      asks += f' <span class="paper">{text(found.paper)}</span>'
    parts.append(f'<p class="asks">{asks}</p>')
  if result.partial:
    parts.append(f'<p class="partial">Partial: {text(result.partial)}</p>')
  if result.findings:
    lines = "".join(f"<li>{text(one)}</li>" for one in result.findings)
    parts.append(f'<ul class="findings">{lines}</ul>')
  for number, figure in enumerate(result.figures):
    parts.append(_figure(figure, f"{safe}{number}", outputs))
  parts += [_table(table, outputs) for table in result.tables]
  parts.append("</section>")
  return "\n".join(parts)


def _figure(figure: Figure, prefix: str, outputs: Path) -> str:
  drawn = look.themed(look.svg(figure.draw()), prefix)
  # The words say what the picture shows; its own text is for the eye.
  drawn = drawn.replace("<svg ", '<svg aria-hidden="true" ', 1)
  links = _links(outputs / "figures", figure.name, ("svg", "png"))
  width = _WIDTH.search(drawn)
  pixels = float(width[1]) * 4 / 3 if width else 600  # of points
  return (
    '<figure class="drawn"><div class="canvas" role="img" tabindex="0"'
    f' aria-label="{_attribute(figure.described)}"'
    f' style="--width: {pixels:.0f}">{drawn}</div>'
    f"<figcaption>{text(figure.caption)}{links}</figcaption></figure>"
  )


def _table(table: Table, outputs: Path) -> str:
  heads = "".join(_head(n, one) for n, one in enumerate(table.columns))
  rows = "".join(
    "<tr>"
    + "".join(
      _cell(cell, column, is_first=place == 0)
      for place, (cell, column) in enumerate(
        zip(row, table.columns, strict=True)
      )
    )
    + "</tr>"
    for row in table.rows
  )
  links = _links(outputs / "tables", table.name, ("csv", "tex"))
  is_long = len(table.rows) > _OPEN_ROWS
  said = text(table.caption)
  if is_long:
    said = f'<span class="unseen">{said}</span>'
  made = (
    '<div class="scroll" tabindex="0" role="region"'
    f' aria-label="{_attribute(table.caption)}">'
    '<table class="sortable">'
    f"<caption><span>{said}{links}</span></caption>"
    f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
  )
  if not is_long:
    return made
  # So that what was found isn't lost between long tables.
  return (
    f'<details class="long"><summary>Table of {len(table.rows)} rows:'
    f" {text(table.caption)}</summary>{made}</details>"
  )


def _head(number: int, column: Column) -> str:
  kind = ' class="number"' if column.unit != "text" else ""
  return (
    f'<th scope="col"{kind}><button type="button" class="sort"'
    f' data-column="{number}">{text(column.name)}</button></th>'
  )


def _cell(cell: Cell, column: Column, *, is_first: bool) -> str:
  shown = text(formats.shown(cell, column.unit))
  value = cell.value if isinstance(cell, Number) else cell
  value = "" if value is None else value
  raw = f' data-value="{_attribute(value)}"'
  if isinstance(cell, Number):
    if cell.best:
      shown = f'<strong>{shown}<span class="unseen"> (best)</span></strong>'
    if cell.change is not None:
      change = text(formats.shown_change(cell.change, column.unit))
      sign = "up" if cell.change > 0 else "down" if cell.change < 0 else "level"
      shown += f' <span class="change {sign}">{change}</span>'
    if interval := formats.shown_interval(cell, column.unit):
      shown += f' <span class="interval">{text(interval)}</span>'
  if is_first and column.unit == "text":
    return f'<th scope="row"{raw}>{shown}</th>'
  kind = ' class="number"' if column.unit != "text" else ""
  return f"<td{kind}{raw}>{shown}</td>"


def _attribute(value: object) -> str:
  """Returns text as the value of an attribute, which has no elements."""
  return html_text.escape(printing.clean(str(value)))


def _links(folder: Path, name: str, suffixes: tuple[str, ...]) -> str:
  found = "".join(
    f'<a href="../{folder.name}/{text(name)}.{suffix}"'
    f" download>{suffix.upper()}</a>"
    for suffix in suffixes
    if (folder / f"{name}.{suffix}").is_file()
  )
  return f' <span class="files">{found}</span>' if found else ""
