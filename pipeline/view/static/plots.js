// Curves as SVG, with the values at a step under the pointer, by arrow keys, and as a table.
import { el, number, table } from "./dom.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const WIDTH = 560;
const HEIGHT = 260;
const LEFT = 56;
const BOTTOM = 30;

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** `lines`: {name, steps, values} each; a value that is null is a gap between points that are joined. `marks`: [step, text]. */
export function curves(title, lines, marks = [], at = null) {
  const points = lines.map(({ steps, values }) => steps.flatMap((step, place) => (values[place] === null ? [] : [[step, values[place]]])));
  const all = points.flat();
  if (!all.length) return el("figure", {}, el("figcaption", {}, `${title}: nothing yet`));
  const [fromStep, toStep] = ends(all.map(([step]) => step));
  const [low, high] = ends(all.map(([, value]) => value));
  const x = (step) => LEFT + ((step - fromStep) / (toStep - fromStep || 1)) * (WIDTH - LEFT - 12);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low || 1)) * (HEIGHT - BOTTOM - 14);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}, from step ${fromStep} to ${toStep}; the values are in the table below` });
  for (const value of ticks(low, high)) {
    picture.append(svg("line", { x1: LEFT, x2: WIDTH - 12, y1: y(value), y2: y(value), class: "grid" }), svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const step of ticks(fromStep, toStep)) picture.append(svg("text", { x: x(step), y: HEIGHT - 8, "text-anchor": "middle" }, String(Math.round(step))));
  points.forEach((line, place) => {
    picture.append(svg("polyline", { points: line.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" "), class: `line line-${place % 6}` }));
    if (line.length < 40) for (const [step, value] of line) picture.append(svg("circle", { cx: x(step), cy: y(value), r: 3, class: `dot line-${place % 6}` }));
  });
  for (const [step] of marks) picture.append(svg("line", { x1: x(step), x2: x(step), y1: 10, y2: HEIGHT - BOTTOM, class: "mark" }));
  const cursor = svg("line", { y1: 10, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden" });
  picture.append(cursor);
  const steps = [...new Set(all.map(([step]) => step))].sort((a, b) => a - b);
  const output = el("output", { class: "values" });
  let place = steps.length - 1;
  const show = (step) => {
    place = nearest(steps, step);
    const chosen = steps[place];
    cursor.setAttribute("x1", x(chosen));
    cursor.setAttribute("x2", x(chosen));
    cursor.setAttribute("visibility", "visible");
    output.replaceChildren(
      `step ${chosen}: `,
      points.map((line, of) => ({ name: lines[of].name, found: line.find(([one]) => one === chosen) })).filter(({ found }) => found).map(({ name, found }) => `${name} ${number(found[1], 4)}`).join(", "),
    );
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    show(fromStep + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - 12) * (toStep - fromStep));
  });
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, value: place, "aria-label": `step of ${title}`, oninput: (event) => show(steps[Number(event.target.value)]) });
  if (at !== null) show(at);
  return el(
    "figure",
    {},
    el("figcaption", {}, title),
    picture,
    el("ul", { class: "legend" }, lines.map((line, of) => el("li", { class: `line-${of % 6}` }, line.name))),
    steps.length > 1 ? slider : null,
    output,
    el("details", {}, el("summary", {}, "as a table"), tableOf(title, lines, points, steps)),
  );
}

function tableOf(title, lines, points, steps) {
  const by = points.map((line) => new Map(line));
  const rows = steps.slice(0, 2000).map((step) => [String(step), ...by.map((values) => number(values.has(step) ? values.get(step) : null, 4))]);
  return table(title, ["step", ...lines.map((line) => line.name)], rows, { hidden: true, numbers: new Set(lines.map((_, of) => of + 1)) });
}

function ends(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return [low, high];
}

function ticks(low, high) {
  if (!(high > low)) return [low];
  const raw = (high - low) / 4;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((times) => times * size).find((one) => one >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(value);
  return found;
}

function short(value) {
  const rounded = Number(value.toPrecision(3));
  return (Math.abs(rounded) >= 1e5 || (rounded && Math.abs(rounded) < 1e-3) ? rounded.toExponential(1) : String(rounded)).replace("-", "−");
}

function nearest(sorted, wanted) {
  let best = 0;
  sorted.forEach((value, place) => {
    if (Math.abs(value - wanted) < Math.abs(sorted[best] - wanted)) best = place;
  });
  return best;
}
