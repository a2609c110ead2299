// The facts, the findings, and the tables of stages, crossings and state.

const KINDS = ["parameters", "gradients", "optimizer", "activations", "passing"];

function facts() {
  const r = DATA.report;
  const found = [["stages", DATA.stages.length || "none yet"], ["ops", DATA.ops.length], ["phase", DATA.phase]];
  if (r) {
    found.push(["device", r.device], ["schedule", r.schedule], ["micro-batches", r.n_microbatches], ["predicted step", seconds(r.seconds)],
      ["bubble", percent(r.bubble)], ["balance", percent(r.balance)], ["times as fast as one device", r.speed_up.toFixed(2)]);
  }
  return found.map(([name, item]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(item))));
}

function findingNode([text, about]) {
  return h("li", {}, text, about ? [" ", h("button", {class: "ref", type: "button", "data-go": about}, "show")] : null);
}

const bar = (parts, most) => h("div", {class: "bar", "aria-hidden": "true"}, parts.map(([kind, size]) => {
  const piece = h("i", {class: kind, title: kind});
  piece.style.width = `${most ? 100 * size / most : 0}%`;
  return piece;
}));

const legend = (kinds) => kinds.map((kind) => h("span", {}, h("i", {class: kind}), kind));
const cell = (...items) => h("td", {}, ...items);
const number = (text) => h("td", {class: "number"}, String(text));
const memoryOf = (stage) => sum(KINDS.map((kind) => stage.memory[kind] ?? 0));
/** Seconds of the device or of the host, whichever has more to do, as in a StageReport. */
const timeOf = (stage) => Math.max(stage.forward + stage.backward, stage.host);
const timeBar = (stage, most) => bar([["forward", stage.forward], ["backward", stage.backward],
  ["host", timeOf(stage) - stage.forward - stage.backward]], most);
const waitsForHost = (stage) => stage.host > stage.forward + stage.backward;

/** A table whose rows are made on demand; a click on a head sorts by it. heads: [name, key of an item, is a number]. */
function sortable(heads, items, row) {
  const body = h("tbody", {}, items.map(row));
  const tops = heads.map(([name, key, isNumber]) => h("th", {class: isNumber ? "number" : null, scope: "col"},
    h("button", {type: "button", click: () => sortBy(key, isNumber)}, name)));
  let sorted = null, down = false;
  function sortBy(key, isNumber) {
    down = sorted === key ? !down : Boolean(isNumber);
    sorted = key;
    const order = [...items].sort((a, b) => compare(key(a), key(b)) * (down ? -1 : 1));
    tops.forEach((top, i) => top.setAttribute("aria-sort", heads[i][1] === key ? (down ? "descending" : "ascending") : "none"));
    body.replaceChildren(...order.map(row));
  }
  return h("div", {class: "scroll", tabindex: "0"}, h("table", {}, h("thead", {}, h("tr", {}, tops)), body));
}

const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));

const costed = DATA.report !== null;
const longest = costed ? Math.max(...DATA.stages.map(timeOf)) : 0;
const fullest = costed ? Math.max(...DATA.stages.map(memoryOf)) : 0;

/** The word for the stage that has the most of something, the first of equal ones as in the sentences at the top. */
function flag(size, stage, word) {
  const sizes = DATA.stages.map(size), most = Math.max(...sizes);
  const stands = DATA.stages.length > 1 && Math.min(...sizes) < 0.999 * most && DATA.stages[sizes.indexOf(most)] === stage;
  return stands ? h("span", {class: "flag"}, word) : null;
}

/** The word for a stage whose rank needs more memory than its device has, else for the fullest. */
const memoryFlag = (stage) => DATA.report.too_large.includes(stage.index)
  ? h("span", {class: "flag over"}, "too large") : flag(memoryOf, stage, "fullest");

/** The word for a stage whose ops the host starts in more time than the device takes for them. */
function hostFlag(stage) {
  if (!waitsForHost(stage)) return null;
  const says = `the host starts its ops in ${seconds(stage.host)}, the device computes them in ${seconds(stage.forward + stage.backward)}`;
  return h("span", {class: "flag", title: says}, "host");
}

const modulesText = ({modules}) => modules.map(({text}) => text).join(", ");
const STAGE_HEADS = [["stage", (s) => s.index], ["modules", modulesText], ["ops", (s) => s.ops, true]];
const COST_HEADS = [
  ["stage", (s) => s.index], ["rank", (s) => s.rank, true], ["time of a micro-batch", timeOf], ["", timeOf],
  ["share", (s) => s.share, true], ["FLOPs", (s) => s.flops, true], ["parameters", (s) => s.parameters, true],
  ["memory", memoryOf], ["", memoryOf],
  ["in", (s) => s.received, true], ["out", (s) => s.sent, true], ["ops", (s) => s.ops, true], ["modules", modulesText],
];

function modulesCell(stage) {
  return h("td", {class: "modules"}, between(stage.modules.map(modulesRef), ", "));
}

function stageRow(stage) {
  const row = {"data-stage": stage.index};
  if (!costed) return h("tr", row, cell(stageRef(stage.index)), modulesCell(stage), number(stage.ops));
  return h("tr", row,
    cell(stageRef(stage.index)), number(stage.rank),
    cell(timeBar(stage, longest)), cell(seconds(timeOf(stage)), flag(timeOf, stage, "slowest"), hostFlag(stage)), number(percent(stage.share)),
    number(count(stage.flops)), number(count(stage.parameters)),
    cell(bar(KINDS.map((kind) => [kind, stage.memory[kind] ?? 0]), fullest)),
    cell(bytes(memoryOf(stage)), memoryFlag(stage)),
    number(bytes(stage.received)), number(bytes(stage.sent)), number(stage.ops), modulesCell(stage));
}

const WAY_HEADS = [
  ["value", (w) => w.value], ["from", (w) => w.source ?? -1, true], ["to", (w) => w.target, true], ["route", (w) => w.route ?? ""],
  ["bytes", (w) => w.bytes ?? -1, true], ["through", (w) => w.via.length], ["why", (w) => w.why ?? ""],
];

const wayRow = (way) => h("tr", {}, cell(byName(way.value), madeIn(way.value)), number(way.source ?? "input"), number(way.target),
  cell(way.route ?? "", way.made ? [" as ", byName(way.made)] : null), number(bytes(way.bytes)), cell(stagesText(way.via)),
  h("td", {class: "wide"}, reason(way)));

const ENTRY_HEADS = [
  ["name", (e) => e.name], ["kind", (e) => e.kind], ["type", (e) => string(e.type)], ["bytes", (e) => e.bytes ?? -1, true],
  ["stages", (e) => e.held?.[0][0] ?? -1], ["shared", (e) => e.share ?? ""], ["reads", (e) => e.uses?.length ?? 0, true],
];

const entryRow = (entry) => h("tr", {},
  cell(ref("state", entry.name)), cell(entry.kind), h("td", {class: "mono"}, string(entry.type)), number(bytes(entry.bytes)),
  cell(between((entry.held ?? []).map(([stage]) => ref("stage", stage)), ", ")), cell(entry.share ?? ""), number(entry.uses?.length ?? 0));

/** A long table comes when it is asked for: elements cost more than data. */
function table(place, heads, items, row, most = 400) {
  const make = () => place.replaceChildren(sortable(heads, items, row));
  if (items.length <= most) make();
  else place.append(h("button", {class: "small", type: "button", click: make}, `show all ${items.length}`));
  place.closest("section").hidden = !items.length;
}

at("facts").append(...facts());
at("findings").append(...DATA.findings.slice(0, 8).map(findingNode));
if (DATA.findings.length > 8) {
  at("findings").append(h("li", {}, `and ${DATA.findings.length - 8} more state entries that several stages use`));
}
table(at("costs"), costed ? COST_HEADS : STAGE_HEADS, DATA.stages, stageRow, Infinity);
if (costed) at("costs").append(h("div", {class: "legend"}, legend(["forward", "backward", ...(DATA.stages.some(waitsForHost) ? ["host"] : []), ...KINDS])));
table(at("ways"), WAY_HEADS, DATA.ways, wayRow);
table(at("entries"), ENTRY_HEADS, DATA.state, entryRow);
