// The page: its state lies in its address, and keys and switches change it.

const DEFAULTS = {
  run: 0, mode: "t", t: "", n: 0, q: "", cell: "", reason: "", side: "o",
  least: "", most: "", scored: false, cut: false, leak: false, texts: false,
  sort: "", shade: "none", student: "base", context: "", diff: true, page: 0,
};
const state = { ...DEFAULTS, view: "report" };
let listed = []; // entries or questions, filtered and in order
const found = { query: "", problems: new Set(), entries: new Set() };
let searching = 0;

// -- address ----------------------------------------------------------------

function address(change = {}) {
  const whole = { ...state, ...change };
  if (whole.view === "report") return "#report";
  const made = new URLSearchParams();
  for (const [name, fallback] of Object.entries(DEFAULTS)) {
    const value = whole[name];
    if (value !== fallback) made.set(name, typeof value === "boolean" ? Number(value) : value);
  }
  return `#${made.toString() || "inspect"}`;
}

// Takes the state from the address; another one's anchor is the report's.
function fromAddress() {
  const hash = location.hash.slice(1);
  const isInspector = hash === "inspect" || hash.includes("=");
  state.view = isInspector ? "inspector" : "report";
  if (!isInspector) return;
  const read = new URLSearchParams(hash === "inspect" ? "" : hash);
  for (const [name, fallback] of Object.entries(DEFAULTS)) {
    const text = read.get(name);
    if (text === null) state[name] = fallback;
    else if (typeof fallback === "boolean") state[name] = text === "1";
    else if (typeof fallback === "number") state[name] = Math.max(0, Number.parseInt(text, 10) || 0);
    else state[name] = text;
  }
  state.run = Math.min(state.run, DATA.runs.length - 1);
  if (!SHADES.some((one) => one.key === state.shade)) state.shade = "none";
}

function keepAddress() {
  history.replaceState(null, "", address());
}

// -- list -------------------------------------------------------------------

function filterAgain(keepPage = false) {
  const of = state.mode === "t" ?
    filtered(state.run, state, found) : filteredQuestions(state.run, state);
  listed = of;
  if (!keepPage) state.page = 0;
  drawList();
}

function drawList() {
  const pages = Math.max(1, Math.ceil(listed.length / PAGE));
  state.page = Math.min(state.page, pages - 1);
  const here = listed.slice(state.page * PAGE, (state.page + 1) * PAGE);
  const isTraining = state.mode === "t";
  const opened = current();
  byId("list").replaceChildren(...here.map((n) => {
    const href = address(target(n));
    return (isTraining ? listItem : questionItem)(state.run, n, href, n === opened);
  }));
  byId("list").start = state.page * PAGE + 1;
  const { columns, samples } = DATA.runs[state.run];
  const all = isTraining ? columns.cell.length : samples ? samples.ids.length : 0;
  const what = isTraining ? "trajectories" : "questions";
  byId("count").textContent = listed.length === all ?
    `${number(all)} ${what}` : `${number(listed.length)} of ${number(all)} ${what}`;
  byId("page-number").textContent = `${state.page + 1} of ${number(pages)}`;
  byId("page-back").disabled = state.page === 0;
  byId("page-on").disabled = state.page >= pages - 1;
}

// The part of the state that opens an entry, or a question.
function target(n) {
  const { columns, samples } = DATA.runs[state.run];
  if (state.mode === "q") return { t: `${samples.benchmarks[n]}/${samples.ids[n]}`, n: 0 };
  return { t: columns.ids[columns.problem[n]], n: columns.sample[n] };
}

// The entry or question that is open, null where none is.
function current() {
  if (!state.t) return null;
  if (state.mode === "t") return entryOf(state.run, state.t, state.n);
  const { samples } = DATA.runs[state.run];
  if (!samples) return null;
  const q = samples.ids.findIndex((id, i) => `${samples.benchmarks[i]}/${id}` === state.t);
  return q < 0 ? null : q;
}

function drawFilters() {
  const isTraining = state.mode === "t";
  byId("of-training").hidden = !isTraining;
  byId("mode-t").setAttribute("aria-pressed", String(isTraining));
  byId("mode-q").setAttribute("aria-pressed", String(!isTraining));
  byId("mode-q").disabled = !DATA.runs[state.run].samples;
  byId("cells").replaceChildren(byId("cells").querySelector("legend"),
    ...cellButtons(state.run, state.cell, (cell) => change({ cell })));
  const { reasons } = DATA.runs[state.run];
  byId("reason").replaceChildren(make("option", { value: "" }, "any"),
    ...reasons.map((one) => make("option", { value: one }, one.replace(/_/gu, " "))));
  byId("sort").replaceChildren(...Object.entries(ORDERS[state.mode]).map(
    ([value, label]) => make("option", { value }, label)));
  for (const name of ["reason", "side", "least", "most", "sort"]) byId(name).value = state[name];
  if (byId("query").value !== state.q) byId("query").value = state.q;
  for (const name of ["scored", "cut", "leak", "texts"]) byId(name).checked = state[name];
  byId("run").value = String(state.run);
}

// Searches whole texts, piece by piece; what the list shows is searched at once.
async function searchTexts() {
  const mine = ++searching;
  const query = state.q.trim().toLowerCase(), { run } = state;
  if (state.mode !== "t" || query.length < 2 || found.query === query + run + byId("inside").checked) return;
  found.query = "";
  found.problems.clear();
  found.entries.clear();
  const { texts, columns } = DATA.runs[run];
  const progress = (what) => (done, all) => {
    if (mine !== searching) return false;
    byId("count").textContent = `Searching ${what}: ${number(done)} of ${number(all)} pieces`;
    return true;
  };
  const has = (text) => text.toLowerCase().includes(query);
  try {
    let isWhole = await Pieces.each(run, "x", ([text], n) => {
      if (has(text)) found.problems.add(n);
    }, progress("problems"));
    if (isWhole && byId("inside").checked) {
      for (const [letter, of] of [["o", texts.draft], ["r", texts.refined]]) {
        const entries = new Map(Object.entries(of).map(([n, row]) => [row, Number(n)]));
        isWhole &&= await Pieces.each(run, letter, ([text], row) => {
          if (has(text)) found.entries.add(entries.get(row));
        }, progress(letter === "o" ? "y_o" : columns.refined ? "y_r" : ""));
      }
    }
    if (!isWhole) return;
    found.query = query + run + byId("inside").checked;
    filterAgain(true);
  } catch (error) {
    if (mine === searching) byId("count").textContent = error.message;
  }
}

// -- changes ----------------------------------------------------------------

const LISTS = ["run", "mode", "q", "cell", "reason", "side", "least", "most",
  "scored", "cut", "leak", "texts", "sort"];
const OPENS = ["run", "mode", "t", "n"];

function change(changes, focus = false) {
  const before = { ...state };
  Object.assign(state, changes);
  if (state.run !== before.run || state.mode !== before.mode) {
    found.query = "";
    found.problems.clear();
    found.entries.clear();
    state.cell = state.reason = state.sort = "";
    if (state.mode !== before.mode) state.t = "";
  }
  const differs = (names) => names.some((name) => state[name] !== before[name]);
  keepAddress();
  if (differs(LISTS)) {
    drawFilters();
    filterAgain();
    if (differs(["q", "run"])) {
      clearTimeout(change.timer);
      change.timer = setTimeout(searchTexts, 250);
    }
  } else drawList();
  if (differs(OPENS)) openCurrent(focus);
  else if (state.mode === "t" && current() !== null &&
    differs(["shade", "student", "context", "diff"])) Trajectory.changed({ ...state, entry: current() });
}

function openCurrent(focus) {
  const detail = byId("detail"), opened = current();
  Trajectory.close();
  Samples.close();
  byId("inspector").classList.toggle("is-open", Boolean(state.t));
  if (opened === null) {
    detail.replaceChildren(make("div", { class: "empty-detail" },
      state.t ? make("p", {}, "This run has nothing under ", make("code", {}, state.t), ".") :
        make("p", {}, "Choose a trajectory from the list, or press ", make("kbd", {}, "j"), ".")));
    return;
  }
  const update = { step, back: () => { change({ t: "" }); byId("list").querySelector("a")?.focus(); }, set: change };
  detail.scrollTop = 0;
  const shownIn = state.mode === "t" ?
    Trajectory.show(detail, { ...state, entry: opened }, update) :
    Samples.show(detail, { ...state, question: opened }, update);
  if (focus) shownIn.then(() => detail.querySelector("h3")?.focus());
  if (matchMedia("(max-width: 900px)").matches) detail.scrollIntoView();
}

function step(by) {
  if (!listed.length) return;
  const at = listed.indexOf(current());
  const next = at < 0 ? (by > 0 ? 0 : listed.length - 1) :
    Math.min(listed.length - 1, Math.max(0, at + by));
  state.page = Math.floor(next / PAGE);
  change(target(listed[next]));
  byId("list").querySelector('[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
}

// -- views ------------------------------------------------------------------

function showView() {
  const isReport = state.view === "report";
  document.documentElement.dataset.view = state.view;
  byId("report").hidden = !isReport;
  byId("inspector").hidden = isReport;
  byId("to-report").toggleAttribute("aria-current", isReport);
  byId("to-inspector").toggleAttribute("aria-current", !isReport);
  if (isReport) byId("to-report").setAttribute("aria-current", "page");
  else byId("to-inspector").setAttribute("aria-current", "page");
}

function arrive() {
  const before = { ...state };
  fromAddress();
  showView();
  if (state.view === "report") {
    let anchor = null;
    try {
      anchor = byId(decodeURIComponent(location.hash.slice(1)));
    } catch { /* no name of a section */ }
    if (anchor && anchor.id !== "report") anchor.scrollIntoView();
    return;
  }
  drawFilters();
  const isNew = before.view !== state.view || [...LISTS, "page"].some((name) => state[name] !== before[name]);
  if (isNew || !listed.length) filterAgain(true);
  else drawList();
  if (state.q) searchTexts();
  const opened = listed.indexOf(current());
  if (opened >= 0 && isNew) {
    state.page = Math.floor(opened / PAGE);
    drawList();
  }
  openCurrent(before.view !== state.view || before.t !== state.t);
}

// -- light and dark ---------------------------------------------------------

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function drawTheme() {
  const chosen = document.documentElement.dataset.theme;
  const isDark = chosen ? chosen === "dark" : prefersDark.matches;
  byId("theme").setAttribute("aria-pressed", String(isDark));
}

byId("theme").addEventListener("click", () => {
  const isDark = byId("theme").getAttribute("aria-pressed") === "true";
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
  drawTheme();
});
prefersDark.addEventListener("change", drawTheme);
drawTheme();

// -- tables -----------------------------------------------------------------

for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const pressed = event.target.closest("button.sort");
    if (!pressed) return;
    const head = pressed.closest("th"), column = Number(pressed.dataset.column);
    const isUp = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
    const body = table.tBodies[0];
    const value = (row) => row.cells[column].dataset.value ?? "";
    const isNumber = head.classList.contains("number");
    const compared = (a, b) => {
      const [one, other] = [value(a), value(b)];
      if (one === "" || other === "") return (one === "") - (other === "");
      const order = isNumber ? Number(one) - Number(other) : one.localeCompare(other, "en", { numeric: true });
      return isUp ? order : -order;
    };
    body.append(...[...body.rows].sort(compared));
  });
}

// -- keys and fields --------------------------------------------------------

function nextShade(by) {
  if (!Trajectory.isScored()) return;
  const at = SHADES.findIndex((one) => one.key === state.shade);
  change({ shade: SHADES[(at + by + SHADES.length) % SHADES.length].key });
}

const KEYS = {
  j: () => step(1),
  k: () => step(-1),
  s: () => nextShade(1),
  S: () => nextShade(-1),
  b: () => {
    const students = Trajectory.studentsOf();
    if (students.length > 1) change({ student: students.find((one) => one !== state.student) });
  },
  n: () => Trajectory.toNextMark(),
  "/": () => byId("query").focus(),
  Enter: () => {
    if (current() === null) step(1);
    byId("detail").querySelector(".text:not(.reference) .words")?.focus();
  },
  Escape: () => byId("list").querySelector('[aria-current="true"], a')?.focus(),
};

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || byId("keys").open) return;
  const isTyping = event.target.matches("input:not([type=checkbox]), select, textarea");
  if (isTyping) {
    // Not as browsers do it: that would clear what was searched for.
    if (event.key === "Escape" || event.key === "Enter") {
      event.preventDefault();
      event.target.blur();
    }
    return;
  }
  if (event.key === "Enter" && event.target.matches("a, button, summary, [type=checkbox]")) return;
  if (event.key === "?") {
    event.preventDefault();
    byId("keys").showModal();
  } else if (event.key === "g") {
    location.hash = state.view === "report" ? address({ view: "inspector" }) : "#report";
  } else if (state.view === "inspector" && Object.hasOwn(KEYS, event.key)) {
    event.preventDefault();
    KEYS[event.key]();
  }
});

byId("show-keys").addEventListener("click", () => byId("keys").showModal());
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("query").addEventListener("input", (event) => change({ q: event.target.value }));
for (const name of ["reason", "side", "least", "most", "sort"]) {
  byId(name).addEventListener("change", (event) => change({ [name]: event.target.value }));
}
for (const name of ["scored", "cut", "leak", "texts"]) {
  byId(name).addEventListener("change", (event) => change({ [name]: event.target.checked }));
}
byId("inside").addEventListener("change", () => {
  found.query = "";
  searchTexts();
});
byId("clear").addEventListener("click", () => {
  const { run, mode, t, n, shade, student, context, diff } = state;
  change({ ...DEFAULTS, run, mode, t, n, shade, student, context, diff });
});
byId("mode-t").addEventListener("click", () => change({ mode: "t" }));
byId("mode-q").addEventListener("click", () => change({ mode: "q" }));
byId("page-back").addEventListener("click", () => { state.page--; drawList(); });
byId("page-on").addEventListener("click", () => { state.page++; drawList(); });
byId("run-field").hidden = DATA.runs.length < 2;
byId("run").append(...DATA.runs.map(({ label }, i) => make("option", { value: i }, plain(label))));
byId("run").addEventListener("change", (event) => change({ run: Number(event.target.value) }));
window.addEventListener("hashchange", arrive);
arrive();
