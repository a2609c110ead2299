// Search over values, state, modules, source lines, op targets, and the lines of the last program.

const query = at("query"), found = at("found");
const MOST = 12;

/** [heading, [kind, key, what to compare with, remark] ...], made at the first search. */
let index = null;
function makeIndex() {
  const grouped = (kind) => Array.from(groups[kind], ([key, of]) => [kind, key, key.toLowerCase(), opsText(of.length)]);
  return [
    ["Stages", DATA.stages.map((s) => ["stage", String(s.index), `stage ${s.index}`, opsText(s.ops)])],
    ["Values", DATA.values.map((v) => ["value", v.name, v.name.toLowerCase(), string(v.type)])],
    ["State", Array.from(states, ([name, entry]) => ["state", name, name.toLowerCase(), string(entry.type)])],
    ["Modules", grouped("module")], ["Source lines", grouped("source")], ["Ops", grouped("target")],
    ["Lines of the program", ops.filter((op) => op.line >= 0).map(lineItem)],
  ];
}

function lineItem({number, line, stage}) {
  return ["op", String(number), lines[lastIds()[line]].toLowerCase(), stage === null ? "" : `stage ${stage}`];
}

/** Whole names first, then beginnings, then the rest; the mark before a name does not count. */
function rank(text, wanted) {
  const bare = text.replace(/^[%@]/, "");
  if (text === wanted || bare === wanted) return 0;
  return text.startsWith(wanted) || bare.startsWith(wanted) || bare.endsWith(`.${wanted}`) ? 1 : 2;
}

function matches(wanted) {
  index ??= makeIndex();
  return index.map(([title, items]) => {
    const all = items.filter(([, , text]) => text.includes(wanted));
    const best = [0, 1, 2].flatMap((level) => all.filter(([, , text]) => rank(text, wanted) === level).slice(0, MOST)).slice(0, MOST);
    return [title, best, all.length];
  }).filter(([, best]) => best.length);
}

function label(kind, key) {
  return kind === "op" ? lines[lastIds()[ops[key].line]] : kind === "stage" ? `stage ${key}` : key;
}

function showFound() {
  const wanted = query.value.trim().toLowerCase();
  const results = wanted ? matches(wanted) : [];
  const nodes = results.flatMap(([title, best, all]) => [
    h("div", {class: "kind", role: "presentation"}, all > best.length ? `${title} (${best.length} of ${all})` : title),
    ...best.map(([kind, key, , remark]) => h("div", {role: "option", "aria-selected": "false", "data-go": `${kind}:${key}`},
      h("b", {}, label(kind, key)), h("span", {}, remark))),
  ]);
  found.replaceChildren(...(nodes.length ? nodes : [h("div", {class: "none"}, "nothing found")]));
  found.querySelectorAll("[role=option]").forEach((option, i) => { option.id = `found-${i}`; });
  setFound(Boolean(wanted));
  choose(found.querySelector("[role=option]"));
}

function setFound(open) {
  found.hidden = !open;
  query.setAttribute("aria-expanded", String(open));
}

function choose(option) {
  found.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
  option?.setAttribute("aria-selected", "true");
  option?.scrollIntoView({block: "nearest"});
  query.setAttribute("aria-activedescendant", option?.id ?? "");
}

function move(step) {
  const options = [...found.querySelectorAll("[role=option]")];
  const now = options.findIndex((option) => option.getAttribute("aria-selected") === "true");
  choose(options[(now + step + options.length) % options.length]);
}

function searchKey(event) {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); move(event.key === "ArrowDown" ? 1 : -1); }
  else if (event.key === "Enter") found.querySelector("[aria-selected=true]")?.click();
  else if (event.key === "Escape" && !found.hidden) { event.stopPropagation(); setFound(false); }
}

query.addEventListener("input", showFound);
query.addEventListener("focus", () => { if (query.value) showFound(); });
query.addEventListener("keydown", searchKey);
document.addEventListener("pointerdown", (event) => { if (!event.target.closest(".search")) setFound(false); });
