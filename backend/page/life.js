// The panel on the right: the life of a value or of a state entry, a stage, or the ops of a module, a source line, a target.

const panel = at("life");

const heading = (text) => h("h3", {}, text);
const paragraph = (...items) => h("p", {}, ...items);
const list = (items) => h("ul", {}, items.map((item) => h("li", {}, item)));
const some = (title, items) => items.length ? [heading(title), list(items)] : [];

function limited(items, most = 200) {
  return items.length <= most ? items : [...items.slice(0, most), `and ${items.length - most} more`];
}

/** What is shown beside an op's line already: its module and its line of source. */
const PLACE = /(?: in (?:"(?:[^"\\]|\\.)*"|[\w.~/])+)?(?: at [\w.-]+:\d+)?(?: \{)?$/;

/** An op as a button that jumps to its line. */
function opRef(op, how) {
  const text = op.line >= 0 ? lines[lastIds()[op.line]].replace(PLACE, "") : op.target;
  const jump = ref("op", op.number, "");
  jump.replaceChildren(...lineNodes(text, null));
  return [
    op.stage === null ? null : h("span", {class: "chip"}, `stage ${op.stage}`), how ? h("span", {class: "how"}, ` ${how}`) : null,
    op.loc ? [" ", ref("source", op.loc)] : null, op.module ? [" in ", ref("module", op.module)] : null, h("br"), jump,
  ];
}

const lastIds = () => columns.at(-1)?.ids ?? [];
const useRefs = (uses) => (uses ?? []).map(([number, how]) => opRef(ops[number], how));
const stagesOf = (uses) => new Set((uses ?? []).map(([number]) => ops[number].stage));

/** One box a stage: born, read, passed through, computed again. */
function lane(born, reads, crossings) {
  if (DATA.stages.length < 2) return null;
  const through = new Set(crossings.flatMap((way) => way.via)), made = new Set(crossings.filter((w) => w.made).map((w) => w.target));
  const kind = (i) => born.has(i) ? "born" : made.has(i) ? "made" : reads.has(i) ? "read" : through.has(i) ? "pass" : "";
  const says = {born: "it is there from here on", made: "computed again", read: "read", pass: "handed on", "": "not there"};
  return h("div", {class: "lane", "aria-label": "Stages"}, DATA.stages.map(({index}) => h("button",
    {class: kind(index), type: "button", title: `stage ${index}: ${says[kind(index)]}`, "data-go": `stage:${index}`}, String(index))));
}

function wayNodes(way) {
  const {via} = way, why = reason(way);
  const through = via.length ? ` through ${stagesText(via)}` : "";
  const source = way.source === null ? "input" : way.source;
  const route = h("span", {class: "chip"}, way.route ?? "no route yet");
  return [`${source} → ${way.target} `, route, through, way.made ? [" as ", byName(way.made)] : null,
    `, ${bytes(way.bytes)}`, why ? h("span", {class: "label"}, ` — ${why}`) : null];
}

const KIND_TEXT = {input: "an input of the model", param: "a parameter of a region of this op", version: "what a write made", result: ""};

function valueLife(name) {
  const value = values.get(name);
  if (!value) return null;
  const born = value.born === undefined ? null : ops[value.born], crossings = ways.get(name) ?? [];
  const homes = new Set(born && born.stage !== null ? [born.stage] : []);
  return [
    paragraph(h("span", {class: "mono"}, string(value.type)), `, ${bytes(value.bytes)}`),
    lane(homes, stagesOf(value.uses), crossings),
    heading("Born"), paragraph(KIND_TEXT[value.kind ?? "result"]), born ? list([opRef(born)]) : null,
    versions(name),
    value.view ? [heading("Shares storage with"), paragraph(byName(value.view))] : null,
    value.copy ? [heading("Computed again in place of"), paragraph(byName(value.copy))] : null,
    some("Computed again as", (value.copies ?? []).map(byName)),
    some("Used by", limited(useRefs(value.uses))),
    some("Crosses", crossings.map(wayNodes)),
    heading("Dies"), death(value),
  ];
}

function versions(name) {
  const chain = chains.get(name);
  if (!chain) return null;
  const names = chain.map((one) => one === name ? h("b", {class: "mono"}, one) : byName(one));
  return [heading("Versions, oldest first"), paragraph(between(names, " → "))];
}

function death(value) {
  if (value.returned) return paragraph(`not before the end: returned as output ${value.returned.join(", ")}`);
  const last = value.uses?.at(-1);
  return last ? list([opRef(ops[last[0]])]) : paragraph("at once: nothing reads it");
}

function stateLife(name) {
  const entry = states.get(name);
  if (!entry) return null;
  const held = entry.held ?? [];
  return [
    paragraph(`${entry.trained ? "trained " : ""}${entry.kind}, `, h("code", {}, string(entry.type)), `, ${bytes(entry.bytes)}`),
    lane(new Set(held.map(([stage]) => stage)), stagesOf(entry.uses), ways.get(entry.name) ?? []),
    some("Names", entry.names.length > 1 || entry.transient ? stateNames(entry) : []),
    some("Held by", held.map(([stage, names]) => [stageRef(stage), ` as ${names.join(", ")}`])),
    entry.share ? [heading("Shared by"), paragraph(entry.share)] : null,
    some("Same storage as", (entry.overlaps ?? []).map(byName)),
    versions(entry.name),
    some("Used by", limited(useRefs(entry.uses))),
    some("Crosses", (ways.get(entry.name) ?? []).map(wayNodes)),
    entry.returned ? [heading("Returned"), paragraph(`as output ${entry.returned.join(", ")}`)] : null,
    entry.uses || entry.returned ? null : paragraph("No op reads it."),
  ];
}

function stateNames({names, transient = []}) {
  return names.map((name) => [h("code", {}, name), transient.includes(name) ? " (not in the state_dict)" : ""]);
}

function stageLife(key) {
  const stage = DATA.stages[Number(key)];
  if (!stage) return null;
  const held = DATA.state.filter((entry) => entry.held?.some(([index]) => index === stage.index));
  return [
    costed ? stageCosts(stage) : null,
    treeSection(ops.filter((op) => op.stage === stage.index)),
    some("Inputs", limited(stage.inputs.map((name) => [byName(name), madeIn(name)]))),
    some("Outputs", limited(stage.outputs.map((name) => [byName(name), madeIn(name)]))),
    some(`State, ${held.length} of ${DATA.state.length}`, limited(held.map((one) => [byName(one.name), `  ${bytes(one.bytes)}`]), 80)),
    some("First and last op", [opRef(ops.find((op) => op.stage === stage.index)), opRef(ops.findLast((op) => op.stage === stage.index))]),
  ];
}

function stageCosts(stage) {
  const sources = Object.entries(stage.sources).map(([kind, n]) => `${n} by ${kind}`).join(", ");
  const host = stage.host ? `; the host starts their ops in ${seconds(stage.host)}` : "";
  return [
    paragraph(`rank ${stage.rank}: a micro-batch takes ${seconds(timeOf(stage))}, ${percent(stage.share)} of the time of all stages`,
      hostFlag(stage)),
    paragraph(`the device computes forward in ${seconds(stage.forward)}, backward in ${seconds(stage.backward)}${host}`),
    paragraph(`${count(stage.flops)} FLOPs forward, ${count(stage.parameters)} parameters; `
      + `receives ${bytes(stage.received)}, sends ${bytes(stage.sent)}`),
    heading("Memory"), list(KINDS.map((kind) => [h("i", {class: `swatch ${kind}`}), `${kind} ${bytes(stage.memory[kind])}`])),
    paragraph(h("span", {class: "label"}, `costs of ops: ${sources}`)),
  ];
}

const groupLife = (kind) => (key) => {
  const found = groups[kind].get(key);
  if (!found) return null;
  const stages = [...new Set(found.map((op) => op.stage))].filter((stage) => stage !== null);
  const path = kind === "source" ? DATA.files[key.slice(0, key.lastIndexOf(":"))] : null;
  const prefix = `@${key}.`;
  const held = kind === "module" ? DATA.state.filter((entry) => entry.names.some((name) => name.startsWith(prefix))) : [];
  return [
    path ? paragraph(h("code", {}, path)) : null,
    stages.length ? paragraph("In ", between(stages.map(stageRef), ", ")) : null,
    kind === "module" ? treeSection(found, key) : null,
    some(`State, ${held.length}`, limited(held.map((entry) => byName(entry.name)), 40)),
    some(`Ops, ${found.length}`, limited(found.map((op) => opRef(op)), 100)),
  ];
};

function severalLives(key) {
  return [list(key.split("\n").filter(named).map((name) => {
    const {type, bytes: size} = values.get(name) ?? states.get(name);
    return [byName(name), " ", h("span", {class: "mono"}, string(type)), `, ${bytes(size)}`];
  }))];
}

const LIVES = {
  value: valueLife, state: stateLife, stage: stageLife, several: severalLives,
  module: groupLife("module"), source: groupLife("source"), target: groupLife("target"),
};
const TITLES = {
  several: (key) => `${key.split("\n").length} values`,
  stage: (key) => `stage ${key}`,
  module: (key) => `module ${key}`,
};

/** The left edge of the panel: dragging it or its arrow keys make the panel wider or narrower. */
const edge = h("div", {id: "edge", role: "separator", "aria-orientation": "vertical", "aria-label": "Width of the details", tabindex: "0",
  pointerdown: dragEdge, keydown: (event) => {
    const step = {ArrowLeft: 40, ArrowRight: -40}[event.key];
    if (step) setWidth(panel.offsetWidth + step);
  }});

function setWidth(width) {
  const most = Math.max(320, innerWidth - 240);
  document.body.style.setProperty("--wide", `${Math.round(Math.min(Math.max(width, 320), most))}px`);
}

function dragEdge(start) {
  start.preventDefault();
  edge.setPointerCapture(start.pointerId);
  const move = (event) => setWidth(innerWidth - event.clientX);
  edge.addEventListener("pointermove", move);
  edge.addEventListener("lostpointercapture", () => edge.removeEventListener("pointermove", move), {once: true});
}

/** The panel shows a thing; false when there is no such thing. */
function showLife(kind, key) {
  const content = Object.hasOwn(LIVES, kind) ? LIVES[kind](key) : null;
  if (!content) return false;
  const close = h("button", {class: "small", type: "button", id: "close", click: closeLife, title: "Escape"}, "close");
  const back = h("button", {class: "small", type: "button", hidden: steps < 2, click: () => { steps -= 2; history.back(); }}, "back");
  const top = h("div", {class: "top"}, h("h2", {}, TITLES[kind]?.(key) ?? key), back, close);
  panel.replaceChildren(edge, top, ...content.flat(Infinity).filter(Boolean));
  panel.hidden = false;
  panel.scrollTop = 0;
  document.body.classList.add("open");
  return true;
}

function closeLife() {
  steps = 0;
  panel.hidden = true;
  document.body.classList.remove("open");
  markEverywhere(null);
  markPictures(null);
  history.replaceState(null, "", location.pathname + location.search);
  opener?.isConnected && opener.focus({preventScroll: true});
}
