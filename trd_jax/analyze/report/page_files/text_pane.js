// A text, with what is marked in it and, where scores are, its tokens shaded.
//
// A text is cut into blocks of some thousand characters, at ends of lines where
// there are any. The browser lays out blocks that are in view, and tokens
// become elements of their own only there: a line of 100,000 tokens costs what
// is seen of it.

const BLOCK = 3000; // characters

class TextPane {
  // `label` is read to whoever can't see it; `onToken(index, pinned)` is called
  // for the token that is pointed at or moved to.
  constructor(label, onToken) {
    this.words = make("div", {
      class: "words", tabindex: 0, role: "group", "aria-label": label,
    });
    this.onToken = onToken;
    this.text = "";
    this.marks = [];
    this.tokens = null;
    this.current = -1;
    this.blocks = [];
    this.watcher = new IntersectionObserver(
      (seen) => seen.forEach((one) => one.isIntersecting && this.shade(one.target)),
      { rootMargin: "400px" });
    this.words.addEventListener("pointerover", (e) => this.pointed(e, false));
    this.words.addEventListener("click", (e) => this.pointed(e, true));
    this.words.addEventListener("keydown", (e) => this.pressed(e));
  }

  // marks: {start, end, kind, note}; kinds: removed, added, wrong, cut.
  // tokens: null, or {starts: [T + 1], look(span, i)}.
  show(text, marks, tokens) {
    this.text = text;
    this.marks = marks.filter((one) => one.end > one.start)
      .sort((a, b) => a.start - b.start);
    this.tokens = tokens;
    this.current = -1;
    this.watcher.disconnect();
    this.blocks = this.cutIntoBlocks();
    this.words.replaceChildren(...this.blocks.map((one) => one.element));
    if (tokens) this.blocks.forEach((one) => this.watcher.observe(one.element));
  }

  cutIntoBlocks() {
    const blocks = [], { text } = this;
    for (let start = 0; start < text.length || !blocks.length;) {
      const end = this.endOfBlock(start);
      const element = make("div", { class: "block" });
      const lines = text.slice(start, end).split("\n")
        .reduce((sum, line) => sum + 1 + (line.length >> 6), 0);
      if (text.length > 3 * BLOCK) {
        element.classList.add("far");
        element.style.setProperty("--lines", lines);
      }
      if (end < text.length && text[end - 1] !== "\n") {
        element.classList.add("torn");
      }
      blocks.push({ element, start, end, isShaded: false });
      element.block = blocks[blocks.length - 1];
      this.fill(element, start, end);
      if (end >= text.length) break;
      start = end;
    }
    return blocks;
  }

  endOfBlock(start) {
    const { text, tokens } = this;
    let end = start + BLOCK;
    if (end >= text.length) return text.length;
    const line = text.indexOf("\n", end);
    if (line >= 0 && line < end + BLOCK) end = line + 1;
    // Neither through a token nor through a character.
    if (tokens) end = tokens.starts[firstAtLeast(tokens.starts, end)];
    else if (text.charCodeAt(end) >> 10 === 0x37) end += 1;
    return Math.min(end, text.length);
  }

  // Puts a stretch of the text into an element, with its marks.
  fill(element, start, end) {
    const here = this.marks.filter((one) => one.start < end && one.end > start);
    const cuts = new Set([start, end]);
    for (const one of here) {
      cuts.add(Math.max(one.start, start)).add(Math.min(one.end, end));
    }
    const places = [...cuts].sort((a, b) => a - b);
    for (let i = 0; i + 1 < places.length; i++) {
      const [from, to] = [places[i], places[i + 1]];
      let inner = element;
      for (const one of here) {
        if (one.start <= from && one.end >= to) {
          const mark = make(TAGS[one.kind], { class: one.kind });
          inner.append(mark);
          inner = mark;
        }
      }
      appendText(inner, this.text.slice(from, to));
      for (const one of here) {
        if (one.note && one.end === to) {
          element.append(make("span", { class: `note of-${one.kind}` }, one.note));
        }
      }
    }
  }

  // Makes elements of a block's tokens, once it comes into view.
  shade(element) {
    const { block } = element, { tokens } = this;
    if (block.isShaded || !tokens) return;
    block.isShaded = true;
    element.replaceChildren();
    const { starts } = tokens, count = starts.length - 1;
    const isLast = block.end === this.text.length;
    let i = firstAtLeast(starts, block.start);
    // Tokens without text of their own stand before the one that has it.
    for (; i < count && (starts[i] < block.end || isLast); i++) {
      const span = make("span", { class: "t" });
      span.dataset.i = i;
      const text = this.text.slice(starts[i], starts[i + 1]);
      if (!text) span.append(make("span", { class: "empty" }, i === count - 1 ? "end" : "·"));
      else if (/^[ \t\n]*\n[ \t\n]*$/u.test(text)) {
        span.append(make("span", { class: "newline", "aria-hidden": "true" }, "⏎"));
      }
      this.fill(span, starts[i], starts[i + 1]);
      tokens.look(span, i);
      element.append(span);
    }
  }

  // Shades all tokens that are elements again, after the choice has changed.
  repaint() {
    if (!this.tokens) return;
    for (const span of this.words.querySelectorAll(".t")) {
      this.tokens.look(span, Number(span.dataset.i));
    }
  }

  pointed(event, pinned) {
    const span = event.target.closest?.(".t");
    if (span) this.select(Number(span.dataset.i), pinned);
  }

  select(i, pinned) {
    if (!this.tokens) return;
    if (pinned) {
      this.words.querySelector(".t.current")?.classList.remove("current");
      this.current = i;
      this.span(i)?.classList.add("current");
    }
    this.onToken(i, pinned);
  }

  span(i) {
    return this.words.querySelector(`.t[data-i="${i}"]`);
  }

  pressed(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !this.tokens || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const last = this.tokens.starts.length - 2;
    const i = Math.min(last, Math.max(0, this.current + step));
    const place = this.tokens.starts[i];
    const block = this.blocks.find((one) => one.end > place) || this.blocks.at(-1);
    this.shade(block.element);
    this.select(i, true);
    this.span(i)?.scrollIntoView({ block: "nearest" });
  }

  // Scrolls to the next mark of a kind after the one shown last.
  toNext(kinds) {
    const found = [...this.words.querySelectorAll(kinds.map((k) => `.${k}`).join())];
    if (!found.length) return false;
    this.next = ((this.next ?? -1) + 1) % found.length;
    found[this.next].scrollIntoView({ block: "center" });
    found.forEach((one, i) => one.classList.toggle("here", i === this.next));
    return true;
  }
}

const TAGS = { removed: "del", added: "ins", wrong: "mark", cut: "span" };

// Returns the first place in a sorted list whose value is at least that.
function firstAtLeast(values, least) {
  let low = 0, high = values.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < least) low = middle + 1;
    else high = middle;
  }
  return low;
}
