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

/** Stage -> the outermost modules that lie wholly in it, and those it has only ops of, where nothing smaller tells. */
function modulesByStage(byModule) {
  const whole = new Map(Array.from(byModule, ([path, of]) => [path, of.every((op) => op.stage === of[0].stage)]));
  const found = new Map(DATA.stages.map((stage) => [stage.index, new Set()]));
  for (const op of ops.filter((op) => op.module && op.stage !== null)) {
    const parts = op.module.split(".");
    const paths = parts.map((_, i) => parts.slice(0, i + 1).join("."));
    found.get(op.stage).add(paths.find((path) => whole.get(path)) ?? op.module);
  }
  return found;
}

const groups = {
  module: opsByModule(),
  source: group(ops.filter((op) => op.loc), (op) => op.loc),
  target: group(ops, (op) => op.target),
};

for (const [index, modules] of modulesByStage(groups.module)) DATA.stages[index].modules = [...modules];

function scaled(number, base, units, digits) {
  let unit = 0;
  while (number >= base && unit < units.length - 1) {
    number /= base;
    unit++;
  }
  const shown = number >= 100 || Number.isInteger(number) ? number.toFixed(0) : number.toPrecision(digits);
  return `${shown} ${units[unit]}`.trim();
}

const bytes = (size) => size === null || size === undefined ? "dynamic" : scaled(size, 1024, ["B", "KiB", "MiB", "GiB", "TiB"], 3);
const count = (number) => scaled(number, 1000, ["", "k", "M", "G", "T", "P"], 3);
const percent = (part) => `${(100 * part).toFixed(1)} %`;

function seconds(time) {
  if (!time) return "0 s";
  const [scale, unit] = time >= 1 ? [1, "s"] : time >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"];
  return `${(scale * time).toPrecision(3)} ${unit}`;
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

/** Names in order, runs of numbered ones as first … last, and none that only contains others: `layers.3 … layers.7`. */
function moduleRefs(modules) {
  const leaves = modules.filter((m) => !modules.some((other) => other.startsWith(`${m}.`)));
  const runs = [];
  for (const module of leaves) {
    const run = runs.at(-1);
    if (run && follows(run.at(-1), module)) run.push(module);
    else runs.push([module]);
  }
  const refs = (run) => run.map((module) => [ref("module", module)]);
  return runs.flatMap((run) => run.length > 2 ? [[ref("module", run[0]), " … ", ref("module", run.at(-1))]] : refs(run));
}

function follows(a, b) {
  const [, one, first] = /^(.*?)(\d+)$/.exec(a) ?? [], [, two, second] = /^(.*?)(\d+)$/.exec(b) ?? [];
  return one !== undefined && one === two && Number(second) === Number(first) + 1;
}

/** As moduleRefs, with the block in place of the modules in it: `layers.2 … layers.5, part of layers.6`. Where there are many, those behind
 * the first ones are only counted.
 */
function blockRefs(modules) {
  const leaves = modules.filter((m) => !modules.some((other) => other.startsWith(`${m}.`)));
  const blocks = leaves.map((module) => /^(?:.*?\.)?\d+(?=\.|$)/.exec(module)?.[0] ?? module);
  const parts = new Set(blocks.filter((block) => groups.module.get(block).some((op) => op.stage !== groups.module.get(block)[0].stage)));
  const runs = [];
  for (const block of new Set(blocks)) {
    const run = runs.at(-1);
    if (run && !parts.has(block) && !parts.has(run.at(-1)) && follows(run.at(-1), block)) run.push(block);
    else runs.push([block]);
  }
  const shown = runs.length > 8 ? 7 : 8, hidden = runs.slice(shown).flat().length;
  const refs = runs.slice(0, shown).map((run) => [parts.has(run[0]) ? "part of " : null, ref("module", run[0]),
    run.length > 1 ? [run.length > 2 ? " … " : ", ", ref("module", run.at(-1))] : null]);
  return hidden ? [...refs, `${hidden} more modules`] : refs;
}

const opsText = (number) => number === 1 ? "1 op" : `${number} ops`;

/** Stages in order: all where they are few, else the first and the last. */
const stagesText = (via) => via.length < 6 ? via.join(", ") : `${via[0]} … ${via.at(-1)}`;

/** Why something crosses, without the stages it goes through: those are shown beside it. */
const reason = (way) => (way.why ?? "").replace(/, handed on by [\d, ]+$/, "");

const byName = (name) => ref(states.has(name) ? "state" : "value", name);
const stageRef = (index) => ref("stage", index, `stage ${index}`);
const between = (items, text) => items.flatMap((item, i) => i ? [text, item] : [item]);
