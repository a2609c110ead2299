// What is shown stands in the address, so that the browser's own way back works and a place can be sent to somebody.

let opener = null, steps = 0;

/** kind:key as [kind, key] */
const split = (what) => [what.slice(0, what.indexOf(":")), what.slice(what.indexOf(":") + 1)];

function go(kind, key) {
  if (kind === "op") {
    const {line, loc} = ops[Number(key)];
    beside?.showLine(loc);
    revealLine(line);
    return;
  }
  const hash = `#${kind}:${encodeURIComponent(key)}`;
  if (location.hash === hash) show();
  else location.hash = hash;
}

function show() {
  const [, kind, rest] = /^#(\w+):(.*)$/.exec(location.hash) ?? [];
  let key;
  try { key = decodeURIComponent(rest ?? ""); } catch { return; }
  if (!location.hash && !panel.hidden) closeLife();
  steps++;
  if (!kind || !showLife(kind, key)) return;
  const isName = kind === "value" || kind === "state" || kind === "source";
  if (kind === "source") beside?.showLine(key);
  if (kind === "value") beside?.showLine(ops[values.get(key).born]?.loc);
  markEverywhere(isName ? key : null);
  markPictures(`${kind}:${key}`);
  for (const row of document.querySelectorAll("tr[data-stage]")) {
    row.classList.toggle("chosen", kind === "stage" && row.dataset.stage === key);
  }
}

document.addEventListener("click", (event) => {
  const from = event.target.closest("[data-go]");
  if (!from || event.target.closest(".dragged")) return;
  if (!panel.contains(from)) opener = from.closest("[role=option]") ? query : from;
  setFound(false);
  go(...split(from.dataset.go));
});

document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLInputElement;
  if (event.key === "Escape" && !panel.hidden) closeLife();
  else if (event.key === "/" && !typing) { event.preventDefault(); query.focus(); query.select(); }
});

addEventListener("hashchange", show);

for (const section of document.querySelectorAll("#against[hidden], #whatif[hidden], #beside[hidden]")) section.remove();
for (const section of document.querySelectorAll("section:not([hidden])")) {
  at("nav").append(h("a", {href: `#${section.id}`}, section.dataset.title));
}

/** A fold opens when the address leads to it; its columns show what is marked by then. */
function unfold() {
  const fold = location.hash.length > 1 ? document.getElementById(location.hash.slice(1))?.querySelector("details") : null;
  if (fold) fold.open = true;
}

addEventListener("hashchange", unfold);
for (const fold of document.querySelectorAll("details")) {
  fold.addEventListener("toggle", () => { for (const column of columns) column.unfolded(); });
}
unfold();
show();
