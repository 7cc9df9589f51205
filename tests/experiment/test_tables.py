from trd_jax.experiment import tables


def test_cells_begin_or_end_together_and_lines_end_without_spaces():
  rows = [("GiB", "base", ""), ("a", "1.25", "fits"), ("all of it", "10", "")]
  assert tables.columns(rows).splitlines() == [
    "GiB        base",
    "a          1.25  fits",
    "all of it  10",
  ]
  assert tables.columns(rows, "<>", indent="  ").splitlines() == [
    "  GiB        base",
    "  a          1.25  fits",
    "  all of it    10",
  ]


def test_a_table_of_nothing_is_empty():
  assert tables.columns([]) == ""
