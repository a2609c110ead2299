// Timelines of a step, one above the other on one time axis: steps of ranks, what is sent, memory over time.

const SVG = new DOMParser().parseFromString(`<${"svg"}>`, "text/html").querySelector("svg").namespaceURI;
const LEFT = 64, RIGHT = 96, HEAD = 26, STEP = 22, SEND = 6, MEMORY = 24, GAP = 8;
const STEP_NAMES = {F: "forward", B: "backward", I: "backward for the inputs", W: "backward for the weights"};
const ENDS = new Set(["B", "W"]);  // what a forward keeps is free after these

/** An element of a picture. */
function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, item] of Object.entries(attributes)) if (item !== null) element.setAttribute(name, String(item));
  element.append(...children);
  return element;
}

const tip = (text) => draw("title", {}, text);

/** A timeline as the page carries it, with what follows from it. stages: of the cut, with rank and memory. */
function readTimeline({title, ranks, events, sent, hosts}, stages) {
  const steps = events.map(([kind, stage, microbatch, rank, start, end]) => ({kind, stage, microbatch, rank, start, end}));
  const sends = sent.map(([boundary, microbatch, gradient, start, end]) => ({boundary, microbatch, gradient, start, end}));
  const end = Math.max(0, ...steps.map((step) => step.end)), rows = Array.from({length: ranks}, () => []);
  for (const step of steps) rows[step.rank].push(step);
  const inSteps = rows.map((row) => sum(row.map((step) => step.end - step.start)));
  const alone = inSteps.map((busy, rank) => Math.max((hosts[rank] ?? 0) - busy, 0)), waits = inSteps.map((busy, rank) => end - busy - alone[rank]);
  return {title, ranks, steps, sends, rows, stages, waits, hostUntil: rows.map((row, rank) => hostUntil(row, alone[rank])), seconds: end,
    bubble: end ? sum(waits) / (ranks * end) : 0};
}

/** Up to here a device without a step waits while its host starts what comes next, for so many seconds together. */
function hostUntil(row, left) {
  let reached = 0;
  if (!left) return reached;
  for (const {start, end} of [...row].sort((a, b) => a.start - b.start)) {
    if (start - reached >= left) break;
    left -= start - reached;
    reached = end;
  }
  return reached + left;
}

/** Stage -> the most micro-batches of which it holds what their forwards keep. */
function inFlight({steps, stages}) {
  const now = stages.map(() => 0), most = stages.map(() => 0);
  for (const {kind, stage} of steps) {
    if (kind === "F") most[stage] = Math.max(most[stage], ++now[stage]);
    else if (ENDS.has(kind)) now[stage]--;
  }
  return most;
}

/** Stage -> the bytes that it keeps for each micro-batch: those of all in flight under the prediction, divided by their number. */
function keptBytes(timeline) {
  const most = inFlight(timeline);
  return timeline.stages.map(({memory}, stage) => (memory?.activations ?? 0) / Math.max(1, most[stage]));
}

/** The memory of a rank over time as [seconds, bytes] where it changes: state, what forwards keep, what backwards pass on. */
function memoryOver({rows, stages}, rank, kept) {
  const own = stages.filter((stage) => stage.rank === rank);
  const changes = [];
  for (const {kind, stage, start, end} of rows[rank]) {
    const passing = kind === "B" || kind === "I" ? stages[stage].memory.passing : 0;
    if (kind === "F") changes.push([start, kept[stage]]);
    if (passing) changes.push([start, passing], [end, -passing]);
    if (ENDS.has(kind)) changes.push([end, -kept[stage]]);
  }
  changes.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  let size = sum(own.flatMap(({memory}) => [memory.parameters, memory.gradients, memory.optimizer]));
  const points = [[0, size]];
  for (const [time, change] of changes) points.push([time, size += change]);
  return points;
}

class Lanes {
  constructor(place) {
    this.timelines = [];
    this.shown = {sends: true, memory: costed};
    this.view = null;
    this.svg = draw("svg", {class: "lanes", role: "img", "aria-label": "Steps of each rank over time"});
    this.frame = h("div", {class: "frame", tabindex: "0", role: "group", "aria-label": "Timeline: plus and minus zoom, arrows move, 0 fits"}, this.svg);
    this.legend = h("div", {class: "legend"});
    place.append(this.frame, this.legend);
    this.addTools(place.closest("section").querySelector("h2"));
    this.listen();
    new ResizeObserver(() => this.render()).observe(this.frame);
  }

  addTools(head) {
    const tool = (label, title, click) => h("button", {class: "small", type: "button", title, "aria-label": title, click}, label);
    const check = (kind) => h("label", {class: "label"}, h("input", {type: "checkbox", checked: this.shown[kind],
      "data-shows": kind, change: (e) => { this.shown[kind] = e.target.checked; this.render(); }}), ` ${kind}`);
    head.append(h("div", {class: "tools"}, check("sends"), costed ? check("memory") : null,
      tool("+", "zoom in", () => this.zoom(0.6)), tool("−", "zoom out", () => this.zoom(1 / 0.6)), tool("fit", "show all of it", () => this.fit())));
  }

  /** These are shown, all of each. */
  show(timelines) {
    this.timelines = timelines;
    this.end = Math.max(1e-12, ...timelines.map(({seconds: end}) => end));
    this.memory = timelines.map((timeline) => this.memoryOf(timeline));
    this.fullest = Math.max(1, ...this.memory.flat(2).map(([, size]) => size));
    this.fit();
  }

  /** What a measured step keeps is that of the prediction for the same stages. */
  memoryOf(timeline) {
    if (!costed || timeline.stages.length !== (timeline.like ?? timeline).stages.length) return [];
    const kept = keptBytes(timeline.like ?? timeline);
    return timeline.rows.map((_, rank) => memoryOver(timeline, rank, kept));
  }

  fit() { this.set(0, this.end); }

  set(begin, end) {
    const long = Math.min(Math.max(end - begin, this.end * 1e-4), this.end);
    const from = Math.min(Math.max(begin, 0), this.end - long);
    this.view = [from, from + long];
    this.soon();
  }

  zoom(factor, part = 0.5) {
    const [begin, end] = this.view, middle = begin + (end - begin) * part;
    this.set(middle - (middle - begin) * factor, middle + (end - middle) * factor);
  }

  pan(part) {
    const [begin, end] = this.view, step = (end - begin) * part;
    this.set(begin + step, end + step);
  }

  listen() {
    this.frame.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey && !this.frame.contains(document.activeElement)) return;
      event.preventDefault();
      const {left, width} = this.frame.getBoundingClientRect();
      this.zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, Math.min(Math.max((event.clientX - left - LEFT) / (width - LEFT - RIGHT), 0), 1));
    }, {passive: false});
    this.frame.addEventListener("keydown", (event) => {
      const does = {"+": () => this.zoom(0.7), "=": () => this.zoom(0.7), "-": () => this.zoom(1 / 0.7), "0": () => this.fit(),
        ArrowLeft: () => this.pan(-0.1), ArrowRight: () => this.pan(0.1)}[event.key];
      if (!does || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      does();
    });
    this.frame.addEventListener("pointerdown", (start) => this.drag(start));
  }

  drag(start) {
    if (start.button) return;
    const [begin, end] = this.view, unit = (end - begin) / this.wide;
    follow(this.frame, start, Math.abs, (dx) => this.set(begin - dx * unit, end - dx * unit));
  }

  soon() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.render(); });
  }

  x(time) { return LEFT + this.wide * (time - this.view[0]) / (this.view[1] - this.view[0]); }

  /** Steps of a stage are marked. */
  mark(what) {
    this.marked = what;
    this.render();
  }

  render() {
    if (!this.view || !this.frame.clientWidth) return;
    const width = this.frame.clientWidth;
    this.wide = Math.max(100, width - LEFT - RIGHT);
    const rowHigh = STEP + (this.shown.sends ? SEND : 0) + (this.shown.memory ? MEMORY : 0) + GAP;
    const parts = [draw("clipPath", {id: "lanes-clip"}, draw("rect", {x: LEFT, y: 0, width: this.wide, height: 1e6}))];
    let top = 0;
    this.timelines.forEach((timeline, number) => {
      parts.push(this.head(timeline, top));
      for (let rank = 0; rank < timeline.ranks; rank++) parts.push(this.row(timeline, number, rank, top + HEAD + rank * rowHigh));
      if (this.shown.sends) parts.push(this.arrows(timeline, top + HEAD, rowHigh));
      top += HEAD + timeline.ranks * rowHigh + 10;
    });
    parts.splice(1, 0, this.ruler(top));
    this.svg.replaceChildren(...parts);
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", top + 22);
    this.frame.style.maxHeight = `${Math.max(320, innerHeight * 0.7)}px`;
    this.showLegend();
  }

  head({title, seconds: end, bubble}, top) {
    return draw("text", {x: 8, y: top + 16, class: "title"}, `${title}: ${seconds(end)}, bubble ${percent(bubble)}`);
  }

  row(timeline, number, rank, top) {
    const {seconds: end} = timeline, waits = timeline.waits[rank], host = timeline.hostUntil[rank];
    const inside = draw("g", {"clip-path": "url(#lanes-clip)"},
      draw("rect", {class: "waits", x: this.x(0), y: top, width: Math.max(0, this.x(end) - this.x(0)), height: STEP},
        tip(`rank ${rank} waits ${seconds(waits)}, ${percent(end ? waits / end : 0)} of the step`)),
      host ? draw("rect", {class: "host", x: this.x(0), y: top, width: Math.max(0, this.x(host) - this.x(0)), height: STEP},
        tip(`the host of rank ${rank} starts what comes next`)) : "");
    inside.append(...this.boxes(timeline, rank, top));
    if (this.shown.memory && this.memory[number][rank]) inside.append(...this.memoryPath(this.memory[number][rank], end, rank, top));
    const right = LEFT + this.wide + 8, peak = this.memory[number][rank] && Math.max(...this.memory[number][rank].map(([, size]) => size));
    return draw("g", {"data-rank": rank}, draw("text", {x: 8, y: top + 15}, `rank ${rank}`), inside,
      draw("text", {x: right, y: top + 15, class: "soft"}, `${percent(end ? waits / end : 0)} idle`),
      this.shown.memory && peak ? draw("text", {x: right, y: top + STEP + (this.shown.sends ? SEND : 0) + 16, class: "soft"}, bytes(Math.round(peak))) : "");
  }

  /** The steps in sight; of those too thin to see one stands for its neighbours. */
  * boxes({rows, stages}, rank, top) {
    const own = [...new Set(rows[rank].map((step) => step.stage))].sort((a, b) => a - b);
    let last = -Infinity;
    for (const step of rows[rank]) {
      const from = this.x(step.start), wide = this.x(step.end) - from;
      if (from + wide < LEFT || from > LEFT + this.wide || (wide < 0.7 && from < last + 0.7)) continue;
      last = from;
      const {kind, stage, microbatch, start, end} = step, shade = Math.min(own.indexOf(stage), 2);
      const says = `${STEP_NAMES[kind]} of micro-batch ${microbatch}, stage ${stage}, rank ${rank}\n${seconds(start)} to ${seconds(end)}, ${seconds(end - start)}`;
      const here = this.marked === `stage:${stage}` ? " chosen" : "";
      yield draw("rect", {class: `step k${kind} shade${shade}${here}`, x: from.toFixed(2), y: top, width: Math.max(wide, 0.6).toFixed(2), height: STEP,
        "data-go": stages.length === DATA.stages.length ? `stage:${stage}` : null}, tip(says));
      const text = own.length > 1 ? `${microbatch} s${stage}` : String(microbatch);
      const short = wide > 6.5 * text.length + 4 ? text : wide > 7 * String(microbatch).length + 2 ? String(microbatch) : "";
      if (short) yield draw("text", {class: "in", x: (from + wide / 2).toFixed(1), y: top + 15}, short);
    }
  }

  memoryPath(points, end, rank, top) {
    const base = top + STEP + (this.shown.sends ? SEND : 0) + MEMORY, high = (size) => base - (MEMORY - 3) * size / this.fullest;
    let path = `M${this.x(0).toFixed(1)} ${base}`, before = null;
    for (const [time, size] of points) {
      const x = this.x(time).toFixed(1);
      if (before !== null) path += `V${high(before).toFixed(1)}H${x}`;
      before = size;
    }
    path += `V${high(before).toFixed(1)}H${this.x(end).toFixed(1)}V${base}Z`;
    const peak = Math.max(...points.map(([, size]) => size));
    return [draw("path", {class: "memory", d: path}, tip(`memory of rank ${rank}: at most ${bytes(Math.round(peak))}, ${bytes(Math.round(points[0][1]))} of it state`))];
  }

  /** What is sent: a bar in the row of the sender, and a line to the receiver where there is room for it. */
  arrows({sends, stages}, top, rowHigh) {
    const clipped = draw("g", {"clip-path": "url(#lanes-clip)"});
    const seen = sends.filter(({start, end}) => end >= this.view[0] && start <= this.view[1]);
    const lines = seen.length <= 400;
    let last = {};
    for (const {boundary, microbatch, gradient, start, end} of seen) {
      const [from, to] = gradient ? [boundary + 1, boundary] : [boundary, boundary + 1];
      const [rank, other] = [stages[from].rank, stages[to].rank], x = this.x(start), y = top + rank * rowHigh + STEP + 1;
      if (rank === other || (!lines && x < (last[rank] ?? -1) + 0.7)) continue;
      last[rank] = x;
      const kind = gradient ? "gradient" : "value", wide = Math.max(this.x(end) - x, 1);
      const says = `${gradient ? "gradients" : "values"} of micro-batch ${microbatch}, stage ${from} to ${to}\n${seconds(start)} to ${seconds(end)}, ${seconds(end - start)}`;
      clipped.append(draw("rect", {class: `send ${kind}`, x: x.toFixed(2), y, width: wide.toFixed(2), height: SEND - 2}, tip(says)));
      const goal = top + other * rowHigh + (other > rank ? 0 : STEP);
      if (lines) clipped.append(draw("path", {class: `way ${kind}`, d: `M${x.toFixed(1)} ${y + 2}L${(x + wide).toFixed(1)} ${goal}`}));
    }
    return clipped;
  }

  ruler(bottom) {
    const [begin, end] = this.view, wanted = 110 * (end - begin) / this.wide, power = 10 ** Math.floor(Math.log10(wanted));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= wanted * 0.999);
    const marks = draw("g", {class: "ruler"});
    for (let n = Math.ceil(begin / step - 1e-9); n * step <= end * 1.0001; n++) {
      const x = this.x(n * step).toFixed(1);
      marks.append(draw("path", {d: `M${x} ${HEAD - 4}V${bottom}`}), draw("text", {x, y: bottom + 14}, seconds(n * step)));
    }
    return marks;
  }

  showLegend() {
    const kinds = new Set(this.timelines.flatMap(({steps}) => steps.map(({kind}) => kind)));
    const item = (kind, text) => h("span", {}, h("i", {class: kind}), text);
    this.legend.replaceChildren(...Object.keys(STEP_NAMES).filter((kind) => kinds.has(kind)).map((kind) => item(`k${kind}`, STEP_NAMES[kind])),
      this.timelines.some(({hostUntil: until}) => until.some(Boolean)) ? item("host", "host alone") : "",
      this.shown.sends ? item("value", "values sent") : "", this.shown.sends && (kinds.has("B") || kinds.has("I")) ? item("gradient", "gradients sent") : "",
      this.shown.memory ? item("memory", "memory of the rank; full height is the largest of all ranks") : "");
  }
}

/** The means of the steps of each stage, predicted and measured. */
function comparison(predicted, measured) {
  const mean = ({steps}, stage, kinds) => {
    const own = steps.filter((step) => step.stage === stage && kinds.has(step.kind));
    const ends = new Set(own.map(({microbatch}) => microbatch)).size;
    return ends ? sum(own.map(({start, end}) => end - start)) / ends : 0;
  };
  const forward = new Set("F"), backward = new Set("BIW");
  const heads = ["stage", "forward, predicted", "measured", "backward, predicted", "measured"];
  const tops = heads.map((name, i) => h("th", {class: i ? "number" : null, scope: "col"}, name));
  return h("div", {class: "scroll", id: "measured"}, h("table", {}, h("thead", {}, h("tr", {}, tops)),
    h("tbody", {}, DATA.stages.map(({index}) => h("tr", {}, cell(stageRef(index)),
      [forward, backward].flatMap((kinds) => [predicted, measured].map((one) => number(seconds(mean(one, index, kinds))))))))));
}

/** What the page has recorded or predicted: this cut's step, a measured one, that of the other cut. */
function readTimelines() {
  const read = DATA.timelines.map((timeline) => readTimeline(timeline, DATA.stages));
  if (costed) for (const timeline of read) timeline.like = read[0];
  return DATA.against ? [...read, readTimeline(DATA.against.timeline, DATA.against.stages)] : read;
}

const timelineFrame = document.querySelector("#timeline .picture");
let lanes = null;
if (DATA.timelines.length && !timelineFrame.querySelector("svg")) {
  timelineFrame.hidden = true;
  timelineFrame.closest("section").hidden = false;
  lanes = new Lanes(at("lanes"));
  const read = readTimelines(), predicted = costed ? read[0] : null, measured = read.find(({title}) => title === "measured");
  lanes.show(read);
  if (predicted && measured) at("lanes").append(comparison(predicted, measured));
}
