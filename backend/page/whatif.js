// A prediction for other numbers of stages and micro-batches and for another schedule, from the costs of units that the page carries.

const SINGLE = new Set(["GPipe", "1F1B"]), V_SHAPED = new Set(["ZBVZeroBubble", "DualPipeV"]);
const TRY = DATA.units;

const units = (TRY?.units ?? []).map(([name, device, host, crossing, fixed, kept, shared, passing]) => (
  {name, device, host, crossing, fixed, kept, shared, passing}));

const delayOf = (size) => size / TRY.device.link_bandwidth + TRY.device.link_latency;

/** Where units begin that make so many stages, the slowest of which is as fast as can be. Its time is that of its units, of the device
    or of the host, and of half of what crosses at its ends. */
function cutInto(count) {
  const both = (parts) => units.reduce((sums, unit) => [...sums, sums.at(-1) + unit[parts][0] + unit[parts][1]], [0]);
  const device = both("device"), host = both("host"), time = host.at(-1) > device.at(-1) ? host : device;
  const ways = TRY.training ? 2 : 1;
  const link = [...units.map(({crossing}, i) => i ? ways * crossing / TRY.device.link_bandwidth / 2 : 0), 0];
  let best = time.map((sum, end) => end ? sum + link[end] : Infinity);
  const from = [];
  for (let stage = 1; stage < count; stage++) {
    const now = best.map(() => Infinity), begins = best.map(() => 0);
    for (let end = stage + 1; end < time.length; end++) {
      for (let begin = stage; begin < end; begin++) {
        const slowest = Math.max(best[begin], time[end] - time[begin] + link[begin] + link[end]);
        if (slowest < now[end]) { now[end] = slowest; begins[end] = begin; }
      }
    }
    from.push(begins);
    best = now;
  }
  const cuts = [];
  for (let stage = count - 2, end = units.length; stage >= 0; stage--) cuts.unshift(end = from[stage][end]);
  return cuts;
}

const addParts = (some, parts) => some.reduce((sums, unit) => sums.map((sum, i) => sum + unit[parts][i]), [0, 0, 0, 0]);

/** A stage of units: its seconds, and its memory by what stays and what each micro-batch keeps. */
function stageOf(some) {
  const shared = new Map(some.flatMap((unit) => unit.shared.map(([holder, fixed, kept]) => [holder, [fixed, kept]])));
  const held = [...shared.values()];
  return {
    seconds: [addParts(some, "device"), addParts(some, "host")],
    fixed: sum(some.map(({fixed}) => fixed)) + sum(held.map(([fixed]) => fixed)),
    kept: sum(some.map(({kept}) => kept)) + sum(held.map(([, kept]) => kept)),
    passing: Math.max(...some.map(({passing}) => passing)),
    name: some[0].name,
  };
}

/** The stages as the pipe is cut, or of units. */
function stagesFor(count) {
  if (count === DATA.stages.length) {
    const kept = keptBytes(readTimeline(DATA.timelines[0], DATA.stages));
    const stages = DATA.stages.map(({memory}, i) => ({seconds: TRY.stages[i], fixed: memory.parameters + memory.gradients + memory.optimizer,
      kept: kept[i], passing: memory.passing, name: null}));
    return {stages, delays: TRY.delays};
  }
  const cuts = cutInto(count), edges = [0, ...cuts, units.length];
  const stages = edges.slice(1).map((end, i) => stageOf(units.slice(edges[i], end)));
  return {stages, delays: cuts.map((at) => delayOf(units[at].crossing))};
}

/** Stage -> rank, in turn or there and back again. */
const homeOf = (schedule, ranks) => (stage) => V_SHAPED.has(schedule) ? Math.min(stage, 2 * ranks - 1 - stage) : stage % ranks;

/** The prediction for one key, as a timeline to draw and its numbers. */
function predict([schedule, count, ranks, microbatches], text) {
  const {stages, delays} = stagesFor(count), home = homeOf(schedule, ranks);
  const run = slowedRun(readActions(text), stages.map(({seconds: spent}) => spent), [...delays, 0], TRY.splits, TRY.device);
  const places = stages.map(({fixed, kept, passing}, stage) => (
    {rank: home(stage), memory: {parameters: fixed, gradients: 0, optimizer: 0, activations: kept, passing}}));
  const title = `${schedule}, ${count} stages on ${ranks} ranks, ${microbatches} micro-batches`;
  const timeline = readTimeline(run.timeline(title), places);
  // activations of all micro-batches in flight, as in the tables
  const most = inFlight(timeline);
  places.forEach((place, stage) => { place.memory.activations *= most[stage]; });
  const onRank = (rank, size) => sum(places.map((place, stage) => place.rank === rank ? size(place.memory, stage) : 0));
  const all = (memory) => memory.parameters + memory.activations + memory.passing;
  const fullest = Math.max(...timeline.rows.map((_, rank) => onRank(rank, all)));
  // of one device, or of its host where that has more to do
  const work = Math.max(...[0, 1].map((part) => sum(stages.map(({seconds: both}) => both[part][0] + both[part][1]))));
  return {timeline, stages, delays, fullest, speedUp: microbatches * work / timeline.seconds, each: timeline.seconds / microbatches};
}

class WhatIf {
  constructor(place, texts) {
    this.texts = new Map(TRY.keys.map((key, i) => [key.join(), texts[i]]));
    const numbers = (at) => [...new Set(TRY.keys.map((key) => key[at]))].sort((a, b) => a - b);
    this.now = [DATA.report.schedule, DATA.stages.length, TRY.ranks, DATA.report.n_microbatches];
    this.choices = {stages: numbers(1), microbatches: numbers(3)};
    this.inputs = {
      stages: this.slider("stages", "stages", this.now[1]), microbatches: this.slider("microbatches", "micro-batches", this.now[3]),
      schedule: h("select", {"data-chooses": "schedule", change: () => this.update()},
        [...new Set(TRY.keys.map(([schedule]) => schedule))].map((name) => h("option", {selected: name === this.now[0]}, name))),
    };
    this.result = h("div", {class: "scroll", "aria-live": "polite"});
    this.note = h("p", {class: "note"});
    place.append(h("p", {class: "note"}, TRY_NOTE),
      h("div", {class: "choices"}, this.inputs.stages, this.inputs.microbatches, h("label", {}, "schedule ", this.inputs.schedule),
        h("button", {class: "small", type: "button", click: () => this.reset()}, "as it is")), this.result, this.note);
    this.as = predict(this.now, this.texts.get(this.now.join()));
    this.update();
  }

  slider(kind, label, value) {
    const choices = this.choices[kind];
    const output = h("output", {}, String(value));
    const input = h("input", {type: "range", min: 0, max: choices.length - 1, value: choices.indexOf(value), "data-chooses": kind, "aria-label": label,
      "aria-valuetext": String(value), input: () => this.update()});
    return h("label", {}, `${label} `, input, " ", output);
  }

  reset() {
    for (const [i, kind] of [[1, "stages"], [3, "microbatches"]]) this.inputs[kind].querySelector("input").value = this.choices[kind].indexOf(this.now[i]);
    this.inputs.schedule.value = this.now[0];
    this.update();
  }

  chosen(kind) {
    const input = this.inputs[kind].querySelector("input"), number = this.choices[kind][Number(input.value)];
    this.inputs[kind].querySelector("output").textContent = number;
    input.setAttribute("aria-valuetext", String(number));
    return number;
  }

  update() {
    const schedule = this.inputs.schedule.value, stages = this.chosen("stages"), microbatches = this.chosen("microbatches");
    const key = TRY.keys.find((one) => one[0] === schedule && one[1] === stages && one[3] === microbatches);
    const made = key ? predict(key, this.texts.get(key.join())) : null;
    this.show(key, made);
    const read = readTimelines();
    const isOther = made && key.join() !== this.now.join();
    lanes?.show(isOther ? [read[0], made.timeline, ...read.slice(1)] : read);
  }

  show(key, made) {
    const heads = ["", "step", "for each micro-batch", "times as fast as one device", "bubble", "fullest rank"];
    const size = ({fullest}) => TRY.by_graphs ? "not known" : bytes(Math.round(fullest));
    const row = (name, one) => h("tr", {}, h("th", {scope: "row"}, name), number(seconds(one.timeline.seconds)), number(seconds(one.each)),
      number(one.speedUp.toFixed(2)), number(percent(one.timeline.bubble)), h("td", {class: "number"}, size(one),
        !TRY.by_graphs && one.fullest > TRY.device.memory ? h("span", {class: "flag over"}, "too large") : null));
    this.result.replaceChildren(h("table", {}, h("thead", {}, h("tr", {}, heads.map((name) => h("th", {class: name ? "number" : null, scope: "col"}, name)))),
      h("tbody", {}, row(titleOf(this.now), this.as), made && made.timeline.title !== this.as.timeline.title ? row(made.timeline.title, made) : null)));
    this.note.replaceChildren(...this.says(key, made).flat(Infinity));
    const told = made && {seconds: made.timeline.seconds, bubble: made.timeline.bubble, stages: made.stages, delays: made.delays, fullest: made.fullest, key};
    this.result.dataset.prediction = JSON.stringify(told);
  }

  says(key, made) {
    if (!made) return ["The schedule has no order for these numbers, or the page does not carry it: a schedule with several stages on a rank needs an even number of stages."];
    if (key[1] === this.now[1]) return [];
    return ["Cut in front of ", between(made.stages.slice(1).map(({name}) => ref("module", name || "", name || `forward of ${DATA.name}`)), ", "),
      ", for equal times; memory is not looked at. A search by pipeline() may find better cuts."];
  }
}

const titleOf = ([schedule, stages, ranks, microbatches]) => `as it is: ${schedule}, ${stages} stages on ${ranks} ranks, ${microbatches} micro-batches`;
const TRY_NOTE = "Predicted in this page from the costs of the ops, as pipe.report() predicts. A micro-batch stays as large as it is: more of them are a larger "
  + "batch. The timeline above shows what is chosen.";

if (TRY && lanes && TRY.keys.length && typeof DecompressionStream === "function") {
  unpacked(TRY.orders).then((texts) => {
    new WhatIf(at("try"), texts.split("\n\n"));
  });
  document.querySelector("#whatif").hidden = false;
}
