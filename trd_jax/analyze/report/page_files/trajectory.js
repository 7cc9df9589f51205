// A problem, opened: x and y*, and of each run y_o beside y_r.

// A text with its verdict above it. `onToken` as in TextPane.
function textSection({ title, explains, verdict, facts, pane, more }) {
  return make("section", { class: "text" },
    make("header", {},
      make("h4", {}, title, explains ? make("span", { class: "explains" }, explains) : null),
      verdict, facts && facts.length ? make("p", { class: "facts-line" }, facts.join(" · ")) : null),
    pane.words, more);
}

function badge(correct, reason, extracted) {
  const verdict = correct === null ? NO_GRADE : correct ? RIGHT : WRONG;
  return make("p", { class: "verdict" },
    make("span", { class: `badge v${verdict}` },
      make("span", { "aria-hidden": "true" }, GLYPHS[verdict]), ` ${VERDICTS[verdict]}`),
    make("span", { class: "reason" }, reason.replace(/_/gu, " ")),
    extracted === null ? null :
      make("span", { class: "extracted" }, "answer ", make("code", {}, make("bdi", {}, extracted))));
}

const wrongNote = (right) =>
  right === null ? "first wrong step" : `first wrong step; right is ${right}`;

function wrongMark(step) {
  return step ? [{ start: step[0], end: step[1], kind: "wrong", note: wrongNote(step[2]) }] : [];
}

function sampledHow(said, detail) {
  const rows = Object.entries(said).filter(([, value]) => value !== null);
  if (detail !== null) rows.push(["grader’s detail", detail]);
  return make("details", { class: "how" }, make("summary", {}, "How it was made"),
    make("dl", {}, rows.map(([name, value]) => make("div", {},
      make("dt", {}, name.replace(/_/gu, " ")), make("dd", {}, String(value))))));
}

const MISSING = "This trajectory’s text is not in the report; make it with a " +
  "larger --inspect, or --inspect=all.";

const Trajectory = (() => {
  let ticket = 0; // of what was asked for last
  let open = null;

  async function show(detail, state, update) {
    const mine = ++ticket;
    const { run, entry } = state;
    const lanes = lanesOf(run, entry);
    const { columns } = DATA.runs[run];
    const problem = columns.problem[entry];
    open = { state, update, lanes: [], panel: null, panes: [], mine };
    const head = heading(run, entry, update);
    const note = make("p", { class: "loading", role: "status" }, "Loading …");
    detail.replaceChildren(head, note);
    try {
      const [text, answer] = await Pieces.row(run, "x", problem);
      const texts = await Promise.all(lanes.map(loadLane));
      const reference = await loadReference(run, problem);
      if (mine !== ticket) return;
      note.remove();
      const top = statement(text, answer);
      const toolbar = make("div", { class: "toolbar", role: "group", "aria-label": "How the texts are shown" });
      const panel = make("aside", { class: "panel", role: "status", "aria-label": "The token", hidden: true });
      Object.assign(open, { toolbar, panel });
      lanes.forEach((lane, i) => Object.assign(lane, texts[i]));
      open.lanes = lanes;
      // Beside y* where lines are short, else below it.
      const isNarrow = lanes.every(({ draft, refined }) =>
        [reference, draft, refined].every((row) => !row || longestLine(row[0]) < 33));
      const sections = lanes.map((lane, i) => laneSection(lane, lanes.length > 1, isNarrow,
        i ? null : referenceSection(run, entry, reference)));
      detail.append(top, toolbar, ...sections, panel);
      await draw();
    } catch (error) {
      if (mine !== ticket) return;
      note.className = "notice";
      note.textContent = error.message;
    }
  }

  // The same draft of the same problem in every run that has it.
  function lanesOf(run, entry) {
    const { columns } = DATA.runs[run];
    const id = columns.ids[columns.problem[entry]], sample = columns.sample[entry];
    const found = [{ run, entry }];
    DATA.runs.forEach((_, other) => {
      if (other === run) return;
      const same = entryOf(other, id, sample);
      if (same !== null) found.push({ run: other, entry: same });
    });
    return found;
  }

  async function loadLane({ run, entry }) {
    const { texts } = DATA.runs[run];
    const of = (letter, n) => n === undefined ? null : Pieces.row(run, letter, n);
    const [draft, refined] = await Promise.all(
      [of("o", texts.draft[entry]), of("r", texts.refined[entry])]);
    return { draft, refined };
  }

  async function loadReference(run, problem) {
    const n = DATA.runs[run].texts.reference[problem];
    return n === undefined ? null : Pieces.row(run, "s", n);
  }

  function heading(run, entry, update) {
    const { columns, refined } = DATA.runs[run];
    const id = columns.ids[columns.problem[entry]];
    const cell = columns.cell[entry];
    const link = button("Copy link", null, async () => {
      try {
        await navigator.clipboard.writeText(location.href);
        link.textContent = "Copied";
      } catch {
        link.textContent = "It is in the address bar";
      }
    });
    const last = button("", null, () => update.step(-1), { "aria-label": "The one before (k)" });
    last.textContent = "↑";
    const next = button("", null, () => update.step(1), { "aria-label": "The next one (j)" });
    next.textContent = "↓";
    const back = button("List", null, () => update.back(), { class: "to-list" });
    return make("header", { class: "heading" },
      back,
      make("h3", { tabindex: -1 }, make("span", { class: "eyebrow" }, "Problem"),
        make("bdi", {}, id),
        columns.sample[entry] ? ` · draft ${columns.sample[entry] + 1}` : null),
      make("p", { class: "outcome" }, pill(cell, refined),
        make("span", { "aria-hidden": "true" }, cellName(cell, refined))),
      make("div", { class: "buttons" }, last, next, link));
  }

  function statement(text, answer) {
    const pane = new TextPane("x, the problem", () => {});
    pane.show(text || "The problem’s text is not in the workdir.", [], null);
    return make("section", { class: "statement", "aria-label": "x, the problem" }, pane.words,
      answer ? make("p", { class: "facts-line" }, "right answer ",
        make("code", {}, make("bdi", {}, answer))) : null);
  }

  function referenceSection(run, entry, row) {
    if (!row) return null;
    const pane = new TextPane("y*, the reference", (i) => say(pane, i));
    Object.assign(pane, { kind: "y_star", lane: { run, entry: firstEntry(run, entry) } });
    pane.raw = row[0];
    pane.steps = wrongMark(row[1]);
    pane.show(row[0], pane.steps, null);
    open.panes.push(pane);
    const made = textSection({ title: "y*", explains: "the reference", pane });
    made.classList.add("reference");
    return made;
  }

  function firstEntry(run, entry) {
    const { columns } = DATA.runs[run];
    let n = entry;
    while (n > 0 && columns.problem[n - 1] === columns.problem[entry]) n--;
    return n;
  }

  function longestLine(text) {
    return text.split("\n").reduce((most, line) => Math.max(most, line.length), 0);
  }

  function laneSection(lane, isNamed, isNarrow, reference) {
    const { label, columns, refined: kind } = DATA.runs[lane.run];
    const { entry } = lane;
    const both = [];
    if (draftVerdict(columns.cell[entry]) !== NONE) {
      both.push(graded(lane, "draft", "y_o", "the student’s draft", columns.draft[entry]));
    }
    if (refinedVerdict(columns.cell[entry]) !== NONE) {
      both.push(kind === "teacher" ?
        graded(lane, "refined", "teacher", "the teacher’s own answer", columns.refined[entry]) :
        graded(lane, "refined", "y_r", "as the teacher rewrote it", columns.refined[entry]));
    }
    if (!both.length) both.push(make("p", { class: "notice" }, "There is no trajectory of it yet."));
    return make("section", { class: "lane", "aria-label": isNamed ? `Run ${plain(label)}` : null },
      isNamed ? make("h4", { class: "run-name" }, make("span", { class: "eyebrow" }, "Run"),
        make("bdi", {}, label), pill(columns.cell[entry], kind)) : null,
      make("div", { class: isNarrow ? "texts narrow" : "texts" }, reference, both));
  }

  function graded(lane, side, title, explains, tokens) {
    const row = lane[side];
    const facts = [`${number(tokens)} tokens`];
    const flag = side === "draft" ? CUT_DRAFT : CUT_REFINED;
    if (DATA.runs[lane.run].columns.flags[lane.entry] & flag) facts.push("cut off at its budget");
    const pane = new TextPane(`${title}, ${explains}`, (i) => say(pane, i));
    if (!row) {
      pane.show("", [], null);
      return make("section", { class: "text" },
        make("header", {}, make("h4", {}, title, make("span", { class: "explains" }, explains)),
          make("p", { class: "facts-line" }, facts.join(" · "))),
        make("p", { class: "notice" }, MISSING));
    }
    const [text, correct, reason, extracted, detail, step, said] = row;
    Object.assign(pane, { kind: title, lane, raw: text, steps: wrongMark(step), side });
    lane[`${side}Pane`] = pane;
    open.panes.push(pane);
    if (side === "draft" && row[7]) {
      pane.steps.push({ start: row[7][0], end: row[7][1], kind: "cut",
        note: "left out of the prompt that it was rewritten from" });
    }
    if (side === "refined") {
      if (row[7]) facts.push(`${number(row[7])} tokens of its draft were left out of the prompt`);
      if (row[8]) facts.push(`speaks of its draft: “${plain(row[8])}”`);
    }
    return textSection({
      title, explains, facts, pane, verdict: badge(correct, reason, extracted),
      more: sampledHow(said, detail),
    });
  }

  // Marks differences and shades tokens, as the toolbar says.
  async function draw() {
    const mine = open.mine, { state } = open;
    for (const lane of open.lanes) {
      const [a, b] = [lane.draftPane, lane.refinedPane];
      for (const pane of [a, b]) if (pane) pane.changes = [];
      if (state.diff && a && b) {
        const found = differences(a.raw, b.raw);
        a.changes = found.removed.map(([start, end]) => ({ start, end, kind: "removed" }));
        b.changes = found.added.map(([start, end]) => ({ start, end, kind: "added" }));
        lane.level = found.level;
      }
    }
    drawToolbar();
    const shade = SHADES.find((one) => one.key === state.shade) || SHADES[0];
    const results = await Promise.all(open.panes.map(async (pane) => {
      pane.scores = null;
      const row = shade.of ? scoreRow(pane, state) : null;
      if (row) pane.scores = await loadScores(pane.lane.run, row);
    }).map((one) => one.then(() => null, (error) => error)));
    if (mine !== ticket) return;
    const failed = results.find(Boolean);
    if (failed) open.toolbar.append(make("p", { class: "notice" }, failed.message));
    for (const pane of open.panes) {
      const { scores } = pane, marks = [...(pane.changes || []), ...pane.steps];
      if (!scores) {
        pane.show(pane.raw, marks, null);
        continue;
      }
      const { scales } = DATA.runs[pane.lane.run].scores;
      // A tokenizer that normalises says other characters than the text has:
      // then nothing is marked.
      pane.show(scores.text, scores.text === pane.raw ? marks : [], {
        starts: scores.starts,
        look: (span, i) => shadeToken(span, currentShade(), scales, scores.numbers(i)),
      });
    }
    open.panel.hidden = !open.panes.some((pane) => pane.scores);
    if (!open.panel.hidden && !open.panel.hasChildNodes()) {
      open.panel.append(make("p", { class: "hint" },
        "Point at a token, or go into a text and press ← and →."));
    }
  }

  const currentShade = () =>
    SHADES.find((one) => one.key === open.state.shade) || SHADES[0];

  const rowsOf = (pane) =>
    scoresOf[pane.lane.run].get(`${pane.kind} ${pane.lane.entry}`) || [];

  function scoreRow(pane, state) {
    const rows = rowsOf(pane);
    const ofStudent = rows.filter((one) => one.student === state.student);
    const some = ofStudent.length ? ofStudent : rows;
    return some.find((one) => one.context === state.context) || some[0];
  }

  function drawToolbar() {
    const { toolbar, state, update, panes, lanes } = open;
    const rows = panes.flatMap(rowsOf);
    const focused = document.activeElement?.dataset?.key;
    const groups = [];
    if (rows.length) {
      groups.push(group("Shade tokens by", SHADES.map((one) =>
        button(one.label, state.shade === one.key, () => update.set({ shade: one.key }),
          { "data-key": `shade-${one.key}` }))));
      const students = STUDENTS.filter((s) => rows.some((one) => one.student === s));
      if (students.length > 1 && state.shade !== "none") {
        groups.push(group("Student", students.map((s) =>
          button(s === "base" ? "before training" : "after training", state.student === s,
            () => update.set({ student: s }), { "data-key": `student-${s}` }))));
      }
      // A choice only where one text was scored under several.
      const contexts = CONTEXTS.filter((c) => rows.some((one) => one.context === c));
      const isChoice = panes.some((pane) => new Set(rowsOf(pane).map((one) => one.context)).size > 1);
      if (isChoice && state.shade !== "none") {
        groups.push(group("Teacher reads", contexts.map((c) =>
          button(READS[c], state.context === c, () => update.set({ context: c }),
            { "data-key": `context-${c}` }))));
      }
    }
    if (lanes.some((lane) => lane.draftPane && lane.refinedPane)) {
      groups.push(group("Differences", [
        button("y_o → y_r", state.diff, () => update.set({ diff: !state.diff }),
          { "data-key": "diff" })]));
    }
    const legend = rows.length ? legendOf(currentShade(), DATA.runs[state.run].scores.scales) : null;
    const notes = [];
    if (!rows.length && scoresOf[state.run].size) {
      notes.push("This problem’s tokens are not scored; the filter “scored by token” shows which are.");
    }
    if (lanes.some((lane) => lane.level === "line")) notes.push("Long texts: differences were looked for by line, then within lines.");
    if (lanes.some((lane) => lane.level === "whole")) {
      notes.push("The texts are too far apart: all between their common beginning and end is marked.");
    }
    if (lanes.some((lane) => state.diff && lane.level === "same")) notes.push("y_o and y_r are the same text.");
    toolbar.replaceChildren(...groups, ...(legend ? [legend] : []),
      ...notes.map((one) => make("p", { class: "hint" }, one)));
    // A switch that was pressed was drawn anew: the focus stays on it.
    if (focused) toolbar.querySelector(`[data-key="${focused}"]`)?.focus();
  }

  function group(label, buttons) {
    return make("div", { class: "group" }, make("span", { class: "label" }, label),
      make("div", { class: "switch", role: "group", "aria-label": label }, buttons));
  }

  function say(pane, i) {
    if (!pane.scores) return;
    open.panel.replaceChildren(make("p", { class: "of" }, pane.kind.replace("y_star", "y*")),
      ...describeToken(pane.scores, i, DATA.runs[pane.lane.run].scores.divergence));
  }

  // Takes over a changed choice without loading anything again.
  async function changed(state) {
    const before = open.state;
    open.state = state;
    const onlyShade = before.shade !== state.shade && before.shade !== "none" &&
      state.shade !== "none" && before.student === state.student &&
      before.context === state.context && before.diff === state.diff;
    if (!onlyShade) return draw();
    drawToolbar();
    open.panes.forEach((pane) => pane.repaint());
    return null;
  }

  function toNextMark() {
    for (const pane of open?.panes || []) {
      if (pane.kind !== "y_star") pane.toNext(["removed", "added", "wrong"]);
    }
  }

  const studentsOf = () => STUDENTS.filter((s) =>
    open?.panes.some((pane) => rowsOf(pane).some((one) => one.student === s)));
  const isScored = () => Boolean(open?.panes.some((pane) => rowsOf(pane).length));

  return { show, changed, toNextMark, studentsOf, isScored, close: () => { ticket++; } };
})();

// Returns the entry of a problem's draft in a run, null where there is none.
function entryOf(run, id, sample) {
  const { columns } = DATA.runs[run];
  entryOf.known ??= [];
  if (!entryOf.known[run]) {
    entryOf.known[run] = new Map();
    columns.problem.forEach((problem, n) =>
      entryOf.known[run].set(`${columns.sample[n]} ${columns.ids[problem]}`, n));
  }
  return entryOf.known[run].get(`${sample} ${id}`) ?? null;
}
