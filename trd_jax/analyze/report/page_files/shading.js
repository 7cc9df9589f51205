// Per-token numbers: what a switch shades tokens by, and what a token says.

// The columns of a part, in their order (token_scores.NUMBERS).
const [DIVERGENCE, WEIGHT, CLIPPED, NLL, TEACHER_NLL, ENTROPY, TEACHER_ENTROPY,
  ONSET, TEACHER_ONSET] = Array(9).keys();

// `of` gives a token's value from its numbers; `scale` what is darkest, from
// the scales of the columns. A signed value has two colours.
const SHADES = [
  { key: "none", label: "None" },
  { key: "divergence", label: "D", name: "divergence", unit: "nats",
    says: "how far student and teacher are apart at a token, before any clip",
    of: (n) => n[DIVERGENCE], scale: (s) => s[DIVERGENCE] },
  { key: "teacher_entropy", label: "Teacher entropy", unit: "nats",
    says: "how undecided the teacher is before a token",
    of: (n) => n[TEACHER_ENTROPY], scale: (s) => s[TEACHER_ENTROPY] },
  { key: "student", label: "Student log p", unit: "nats",
    says: "darker: the student held the token less likely",
    of: (n) => -n[NLL], scale: (s) => s[NLL] },
  { key: "teacher", label: "Teacher log p", unit: "nats",
    says: "darker: the teacher held the token less likely",
    of: (n) => -n[TEACHER_NLL], scale: (s) => s[TEACHER_NLL] },
  { key: "difference", label: "Difference", unit: "nats", signed: true,
    says: "teacher’s log p minus student’s: blue, the teacher held the " +
      "token likelier; orange, the student did",
    of: (n) => n[NLL] - n[TEACHER_NLL],
    scale: (s) => Math.max(s[NLL], s[TEACHER_NLL]) },
  { key: "onset", label: "Epistemic mass", unit: "",
    says: "the student’s probability of words that open a doubt (Wait, Hmm, …)",
    of: (n) => n[ONSET], scale: (s) => s[ONSET] },
  { key: "clipped", label: "Clip, weight", unit: "×", signed: true,
    centre: 1,
    says: "outlined: the clip bounds the token; blue and orange: it counts " +
      "more and less than the mean token",
    of: (n) => n[WEIGHT], scale: (s) => Math.max(s[WEIGHT] - 1, 1) },
];
const KINDS = ["y_o", "y_r", "y_star", "teacher"];
const STUDENTS = ["base", "trained"];
const CONTEXTS = ["x", "x_reference", "refine"];
const READS = { x: "x", x_reference: "x and y*", refine: "the refinement prompt" };

// The rows of scores of a run by what they are of: "kind entry".
const scoresOf = DATA.runs.map(({ scores }) => {
  const found = new Map();
  for (const [kind, entry, student, context, tokens, mean, first] of scores.rows) {
    const key = `${KINDS[kind]} ${entry}`;
    if (!found.has(key)) found.set(key, []);
    found.get(key).push({ student: STUDENTS[student], context: CONTEXTS[context],
      tokens, mean, first });
  }
  return found;
});

// Loads a row of scores, all parts. A token's numbers are `numbers(i)`.
async function loadScores(run, row) {
  const { part } = DATA.runs[run].scores;
  const parts = [];
  const count = Math.max(1, Math.ceil(row.tokens / part));
  for (let n = 0; n < count; n++) {
    parts.push(await Pieces.row(run, "k", row.first + n));
  }
  const starts = [0];
  for (const [, lengths] of parts) {
    for (const length of lengths) starts.push(starts.at(-1) + length);
  }
  const at = (i) => [parts[Math.floor(i / part)], i % part];
  return {
    ...row,
    text: parts.map(([text]) => text).join(""),
    starts,
    numbers(i) {
      const [one, place] = at(i);
      return one[2].map((column) => column[place]);
    },
    // The likeliest tokens of a side: [text, probability in units of 0.01%].
    likeliest(i, side) {
      const [one, place] = at(i);
      const [names, k] = [one[3], one[4]];
      const [ids, shares] = side === "student" ? [one[5], one[6]] : [one[7], one[8]];
      const found = [];
      for (let j = place * k; j < (place + 1) * k; j++) {
        found.push([names[ids[j]], shares[j]]);
      }
      return found;
    },
  };
}

// Shades a token's element: strength from 0 to 1, and the side of the centre.
function shadeToken(span, shade, scales, numbers) {
  const value = shade.of ? shade.of(numbers) - (shade.centre || 0) : 0;
  const most = shade.of ? shade.scale(scales) || 1 : 1;
  const strength = Math.min(1, Math.abs(value) / most);
  span.style.setProperty("--strength", strength.toFixed(3));
  span.classList.toggle("below", Boolean(shade.signed) && value < 0);
  span.classList.toggle("clipped", shade.key === "clipped" && numbers[CLIPPED] > 0);
}

function legendOf(shade, scales) {
  if (!shade.of) return null;
  const most = shade.scale(scales) || 1, centre = shade.centre || 0;
  const isLog = shade.key === "student" || shade.key === "teacher";
  const low = shade.signed ? Math.max(centre - most, shade.centre ? 0 : -Infinity) : 0;
  const ends = isLog ? [0, -most] : [low, centre + most];
  return make("div", { class: "legend" },
    make("span", {}, shown(ends[0])),
    make("span", { class: shade.signed ? "scale signed" : "scale", "aria-hidden": "true" }),
    make("span", {}, `${shown(ends[1])}${shade.unit ? ` ${shade.unit}` : ""} and beyond`),
    make("span", { class: "says" }, shade.says));
}

// A number to three digits, as a person writes it.
function shown(value) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) < 0.0005) return value ? "≈ 0" : "0";
  const text = Math.abs(value) >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString();
  return text.replace("-", "−");
}

const percent = (share) =>
  share < 1 ? "< 0.01%" : `${(share / 100).toFixed(share < 100 ? 2 : 1)}%`;

// What a token says, for the panel.
function describeToken(scores, i, divergence) {
  const n = scores.numbers(i);
  const text = scores.text.slice(scores.starts[i], scores.starts[i + 1]);
  const rows = [
    [`D (${divergence})`, `${shown(n[DIVERGENCE])} nats`, ""],
    ["log p", shown(-n[NLL]), shown(-n[TEACHER_NLL])],
    ["entropy", shown(n[ENTROPY]), shown(n[TEACHER_ENTROPY])],
    ["epistemic mass", shown(n[ONSET]), shown(n[TEACHER_ONSET])],
  ];
  const lines = [make("tr", {}, make("th", { scope: "row" }, rows[0][0]),
    make("td", { colspan: 2 }, rows[0][1]))];
  for (const [name, student, teacher] of rows.slice(1)) {
    lines.push(make("tr", {}, make("th", { scope: "row" }, name),
      make("td", {}, student), make("td", {}, teacher)));
  }
  lines.push(make("tr", {}, make("th", { scope: "row" }, "weight in the loss"),
    make("td", { colspan: 2 },
      `${shown(n[WEIGHT])}×${n[CLIPPED] ? ", clipped" : ""}`)));
  const numbers = make("table", { class: "numbers" },
    make("thead", {}, make("tr", {}, make("td"), make("th", { scope: "col" }, "student"),
      make("th", { scope: "col" }, "teacher"))),
    make("tbody", {}, lines));
  return [
    make("p", { class: "which" },
      make("span", { class: "token" }, quoted(text) || "end of the text"),
      make("span", { class: "place" }, `token ${number(i + 1)} of ${number(scores.tokens)}`),
      make("span", { class: "place" },
        `student ${scores.student === "base" ? "before" : "after"} training; ` +
        `the teacher reads ${READS[scores.context]}`)),
    numbers,
    likeliestTable("Student’s likeliest", scores.likeliest(i, "student"), text),
    likeliestTable("Teacher’s likeliest", scores.likeliest(i, "teacher"), text),
  ];
}

const quoted = (text) => text.replace(/\n/gu, "⏎").replace(/\t/gu, "⇥").replace(/ /gu, "␣");

function likeliestTable(title, tokens, actual) {
  const rows = tokens.map(([text, share]) => {
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", share / 10000);
    return make("tr", text === actual ? { class: "actual" } : {},
      make("th", { scope: "row" }, quoted(text),
        text === actual ? make("span", { class: "unseen" }, " (this one)") : null),
      make("td", {}, percent(share)), make("td", {}, bar));
  });
  return make("table", { class: "likeliest" }, make("caption", {}, title),
    make("tbody", {}, rows));
}
