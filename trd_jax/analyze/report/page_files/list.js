// The list of the inspector: filters, search, order, pages.

const PAGE = 50;
const NONE = 0, WRONG = 1, RIGHT = 2, NO_GRADE = 3;
const VERDICTS = ["none", "wrong", "right", "no verdict"];
const GLYPHS = ["–", "✗", "✓", "?"];
const CUT_DRAFT = 1, CUT_REFINED = 2, LEAK = 4;

const ORDERS = {
  t: {
    "": "as in the data",
    divergence: "mean D, highest first",
    longest: "y_o, longest first",
    shortest: "y_o, shortest first",
    refined: "y_r, longest first",
    change: "shortened most by y_r",
  },
  q: {
    "": "as in the data",
    gain: "gained most",
    loss: "lost most",
    hardest: "hardest for the base",
  },
};

function draftVerdict(cell) { return cell >> 2; }
function refinedVerdict(cell) { return cell & 3; }

function cellName(cell, refined) {
  const draft = draftVerdict(cell), after = refinedVerdict(cell);
  if (draft === NONE && after === NONE) return "no trajectory";
  if (after === NONE) return `y_o ${VERDICTS[draft]}, no ${refined}`;
  if (draft === NONE) return `${refined} ${VERDICTS[after]}`;
  return `${VERDICTS[draft]} → ${VERDICTS[after]}`;
}

// Returns the numbers of a run's entries that pass the filters, in order.
// `found` holds what a search inside texts has found: problems and entries.
function filtered(run, f, found) {
  const { columns, scores, texts } = DATA.runs[run];
  const query = f.q.trim().toLowerCase();
  const lengths = f.side === "r" ? columns.refined : columns.draft;
  const least = f.least === "" ? -Infinity : Number(f.least);
  const most = f.most === "" ? Infinity : Number(f.most);
  const reason = DATA.runs[run].reasons.indexOf(f.reason);
  const kept = [];
  for (let n = 0; n < columns.cell.length; n++) {
    if (f.cell !== "" && columns.cell[n] !== Number(f.cell)) continue;
    if (f.reason !== "" && columns.draft_reason[n] !== reason &&
      columns.refined_reason[n] !== reason) continue;
    if (lengths[n] < least || lengths[n] > most) continue;
    if (f.scored && columns.divergence[n] === undefined) continue;
    if (f.cut && !(columns.flags[n] & (CUT_DRAFT | CUT_REFINED))) continue;
    if (f.leak && !(columns.flags[n] & LEAK)) continue;
    if (f.texts && texts.draft[n] === undefined && texts.refined[n] === undefined) continue;
    if (query) {
      const problem = columns.problem[n];
      if (!columns.ids[problem].toLowerCase().includes(query) &&
        !columns.heads[problem].toLowerCase().includes(query) &&
        !found.problems.has(problem) && !found.entries.has(n)) continue;
    }
    kept.push(n);
  }
  const by = {
    divergence: (n) => -(columns.divergence[n] ?? -1),
    longest: (n) => -columns.draft[n],
    shortest: (n) => columns.draft[n] < 0 ? Infinity : columns.draft[n],
    refined: (n) => -columns.refined[n],
    change: (n) => columns.refined[n] - columns.draft[n],
  }[f.sort];
  if (by) kept.sort((a, b) => by(a) - by(b) || a - b);
  return kept;
}

// Right samples and all of each question, for each model.
const tallies = DATA.runs.map(({ samples }) => {
  if (!samples) return null;
  const made = {};
  for (const [model, columns] of Object.entries(samples.models)) {
    const right = new Int32Array(samples.ids.length), all = right.slice();
    columns.question.forEach((q, i) => {
      all[q]++;
      if (columns.verdict[i] === RIGHT) right[q]++;
    });
    made[model] = { right, all };
  }
  return made;
});

function filteredQuestions(run, f) {
  const { samples } = DATA.runs[run];
  if (!samples) return [];
  const query = f.q.trim().toLowerCase();
  const kept = [];
  samples.ids.forEach((id, q) => {
    if (query && !id.toLowerCase().includes(query) &&
      !samples.heads[q].toLowerCase().includes(query) &&
      !samples.benchmarks[q].toLowerCase().includes(query)) return;
    kept.push(q);
  });
  const share = (model, q) => {
    const one = tallies[run][model];
    return one && one.all[q] ? one.right[q] / one.all[q] : 0;
  };
  const by = {
    gain: (q) => share("base", q) - share("trained", q),
    loss: (q) => share("trained", q) - share("base", q),
    hardest: (q) => share("base", q),
  }[f.sort];
  if (by) kept.sort((a, b) => by(a) - by(b) || a - b);
  return kept;
}

function listItem(run, n, href, isCurrent) {
  const { columns, refined, scores } = DATA.runs[run];
  const problem = columns.problem[n], cell = columns.cell[n];
  const lengths = [columns.draft[n], columns.refined[n]]
    .filter((length) => length >= 0).map(number).join(" → ");
  const flags = columns.flags[n];
  const tags = [];
  if (columns.divergence[n] !== undefined) {
    const mean = shown(columns.divergence[n]);
    tags.push(make("span", { class: "tag" }, `D ${mean} along ${scores.along[n]}`));
  }
  if (flags & (CUT_DRAFT | CUT_REFINED)) tags.push(make("span", { class: "tag" }, "cut off"));
  if (flags & LEAK) tags.push(make("span", { class: "tag" }, "leak"));
  return make("li", {},
    make("a", { href, "aria-current": isCurrent ? "true" : null },
      pill(cell, refined),
      make("span", { class: "id" }, make("bdi", {}, columns.ids[problem]),
        columns.sample[n] ? ` · ${columns.sample[n] + 1}` : null),
      make("span", { class: "length" }, lengths,
        make("span", { class: "unseen" }, " tokens")),
      make("span", { class: "head" }, make("bdi", {}, columns.heads[problem])),
      tags.length ? make("span", { class: "tags" }, tags) : null));
}

// Two verdicts, by shape, words and colour.
function pill(cell, refined) {
  const sides = [draftVerdict(cell), refinedVerdict(cell)];
  return make("span", { class: "pill", title: cellName(cell, refined) },
    make("span", { class: "unseen" }, cellName(cell, refined)),
    sides.map((verdict) => make("span",
      { class: `glyph v${verdict}`, "aria-hidden": "true" }, GLYPHS[verdict])));
}

function questionItem(run, q, href, isCurrent) {
  const { samples } = DATA.runs[run];
  const bars = Object.entries(tallies[run]).map(([model, { right, all }]) => {
    const bar = make("span", { class: `tally ${model}`, "aria-hidden": "true" });
    bar.style.setProperty("--share", all[q] ? right[q] / all[q] : 0);
    return make("span", { class: "of-model" }, `${model} ${right[q]}/${all[q]}`, bar);
  });
  return make("li", {},
    make("a", { href, class: "question", "aria-current": isCurrent ? "true" : null },
      make("span", { class: "id" }, make("bdi", {}, samples.benchmarks[q]), " ",
        make("bdi", {}, samples.ids[q])),
      make("span", { class: "head" }, make("bdi", {}, samples.heads[q])),
      make("span", { class: "tallies" }, bars)));
}

// The counts of outcomes, as buttons: y_o down, y_r across.
function cellButtons(run, chosen, choose) {
  const { columns, refined } = DATA.runs[run];
  const counts = new Map();
  for (const cell of columns.cell) counts.set(cell, (counts.get(cell) || 0) + 1);
  const matrix = [4 * WRONG + RIGHT, 4 * WRONG + WRONG, 4 * RIGHT + RIGHT, 4 * RIGHT + WRONG];
  const others = [...counts.keys()].filter((cell) => !matrix.includes(cell)).sort();
  const isMatrix = matrix.some((cell) => counts.has(cell));
  const made = (cell) => {
    const count = counts.get(cell) || 0;
    const one = button("", chosen === String(cell), () =>
      choose(chosen === String(cell) ? "" : String(cell)), { class: "cell", disabled: !count });
    one.append(make("span", { class: "count" }, number(count)), pill(cell, refined),
      make("span", { class: "name", "aria-hidden": "true" }, cellName(cell, refined)));
    return one;
  };
  return [...(isMatrix ? matrix : []), ...others].map(made);
}
