// Text that a model or a data set wrote, in the page.
//
// It is only ever put into text nodes. Controls, and characters that turn the
// direction of text around or can't be seen, are shown by name.

const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u061c\\u200b\\u200e\\u200f" +
  "\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\ufff9-\\ufffb" +
  "\\u{e0000}-\\u{e007f}\\ud800-\\udfff]", "gu");

function nameOf(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCharCode(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  return "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}

function appendText(parent, text) {
  let at = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > at) parent.append(text.slice(at, found.index));
    const shown = document.createElement("span");
    shown.className = "hidden";
    shown.textContent = nameOf(found[0]);
    parent.append(shown);
    at = found.index + found[0].length;
  }
  if (at < text.length) parent.append(at ? text.slice(at) : text);
}

// Text in an attribute, or on one line: whatever is hidden is named.
function plain(text) {
  return text.replace(HIDDEN, nameOf).replace(/\s+/gu, " ");
}

// Makes an element. A child that is a string becomes text.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined || child === false) continue;
    if (typeof child === "string") appendText(element, child);
    else element.append(child);
  }
  return element;
}

function button(label, pressed, action, attributes = {}) {
  const made = make("button", { type: "button", ...attributes }, label);
  if (pressed !== null) made.setAttribute("aria-pressed", String(pressed));
  made.addEventListener("click", action);
  return made;
}

const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");
