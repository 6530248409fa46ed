// The curves of a training, as far as it has come, and what looked wrong.
import { el, link, number, table } from "./dom.js";
import { get } from "./source.js";
import { curves } from "./plots.js";

const GROUPS = [
  ["Loss", [["training", "loss"], ["held-out pairs", "eval_loss"]]],
  ["Reward margin", [["training", "rewards/margins"], ["held-out pairs", "eval_rewards/margins"]]],
  ["Reward accuracy", [["training", "rewards/accuracies"], ["held-out pairs", "eval_rewards/accuracies"]]],
  ["Rewards", [["chosen", "rewards/chosen"], ["rejected", "rewards/rejected"], ["chosen, held out", "eval_rewards/chosen"], ["rejected, held out", "eval_rewards/rejected"]]],
  ["Log-probabilities, nats per response", [["chosen", "logps/chosen"], ["rejected", "logps/rejected"], ["chosen, held out", "eval_logps/chosen"], ["rejected, held out", "eval_logps/rejected"]]],
  ["Rewards of samples", [["mean", "reward"], ["standard deviation within a prompt", "reward_std"]]],
  ["KL, nats", [["to what wrote the samples, per token", "kl/behaviour"], ["to the reference", "kl"], ["to the reference, held out", "eval_kl"]]],
  ["Ratio to what wrote the samples", [["mean", "ratio/mean"], ["highest", "ratio/max"]]],
  ["Share of ratios that were clipped", [["all", "clip_ratio/region_mean"], ["from below", "clip_ratio/low_mean"], ["from above", "clip_ratio/high_mean"]]],
  ["Values", [["mean", "value/mean"]]],
  ["Variance of returns that values explain", [["training", "value/explained_variance"]]],
  ["Norm of the gradient", [["training", "grad_norm"]]],
  ["Learning rate", [["training", "learning_rate"]]],
  ["Tokens per second", [["training", "tokens_per_second"]]],
  ["Seconds per step", [["training", "step_seconds"]]],
  ["Peak memory, GiB", [["training", "peak_memory_gib"]]],
];

export async function trainingPage({ run, overview, parameters }) {
  const title = el("h1", {}, `Training of ${run}`);
  if (!overview.versions.metrics) return [title, el("p", {}, "No training has begun.")];
  const found = await get(`runs/${encodeURIComponent(run)}/training.json`, overview.versions.metrics);
  const asked = parameters.get("step");
  const at = asked === null || !Number.isFinite(Number(asked)) ? null : Number(asked);
  const marks = found.findings.map(({ step, sentence }) => [step, sentence]);
  const last = found.step[found.step.length - 1];
  const pictures = GROUPS.map(([name, columns]) => {
    const lines = columns.filter(([, column]) => found.columns[column]).map(([text, column]) => ({ name: text, steps: found.step, values: found.columns[column] }));
    return lines.length ? curves(name, lines, marks, at) : null;
  });
  return [
    title,
    el("p", {}, `Step ${last} of ${found.steps ?? "?"}.`, at === null ? null : ` Values at step ${at} are under each picture.`),
    el("h2", {}, "What looked wrong"),
    found.findings.length
      ? el("ul", {}, found.findings.map(({ step, sentence }) => el("li", {}, link(["runs", run, "training"], { step }, `step ${step}`), `: ${sentence}`)))
      : el("p", {}, "Nothing that the rules of thumb of health look for."),
    gate(found.gate),
    el("h2", {}, "Curves"),
    el("div", { class: "plots" }, pictures),
  ];
}

function gate(figures) {
  const rows = Object.entries(figures).map(([name, value]) => [name.replaceAll("_", " "), typeof value === "number" ? number(value, 4) : String(value)]);
  return rows.length ? el("details", {}, el("summary", {}, "The gate: did the policy start as the reference that was scored?"), table("Figures of the gate", ["figure", "value"], rows, { hidden: true })) : null;
}
