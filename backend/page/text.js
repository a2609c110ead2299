// IR text as elements: tokens with their colours, and what changed within a line.

const LEX = new RegExp([
  /(?<comment># .*)/,
  /(?<type>\b(?:f|bf|i|u|b|c)\d+[a-z0-9]*\[[^\]]*\](?:\{[^}]*\})?(?:@[\w:]+)?)/,
  /(?<state>@(?:"(?:[^"\\]|\\.)*"|[\w.]+))/,
  /(?<value>%[\w.]+)/,
  /(?<scope>(?<= in )(?:"(?:[^"\\]|\\.)*"|[\w.~/])+)/,
  /(?<loc>(?<= at )[\w.-]+:\d+)/,
  /(?<string>"(?:[^"\\]|\\.)*")/,
  /(?<op>[A-Za-z_]\w*(?:\.(?:\w+|"(?:[^"\\]|\\.)*"))+(?=\())/,
  /(?<word>\w+)/,
  /(?<space>\s+)/,
  /(?<rest>[^\s\w])/,
].map((part) => part.source).join("|"), "gu");

const KEYWORDS = new Set(("program file input state stage holds transfer output split region yield param buffer const grad view views "
  + "writes renews random effect with in at form send relay feed recompute share stages phase names nonpersistent").split(" "));

/** [kind, text] for every token of a line. */
function tokens(line) {
  return Array.from(line.matchAll(LEX), (found) => {
    const kind = Object.keys(found.groups).find((name) => found.groups[name] !== undefined);
    return [kind === "word" && KEYWORDS.has(found[0]) ? "keyword" : kind, found[0]];
  });
}

const modulePath = (scope) => scope.replace(/~\d+/g, "").replaceAll("/", ".").replaceAll('"', "");
const GOES = {value: (t) => `value:${t}`, state: (t) => `state:${t}`, loc: (t) => `source:${t}`, scope: (t) => `module:${modulePath(t)}`};
const PLAIN = new Set(["space", "rest", "word"]);

function tokenNode([kind, text], marked) {
  if (PLAIN.has(kind)) return document.createTextNode(text);
  return h("span", {class: `t-${kind}${text === marked ? " marked" : ""}`, "data-go": GOES[kind]?.(text)}, text);
}

const lineNodes = (line, marked) => tokens(line).map((token) => tokenNode(token, marked));

/** The new line, with what came in <ins> and what went in <del>. */
function changedNodes(old, line, marked) {
  const steps = tokenSteps(tokens(old), tokens(line));
  const wraps = {"=": (node) => node, "+": (node) => h("ins", {}, node), "-": (node) => h("del", {}, node)};
  return steps.map(([step, token]) => wraps[step](tokenNode(token, marked)));
}

/** The steps from one list of tokens to another by their longest common subsequence; lines far apart are all lost and new. */
function tokenSteps(a, b) {
  let head = 0;
  while (head < a.length && head < b.length && a[head][1] === b[head][1]) head++;
  let tail = 0;
  while (tail < Math.min(a.length, b.length) - head && a[a.length - 1 - tail][1] === b[b.length - 1 - tail][1]) tail++;
  const middle = commonSteps(a.slice(head, a.length - tail), b.slice(head, b.length - tail));
  return [...b.slice(0, head).map((t) => ["=", t]), ...middle, ...b.slice(b.length - tail).map((t) => ["=", t])];
}

function commonSteps(a, b) {
  if (a.length * b.length > 40000) return [...a.map((t) => ["-", t]), ...b.map((t) => ["+", t])];
  const most = Array.from({length: a.length + 1}, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      most[i][j] = a[i][1] === b[j][1] ? most[i + 1][j + 1] + 1 : Math.max(most[i + 1][j], most[i][j + 1]);
    }
  }
  const steps = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i][1] === b[j][1]) { steps.push(["=", b[j]]); i++; j++; }
    else if (i < a.length && (j === b.length || most[i + 1][j] >= most[i][j + 1])) steps.push(["-", a[i++]]);
    else steps.push(["+", b[j++]]);
  }
  return steps;
}

/** True when the line names the value or state, as a whole token. */
function mentions(line, name) {
  for (let at = line.indexOf(name); at >= 0; at = line.indexOf(name, at + 1)) {
    if (name.endsWith('"') || !/[\w.]/.test(line[at + name.length] ?? "")) return true;
  }
  return false;
}
