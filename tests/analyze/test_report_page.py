"""The report as a browser shows it: driven by hand, opened from the disk."""

import random
import re
from importlib import resources

import pytest

from tests.support import browsers, report_runs
from tests.support.report_runs import HOSTILE_ID, LONG, SAME, WORSE
from trd_jax.analyze import report
from trd_jax.analyze.analysis import Column, Number, Result, Table
from trd_jax.analyze.runs import Run

pytestmark = browsers.NEEDED

RESULTS = {
  "results": Result(
    findings=("It learnt <b>a lot</b>.",),
    tables=(
      Table(
        "numbers",
        "What is counted.",
        (Column("name"), Column("share", "share")),
        (
          ("b", Number(0.25, 0.2, 0.3, -0.5)),
          ("a", Number(0.5, best=True)),
          ("<i>c</i>", None),
        ),
      ),
      Table(
        "wide",
        "Wider than a phone.",
        [Column(f"column {n}", "number") for n in range(20)],
        [[Number(12345.6, best=True)] * 20],
      ),
    ),
  )
}


@pytest.fixture(scope="module")
def page_url(tmp_path_factory):
  """A report of two runs, of which the second wrote other y_r."""
  root = tmp_path_factory.mktemp("report")
  one = report_runs.workdir(root / "one")
  two = report_runs.workdir(root / "two", prefix="So\n", scored=False)
  folder = one.root / "analyze" / "report"
  runs = [Run(one.root, "one <u>"), Run(two.root, "two")]
  report.write(runs, RESULTS, folder)
  return (folder / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser():
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    opened = browsers.launch(playwright)
    yield opened
    opened.close()


@pytest.fixture
def visit(browser, page_url):
  """Opens the report at an address; what goes wrong on it fails the test."""
  faults, contexts = [], []

  def visited(address="", width=1280, **options):
    context = browser.new_context(
      viewport={"width": width, "height": 900}, **options
    )
    contexts.append(context)
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.on(
      "console",
      lambda told: (
        told.type in ("error", "warning") and faults.append(told.text)
      ),
    )
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on(
      "request",
      lambda asked: asked.url.startswith("file:") or faults.append(asked.url),
    )
    page.goto(page_url + address)
    return page

  visited.faults = faults
  yield visited
  for context in contexts:
    for page in context.pages:
      if page.evaluate("window.hacked"):
        faults.append("what a model wrote was run")
    context.close()
  assert faults == []


def open_first(page):
  page.locator("#list a").first.click()
  page.locator(".lane .words").first.wait_for()


def texts(page):
  """y_o and y_r as they are shown, without what was added for a reader."""
  return page.locator(".lane").first.evaluate(
    """lane => [...lane.querySelectorAll('.text:not(.reference) .words')].map(
      words => { const copy = words.cloneNode(true);
        copy.querySelectorAll('.note, .newline, .empty').forEach(
          one => one.remove());
        return copy.textContent; })"""
  )


def test_the_report_says_what_was_asked_found_and_counted(visit):
  page = visit()
  assert page.locator("h1").inner_text() == "one <u>"
  assert (
    "get better at arithmetic" in page.locator(".question").first.inner_text()
  )
  assert page.locator(".found").inner_text().endswith("It learnt <b>a lot</b>.")
  assert "partial: train, merge, evaluate/base, evaluate/trained" in (
    page.locator(".warnings").first.inner_text()
  )
  rows = page.locator("table.sortable").first.locator("tbody tr")
  assert "25.0% −50.0 [20.0, 30.0]" in rows.first.inner_text().replace(
    "\t", " "
  )
  sort = page.get_by_role("button", name="share")
  sort.click()
  assert [row.split()[0] for row in rows.all_inner_texts()] == [
    "b",
    "a",
    "<i>c</i>",
  ]
  sort.click()
  assert [row.split()[0] for row in rows.all_inner_texts()] == [
    "a",
    "b",
    "<i>c</i>",
  ]
  assert sort.locator("..").get_attribute("aria-sort") == "descending"


def test_filters_search_and_keys_choose_a_trajectory(visit):
  page = visit("#inspect")
  items = page.locator("#list a")
  assert items.count() == 5
  page.get_by_role("button", name="wrong → right").click()
  assert items.count() == 1
  page.get_by_role("button", name="Clear").click()
  page.keyboard.press("/")
  page.keyboard.type("ADD 8")
  assert items.count() == 1
  page.keyboard.press("Escape")
  page.keyboard.press("j")
  page.locator(f"h3:has-text('{SAME}')").wait_for()
  assert (
    "y_o and y_r are the same text" in page.locator(".toolbar").inner_text()
  )
  page.locator("#query").fill("")
  page.keyboard.press("Escape")
  page.keyboard.press("j")
  page.locator(f"h3:has-text('{WORSE}')").wait_for()
  assert f"t={WORSE}" in page.url
  page.keyboard.press("k")
  page.locator(f"h3:has-text('{SAME}')").wait_for()
  page.locator("#more summary").click()
  page.get_by_label("scored by token").check()
  assert items.count() == 3
  page.locator("#least").fill("5000")
  page.locator("#least").blur()
  assert items.count() == 1
  page.keyboard.press("?")
  assert page.get_by_role("dialog").is_visible()


def test_a_search_finds_what_only_a_whole_text_says(visit):
  page = visit("#inspect")
  page.locator("#more summary").click()
  page.get_by_label("search y_o and y_r, too").check()
  page.locator("#query").fill("boxed{12}")
  page.locator("#count:has-text('1 of 5')").wait_for()
  page.locator("#query").fill("title")  # behind the list's first characters
  page.locator("#list a:has-text('script')").wait_for()
  page.locator("#count:has-text('1 of 5')").wait_for()


def test_differences_are_marked_and_the_first_wrong_step_is_named(visit):
  page = visit("#t=p0")
  page.locator(".lane ins").first.wait_for()
  lane = page.locator(".lane").first
  assert lane.locator("del").all_inner_texts() == ["0", "0"]
  assert lane.locator("ins").all_inner_texts() == ["10", "10"]
  assert "".join(lane.locator("mark.wrong").all_inner_texts()) == "3+7=0"
  assert "right is 3+7=10" in lane.locator(".note").first.inner_text()
  line = "one => getComputedStyle(one).textDecorationLine"
  assert lane.locator("del").first.evaluate(line) == "line-through"
  assert lane.locator("ins").first.evaluate(line) == "underline"
  page.locator("[data-key=diff]").click()
  page.locator(".lane ins").first.wait_for(state="detached")


def differences(page, pairs):
  """What the page's own script finds to differ, of each pair of texts."""
  folder = resources.files("trd_jax.analyze.report") / "page_files"
  source = (folder / "differences.js").read_text("utf-8")
  return page.evaluate(
    "pairs => {" + source + "return pairs.map(p => differences(...p)); }", pairs
  )


def without(text, ranges):
  units = text.encode("utf-16-le")
  kept, at = b"", 0
  for start, end in ranges:
    assert at <= 2 * start < 2 * end <= len(units)
    kept += units[at : 2 * start]
    at = 2 * end
  return (kept + units[at:]).decode("utf-16-le")


def test_what_isnt_marked_is_the_same_in_both_texts(visit):
  rng = random.Random(0)
  words = ["a", "b", "wait ", " ", "\n", "12", "😀", "=", "\\boxed{", "é"]

  def some(most):
    return "".join(rng.choices(words, k=rng.randrange(most)))

  pairs = [(some(60), some(60)) for _ in range(200)]
  # One word of many, long texts that share lines, and some without likeness.
  many = some(40_000) + " " + "x " * 100
  pairs += [(many, many.replace("x ", "y ", 1))]
  lines = [f"{n} {some(9).replace(chr(10), ' ')}\n" for n in range(3_000)]
  other = [
    line.replace("a", "c", 1) if n % 2 else line for n, line in enumerate(lines)
  ]
  pairs += [("".join(lines), "".join(other))]
  pairs += [
    (
      "".join(rng.choices("abcdefgh \n", k=30_000)),
      "".join(rng.choices("ijklmnop \n", k=30_000)),
    )
  ]
  levels = []
  for (one, two), found in zip(pairs, differences(visit(), pairs), strict=True):
    rest = without(one, found["removed"]), without(two, found["added"])
    assert rest[0] == rest[1]
    levels.append(found["level"])
  assert levels[-2:] == ["line", "whole"]
  assert found["removed"]
  _, one_word, by_line, _ = differences(visit(), [pairs[0], *pairs[-3:]])
  assert [end - start for start, end in one_word["removed"]] == [1]
  marked = sum(end - start for start, end in by_line["removed"])
  assert marked < 0.25 * len(pairs[-2][0])  # words, and not their lines


def test_tokens_are_shaded_and_say_their_numbers(visit):
  page = visit("#t=p0")
  page.get_by_role("button", name="D", exact=True).click()
  page.locator(".lane .t").first.wait_for()
  words = page.locator(".text:not(.reference) .words").first
  strength = (
    "one => Number(getComputedStyle(one).getPropertyValue('--strength'))"
  )
  tokens = words.locator(".t")
  found = [tokens.nth(i).evaluate(strength) for i in range(4)]
  assert found[0] == 0
  assert found[1] > 0
  assert found[3] == pytest.approx(3 * found[1], rel=0.01)
  tokens.nth(3).hover()
  panel = page.locator(".panel")
  text = " ".join(panel.inner_text().split())
  assert "token 4 of" in text
  assert "D (forward_kl) 3 nats" in text
  assert "log p −0.75 −1.5" in text
  assert "entropy 0.125 0.375" in text
  assert "Student’s likeliest = (this one) 75.0%" in text
  assert "Teacher’s likeliest = (this one) 50.0%" in text
  page.get_by_role("button", name="after training").click()
  page.locator(".lane .t").first.wait_for()
  words.focus()
  page.keyboard.press("ArrowRight")
  page.keyboard.press("ArrowRight")
  text = " ".join(panel.inner_text().split())
  assert "token 2 of" in text
  assert "D (forward_kl) 0.5 nats" in text
  assert "clipped" in text
  page.keyboard.press("s")
  assert (
    page.get_by_role("button", name="Teacher entropy").get_attribute(
      "aria-pressed"
    )
    == "true"
  )
  assert "shade=teacher_entropy" in page.url
  assert "student=trained" in page.url


def test_what_models_and_data_wrote_stays_text(visit):
  page = visit("#inspect")
  page.locator("#list a").first.click()  # its id sorts first
  page.locator(".lane .words").first.wait_for()
  assert page.locator("b, img, u, .text script, .text a").count() == 0
  for mark in ("\x1b", "\x00", "\u202e", "\u200b", "\u2028", "\U000e0041"):
    assert mark not in page.locator("#detail").inner_text()
  y_o, y_r = texts(page)
  for visible in ("</script>", "<!--", "javascript:", "ünï 😀", "␛", "␀"):
    assert visible in y_o
  assert "U+202E" in y_o
  assert y_r == y_o + " more"
  # And with elements for tokens, of which several share a character.
  page.get_by_role("button", name="D", exact=True).click()
  page.locator(".lane .t").first.wait_for()
  assert texts(page) == [y_o, y_r]
  page.get_by_role("button", name="Benchmarks").click()
  open_first(page)
  assert "</script>" in page.locator(".text .words").first.inner_text()


def test_a_line_of_100_000_characters_is_made_where_it_is_seen(visit):
  page = visit(f"#t={LONG}&shade=divergence")
  page.locator(".lane .t").first.wait_for()
  one, other = texts(page)
  assert one == report_runs.LONG_LINE + "a"
  assert other == report_runs.LONG_LINE + "b"
  assert page.locator(".lane del").last.text_content() == "a"
  blocks = page.locator(".lane .block")
  shaded = blocks.evaluate_all(
    "all => all.filter(o => o.block.isShaded).length"
  )
  assert 1 <= shaded < blocks.count() / 2
  words = page.locator(".text:not(.reference) .words").first
  words.evaluate("one => one.scrollTo(0, one.scrollHeight)")
  page.wait_for_function(
    """() => document.querySelector('.text:not(.reference) .words')
      .lastElementChild.querySelector('.t')"""
  )


def test_an_address_restores_a_view(visit):
  page = visit("#inspect")
  page.locator("#list a").first.click()  # its id sorts first
  page.locator(".lane .words").first.wait_for()
  page.get_by_role("button", name="Teacher log p").click()
  page.locator("#sort").select_option("longest")
  page.locator(".lane .t").first.wait_for()
  address = page.url[page.url.index("#") :]
  again = visit(address)
  again.locator(".lane .t").first.wait_for()
  heads = [one.locator("#detail h3").inner_text() for one in (page, again)]
  assert heads[0] == heads[1]
  assert HOSTILE_ID[:9] in heads[0]
  assert again.locator("#sort").input_value() == "longest"
  assert (
    again.get_by_role("button", name="Teacher log p").get_attribute(
      "aria-pressed"
    )
    == "true"
  )
  assert again.locator("#list a[aria-current]").count() == 1


def test_runs_are_compared_and_switched(visit):
  page = visit("#t=p0")
  page.locator(".lane").nth(1).wait_for()
  names = page.locator(".run-name").all_inner_texts()
  assert "one <u>" in names[0]
  assert "two" in names[1]
  refined = page.locator(".lane .text:not(.reference) .words")
  assert refined.nth(3).inner_text().startswith("So\n3+7=10")
  page.locator("#run").select_option("1")
  page.wait_for_function(
    "() => document.querySelector('.run-name')?.innerText.includes('two')"
  )
  assert "run=1" in page.url


def test_benchmark_samples_before_and_after_training(visit):
  page = visit("#mode=q")
  assert page.locator("#list a").count() == 1
  assert "base 1/3" in page.locator("#list").inner_text()
  open_first(page)
  page.get_by_role("button", name="Sample 2, wrong").click()
  page.locator("text=base says 2").wait_for()
  assert (
    page.get_by_role("button", name="Sample 2, wrong").get_attribute(
      "aria-pressed"
    )
    == "true"
  )


@pytest.mark.parametrize(
  "address", ["#report", "#inspect", "#t=p0&shade=divergence"]
)
def test_a_phone_shows_all_without_scrolling_sideways(visit, address):
  page = visit(address, width=400)
  page.wait_for_timeout(100)
  assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_light_and_dark_follow_the_system_and_the_switch(visit):
  paper = "getComputedStyle(document.body).backgroundColor"
  page = visit(color_scheme="dark")
  dark = page.evaluate(paper)
  page.get_by_role("button", name="Dark").click()
  light = page.evaluate(paper)
  assert light != dark
  assert visit().evaluate(paper) == light
  assert [int(n) < 64 for n in re.findall(r"\d+", dark)[:3]] == [True] * 3


def test_the_page_may_run_nothing_but_its_own(visit, page_url):
  page = visit()
  policy = page.locator("meta[http-equiv]").get_attribute("content")
  assert policy.startswith("default-src 'none'; script-src 'sha256-")
  assert "unsafe-inline" not in policy.split("style-src")[0]
  page.evaluate(
    """() => { const one = document.createElement('div');
      one.innerHTML = '<img src="x" onerror="window.hacked = 1">';
      document.body.append(one); }"""
  )
  page.wait_for_timeout(50)
  assert page.evaluate("window.hacked") is None
  assert len(visit.faults) == 2  # the request for x, and the handler
  visit.faults.clear()
