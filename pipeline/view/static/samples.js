// The table of comparisons: one row each, a column per judge; filtered and sorted here, texts fetched as rows come into sight.
import { address, breakable, choice, el, link, number, say } from "./dom.js";
import { get, Problem, search } from "./source.js";
import { promptView } from "./prompt.js";

const OUTCOMES = { W: "won", T: "tied", L: "lost", X: "failed", "-": "not judged" };
const NARROW = matchMedia("(max-width: 42rem)");
const AROUND = 15;
// pixels; browsers cut an element off beyond
const TALLEST = 3e7;

/** The comparisons that the address asks for, with the rows that pass its filters in its order. */
async function listed(page) {
  const { run, overview, parameters } = page;
  if (!overview.versions.samples) throw new Problem("No samples yet: refscore eval writes them.");
  if (!overview.comparisons.length) throw new Problem("Only one model wrote responses, so that nothing is compared.");
  const asked = [parameters.get("model"), parameters.get("baseline")];
  const number = asked[0] === null && asked[1] === null ? 0 : overview.comparisons.findIndex(([model, baseline]) => (asked[0] ?? model) === model && (asked[1] ?? baseline) === baseline);
  if (number < 0) throw new Problem(`No judge compared ${asked[0]} with ${asked[1]} in this run.`);
  const version = `${overview.versions.samples} ${overview.versions.judgements} ${overview.versions.kl}`;
  const index = await get(`runs/${encodeURIComponent(run)}/samples/${number}.json`, version);
  const judge = index.judges.find(({ name }) => name === parameters.get("judge")) || index.judges[0];
  if (parameters.get("judge") && judge?.name !== parameters.get("judge")) throw new Problem(`No judge ${parameters.get("judge")} compared these models.`);
  let rows = Array.from(index.sample, (_, row) => row);
  const text = parameters.get("text");
  if (text) {
    const found = new Set(await search(run, number, text, rows.length, index.page));
    rows = rows.filter((row) => found.has(row));
  }
  rows = rows.filter(passes(index, judge, parameters));
  const key = KEYS[parameters.get("sort")]?.(index, judge);
  if (key) {
    const values = new Map(rows.map((row) => [row, key(row)]));
    const turn = parameters.get("up") ? 1 : -1;
    rows.sort((a, b) => compare(values.get(a), values.get(b), turn) || a - b);
  }
  return { index, judge, number, version, rows };
}

// what is not known stands last in either direction
function compare(a, b, turn) {
  if (a === null || b === null) return (a === null) - (b === null);
  return turn * (a - b);
}

const KEYS = {
  margin: (_, judge) => (row) => judge?.scores[row] ?? null,
  length: (index) => (row) => index.tokens[row] - index.baseline_tokens[row],
  kl: (index) => (row) => index.prompts.kl[index.prompt[row]],
  judges: (index) => (row) => {
    const scores = index.judges.map(({ scores }) => scores[row]).filter((score) => score !== null);
    return scores.length > 1 ? Math.max(...scores) - Math.min(...scores) : null;
  },
};

function passes(index, judge, parameters) {
  const outcome = parameters.get("outcome");
  const topic = parameters.has("topic") ? index.topics.indexOf(parameters.get("topic")) : null;
  const cut = parameters.get("cut");
  const sample = parameters.get("sample");
  const letter = Object.keys(OUTCOMES).find((one) => OUTCOMES[one] === outcome);
  return (row) => {
    const said = judge ? judge.letters[row] : "-";
    if (outcome === "flipped" ? said === said.toUpperCase() : outcome && said.toUpperCase() !== letter) return false;
    if (topic !== null && index.prompts.topic[index.prompt[row]] !== topic) return false;
    if (cut && (cut === "none" ? index.cut[row] !== 0 : cut === "model" ? !(index.cut[row] & 1) : cut === "baseline" ? !(index.cut[row] & 2) : !index.cut[row])) return false;
    return sample === null || index.sample[row] === Number(sample);
  };
}

export function verdictText(letter) {
  const text = OUTCOMES[letter.toUpperCase()];
  return letter !== letter.toUpperCase() && letter !== "-" ? `${text}, flipped` : text;
}

export async function samplesPage(page) {
  const found = await listed(page);
  const { index, judge, rows } = found;
  const { run, parameters } = page;
  const kept = Object.fromEntries(parameters);
  const open = (row) => address(["runs", run, "prompts", index.prompts.prompt_id[index.prompt[row]]], { ...kept, sample: null, of: index.sample[row] });
  const list = rowList(rows, (row, place) => rowOf(index, row, place, open(row)), ["prompt", "sample", "tokens", "KL", ...index.judges.map(({ name }) => name)], new Set([1, 2, 3]));
  page.onKeys({ j: () => list.move(1), k: () => list.move(-1), Enter: () => list.chosen() !== null && (location.hash = open(list.chosen())) });
  say(`${rows.length} of ${index.sample.length} comparisons`);
  return [
    el("h1", {}, `Samples of ${run}`),
    el("p", {}, `${index.model} against ${index.baseline}: `, el("strong", {}, `${rows.length.toLocaleString("en")} of ${index.sample.length.toLocaleString("en")}`), " comparisons. ", el("span", { class: "soft" }, "j and k move, Enter opens.")),
    filters(page, found),
    summary(found, judge),
    rows.length ? list.element : el("p", {}, "No comparison passes these filters."),
  ];
}

function summary({ rows }, judge) {
  if (!judge || !rows.length) return null;
  const counts = {};
  for (const row of rows) counts[verdictText(judge.letters[row])] = (counts[verdictText(judge.letters[row])] || 0) + 1;
  return el("p", { class: "soft" }, `${judge.name}: `, Object.entries(counts).sort((a, b) => b[1] - a[1]).map(([text, count]) => `${count.toLocaleString("en")} ${text}`).join(", "));
}

function filters(page, { index, judge }) {
  const { parameters, overview } = page;
  const to = (changes) => (location.hash = page.with(changes));
  const models = overview.comparisons.map((two) => [JSON.stringify(two), `${two[0]} against ${two[1]}`]);
  const text = el("input", { type: "search", name: "text", value: parameters.get("text") || "" });
  const names = (values) => values.map((value) => [value, value]);
  return el(
    "form",
    { class: "filters", role: "search", onsubmit: (event) => (event.preventDefault(), to({ text: text.value })) },
    models.length > 1 ? choice("models", JSON.stringify([index.model, index.baseline]), models, (two) => to({ model: JSON.parse(two)[0], baseline: JSON.parse(two)[1] })) : null,
    index.judges.length ? choice("judge", judge.name, names(index.judges.map(({ name }) => name)), (name) => to({ judge: name })) : null,
    choice("outcome", parameters.get("outcome") || "", [["", "any"], ...names([...Object.values(OUTCOMES), "flipped"])], (outcome) => to({ outcome })),
    index.topics.some(Boolean) ? choice("topic", parameters.get("topic") ?? "", [["", "any"], ...names(index.topics.filter(Boolean))], (topic) => to({ topic })) : null,
    choice("cut off", parameters.get("cut") || "", [["", "any"], ["either", "either"], ["model", index.model], ["baseline", index.baseline], ["none", "neither"]], (cut) => to({ cut })),
    choice("order", parameters.get("sort") || "", [["", "of the file"], ["margin", "score"], ["length", "tokens more than the baseline's"], ["kl", "KL"], ["judges", "difference between judges"]], (sort) => to({ sort })),
    choice("direction", parameters.get("up") || "", [["", "largest first"], ["1", "smallest first"]], (up) => to({ up })),
    el("label", {}, el("span", {}, "text"), text),
    el("button", {}, "Search"),
    parameters.size ? link(["runs", page.run, "samples"], {}, "Take all filters away") : null,
  );
}

function rowOf(index, row, place, href) {
  const prompt = index.prompt[row];
  return el(
    "tr",
    { "aria-rowindex": place + 2, "data-row": row },
    el("th", { scope: "row" }, el("a", { href, class: "start", dir: "auto" }, index.prompts.start[prompt] || "(empty prompt)")),
    el("td", { class: "number" }, String(index.sample[row])),
    el("td", { class: "number" }, `${index.tokens[row]}/${index.baseline_tokens[row]}`, index.cut[row] ? el("span", { title: "cut off" }, " ✂") : null),
    el("td", { class: "number" }, number(index.prompts.kl[prompt], 1)),
    index.judges.map(({ letters }) => el("td", { class: `said said-${letters[row].toUpperCase()}` }, verdictText(letters[row]))),
  );
}

/** A table of very many rows, of which those in sight are made. */
export function rowList(all, make, head, numbers) {
  // in a narrow window a row is the prompt and below it a labelled cell on each line
  const height = NARROW.matches ? 44 + 26 * (head.length - 1) : 46;
  const rows = all.slice(0, Math.floor(TALLEST / height));
  const body = el("tbody");
  const scroller = el(
    "div",
    { class: "rows", tabindex: 0, role: "region", "aria-label": `${rows.length} rows` },
    el("table", { "aria-rowcount": rows.length + 1 }, el("thead", {}, el("tr", { "aria-rowindex": 1 }, head.map((name, place) => el("th", { scope: "col", class: numbers.has(place) ? "number" : null }, breakable(name))))), body),
  );
  let chosen = -1;
  let first = -1;
  const space = (count) => {
    const row = el("tr", { "aria-hidden": "true", class: "space" }, el("td", { colspan: head.length }));
    row.style.height = `${count * height}px`;
    return row;
  };
  const draw = () => {
    const from = Math.max(0, Math.floor(scroller.scrollTop / height) - AROUND);
    const to = Math.min(rows.length, from + Math.ceil((scroller.clientHeight || 700) / height) + 2 * AROUND);
    if (from === first && body.childElementCount) return;
    first = from;
    const held = document.activeElement?.closest?.("[data-row]")?.dataset.row;
    body.replaceChildren(space(from), ...rows.slice(from, to).map((row, place) => mark(make(row, from + place), from + place)), space(rows.length - to));
    if (held !== undefined && scroller.contains(document.activeElement) === false) body.querySelector(`[data-row="${held}"] a`)?.focus({ preventScroll: true });
  };
  const mark = (row, place) => {
    row.style.height = `${height}px`;
    [...row.cells].forEach((cell, of) => cell.setAttribute("data-label", head[of]));
    if (place === chosen) row.setAttribute("aria-selected", "true");
    return row;
  };
  const move = (by) => {
    chosen = Math.min(rows.length - 1, Math.max(0, chosen + by));
    const top = chosen * height;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (top + 2 * height > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + 2 * height - scroller.clientHeight;
    first = -1;
    draw();
    body.querySelector('[aria-selected="true"] a')?.focus({ preventScroll: true });
  };
  scroller.addEventListener("scroll", draw, { passive: true });
  requestAnimationFrame(draw);
  draw();
  const rest = all.length > rows.length ? el("p", { class: "problem" }, `The first ${rows.length.toLocaleString("en")} are listed: filter for the others.`) : null;
  return { element: [rest, scroller], move, chosen: () => (chosen < 0 ? null : rows[chosen]) };
}

/** One comparison whole. Its neighbours are those of the list that the address's filters make. */
export async function promptPage(page) {
  const { run, parameters } = page;
  const sample = Number(parameters.get("of") ?? parameters.get("sample") ?? 0);
  const list = await listed({ ...page, parameters: without(parameters, "sample") });
  const { index, number: pair, rows } = list;
  const prompt = index.prompts.prompt_id.indexOf(page.item);
  const row = index.prompt.findIndex((one, place) => one === prompt && index.sample[place] === sample);
  if (prompt < 0 || row < 0) throw new Problem(`This run compares no sample ${sample} of a prompt ${page.item}.`);
  const place = rows.indexOf(row);
  const kept = Object.fromEntries(without(parameters, "sample"));
  const at = (other) => address(["runs", run, "prompts", index.prompts.prompt_id[index.prompt[other]]], { ...kept, of: index.sample[other] });
  const beside = (by) => (place >= 0 ? rows[place + by] : undefined);
  const go = (by) => {
    if (beside(by) !== undefined) location.hash = at(beside(by));
    else say(by > 0 ? "This is the last." : "This is the first.");
  };
  const back = address(["runs", run, "samples"], { ...kept, of: null });
  page.onKeys({ j: () => go(1), k: () => go(-1), u: () => (location.hash = back) });
  const content = await get(`runs/${encodeURIComponent(run)}/samples/${pair}/${Math.floor(row / index.page)}.json`, list.version);
  return [
    el("h1", {}, `Prompt ${page.item}, sample ${sample}`),
    el(
      "p",
      { class: "walk" },
      el("a", { href: back }, "Back to the table (u)"),
      beside(-1) === undefined ? null : el("a", { href: at(beside(-1)), rel: "prev" }, "Previous (k)"),
      beside(1) === undefined ? null : el("a", { href: at(beside(1)), rel: "next" }, "Next (j)"),
      el("span", { class: "soft" }, place < 0 ? "not among the filtered" : `${place + 1} of ${rows.length}`),
    ),
    await promptView(page, index, content.rows[row - content.first], list.version),
  ];
}

function without(parameters, name) {
  const kept = new URLSearchParams(parameters);
  kept.delete(name);
  return kept;
}
