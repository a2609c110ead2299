// The modules and ops of a stage or of a module as a tree, with what each takes: time, bytes, memory.

const FORWARD = 0, BACKWARD = 1, MOVED = 3, STATE = 4, KEPT = 5;
const nothing = () => [0, 0, 0, 0, 0, 0];
const hasCost = ({cost}) => cost >= 0;
const addTo = (sums, row) => row.forEach((amount, i) => { sums[i] += amount; });

const SORTS = {
  order: {name: "module or op", says: "in the order in which they run"},
  time: {name: "time", of: ({cost}) => cost[FORWARD] + cost[BACKWARD], says: "of a micro-batch on the device, forward and backward"},
  bytes: {name: "bytes", of: ({cost}) => cost[MOVED], says: "read and written in the forward"},
  memory: {name: "memory", of: ({cost}) => cost[STATE] + cost[KEPT],
    says: "state with gradients and optimizer, and what is kept for the backward of all micro-batches in flight"},
};

/** {label, path, cost, count, children} for modules, {label, op, cost} for ops, in the order in which they run. */
function treeOf(some, within = "") {
  const root = branch(within, within);
  for (const op of some) {
    const rest = within && op.module ? op.module.slice(within.length + 1) : op.module;
    let node = root;
    for (const part of rest ? rest.split(".") : []) node = childOf(node, part);
    node.children.push({label: op.target, op, cost: hasCost(op) ? DATA.costs[op.cost] : nothing()});
  }
  if (!within && DATA.loss && some.some((op) => op.stage === DATA.stages.length - 1)) root.children.push(lossLeaf());
  total(root);
  return joined(root);
}

const branch = (label, path) => ({label, path, cost: nothing(), count: 0, children: [], names: new Map()});
const lossLeaf = () => ({label: `the loss, ${DATA.loss[0]}`, cost: DATA.costs[DATA.loss[1]]});

function childOf(node, part) {
  if (!node.names.has(part)) {
    const child = branch(part, node.path ? `${node.path}.${part}` : part);
    node.names.set(part, child);
    node.children.push(child);
  }
  return node.names.get(part);
}

function total(node) {
  for (const child of node.children) {
    if (child.children) total(child);
    addTo(node.cost, child.cost);
    node.count += child.children ? child.count : 1;
  }
}

/** A module that has nothing but one other module is one row with it. */
function joined(node) {
  node.children = node.children.map((child) => {
    let inner = child;
    while (inner.children?.length === 1 && inner.children[0].children) {
      inner = {...inner.children[0], label: `${inner.label}.${inner.children[0].label}`};
    }
    return inner.children ? joined(inner) : inner;
  });
  return node;
}

/** The modules that are open at first: the largest ones, as long as the rows are few. */
function opening(root, most = 16) {
  const size = costed ? SORTS.time.of : ({count}) => count;
  const opened = new Set();
  const inner = (node) => node.children.filter(({children}) => children?.length > 1);
  let rows = root.children.length, closed = inner(root);
  while (closed.length) {
    const largest = closed.reduce((a, b) => size(b) > size(a) ? b : a);
    rows += largest.children.length;
    if (rows > most) break;
    opened.add(largest);
    closed = [...closed.filter((node) => node !== largest), ...inner(largest)];
  }
  return opened;
}

/** The tree as a table; a click on a head sorts by it, one on a triangle opens a module. */
class Tree {
  constructor(root) {
    this.root = root;
    this.sort = "order";
    this.opened = opening(root);
    this.most = costed ? SORTS.time.of(root) : 0;
    this.body = h("tbody");
    const kinds = costed ? Object.keys(SORTS) : ["order"];
    this.heads = kinds.map((kind) => h("th", {scope: "col", class: kind === "order" ? null : "number"},
      h("button", {type: "button", title: SORTS[kind].says, click: () => this.sortBy(kind)}, SORTS[kind].name)));
    this.kinds = kinds;
    this.element = h("div", {class: "scroll tree"}, h("table", {}, h("thead", {}, h("tr", {}, this.heads)), this.body));
    this.sortBy(costed ? "time" : "order");
  }

  sortBy(kind) {
    this.sort = kind;
    this.heads.forEach((head, i) => head.setAttribute("aria-sort", this.kinds[i] !== kind ? "none" : kind === "order" ? "ascending" : "descending"));
    this.render();
  }

  render() {
    this.body.replaceChildren(...this.rowsOf(this.root, 0));
  }

  rowsOf(node, depth) {
    const {of} = SORTS[this.sort], all = of ? [...node.children].sort((a, b) => of(b) - of(a)) : node.children;
    const rows = all.slice(0, 300).flatMap((child) => [
      this.row(child, depth), ...(this.opened.has(child) ? this.rowsOf(child, depth + 1) : []),
    ]);
    if (all.length > 300) rows.push(h("tr", {}, h("td", {}, `and ${all.length - 300} more`)));
    return rows;
  }

  row(node, depth) {
    const name = h("td", {class: "name"}, this.toggle(node), node.children ? ref("module", node.path, node.label)
      : node.op ? ref("op", node.op.number, node.label) : node.label,
    node.children ? h("span", {class: "label", title: "ops"}, ` ${node.count}`) : null);
    name.style.paddingLeft = `${4 + 14 * depth}px`;
    if (!costed) return h("tr", {}, name);
    const {time, bytes: moved, memory} = SORTS;
    return h("tr", {"data-node": node.path ?? node.label}, name, this.time(node, time.of(node)),
      h("td", {class: "number"}, bytes(moved.of(node))), h("td", {class: "number"}, bytes(Math.round(memory.of(node)))));
  }

  toggle(node) {
    if (!node.children) return h("span", {class: "toggle"});
    const open = this.opened.has(node);
    const flip = () => { if (!this.opened.delete(node)) this.opened.add(node); this.render(); };
    return h("button", {class: "toggle", type: "button", "aria-expanded": String(open), "aria-label": `ops of ${node.label}`, click: flip},
      open ? "▾" : "▸");
  }

  time(node, spent) {
    const share = h("i", {class: "share"});
    share.style.width = `${this.most ? 100 * spent / this.most : 0}%`;
    const exact = `forward ${seconds(node.cost[FORWARD])}, backward ${seconds(node.cost[BACKWARD])}`;
    return h("td", {class: "number time", title: exact}, share, h("span", {}, seconds(spent)));
  }
}

/** Regions run inside of their op, which has their costs. */
function treeSection(some, within) {
  const shown = costed ? some.filter(hasCost) : some;
  return shown.length ? [heading("Modules and ops"), new Tree(treeOf(shown, within)).element] : [];
}
