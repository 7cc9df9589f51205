"""Figures and tables as they look: colours, bytes, themes, escapes."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tests.support import made_runs
from trd_jax.analyze import analysis, formats, look, runs
from trd_jax.analyze.analysis import Column, Number, Table

HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
# How a colour is seen by whoever lacks one kind of cone (Machado, Oliveira and
# Fernandes 2009, severity 1).
SEEN = {
  "all": np.eye(3),
  "no red": [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  "no green": [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
  "no blue": [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.303900],
  ],
}


def linear(color: str) -> np.ndarray:
  values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  return np.where(
    values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4
  )


def lab(rgb: np.ndarray) -> np.ndarray:
  matrix = [
    [0.4124, 0.3576, 0.1805],
    [0.2126, 0.7152, 0.0722],
    [0.0193, 0.1192, 0.9505],
  ]
  x, y, z = np.cbrt(matrix @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089])
  return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, two: str) -> float:
  light, dark = sorted(
    (linear(c) @ [0.2126, 0.7152, 0.0722] for c in (one, two)), reverse=True
  )
  return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_series_differ_for_every_eye_and_stand_out_from_the_paper(dark):
  series = [look.COLORS[f"series-{n}"][dark] for n in range(1, 7)]
  paper = look.COLORS["paper"][dark]
  for color in series:
    assert contrast(color, paper) >= 3  # WCAG's for what is drawn
  for eye in SEEN.values():
    seen = [lab(np.asarray(eye) @ linear(color)) for color in series]
    for one, two in itertools.combinations(seen, 2):
      assert np.linalg.norm(one - two) > 15
  # In grey the first three, which are most, are told apart by lightness.
  grey = [lab(linear(color))[0] for color in series[:3]]
  for one, two in itertools.combinations(grey, 2):
    assert abs(one - two) > 5
  assert contrast(look.COLORS["ink"][dark], paper) >= 7
  assert contrast(look.COLORS["quiet"][dark], paper) >= 4.5


def test_series_differ_by_more_than_colour():
  looks = [look.series(number) for number in range(12)]
  assert len({(one.marker, str(one.dash)) for one in looks[:6]}) == 6
  assert len({(o.color, o.marker, str(o.dash)) for o in looks}) == 12
  assert len(set(look.HATCHES.values())) == len(look.HATCHES)


def test_every_colour_can_be_told_from_the_others_in_an_svg():
  light = [pair[0] for pair in look.COLORS.values()]
  assert len(set(light)) == len(light)
  assert not {"#000000", "#ffffff"} & set(light)  # matplotlib's own


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
  root = tmp_path_factory.mktemp("look") / "a $x$ <b> & run"
  made_runs.workdir(root)
  other = tmp_path_factory.mktemp("look") / "other"
  made_runs.workdir(other, seed=1, train__learning_rate=1e-3)

  def made():
    opened = runs.open_runs([root, other])
    results = [one.make(opened) for one in analysis.registry().values()]
    return {f.name: f for one in results if one for f in one.figures}

  return made(), made()


def test_equal_figures_have_equal_bytes(figures):
  first, second = figures
  assert first.keys() == second.keys()
  assert len(first) >= 12
  for name in ("results_changes", "trajectory_lengths", "outcomes"):
    assert first[name].draw() is not second[name].draw()
    content = look.svg(first[name].draw())
    assert content == look.svg(second[name].draw())
    assert b"<dc:date>" not in content


def test_figures_take_the_colours_of_their_page(figures):
  for name, figure in figures[0].items():
    content = look.svg(figure.draw())
    used = set(HEX.findall(content.decode()))
    known = {pair[0] for pair in look.COLORS.values()}
    assert used <= known, (name, used - known)
    themed = look.themed(content, "f1")
    assert themed.startswith("<svg")
    bare = re.sub(r"var\(--trd-[a-z0-9-]+, #[0-9a-f]{6}\)", "", themed)
    assert not HEX.findall(bare), name
    ElementTree.fromstring(themed)
    ids = re.findall(r' id="([^"]+)"', themed)
    assert all(one.startswith("f1-") for one in ids)
    links = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', themed)
    assert {one or two for one, two in links} <= set(ids)
    assert not re.findall(r'(?:href|src)="(?!#)', themed)
    assert figure.caption.endswith(".")
    assert figure.described


def test_text_stays_text_and_a_name_is_no_formula(figures):
  content = look.svg(figures[0]["wall_clock"].draw()).decode()
  texts = "".join(ElementTree.fromstring(content).itertext())
  assert "a $x$ <b> & run" in texts
  assert "rollout" in texts


def test_variables_have_both_themes():
  for dark in (False, True):
    text = look.variables(dark)
    for name, pair in look.COLORS.items():
      assert f"--trd-{name}: {pair[dark]};" in text


# -- tables ------------------------------------------------------------------

TABLE = Table(
  "of_names",
  "100% of a_b & c.",
  [Column("who's"), Column("a_1 & b", "share"), Column("n", "count")],
  [
    ["x_y \\ {z} $5 #1 ~^ <t>\n% end", Number(0.5, 0.25, 0.75, -0.1), 1234],
    ["=1+1", Number(0.75, best=True), None],
  ],
)


def test_csv_holds_raw_numbers_with_columns_of_their_own():
  lines = formats.to_csv(TABLE).decode().splitlines()
  assert lines[0] == 'who\'s,a_1 & b,"a_1 & b, low","a_1 & b, high",' + (
    '"a_1 & b, change",n'
  )
  assert lines[-1] == "=1+1,0.75,,,,"
  assert lines[-2].endswith(",0.5,0.25,0.75,-0.1,1234")


def test_latex_escapes_whatever_a_cell_holds():
  text = formats.to_latex(TABLE).decode()
  assert r"x\_y \textbackslash{} \{z\} \$5 \#1" in text
  assert r"\textasciitilde{}\textasciicircum{} \textless{}t\textgreater{}" in (
    text
  )
  assert r"\textbf{75.0}" in text
  assert r"50.0$_{-10.0}$ {\scriptsize [25.0, 75.0]} & 1,234" in text
  assert r"\caption{100\% of a\_b \& c.}" in text
  body = text.split("\\midrule\n")[1].split("\n\\bottomrule")[0]
  for line in body.splitlines():  # one row a line, as many cells as columns
    assert line.endswith(r" \\")
    assert len(re.findall(r"(?<!\\)&", line)) == 2
    assert not re.findall(r"(?<!\\)[%#~^]", line)
  plain = re.sub(r"\\[{}\\]", "", text)
  assert plain.count("{") == plain.count("}")


@pytest.mark.parametrize(
  ("cell", "unit", "wanted"),
  [
    (None, "share", "–"),
    (0.4765625, "share", "47.7%"),
    (Number(1.0), "share", "100.0%"),
    (7700, "tokens", "7,700"),
    (45.5, "tokens", "45.5"),
    (4210.0, "seconds", "1:10 h"),
    (0.0470123, "number", "0.04701"),
    ("text", "text", "text"),
  ],
)
def test_cells_are_written_by_their_unit(cell, unit, wanted):
  assert formats.shown(cell, unit) == wanted


def test_changes_have_a_sign_unless_there_is_none():
  assert formats.shown_change(0.492, "share") == "+49.2"
  assert formats.shown_change(-0.03125, "share") == "−3.1"
  assert formats.shown_change(-0.0001, "share") == "0.0"
  assert formats.in_full(TABLE.rows[0][1], "share") == (
    "50.0% (−10.0) [25.0, 75.0]"
  )
