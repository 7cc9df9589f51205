// Loads pieces: scripts beside the page that hand rows to `trdPiece`.

const DATA = JSON.parse(byId("data").textContent);
const MOST_PIECES = 80; // that are kept

const Pieces = (() => {
  const waiting = new Map(), kept = new Map();

  window.trdPiece = (build, name, rows) => {
    const one = waiting.get(name);
    if (!one) return;
    waiting.delete(name);
    if (build === DATA.build) one.resolve(rows);
    else one.reject(new Error(`${name} belongs to another report`));
  };

  function load(name) {
    if (kept.has(name)) {
      const rows = kept.get(name);
      kept.delete(name); // the last that was used is the last to go
      kept.set(name, rows);
      return rows;
    }
    const rows = new Promise((resolve, reject) => {
      waiting.set(name, { resolve, reject });
      const script = document.createElement("script");
      script.src = `pieces/${DATA.build}-${name}.js`;
      const fail = () => {
        waiting.delete(name);
        kept.delete(name);
        reject(new Error(`${script.src.split("/").pop()} can’t be read: keep ` +
          "the folder pieces beside index.html"));
      };
      script.onerror = fail;
      script.onload = () => {
        script.remove();
        if (waiting.has(name)) fail();
      };
      document.head.append(script);
    });
    kept.set(name, rows);
    if (kept.size > MOST_PIECES) kept.delete(kept.keys().next().value);
    return rows;
  }

  const nameOf = (family, piece) => `${family}-${String(piece).padStart(3, "0")}`;

  // Row number n of a family, such as "o", of a run.
  async function row(run, letter, n) {
    const family = `r${run}-${letter}`;
    const starts = DATA.runs[run].starts[family];
    let low = 0, high = starts.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (starts[middle] <= n) low = middle;
      else high = middle - 1;
    }
    return (await load(nameOf(family, low)))[n - starts[low]];
  }

  // Calls visit(row, n) for all rows, and progress(done, all) between pieces;
  // ends early where progress returns false.
  async function each(run, letter, visit, progress) {
    const family = `r${run}-${letter}`;
    const starts = DATA.runs[run].starts[family] || [];
    for (let piece = 0; piece < starts.length; piece++) {
      const rows = await load(nameOf(family, piece));
      rows.forEach((one, i) => visit(one, starts[piece] + i));
      if (progress(piece + 1, starts.length) === false) return false;
    }
    return true;
  }

  return { row, each };
})();
