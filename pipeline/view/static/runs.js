// The list of runs, and runs side by side.
import { address, breakable, bytes, choice, el, interval, link, number, percent, table } from "./dom.js";
import { compare, fresh, get } from "./source.js";
import { curves } from "./plots.js";

export async function runsPage(page) {
  const chosen = page.parameters.getAll("run");
  if (chosen.length > 1) return sideBySide(page, chosen);
  const { runs } = await fresh("runs.json");
  if (!runs.length) return [el("h1", {}, "Runs"), el("p", {}, "There are no runs here: refscore precompute begins one.")];
  const boxes = runs.map((run) => el("input", { type: "checkbox", name: "run", value: run.name, "aria-label": `compare ${run.name}`, checked: chosen.includes(run.name) }));
  const head = ["run", "state", "win rate (95 %)", "reward accuracy", "KL, nats", "reference", "size", "changed", "compare"];
  const rows = runs.map((run, place) => [
    link(["runs", run.name], {}, breakable(run.name)),
    (run.state === "training" ? `training, step ${run.step} of ${run.steps ?? "?"}` : run.state) + (run.writer ? ", running" : ""),
    run.figures.win_rate ? [interval(run.figures.win_rate), el("small", {}, " by ", breakable(run.figures.judge))] : "–",
    percent(run.figures.reward_accuracy),
    interval(run.figures.kl),
    el("code", {}, run.reference || "–"),
    bytes(run.bytes),
    new Date(run.changed).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }),
    boxes[place],
  ]);
  const problem = el("p", { class: "problem", role: "alert" });
  const go = () => {
    const names = boxes.filter((box) => box.checked).map((box) => box.value);
    if (names.length < 2) problem.textContent = "Tick two runs or more.";
    else location.hash = address(["runs"], { run: names });
  };
  return [
    el("h1", {}, "Runs"),
    table("Win rates are the policy's against its reference.", head, rows, { numbers: new Set([6]) }),
    el("p", {}, el("button", { type: "button", onclick: go }, "Show the ticked runs side by side")),
    problem,
  ];
}

async function sideBySide(page, names) {
  const found = await compare(names);
  const others = (first) => [first, ...names.filter((name) => name !== first)];
  const baseline = choice("baseline", names[0], names.map((name) => [name, name]), (name) => (location.hash = address(["runs"], { run: others(name) })));
  const differences = found.differences.map((one) => [breakable(one.run), breakable(one.judge), interval(one, 3), number(one.p, 3), String(one.prompts)]);
  return [
    el("h1", {}, "Runs side by side"),
    el("div", { class: "filters" }, baseline, el("p", {}, names.map((name) => [link(["runs", name], {}, name), " "]))),
    found.unlike.map((sentence) => el("p", { class: "problem" }, sentence)),
    differences.length
      ? table(
          `Difference of scores from ${names[0]}, prompt by prompt, corrected for ${found.differences[0].comparisons} comparisons`,
          ["run", "judge", "difference (95 %)", "p", "prompts"],
          differences,
          { numbers: new Set([3, 4]) },
        )
      : el("p", {}, "No judge judged these runs on the same prompts against the same responses, so that no difference is tested."),
    table("What was reached", ["figure", ...names], named(found.reached)),
    table("Settings that differ", ["field", ...names], named(found.settings)),
    await trainings(names),
  ];
}

function named(rows) {
  return rows.map(([name, ...values]) => [breakable(name), ...values.map(breakable)]);
}

async function trainings(names) {
  const loaded = await Promise.all(names.map((name) => get(`runs/${encodeURIComponent(name)}/training.json`).catch(() => null)));
  const wanted = [["eval_loss", "Held-out loss"], ["eval_rewards/margins", "Held-out reward margin"], ["eval_rewards/accuracies", "Held-out reward accuracy"]];
  return el(
    "div",
    { class: "plots" },
    wanted.map(([column, title]) => {
      const lines = names.flatMap((name, place) => (loaded[place]?.columns[column] ? [{ name, steps: loaded[place].step, values: loaded[place].columns[column] }] : []));
      return lines.length ? curves(title, lines) : null;
    }),
  );
}
