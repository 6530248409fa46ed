// Where pages have their data from: the server, or files of the same names beside these pages.

const FOLDER = document.body.dataset.source === "folder";
const kept = new Map();
const MOST_KEPT = 400;

/** Whether these pages are files: nothing can be voted, and runs change no more. */
export const isFolder = FOLDER;

export class Problem extends Error {}

async function load(place, options) {
  let response;
  try {
    response = await fetch(place, options);
  } catch {
    throw new Problem("The server does not answer. Is refscore view still running?");
  }
  const text = await response.text();
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Problem(response.status === 404 ? "There is nothing at this address." : text.slice(0, 300));
  }
  if (!response.ok || content.problem !== undefined && Object.keys(content).length === 1) throw new Problem(content.problem || response.statusText);
  return content;
}

/** The value at an address below data/. `version`: what it was made of, so that an older value is not shown for it. */
export function get(place, version = "") {
  const key = `${place} ${version}`;
  if (!kept.has(key)) {
    const coming = load(`data/${place}`);
    coming.catch(() => kept.delete(key));
    kept.set(key, coming);
    if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
  }
  return kept.get(key);
}

/** A value that may be another one each time. */
export function fresh(place) {
  return load(`data/${place}`);
}

/** Rows of comparisons whose prompt or responses have `text`. `count`: how many there are; `page`: rows of a page. */
export async function search(run, number, text, count, page) {
  if (!FOLDER) return (await load(`search?${new URLSearchParams({ run, number, text })}`)).rows;
  const wanted = text.toLowerCase();
  const found = [];
  for (let first = 0; first < count; first += page) {
    const { rows } = await load(`data/runs/${encodeURIComponent(run)}/samples/${number}/${first / page}.json`);
    rows.forEach((row, place) => {
      const texts = [row.prompt, ...row.responses.map((side) => side.text)];
      if (texts.some((one) => one.toLowerCase().includes(wanted))) found.push(first + place);
    });
  }
  return found;
}

/** Runs side by side, the first as the baseline. */
export async function compare(runs) {
  if (!FOLDER) return load(`compare?${new URLSearchParams(runs.map((run) => ["run", run]))}`);
  if (runs.length === 2) {
    const two = await load(`data/compare/${runs.map(encodeURIComponent).join("/")}.json`).catch(() => null);
    if (two) return two;
  }
  const all = await load(`data/compare/${encodeURIComponent(runs[0])}.json`);
  const columns = runs.map((run) => 1 + all.runs.indexOf(run));
  const chosen = (rows) => rows.map((row) => [row[0], ...columns.map((place) => row[place])]);
  return {
    ...all,
    runs,
    settings: chosen(all.settings).filter((row) => new Set(row.slice(1)).size > 1),
    reached: chosen(all.reached),
    differences: all.differences.filter((found) => found.run.split(", ").every((name) => runs.includes(name))),
  };
}

export function ballot(run, asked) {
  return load(`ballot?${new URLSearchParams({ run, ...asked })}`);
}

export function vote(content) {
  return load("votes", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) });
}
