// Two cuts of one model side by side: totals, stages on the same scales, and the modules that are in other stages.

function cutNumbers({stages, report}) {
  const most = (size) => stages.reduce((a, b) => size(b) > size(a) ? b : a);
  const slowest = most(timeOf), largest = most(memoryOf);
  return [
    ["stages", stages.length], ["predicted step", seconds(report.seconds)], ["bubble", percent(report.bubble)], ["balance", percent(report.balance)],
    ["times as fast as one device", report.speed_up.toFixed(2)],
    ["slowest stage", `stage ${slowest.index}, ${seconds(timeOf(slowest))}`], ["fullest stage", `stage ${largest.index}, ${bytes(memoryOf(largest))}`],
    ["too large", report.too_large.length ? `stages ${report.too_large.join(", ")}` : "none"],
    ["sent forward for a micro-batch", bytes(sum(stages.map(({sent}) => sent)))],
  ];
}

function cutTable(name, {stages}, slow, full, isThis) {
  const rows = stages.map((stage) => h("tr", {}, cell(isThis ? stageRef(stage.index) : `stage ${stage.index}`),
    cell(timeBar(stage, slow)), number(seconds(timeOf(stage))),
    cell(bar(KINDS.map((kind) => [kind, stage.memory[kind] ?? 0]), full)), number(bytes(memoryOf(stage)))));
  const heads = ["stage", "time of a micro-batch", "", "memory", ""].map((head) => h("th", {scope: "col"}, head));
  return h("div", {}, h("h3", {}, name), h("div", {class: "scroll"}, h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows))));
}

function movedTable(moved) {
  const row = ([path, here, there]) => h("tr", {}, cell(groups.module.has(path) ? ref("module", path) : path), cell(here.join(", ")), cell(there.join(", ")));
  return sortable([["module", ([path]) => path], ["stages in this cut", ([, here]) => here[0]], ["in the other", ([, , there]) => there[0]]], moved, row);
}

if (DATA.against) {
  const cuts = [["this cut", {stages: DATA.stages, report: DATA.report}], ["the other cut", DATA.against]];
  const all = cuts.flatMap(([, {stages}]) => stages), slow = Math.max(...all.map(timeOf)), full = Math.max(...all.map(memoryOf));
  const [one, other] = cuts.map(([, cut]) => cutNumbers(cut)), {moved} = DATA.against;
  const rows = one.map(([name, here], i) => h("tr", {},
    h("th", {scope: "row"}, name), number(here), number(other[i][1])));
  const head = h("tr", {}, h("th", {}, ""), cuts.map(([name]) => h("th", {class: "number", scope: "col"}, name)));
  at("both").append(
    h("div", {class: "scroll totals"}, h("table", {}, h("thead", {}, head), h("tbody", {}, rows))),
    h("div", {class: "pair"}, cuts.map(([name, cut], i) => cutTable(name, cut, slow, full, i === 0))),
    h("h3", {}, moved.length ? `Modules in other stages: ${moved.length}` : "Each module is in the same stages in both"),
    moved.length ? h("div", {class: "moved"}, movedTable(moved)) : "");
  document.querySelector("#against").hidden = false;
}
