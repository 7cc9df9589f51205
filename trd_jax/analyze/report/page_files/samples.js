// A benchmark question, opened: its samples before and after training.

const Samples = (() => {
  let ticket = 0;

  async function show(detail, state, update) {
    const mine = ++ticket;
    const { run, question } = state;
    const { samples } = DATA.runs[run];
    const [text, answer] = await Pieces.row(run, "q", question);
    if (mine !== ticket) return;
    const statement = new TextPane("The question", () => {});
    statement.show(text || "The question’s text is not on this machine.", [], null);
    const columns = Object.keys(samples.models).map((model) => modelSection(run, question, model));
    detail.replaceChildren(
      heading(samples, question, update),
      make("section", { class: "statement", "aria-label": "x, the question" }, statement.words,
        answer ? make("p", { class: "facts-line" }, "right answer ",
          make("code", {}, make("bdi", {}, answer))) : null),
      make("div", { class: "lane" },
        make("div", { class: "texts" }, columns.map((one) => one.element))));
    await Promise.all(columns.map((one) => one.first()));
  }

  function heading(samples, question, update) {
    const last = button("↑", null, () => update.step(-1), { "aria-label": "The one before (k)" });
    const next = button("↓", null, () => update.step(1), { "aria-label": "The next one (j)" });
    const back = button("List", null, () => update.back(), { class: "to-list" });
    return make("header", { class: "heading" }, back,
      make("h3", { tabindex: -1 },
        make("span", { class: "eyebrow" }, make("bdi", {}, samples.benchmarks[question])),
        make("bdi", {}, samples.ids[question])),
      make("div", { class: "buttons" }, last, next));
  }

  function modelSection(run, question, model) {
    const columns = DATA.runs[run].samples.models[model];
    const { right, all } = tallies[run][model];
    const mine = [];
    columns.question.forEach((q, i) => { if (q === question) mine.push(i); });
    mine.sort((a, b) => columns.sample[a] - columns.sample[b]);
    const pane = new TextPane(`A sample of ${model}`, () => {});
    const verdict = make("div", { class: "of-sample" });
    const name = model === "base" ? "before training" : "after training";

    async function open(i) {
      buttons.forEach((one, j) => one.setAttribute("aria-pressed", String(mine[j] === i)));
      const cut = columns.cut[i] ? ["cut off at its budget"] : [];
      const facts = make("p", { class: "facts-line" },
        [`sample ${columns.sample[i]}`, `${number(columns.tokens[i])} tokens`, ...cut].join(" · "));
      if (columns.row[i] < 0) {
        verdict.replaceChildren(facts);
        pane.show("This sample’s text is not in the report; make it with a larger --inspect.", [], null);
        return;
      }
      try {
        const [text, extracted, , step] = await Pieces.row(run, model === "base" ? "b" : "t", columns.row[i]);
        const code = columns.verdict[i];
        verdict.replaceChildren(badge(code === NO_GRADE ? null : code === RIGHT,
          columns.reasons[columns.reason[i]], extracted), facts);
        pane.show(text, wrongMark(step), null);
      } catch (error) {
        verdict.replaceChildren(make("p", { class: "notice" }, error.message));
      }
    }

    const buttons = mine.map((i) => button(GLYPHS[columns.verdict[i]], false, () => open(i), {
      class: `sample v${columns.verdict[i]}`,
      "aria-label": `Sample ${columns.sample[i]}, ${VERDICTS[columns.verdict[i]]}`,
    }));
    const element = textSection({
      title: model, explains: `${name}: ${right[question]} of ${all[question]} right`,
      verdict: make("div", {}, make("div", { class: "samples", role: "group",
        "aria-label": `Samples ${name}` }, buttons), verdict),
      pane,
    });
    return { element, first: () => mine.length ? open(mine[0]) : null };
  }

  return { show, close: () => { ticket++; } };
})();
