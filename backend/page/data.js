"use strict";
// The data of the page, names to look things up by, and how numbers are written.

/** An element of the page itself: a picture may have the same id. */
const at = (id) => document.querySelector(`#${id}:not(svg, svg *)`);

/** A text that was deflated, in base64. */
async function unpacked(packed) {
  const all = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([all]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
}

const TEXT = at("data").textContent;
const DATA = JSON.parse("packed" in at("data").dataset ? await unpacked(TEXT) : TEXT);
const string = (number) => DATA.strings[number];

const ops = DATA.ops.map(([stage, target, module, loc, line], number) => (
  {number, stage, target: string(target), module: string(module), loc: string(loc), line, cost: DATA.cost_of[number]}
));
const values = new Map(DATA.values.map((value) => [value.name, value]));
const states = new Map(DATA.state.flatMap((entry) => entry.names.map((name) => [name, entry])));
const chains = new Map(DATA.chains.flatMap((chain) => chain.map((name) => [name, chain])));
const ways = group(DATA.ways, (way) => way.value);
const lines = DATA.lines;

function group(items, key) {
  const groups = new Map();
  for (const item of items) {
    const name = key(item);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(item);
  }
  return groups;
}

/** Module -> its ops, those of the modules in it among them. */
function opsByModule() {
  const groups = new Map();
  for (const op of ops) {
    const parts = op.module ? op.module.split(".") : [];
    for (let depth = 1; depth <= parts.length; depth++) {
      const path = parts.slice(0, depth).join(".");
      if (!groups.has(path)) groups.set(path, []);
      groups.get(path).push(op);
    }
  }
  return groups;
}

const groups = {
  module: opsByModule(),
  source: group(ops.filter((op) => op.loc), (op) => op.loc),
  target: group(ops, (op) => op.target),
};

// Sizes, counts and times are written as by size_text, count_text and time_text in Python.

/** A number with so many digits behind its point; halves go to the even neighbour. */
function rounded(number, digits) {
  const exact = number.toFixed(80), end = exact.indexOf(".") + 1 + digits, below = exact.slice(0, end);
  const isEven = "02468".includes(below.replace(".", "").at(-1));
  return isEven && /^50*$/.test(exact.slice(end)) ? Number(below) : Number(number.toFixed(digits));
}

/** A number with three digits or fewer. */
const short = (number) => String(!number ? 0 : number >= 1000 ? Number(number.toPrecision(3)) : rounded(number, 2 - Math.floor(Math.log10(number))));

function bytes(size) {
  if (size === null || size === undefined) return "dynamic";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  while (size >= 1024 && units.length > 1) {
    size /= 1024;
    units.shift();
  }
  return `${size >= 10 || Number.isInteger(size) ? rounded(size, 0) : rounded(size, 1).toFixed(1)} ${units[0]}`;
}

function count(number) {
  const [scale, unit] = [[1e15, " P"], [1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]].find(([least]) => number >= least) ?? [0, ""];
  return scale ? short(number / scale) + unit : String(rounded(number, 0));
}

const percent = (part) => `${(100 * part).toFixed(1)} %`;

function seconds(time) {
  const [scale, unit] = time >= 1 ? [1, "s"] : time >= 1e-3 ? [1e3, "ms"] : [1e6, "us"];
  return `${short(scale * time)} ${unit}`;
}

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

/** An element. Attributes that are functions are listeners; children are nodes or text, never markup. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, item] of Object.entries(attributes)) {
    if (typeof item === "function") element.addEventListener(name, item);
    else if (item !== undefined && item !== null && item !== false) element.setAttribute(name, item === true ? "" : item);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A button that shows a thing: a value, a state entry, a stage, a module, a source line, an op. */
function ref(kind, key, label = key) {
  return h("button", {class: `ref ${kind}`, type: "button", "data-go": `${kind}:${key}`}, broken(String(label)));
}

/** A name as text that may break behind its dots and nowhere else. */
const broken = (name) => name.split(/(?<=[./])/).flatMap((part, i) => i ? [h("wbr"), part] : [part]);

/** The modules of a stage in the words of every other table; the first and the last one of a run are references: `layers.2-5`. */
function modulesRef({text, before, first, last}) {
  if (!groups.module.has(first)) return [text];
  const end = groups.module.has(last) && first !== last ? ["-", ref("module", last, text.slice(text.lastIndexOf("-") + 1))] : [];
  return [before, ref("module", first, end.length || first === last ? first : text), ...end];
}

const opsText = (number) => number === 1 ? "1 op" : `${number} ops`;

/** Stages in order: all where they are few, else the first and the last. */
const stagesText = (via) => via.length < 6 ? via.join(", ") : `${via[0]} … ${via.at(-1)}`;

/** Why something crosses, without the stages it goes through: those are shown beside it. */
const reason = (way) => (way.why ?? "").replace(/, handed on by [\d, ]+$/, "");

const byName = (name) => ref(states.has(name) ? "state" : "value", name);

/** The module that makes a value, whose name alone says little. */
function madeIn(name) {
  const born = values.get(name)?.born, module = born === undefined ? "" : ops[born].module;
  return module ? [" from ", ref("module", module)] : null;
}

const stageRef = (index) => ref("stage", index, `stage ${index}`);
/** Items with a text between them, which does not begin a line. */
const between = (items, text) => items.flatMap((item, i) => {
  const isLast = i === items.length - 1;
  return [h("span", {class: "item"}, item, isLast ? "" : text.trimEnd()), isLast ? "" : " "];
});
