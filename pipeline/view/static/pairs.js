// Training and held-out pairs: what reference and policy think of each, token by token; and the rows that are no pairs.
import { address, choice, el, link, longText, number, say, table } from "./dom.js";
import { get, Problem } from "./source.js";
import { coloured, shades } from "./prompt.js";
import { rowList } from "./samples.js";

const PREFERS = { rejected: "policy prefers the rejected", chosen: "policy prefers the chosen", away: "moved towards the rejected", towards: "moved towards the chosen" };

async function listed({ run, overview, parameters }) {
  if (!overview.versions.pairs) throw new Problem("No pairs yet: refscore precompute writes them.");
  const version = `${overview.versions.pairs} ${overview.versions.policy_logps}`;
  const index = await get(`runs/${encodeURIComponent(run)}/pairs.json`, version);
  const known = (values, row) => values[0][row] !== null && values[1][row] !== null;
  const margin = (values) => (row) => (known(values, row) ? values[0][row] - values[1][row] : null);
  const before = margin(index.reference);
  const after = margin(index.policy);
  const moved = (row) => (before(row) === null || after(row) === null ? null : after(row) - before(row));
  const keys = { before, after, moved, length: (row) => index.tokens[0][row] - index.tokens[1][row] };
  const tests = {
    rejected: (row) => after(row) !== null && after(row) < 0,
    chosen: (row) => after(row) !== null && after(row) > 0,
    away: (row) => moved(row) !== null && moved(row) < 0,
    towards: (row) => moved(row) !== null && moved(row) > 0,
  };
  const [split, topic, prefers] = ["split", "topic", "prefers"].map((name) => parameters.get(name));
  const topicNumber = topic === null ? null : index.topics.indexOf(topic);
  const rows = Array.from(index.pair_id, (_, row) => row).filter(
    (row) => (!split || index.held_out[row] === (split === "held out")) && (topicNumber === null || index.topic[row] === topicNumber) && (!tests[prefers] || tests[prefers](row)),
  );
  const key = keys[parameters.get("sort")];
  if (key) {
    const turn = parameters.get("up") ? 1 : -1;
    const values = new Map(rows.map((row) => [row, key(row)]));
    rows.sort((a, b) => (values.get(a) === null) - (values.get(b) === null) || turn * (values.get(a) - values.get(b)) || a - b);
  }
  return { index, rows, before, after, moved, version };
}

export async function pairsPage(page) {
  const { run, parameters } = page;
  const { index, rows, before, after, moved } = await listed(page);
  const kept = Object.fromEntries(parameters);
  const open = (row) => address(["runs", run, "pairs", index.pair_id[row]], kept);
  const to = (changes) => (location.hash = page.with(changes));
  const trained = index.step.some((step) => step !== null);
  const list = rowList(
    rows,
    (row, place) =>
      el(
        "tr",
        { "aria-rowindex": place + 2, "data-row": row },
        el("th", { scope: "row" }, el("a", { href: open(row), class: "start", dir: "auto" }, index.start[row] || "(empty prompt)")),
        el("td", {}, index.held_out[row] ? "held out" : "training"),
        el("td", { class: "number" }, `${index.tokens[0][row]}/${index.tokens[1][row]}`),
        [before(row), after(row), moved(row)].map((value) => el("td", { class: value !== null && value < 0 ? "number under" : "number" }, number(value))),
        el("td", { class: "number" }, index.step[row] === null ? "–" : String(index.step[row])),
      ),
    ["prompt", "split", "tokens", "margin under the reference", "margin under the policy", "moved by", "at step"],
    new Set([2, 3, 4, 5, 6]),
  );
  page.onKeys({ j: () => list.move(1), k: () => list.move(-1), Enter: () => list.chosen() !== null && (location.hash = open(list.chosen())) });
  say(`${rows.length} of ${index.pair_id.length} pairs`);
  return [
    el("h1", {}, `Pairs of ${run}`),
    el("p", {}, el("strong", {}, `${rows.length.toLocaleString("en")} of ${index.total.toLocaleString("en")}`), " pairs. Margin: log-probability of the chosen response minus that of the rejected, in nats. ", trained ? "Of the policy it is that of the step at which it last saw the pair." : "What the policy thinks of single pairs is not known: this run was trained before that was kept, or not yet."),
    index.total > index.pair_id.length ? el("p", { class: "problem" }, `The first ${index.pair_id.length.toLocaleString("en")} are listed; pairs.parquet holds all.`) : null,
    el(
      "form",
      { class: "filters", onsubmit: (event) => event.preventDefault() },
      choice("split", parameters.get("split") || "", [["", "both"], ["training", "training"], ["held out", "held out"]], (split) => to({ split })),
      index.topics.some(Boolean) ? choice("topic", parameters.get("topic") ?? "", [["", "any"], ...index.topics.filter(Boolean).map((topic) => [topic, topic])], (topic) => to({ topic })) : null,
      trained ? choice("policy", parameters.get("prefers") || "", [["", "any"], ...Object.entries(PREFERS)], (prefers) => to({ prefers })) : null,
      choice("order", parameters.get("sort") || "", [["", "of the file"], ["before", "margin under the reference"], ["after", "margin under the policy"], ["moved", "moved by"], ["length", "tokens more than the rejected's"]], (sort) => to({ sort })),
      choice("direction", parameters.get("up") || "", [["", "largest first"], ["1", "smallest first"]], (up) => to({ up })),
      parameters.size ? link(["runs", run, "pairs"], {}, "Take all filters away") : null,
    ),
    rows.length ? list.element : el("p", {}, "No pair passes these filters."),
  ];
}

export async function pairPage(page) {
  const { run, item, parameters } = page;
  const { index, rows, before, after, moved, version } = await listed(page);
  const row = index.pair_id.indexOf(item);
  if (row < 0) throw new Problem(`No pair ${item} is among the listed.`);
  const content = await get(`runs/${encodeURIComponent(run)}/pairs/${Math.floor(row / index.page)}.json`, version);
  const pair = content.rows[row - content.first];
  const kept = Object.fromEntries(parameters);
  const place = rows.indexOf(row);
  const at = (by) => (place >= 0 && rows[place + by] !== undefined ? address(["runs", run, "pairs", index.pair_id[rows[place + by]]], kept) : null);
  const go = (by) => (at(by) ? (location.hash = at(by)) : say(by > 0 ? "This is the last." : "This is the first."));
  const back = address(["runs", run, "pairs"], kept);
  page.onKeys({ j: () => go(1), k: () => go(-1), u: () => (location.hash = back) });
  const sums = (values) => [0, 1].map((side) => number(values[side][row]));
  return [
    el("h1", {}, `Pair ${item}`),
    el("p", { class: "walk" }, el("a", { href: back }, "Back to the table (u)"), at(-1) ? el("a", { href: at(-1), rel: "prev" }, "Previous (k)") : null, at(1) ? el("a", { href: at(1), rel: "next" }, "Next (j)") : null, el("span", { class: "soft" }, `${index.held_out[row] ? "held out" : "training"}, row ${pair.source_row} of ${pair.source}`)),
    table(
      "Log-probabilities of the responses, nats",
      ["under", "chosen", "rejected", "margin"],
      [
        ["reference", ...sums(index.reference), number(before(row))],
        [index.step[row] === null ? "policy" : `policy, step ${index.step[row]}`, ...sums(index.policy), number(after(row))],
        ["moved by", ...[0, 1].map((side) => number(index.policy[side][row] === null ? null : index.policy[side][row] - index.reference[side][row])), number(moved(row))],
      ],
      { numbers: new Set([1, 2, 3]) },
    ),
    el("h2", {}, "Prompt"),
    longText(pair.prompt || "(empty)", { class: "prompt" }),
    el("h2", {}, "Responses"),
    el("div", { class: "sides" }, ["chosen", "rejected"].map((side, number_) => response(pair, side, number_))),
    el("h2", {}, "Tokens under the reference"),
    pair.logps[0] ? el("p", { class: "soft" }, "Colour: log-probability minus the response's mean, in nats; ", shades(["more surprising", "less surprising"])) : el("p", {}, "Scores of single tokens are not known of this pair."),
    ["chosen", "rejected"].map((side, number_) => (pair.logps[number_] ? tokens(pair, side, number_) : null)),
  ];
}

function response(pair, side, number_) {
  const parts = pair.parts[number_];
  const marked = parts.some(([, differs]) => differs);
  return el(
    "section",
    { "aria-label": `${side} response` },
    el("h3", {}, side),
    marked ? el("div", { class: `text side-${number_}`, dir: "auto" }, parts.map(([text, differs]) => (differs && text.trim() ? el("mark", {}, text) : text))) : longText(pair.texts[number_] || "(empty)"),
  );
}

function tokens(pair, side, number_) {
  const logps = pair.logps[number_];
  const pieces = pair.pieces[number_];
  const mean = logps.reduce((sum, value) => sum + value, 0) / (logps.length || 1);
  const surprise = (place) => logps[place] - mean;
  const places = pieces.map((_, place) => place).sort((a, b) => logps[a] - logps[b]).slice(0, 10);
  return el(
    "section",
    { "aria-label": `tokens of the ${side} response` },
    el("h3", {}, side),
    coloured(pieces, logps, surprise, "against the mean"),
    el("details", {}, el("summary", {}, "The most surprising tokens"), table(`The most surprising tokens of the ${side} response`, ["token", "position", "log-probability"], places.map((place) => [JSON.stringify(pieces[place]), String(place), number(logps[place], 3)]), { hidden: true, numbers: new Set([1, 2]) })),
  );
}

export async function droppedPage({ run, overview, parameters }) {
  const title = el("h1", {}, `Dropped rows of ${run}`);
  if (!overview.versions.dropped) return [title, el("p", {}, "Nothing is known of dropped rows: refscore precompute writes them.")];
  const found = await get(`runs/${encodeURIComponent(run)}/dropped.json`, overview.versions.dropped);
  if (!found.total) return [title, el("p", {}, "Every row of the data is a pair.")];
  const asked = parameters.get("reason");
  const rows = found.rows.filter(([, , reason]) => !asked || reason === asked);
  const shown = rows.slice(0, 500);
  return [
    title,
    table("Rows that are no pairs, by reason", ["reason", "rows"], found.reasons.map(([reason, count]) => [link(["runs", run, "dropped"], { reason }, reason), String(count)]), { numbers: new Set([1]) }),
    el("p", {}, `${shown.length} of ${rows.length} rows${asked ? ` with ${asked}` : ""}; dropped.parquet holds all ${found.total}.`),
    table("Rows", ["source", "row", "reason", "detail"], shown.map(([source, row, reason, detail]) => [longText(source, {}, 300), String(row), reason, longText(detail, {}, 2000)]), { hidden: true, numbers: new Set([1]) }),
  ];
}
