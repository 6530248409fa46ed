// One run: what it found, and the ways to its rows.
import { breakable, el, interval, link, number, percent, table } from "./dom.js";
import { isFolder } from "./source.js";

export async function overviewPage({ run, overview }) {
  const judges = Object.entries(overview.judges);
  return [
    el("h1", {}, run),
    overview.problem ? el("p", { class: "problem" }, overview.problem) : null,
    el("p", { class: "verdict" }, overview.verdict || "Not evaluated yet."),
    judges.length
      ? table(
          "The policy against its reference, by judge; the rows behind each figure are a press away",
          ["judge", "win rate (95 %)", "prompts", "contradicts itself", "failed", "rows"],
          judges.map(([name, found]) => [
            [breakable(name), name === overview.pair_judge ? el("small", {}, " (made the pairs)") : null],
            interval(found.rate),
            String(found.prompts),
            String(found.flips),
            String(found.failed),
            name === "implicit" ? link(["runs", run, "pairs"], { split: "held out" }, "pairs") : rowsOf(run, name),
          ]),
          { numbers: new Set([2, 3, 4]) },
        )
      : null,
    overview.held_out
      ? el("p", {}, "Held-out pairs: reward accuracy ", percent(overview.held_out.reward_accuracy), `, mean margin ${number(overview.held_out.mean_margin)}, of ${overview.held_out.pairs} pairs. `, link(["runs", run, "pairs"], { split: "held out" }, "See them"))
      : null,
    overview.verified ? el("p", {}, `verify: ${overview.verified}`) : null,
    overview.generate ? el("p", { class: "soft" }, "Sampled with ", Object.entries(overview.generate).map(([name, value]) => `${name} ${value}`).join(", "), ".") : null,
    el(
      "p",
      {},
      overview.versions.report ? [el("a", { href: `report/${encodeURIComponent(run)}/`, target: "_blank", rel: "noopener" }, "The report of this run"), " · "] : null,
      overview.comparisons.length && !isFolder ? link(["runs", run, "vote"], {}, "Vote on its responses") : null,
    ),
  ];
}

function rowsOf(run, judge) {
  return ["won", "lost", "flipped"].map((outcome) => [link(["runs", run, "samples"], { judge, outcome }, outcome), " "]);
}
