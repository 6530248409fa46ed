// Which page an address is, and what is the same on all: where this is, keys, and what changes while it is looked at.
import { address, el, link, say } from "./dom.js";
import { fresh, isFolder, Problem } from "./source.js";
import { runsPage } from "./runs.js";
import { overviewPage } from "./overview.js";
import { promptPage, samplesPage } from "./samples.js";
import { droppedPage, pairPage, pairsPage } from "./pairs.js";
import { trainingPage } from "./training.js";
import { votePage, votesPage } from "./votes.js";

const EVERY = 4000;
const PAGES = {
  "": overviewPage,
  samples: samplesPage,
  prompts: promptPage,
  pairs: pairsPage,
  pair: pairPage,
  training: trainingPage,
  dropped: droppedPage,
  vote: votePage,
  votes: votesPage,
};
export const TABS = [["", "Overview"], ["samples", "Samples"], ["pairs", "Pairs"], ["training", "Training"], ["dropped", "Dropped rows"], ["votes", "Votes"]];

let shown = 0;
let leave = [];
let seen = null;

function here() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  let parts;
  try {
    parts = path.split("/").filter(Boolean).map(decodeURIComponent);
  } catch {
    parts = ["none"];
  }
  return { parts, parameters: new URLSearchParams(query || "") };
}

async function show(keepsPlace) {
  const mine = ++shown;
  const { parts, parameters } = here();
  for (const stop of leave.splice(0)) stop();
  const main = document.getElementById("main");
  const page = {
    parts,
    parameters,
    /** What to do when this page is left. */
    onLeave: (stop) => leave.push(stop),
    /** Whether this page is still the one that is looked at. */
    isShown: () => mine === shown,
    /** A key that does something on this page. */
    onKeys: (keys) => {
      const listener = (event) => {
        if (event.target.closest("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
        // Enter on a link or a button is theirs
        if (event.key === "Enter" && event.target.closest("a, button, summary")) return;
        const act = keys[event.key];
        if (act) {
          event.preventDefault();
          act();
        }
      };
      document.addEventListener("keydown", listener);
      leave.push(() => document.removeEventListener("keydown", listener));
    },
    /** This page's address with some parameters changed; null takes one away. */
    with: (changes, path = parts) => {
      const next = new URLSearchParams(parameters);
      for (const [name, value] of Object.entries(changes)) value === null || value === "" ? next.delete(name) : next.set(name, value);
      return "#/" + path.map(encodeURIComponent).join("/") + (next.size ? `?${next}` : "");
    },
  };
  crumbs(parts);
  say("");
  try {
    const content = await open(page);
    if (mine !== shown) return;
    const scroll = window.scrollY;
    main.replaceChildren(...[content].flat(Infinity).filter((child) => child instanceof Node));
    document.title = `${main.querySelector("h1")?.textContent || "runs"} – refscore`;
    if (keepsPlace) window.scrollTo(0, scroll);
    else {
      window.scrollTo(0, 0);
      main.focus({ preventScroll: true });
    }
    main.dataset.hash = location.hash;
  } catch (error) {
    if (mine !== shown) return;
    if (!(error instanceof Problem)) console.error(error);
    main.replaceChildren(el("h1", {}, "This cannot be shown"), el("p", { class: "problem" }, error instanceof Problem ? error.message : `An error in this page: ${error.message}`));
    main.dataset.hash = location.hash;
  }
}

async function open(page) {
  const [first, run, tab = "", item] = page.parts;
  if (first === undefined || first === "runs" && run === undefined) return runsPage(page);
  const make = first === "runs" ? PAGES[tab === "pairs" && item !== undefined ? "pair" : tab] : undefined;
  if (!make || page.parts.length > 4) throw new Problem("There is no page at this address.");
  const overview = await fresh(`runs/${encodeURIComponent(run)}/overview.json`);
  seen = { run, versions: JSON.stringify(overview.versions) };
  return make({ ...page, run, item, overview });
}

function crumbs([, run, tab]) {
  const nav = document.getElementById("crumbs");
  const places = [link(["runs"], {}, "Runs")];
  if (run !== undefined) {
    places.push(el("strong", {}, run));
    for (const [name, text] of TABS) {
      const current = name === (tab === "prompts" ? "samples" : tab === "vote" ? "votes" : tab || "");
      places.push(el("a", { href: address(name ? ["runs", run, name] : ["runs", run]), "aria-current": current ? "page" : null }, text));
    }
  }
  nav.replaceChildren(...places);
}

// what a run's stages write while it is looked at is taken in; a page on which somebody votes or types stays
async function follow() {
  const { parts } = here();
  if (document.hidden || parts[0] !== "runs" || parts[2] === "vote" || document.activeElement?.matches("input, textarea, select")) return;
  try {
    if (parts[1] === undefined) return;
    const { versions } = await fresh(`runs/${encodeURIComponent(parts[1])}/overview.json`);
    const now = JSON.stringify(versions);
    if (seen && seen.run === parts[1] && seen.versions !== now) {
      await show(true);
      say("The run's files changed: this page shows them now.");
    }
  } catch {
    // the server is gone for now; the page that is there stays
  }
}

document.getElementById("skip").addEventListener("click", () => document.getElementById("main").focus());
window.addEventListener("hashchange", () => show(false));
if (!isFolder) setInterval(follow, EVERY);
show(false);
