// What differs between two texts: Myers' shortest edit script over words, or
// over lines, and over words within lines that changed, where that takes too
// long.

const MOST_EDITS = { word: 1200, line: 2000 };
const MOST_WORDS = 60000;
const WORD = /[\p{L}\p{N}\p{M}_]+|[^\S\n]+|\n|[^]/gu;
const LINE = /[^\n]*\n|[^\n]+/gu;

// Returns {level, removed, added}: ranges of characters of either text.
function differences(one, other) {
  if (one === other) return { level: "same", removed: [], added: [] };
  const levels = [];
  if (one.length + other.length < 12 * MOST_WORDS) {
    levels.push(["word", WORD]);
  }
  levels.push(["line", LINE]);
  for (const [level, pattern] of levels) {
    const changes = changed(one, other, pattern, MOST_EDITS[level]);
    if (!changes) continue;
    const removed = [], added = [];
    for (const [start, end, from, to] of changes) {
      const inner = level === "line" &&
        changed(one.slice(start, end), other.slice(from, to), WORD, 400);
      for (const [s, e, f, t] of inner || [[0, end - start, 0, to - from]]) {
        if (e > s) removed.push([start + s, start + e]);
        if (t > f) added.push([from + f, from + t]);
      }
    }
    return { level, removed, added };
  }
  // Too far apart: all but what both begin and end with.
  let head = 0, tail = 0;
  const most = Math.min(one.length, other.length);
  while (head < most && one[head] === other[head]) head++;
  while (tail < most - head &&
    one[one.length - 1 - tail] === other[other.length - 1 - tail]) tail++;
  const range = (text) =>
    text.length > head + tail ? [[head, text.length - tail]] : [];
  return { level: "whole", removed: range(one), added: range(other) };
}

// Numbers for words: equal words, equal numbers.
function numbered(a, b) {
  const known = new Map();
  const of = (word) => {
    if (!known.has(word)) known.set(word, known.size);
    return known.get(word);
  };
  return [Int32Array.from(a, of), Int32Array.from(b, of)];
}

// Returns runs [start in a, start in b, length] of what is alike, or null.
function alike(a, b, most) {
  let head = 0, tail = 0;
  const shorter = Math.min(a.length, b.length);
  while (head < shorter && a[head] === b[head]) head++;
  while (tail < shorter - head &&
    a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail++;
  const inner = shortest(a.subarray(head, a.length - tail),
    b.subarray(head, b.length - tail), most);
  if (!inner) return null;
  const runs = head ? [[0, 0, head]] : [];
  for (const [x, y, n] of inner) runs.push([x + head, y + head, n]);
  if (tail) runs.push([a.length - tail, b.length - tail, tail]);
  return runs;
}

function shortest(a, b, bound) {
  const n = a.length, m = b.length;
  if (!n || !m) return [];
  const most = Math.min(n + m, bound), zero = most + 1;
  const furthest = new Int32Array(2 * most + 3), trace = [];
  for (let d = 0; d <= most; d++) {
    for (let k = -d; k <= d; k += 2) {
      const down = k === -d ||
        (k !== d && furthest[zero + k - 1] < furthest[zero + k + 1]);
      let x = down ? furthest[zero + k + 1] : furthest[zero + k - 1] + 1;
      while (x < n && x - k < m && a[x] === b[x - k]) x++;
      furthest[zero + k] = x;
      if (x >= n && x - k >= m) return walkedBack(trace, d, k, n);
    }
    trace.push(furthest.slice(zero - d, zero + d + 1));
  }
  return null;
}

function walkedBack(trace, d, k, x) {
  const runs = [];
  for (; d > 0; d--) {
    const before = trace[d - 1], at = (diagonal) => before[diagonal + d - 1];
    const down = k === -d || (k !== d && at(k - 1) < at(k + 1));
    const start = down ? at(k + 1) : at(k - 1) + 1;
    if (x > start) runs.push([start, start - k, x - start]);
    k = down ? k + 1 : k - 1;
    x = at(k);
  }
  if (x > 0) runs.push([0, 0, x]);
  return runs.reverse();
}

// Leaves out what is alike by chance: a run shorter than both edits around it.
function tidied(a, b, runs) {
  const size = (words, start, end) => {
    let sum = 0;
    for (let i = start; i < end; i++) sum += words[i].length;
    return sum;
  };
  const kept = [];
  let endA = 0, endB = 0;
  runs.forEach(([x, y, n], i) => {
    const next = runs[i + 1] || [a.length, b.length];
    const before = size(a, endA, x) + size(b, endB, y);
    const after = size(a, x + n, next[0]) + size(b, y + n, next[1]);
    const mine = 2 * size(a, x, x + n);
    if (mine <= before && mine <= after) return;
    kept.push([x, y, n]);
    [endA, endB] = [x + n, y + n];
  });
  return kept;
}

// Returns what changed as [start, end] in one text and in the other, in
// characters; null where that takes too long.
function changed(one, other, pattern, most) {
  const a = one.match(pattern) || [], b = other.match(pattern) || [];
  if (a.length + b.length > 2 * MOST_WORDS) return null;
  const runs = alike(...numbered(a, b), most);
  if (!runs) return null;
  const found = [], at = [0, 0], word = [0, 0];
  const skipTo = (side, end) => {
    const words = side ? b : a;
    for (; word[side] < end; word[side]++) at[side] += words[word[side]].length;
    return at[side];
  };
  for (const [x, y, n] of [...tidied(a, b, runs), [a.length, b.length, 0]]) {
    const [start, from] = at;
    const [end, to] = [skipTo(0, x), skipTo(1, y)];
    if (end > start || to > from) found.push([start, end, from, to]);
    skipTo(0, x + n);
    skipTo(1, y + n);
  }
  return found;
}
