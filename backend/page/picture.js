// Pictures: a wheel (with Ctrl, or once the picture has the focus), keys and buttons zoom, dragging pans, a click shows what was clicked.

class Picture {
  constructor(frame) {
    this.frame = frame;
    this.svg = frame.querySelector("svg");
    this.whole = sizeOf(this.svg);
    this.svg.removeAttribute("width");
    this.svg.removeAttribute("height");
    this.frame.tabIndex = 0;
    this.frame.setAttribute("role", "group");
    this.frame.setAttribute("aria-label", "Picture: plus and minus zoom, arrows move, 0 fits");
    this.size();
    new ResizeObserver(() => this.size()).observe(frame);
    this.addTools();
    this.listen();
    this.begin();
  }

  /** As high as the picture is at this width, within bounds. */
  size() {
    const high = this.whole.height * Math.min(1, this.frame.clientWidth / this.whole.width || 1) + 24;
    this.frame.style.height = `${Math.round(Math.min(Math.max(high, 120), innerHeight * 0.62))}px`;
  }

  addTools() {
    const tool = (label, title, action) => h("button", {class: "small", type: "button", title, "aria-label": title, click: action}, label);
    const tools = [
      tool("+", "zoom in", () => this.zoom(0.7)), tool("−", "zoom out", () => this.zoom(1 / 0.7)),
      tool("fit", "show all of it", () => this.fit()),
    ];
    this.frame.closest("section").querySelector("h2").append(h("div", {class: "tools"}, tools));
  }

  listen() {
    this.frame.addEventListener("wheel", (e) => this.wheel(e), {passive: false});
    this.frame.addEventListener("keydown", (e) => this.key(e));
    this.svg.addEventListener("pointerdown", (e) => this.drag(e));
  }

  /** All of it, or, where that would be too small to read, its beginning. */
  begin() {
    const {width, height} = this.frame.getBoundingClientRect(), {x, y} = this.whole;
    if (!width || Math.min(width / this.whole.width, height / this.whole.height) >= 0.55) return this.fit();
    const seen = {width: width / 0.8, height: height / 0.8};
    const middle = (from, all, part) => all < part ? from + (all - part) / 2 : from;
    this.set({x: middle(x, this.whole.width, seen.width), y: middle(y, this.whole.height, seen.height), ...seen});
  }

  fit() { this.set({...this.whole}); }

  set(box) {
    this.box = box;
    this.svg.setAttribute("viewBox", `${box.x} ${box.y} ${box.width} ${box.height}`);
  }

  zoom(factor, px = 0.5, py = 0.5) {
    const {x, y, width, height} = this.box;
    const size = Math.min(Math.max(width * factor, 40), this.whole.width * 8), f = size / width;
    this.set({x: x + width * (1 - f) * px, y: y + height * (1 - f) * py, width: size, height: height * f});
  }

  /** The first of the elements comes to the middle, unless one of them is in sight. */
  show(elements) {
    const frame = this.frame.getBoundingClientRect(), boxes = elements.map((element) => element.getBoundingClientRect());
    const inSight = (b) => b.right > frame.left && b.left < frame.right && b.bottom > frame.top && b.top < frame.bottom;
    if (!boxes.length || boxes.some(inSight)) return;
    const unit = 1 / this.svg.getScreenCTM().a, [first] = boxes;
    const middle = (box) => [box.x + box.width / 2, box.y + box.height / 2];
    const [x, y] = middle(first), [homeX, homeY] = middle(frame);
    this.pan((x - homeX) * unit, (y - homeY) * unit);
  }

  pan(dx, dy) { this.set({...this.box, x: this.box.x + dx, y: this.box.y + dy}); }

  wheel(event) {
    if (!event.ctrlKey && !event.metaKey && !this.frame.contains(document.activeElement)) return;
    event.preventDefault();
    const {left, top, width, height} = this.frame.getBoundingClientRect();
    this.zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, (event.clientX - left) / width, (event.clientY - top) / height);
  }

  key(event) {
    const step = this.box.width / 10;
    const does = {
      "+": () => this.zoom(0.8), "=": () => this.zoom(0.8), "-": () => this.zoom(1.25), "0": () => this.fit(),
      ArrowLeft: () => this.pan(-step, 0), ArrowRight: () => this.pan(step, 0),
      ArrowUp: () => this.pan(0, -step), ArrowDown: () => this.pan(0, step),
    }[event.key];
    if (!does || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    does();
  }

  drag(start) {
    if (start.button) return;
    const unit = 1 / this.svg.getScreenCTM().a, {x, y} = this.box;
    follow(this.frame, start, Math.hypot, (dx, dy) => this.set({...this.box, x: x - dx * unit, y: y - dy * unit}));
  }
}

function sizeOf(svg) {
  const box = svg.getAttribute("viewBox")?.split(/[\s,]+/).map(Number);
  const [x, y, width, height] = box ?? [];
  if (box?.length === 4 && box.every(Number.isFinite) && width > 0 && height > 0) return {x, y, width, height};
  return {x: 0, y: 0, width: parseFloat(svg.getAttribute("width")) || 800, height: parseFloat(svg.getAttribute("height")) || 400};
}

/** What a part of a picture stands for, as a list of kind:key: by its classes and its id, else by its title. */
function meanings(element) {
  const marks = [...element.classList, element.id].map(meantByMark).filter(Boolean);
  const found = marks.length ? marks : [meantByTitle(element.querySelector(":scope > title")?.textContent ?? "", element)].filter(Boolean);
  return [...new Set(found.map((pair) => pair.join(":")))];
}

/** `stage-2`, `value-relu_3`, `module-layers.3`; a number behind it tells parts of one thing apart. */
function meantByMark(mark) {
  const [, kind, rest] = /^(stage|cluster|value|state|param|module)[-_](.+)$/s.exec(mark) ?? [];
  return kind ? meant(kind, rest) ?? meant(kind, rest.replace(/-\d+$/, "")) : null;
}

function meant(kind, name) {
  if (kind === "stage" || kind === "cluster") return /^\d+$/.test(name) && DATA.stages[Number(name)] ? ["stage", name] : null;
  if (kind === "module") return plainModules.has(name) ? ["module", plainModules.get(name)] : null;
  return plainNames.get(name) ?? null;
}

/** Marks have letters, digits, `_` and `.` only: names as they are there, and as they are. */
const plain = (name) => name.replace(/^[%@]/, "").replace(/[^A-Za-z0-9_.]+/g, "_");
const plainModules = new Map(Array.from(groups.module.keys(), (path) => [plain(path), path]));
const pairsOf = (kind, names) => Array.from(names, (name) => [plain(name), [kind, name]]);
const plainNames = new Map([...pairsOf("state", states.keys()), ...pairsOf("value", values.keys())]);

/** A value or a state entry by its name, with or without its mark. */
function named(name) {
  if (values.has(name)) return ["value", name];
  if (states.has(name)) return ["state", name];
  if (values.has(`%${name}`)) return ["value", `%${name}`];
  return states.has(`@${name}`) ? ["state", `@${name}`] : null;
}

function meantByTitle(title, element) {
  const stage = /^(?:cluster_|stage[ _-]?)(\d+)$/.exec(title);
  if (stage) return meant("stage", stage[1]);
  const [, state] = /^state\d+[_:](.+)$/s.exec(title) ?? [];
  const name = named(state ?? title.replace(/^input /, "")) ?? named(element.querySelector("text")?.textContent.trim() ?? "");
  if (name || title.includes("->")) return name;
  const [, running] = /\bstage[ -]?(\d+)\b/.exec(title) ?? [];
  return running ? meant("stage", running) : null;
}

const pictures = [];

/** Several values on one edge are shown as a list, of several modules the first. */
function goal(found) {
  const names = found.filter((one) => /^(value|state):/.test(one)).map((one) => one.slice(one.indexOf(":") + 1));
  return names.length > 1 ? `several:${names.join("\n")}` : found[0];
}

function makeClickable(frame) {
  for (const element of frame.querySelectorAll("svg g, svg [id]")) {
    const found = meanings(element);
    if (!found.length) continue;
    element.classList.add("click");
    element.dataset.go = goal(found);
    element.dataset.all = found.join("\n");
    for (const path of element.querySelectorAll(":scope > path, :scope > a > path")) widen(path);
    if (!frame.closest("#graph")) continue;  // the steps of a timeline are too many to go through by key
    element.setAttribute("tabindex", "0");
    element.setAttribute("role", "button");
    element.addEventListener("keydown", (e) => { if (e.key === "Enter") go(...split(element.dataset.go)); });
  }
}

/** A thin line can be hit from nearby. */
function widen(path) {
  if (path.getAttribute("fill") !== "none") return;
  const wide = path.cloneNode();
  wide.removeAttribute("id");
  wide.setAttribute("class", "hit");
  path.after(wide);
}

for (const frame of document.querySelectorAll(".picture")) {
  frame.closest("section").hidden = !frame.querySelector("svg");
  if (!frame.querySelector("svg")) continue;
  makeClickable(frame);
  pictures.push(new Picture(frame));
}

/** What stands for the thing is marked, and in sight where all of it was out of sight. */
function markPictures(what) {
  for (const picture of pictures) {
    const chosen = [...picture.svg.querySelectorAll(".click")].filter((element) => {
      const is = element.dataset.go === what || element.dataset.all.split("\n").includes(what);
      element.classList.toggle("chosen", is);
      return is;
    });
    picture.show(chosen);
  }
  lanes?.mark(what);
}

// Until the pointer is up, `moved` is told how far it is from where it was pressed, once that is as far as a drag.
function follow(frame, start, far, moved) {
  const move = (event) => {
    const dx = event.clientX - start.clientX, dy = event.clientY - start.clientY;
    if (far(dx, dy) > 4) frame.classList.add("dragged");
    if (frame.classList.contains("dragged")) moved(dx, dy);
  };
  const stop = () => {
    removeEventListener("pointermove", move);
    removeEventListener("pointerup", stop);
    setTimeout(() => frame.classList.remove("dragged"));
  };
  addEventListener("pointermove", move);
  addEventListener("pointerup", stop);
}
