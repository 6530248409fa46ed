// One comparison: both responses with what differs, every verdict with the judge's words, and tokens coloured by log-ratio.
import { breakable, el, longText, number, table } from "./dom.js";
import { get } from "./source.js";

export async function promptView({ run }, index, row, version) {
  const models = [index.model, index.baseline];
  return [
    el("h2", {}, "Prompt"),
    longText(row.prompt || "(empty)", { class: "prompt" }),
    el("h2", {}, "Responses"),
    el("div", { class: "sides" }, models.map((model, side) => response(model, row.responses[side], row.parts[side], side))),
    el("h2", {}, "Verdicts"),
    verdicts(row.verdicts),
    await tokens(run, models, row.kl_rows, version, index.page),
  ];
}

function response(model, said, parts, side) {
  const marked = parts.some(([, differs]) => differs);
  const text = marked ? el("div", { class: `text side-${side}`, dir: "auto" }, parts.map(([text, differs]) => (differs && text.trim() ? el("mark", {}, text) : text))) : longText(said.text || "(empty)", { class: `side-${side}` });
  const ended = said.finish_reason === "length" ? "cut off" : `ended (${said.finish_reason})`;
  return el("section", { "aria-label": `response of ${model}` }, el("h3", {}, model), el("p", { class: "soft" }, `${said.tokens} tokens, ${ended}`), text);
}

function verdicts(said) {
  if (!said.length) return el("p", {}, "No judge has judged this comparison.");
  const rows = said.map(({ judge, first, winner, score }) => [breakable(judge), `${first} first`, winner, number(score, 3)]);
  return [
    table("Every verdict in both orders; a score above 0.5 is for the model", ["judge", "order", "winner", "score"], rows, { numbers: new Set([3]) }),
    said.filter(({ words }) => words !== null).map(({ judge, first, words }) => el("details", {}, el("summary", {}, `${judge}, ${first} first: what it wrote`), longText(words))),
  ];
}

async function tokens(run, models, rows, version, page) {
  if (!rows.flat().length) return el("p", { class: "soft" }, "The log-probabilities of no sample of this prompt were measured (generate.kl_samples).");
  const found = await Promise.all(rows.flat().map((row) => get(`runs/${encodeURIComponent(run)}/tokens/${Math.floor(row / page)}.json`, version).then((part) => part.rows[row - part.first])));
  return [
    el("h2", {}, "Tokens"),
    el("p", { class: "soft" }, "Samples at temperature 1 of which KL is measured. Colour: log-probability under the model that wrote it minus that under the reference, in nats per token; ", shades()),
    found.map((row) =>
      el(
        "section",
        { "aria-label": `tokens of ${row.model}, sample ${row.sample}` },
        el("h3", {}, `${row.model}, sample ${row.sample}`),
        row.ref_logps ? coloured(row.pieces, row.logps, (place) => row.logps[place] - row.ref_logps[place], "log-ratio") : coloured(row.pieces, row.logps, () => 0, "log-ratio"),
        row.ref_logps ? mostOf(row, "Tokens on which the model moved most", (place) => row.logps[place] - row.ref_logps[place]) : null,
      ),
    ),
  ];
}

const LIMITS = [0.5, 1.5, 3];

function shade(value) {
  const size = LIMITS.filter((limit) => Math.abs(value) >= limit).length;
  return size ? `shade-${value > 0 ? "more" : "less"}-${size}` : "";
}

export function shades(words = ["less likely", "more likely"]) {
  return [-4, -2, -1, 1, 2, 4].map((value) => [el("span", { class: `token ${shade(value)}` }, `${value > 0 ? "+" : "−"}${LIMITS[LIMITS.filter((limit) => Math.abs(value) >= limit).length - 1]}`), " "]).concat([`(${words.join(", ")})`]);
}

/** Tokens as text, each coloured by `value(place)` with its figures in a hint; `limits` in nats. */
export function coloured(pieces, logps, value, name) {
  return el(
    "div",
    { class: "text tokens", dir: "auto" },
    pieces.map((piece, place) => {
      const known = logps && logps[place] !== null;
      const hint = known ? `${JSON.stringify(piece)}: log-probability ${number(logps[place], 3)}, ${name} ${number(value(place), 3)}` : piece;
      return el("span", { class: `token ${known ? shade(value(place)) : ""}`, title: hint }, piece);
    }),
  );
}

export function mostOf(row, caption, value) {
  const places = row.pieces.map((_, place) => place).sort((a, b) => Math.abs(value(b)) - Math.abs(value(a)));
  const rows = places.slice(0, 10).map((place) => [JSON.stringify(row.pieces[place]), String(place), number(row.logps[place], 3), number(row.ref_logps[place], 3), number(value(place), 3)]);
  return el("details", {}, el("summary", {}, caption), table(caption, ["token", "position", "log-probability", "under the reference", "difference"], rows, { hidden: true, numbers: new Set([1, 2, 3, 4]) }));
}
