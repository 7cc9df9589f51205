"""Text tables: cells in columns."""

from collections.abc import Sequence

from trd_jax.experiment import printing


def columns(
  rows: Sequence[Sequence[str]], align: str = "", indent: str = ""
) -> str:
  """Returns rows of cells as lines, two spaces between the columns.

  Args:
    rows: as many cells each; a column is as wide as its widest cell. What would
      command a terminal is shown, and a cell with newlines is one line.
    align: a character a column, `<` for cells that begin together and `>` for
      cells that end together; the last one counts for all that follow. Empty,
      all begin together.
    indent: stands before each line.
  """
  # Before the widths are taken: shown, a character is wider.
  rows = [
    [printing.clean(cell).replace("\n", "\\n") for cell in row] for row in rows
  ]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  align = (align or "<").ljust(len(widths), (align or "<")[-1])
  return "\n".join(
    indent
    + "  ".join(
      f"{cell:{side}{width}}"
      for cell, side, width in zip(row, align, widths, strict=True)
    ).rstrip()
    for row in rows
  )


def size(count: int) -> str:
  """Writes bytes in the larger unit that they fill."""
  for unit, bits in (("TiB", 40), ("GiB", 30)):
    if count >= 2**bits:
      return f"{count / 2**bits:.1f} {unit}"
  return f"{count / 2**20:.1f} MiB"
