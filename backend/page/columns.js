// One column per pass. Only the rows in sight are elements, so that a program of any size stays quick.

const HEIGHT = 18, CONTEXT = 3, LEAST = 8;

class Column {
  constructor(data, index, previous) {
    Object.assign(this, {data, index, previous, marked: null, here: -1, counts: {"+": 0, "-": 0, "~": 0}});
    this.indents = expandIndents(data.indents);
    this.ids = [];
    this.diff = this.readDiff();
    this.folds = index > 0;
    this.makeElements();
    this.fold();
    if (!data.changed && index > 0) this.element.classList.add("strip");
  }

  /** The rows without folds: {kind, at, id, old}; at is the line here, -1 for a lost one. */
  readDiff() {
    const rows = [];
    let old = 0;
    const next = (kind, id, was) => { rows.push({kind, at: this.ids.length, id, old: was}); this.ids.push(id); };
    for (const [kind, what] of this.data.hunks) {
      const ids = typeof what === "number" ? null : expandRuns(what);
      if (kind === "=") for (const end = old + what; old < end; old++) next("=", this.previous.ids[old]);
      else if (kind === "-") for (const end = old + what; old < end; old++) rows.push(this.lost(old));
      else if (kind === "~") for (const id of ids) next(kind, id, this.previous.ids[old++]);
      else for (const id of ids) next(this.index ? "+" : "=", id);
      if (this.index && kind !== "=") this.counts[kind] += ids ? ids.length : what;
    }
    return rows;
  }

  lost(old) {
    return {kind: "-", at: -1, id: this.previous.ids[old], indent: this.previous.indents[old]};
  }

  makeElements() {
    const {name, seconds: time} = this.data;
    const {"+": more, "-": less, "~": other} = this.counts;
    const changed = [more && `+${more}`, less && `−${less}`, other && `~${other}`].filter(Boolean).join(" ");
    const did = this.data.changed ? `${changed || "order"} lines, ${seconds(time)}` : `changed nothing, ${seconds(time)}`;
    const title = `${name}: ${this.index ? did : "what the passes began with"}`;
    this.rows = h("div", {class: "rows"});
    this.sizer = h("div", {class: "sizer"}, this.rows);
    const frame = {class: "pane", tabindex: "0", role: "region", "aria-label": `Program after ${name}`, scroll: () => this.soon()};
    this.pane = h("div", frame, this.sizer);
    this.toggle = h("button", {class: "small", type: "button", click: () => { this.folds = !this.folds; this.fold(); }}, "");
    this.element = h("div", {class: `column${this.data.changed ? " changed" : ""}`, "data-pass": name},
      h("div", {class: "head"},
        h("button", {class: "name", type: "button", title, click: () => this.flip()}, this.index ? `${this.index}. ${name}` : name),
        h("span", {class: "counts"}, this.index ? [changed, seconds(time)].filter(Boolean).join(" · ") : `${this.ids.length} lines`),
        h("span", {class: "end"}, this.toggle)),
      this.pane);
    this.sizer.style.minWidth = `${widest(this) + 4}ch`;
    this.sizer.style.fontFamily = "var(--mono)";
    this.sizer.style.fontSize = "12px";
    new ResizeObserver(() => this.render()).observe(this.pane);
  }

  flip(open = this.element.classList.contains("strip")) {
    this.element.classList.toggle("strip", !open);
    this.render();
  }

  /** Long runs of unchanged lines are one row each, unless all lines are wanted. */
  fold() {
    this.toggle.textContent = this.folds ? "all lines" : "changes only";
    this.toggle.hidden = this.index === 0;
    this.shown = this.folds ? folded(this.diff) : this.diff.slice();
    this.resize();
  }

  open(row) {
    const {from, to} = this.shown[row];
    this.shown.splice(row, 1, ...this.diff.slice(from, to));
    this.resize();
  }

  resize() {
    this.sizer.style.height = `${this.shown.length * HEIGHT}px`;
    this.first = -1;
    this.render();
  }

  soon() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.render(); });
  }

  render() {
    if (!this.pane.clientHeight) return;
    const first = Math.max(0, Math.floor(this.pane.scrollTop / HEIGHT) - 10);
    const last = Math.min(this.shown.length, first + Math.ceil(this.pane.clientHeight / HEIGHT) + 20);
    if (first === this.first && last === this.last) return;
    Object.assign(this, {first, last});
    this.rows.style.transform = `translateY(${first * HEIGHT}px)`;
    this.rows.replaceChildren(...this.shown.slice(first, last).map((row, i) => this.rowNode(row, first + i)));
  }

  rowNode(row, place) {
    if (row.kind === "fold") {
      const text = `··· ${row.to - row.from} lines`;
      return h("button", {class: "row fold", type: "button", click: () => this.open(place)}, text);
    }
    const kind = {"+": " add", "-": " del", "~": " mod", "=": ""}[row.kind];
    const here = row.at >= 0 && row.at === this.here ? " here" : "";
    const indent = " ".repeat(row.indent ?? this.indents[row.at]);
    const nodes = row.kind === "~" ? changedNodes(lines[row.old], lines[row.id], this.marked) : lineNodes(lines[row.id], this.marked);
    return h("div", {class: `row${kind}${here}`}, indent, ...nodes);
  }

  /** The line is in sight and marked. */
  reveal(at) {
    this.here = at;
    let row = this.shown.findIndex((r) => r.at === at && r.kind !== "fold");
    if (row < 0) {
      const place = this.diff.findIndex((r) => r.at === at);
      row = this.shown.findIndex((r) => r.kind === "fold" && r.from <= place && place < r.to);
      if (row < 0) return;
      const {from} = this.shown[row];
      this.open(row);
      row += place - from;
    }
    this.pane.scrollTop = Math.max(0, row * HEIGHT - this.pane.clientHeight / 3);
    this.first = -1;
    this.render();
  }

  /** What is marked is in sight: nothing scrolls while it is folded away. */
  unfolded() {
    if (this.here >= 0) this.reveal(this.here);
    else this.render();
  }

  /** The name is marked wherever it stands, and the line that defines it is in sight. */
  mark(name, naming) {
    this.marked = name;
    this.here = -1;
    this.first = -1;
    const at = name ? this.ids.findIndex((id) => naming.has(id)) : -1;
    if (at >= 0 && !this.element.classList.contains("strip")) this.reveal(at);
    else this.render();
  }
}

function expandRuns(flat) {
  const ids = [];
  for (let i = 0; i < flat.length; i += 2) for (let k = 0; k < flat[i + 1]; k++) ids.push(flat[i] + k);
  return ids;
}

function expandIndents(flat) {
  const indents = [];
  for (let i = 0; i < flat.length; i += 2) for (let k = 0; k < flat[i + 1]; k++) indents.push(flat[i]);
  return indents;
}

function widest(column) {
  return column.diff.reduce((most, row) => Math.max(most, lines[row.id].length + (row.indent ?? column.indents[row.at])), 0);
}

function folded(diff) {
  const rows = [];
  for (let from = 0, to; from < diff.length; from = to) {
    to = from + 1;
    while (to < diff.length && (diff[to].kind === "=") === (diff[from].kind === "=")) to++;
    const begin = from === 0 ? from : from + CONTEXT, end = to === diff.length ? to : to - CONTEXT;
    if (diff[from].kind !== "=" || end - begin < LEAST) rows.push(...diff.slice(from, to));
    else rows.push(...diff.slice(from, begin), {kind: "fold", from: begin, to: end}, ...diff.slice(end, to));
  }
  return rows;
}

let beside = null;
const columns = [];
for (const [index, data] of DATA.columns.entries()) columns.push(new Column(data, index, columns[index - 1]));
const shelf = at("columns");
shelf.style.height = `min(78vh, ${Math.max(...columns.map((column) => column.diff.length), 12) * HEIGHT + 70}px)`;
shelf.append(...columns.map((column) => column.element));

/** The last program's line is in sight. */
function revealLine(at) {
  if (beside && at >= 0) { beside.reveal(at); return; }
  const last = columns.findLast((column) => column.data.changed || column.index === 0);
  if (!last || at < 0) return;
  document.querySelector("#passes").querySelector("details").open = true;
  last.flip(true);
  last.reveal(at);
  last.element.scrollIntoView({block: "nearest", inline: "nearest"});
}

/** Lines that name it. The first one in a program defines it, but for heads of stages and lists of state: those come before. */
function linesNaming(name) {
  const naming = new Set();
  lines.forEach((line, id) => { if (mentions(line, name) && !/^(stage \d|holds )/.test(line)) naming.add(id); });
  return naming;
}

function markEverywhere(name) {
  const naming = name ? linesNaming(name) : new Set();
  for (const column of [...columns, ...(beside ? [beside.column] : [])]) column.mark(name, naming);
}

if (columns.length === 1) {
  document.querySelector("#passes h2").textContent = "Program";
  document.querySelector("#passes .note").textContent = "A click on a value shows its life.";
  document.querySelector("#passes").dataset.title = "Program";
}
