// The user's source beside the program, with links both ways.

class Beside {
  constructor(place, sources) {
    this.sources = sources;
    this.column = new Column(asIs(columns.at(-1)), 0);
    this.rows = h("div", {class: "pane source", tabindex: "0", role: "region", "aria-label": "Source"});
    this.choice = h("select", {"aria-label": "File", change: () => this.showFile(this.choice.value)},
      Object.keys(sources).map((name) => h("option", {value: name}, name)));
    place.append(h("div", {class: "column"}, h("div", {class: "head"}, this.choice), this.rows), this.column.element);
    this.showFile(Object.keys(sources)[0]);
  }

  showFile(name) {
    if (this.file === name) return;
    this.file = name;
    this.choice.value = name;
    this.rows.replaceChildren(...this.sources[name].flatMap(([first, some], part) => [
      part ? h("div", {class: "row gap"}, "···") : null, ...some.map((text, i) => this.row(`${name}:${first + i}`, first + i, text)),
    ]).filter(Boolean));
  }

  row(key, number, text) {
    const some = groups.source.get(key), line = [h("span", {class: "at"}, String(number)), text];
    if (!some) return h("div", {class: "row", "data-line": number}, line);
    return h("button", {class: "row has", type: "button", "data-line": number, "data-go": `source:${key}`, title: opsText(some.length)}, line);
  }

  /** The line `file.py:12` is in sight and marked. */
  showLine(key) {
    for (const row of this.rows.querySelectorAll(".here")) row.classList.remove("here");
    const cut = (key ?? "").lastIndexOf(":"), name = (key ?? "").slice(0, cut);
    if (!Object.hasOwn(this.sources, name)) return;
    this.showFile(name);
    const row = this.rows.querySelector(`[data-line="${Number(key.slice(cut + 1))}"]`);
    if (!row) return;
    row.classList.add("here");
    this.rows.scrollTop = row.offsetTop - this.rows.clientHeight / 3;
  }

  /** A line of the program is in sight and marked. */
  reveal(at) {
    this.column.reveal(at);
    this.column.element.scrollIntoView({block: "nearest", inline: "nearest"});
  }
}

/** A program as a column without differences. */
function asIs({ids, indents}) {
  const once = (numbers) => numbers.flatMap((number) => [number, 1]);
  return {name: "the program", seconds: 0, changed: true, hunks: [["+", once(ids)]], indents: once(indents)};
}

beside = Object.keys(DATA.source).length && columns.length ? new Beside(at("panes"), DATA.source) : null;
document.querySelector("#beside").hidden = !beside;
if (beside && columns.length === 1) document.querySelector("#passes").hidden = true;
