// Elements made of text alone: nothing here parses HTML, so that no text of a model can act.

/** An element with attributes (`on...`: a listener, `class`, others as they are; null and false: none) and children. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "value") made.value = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false).map(String_));
  return made;
}

function String_(child) {
  return child instanceof Node ? child : String(child);
}

/** The address of a page: parts of its path and parameters, as in a link's href. */
export function address(parts, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of [value].flat()) if (one !== null && one !== undefined && one !== "") query.append(name, one);
  }
  const path = "#/" + parts.map(encodeURIComponent).join("/");
  return query.size ? `${path}?${query}` : path;
}

export function link(parts, parameters, ...children) {
  return el("a", { href: address(parts, parameters) }, children);
}

/** A table: names of columns, rows of cells; numbers stand right. `caption` names it for everybody. */
export function table(caption, head, rows, options = {}) {
  const wide = options.numbers || new Set();
  const cells = (row) =>
    row.map((cell, place) =>
      place === 0
        ? el("th", { scope: "row", "data-label": head[0] }, cell)
        : el("td", { class: wide.has(place) ? "number" : null, "data-label": head[place] }, cell),
    );
  return el(
    "table",
    { class: "plain" },
    el("caption", { class: options.hidden ? "hidden" : null }, caption),
    el("thead", {}, el("tr", {}, head.map((name, place) => el("th", { scope: "col", class: wide.has(place) ? "number" : null }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, cells(row)))),
  );
}

/** A labelled choice: `options` are [value, text]. */
export function choice(label, value, options, change) {
  const select = el("select", { onchange: (event) => change(event.target.value) });
  for (const [one, text] of options) select.append(el("option", { value: one, selected: one === value }, text));
  select.value = value;
  return el("label", {}, el("span", {}, label), select);
}

/** A name that may break after its signs, and nowhere else. */
export function breakable(name) {
  return name.split(/(?<=[:=_/.,-])/).flatMap((part, place) => (place ? [el("wbr"), part] : [part]));
}

export function number(value, digits = 2) {
  return value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
}

export function percent(value) {
  return value === null || value === undefined ? "–" : `${Math.round(100 * value)} %`;
}

/** "0.61 (0.52 to 0.70)" of a mean with its interval. */
export function interval(found, digits = 2) {
  return found ? `${number(found.mean, digits)} (${number(found.low, digits)} to ${number(found.high, digits)})` : "–";
}

export function bytes(count) {
  const units = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]];
  for (const [size, unit] of units) if (count >= size) return `${(count / size).toFixed(count < 10 * size ? 1 : 0)} ${unit}`;
  return `${count} B`;
}

/** Text that is cut if it is very long, with the rest at a press. */
export function longText(text, attributes = {}, most = 20000) {
  const shown = el("div", { ...attributes, class: `text ${attributes.class || ""}`, dir: "auto" }, text.slice(0, most));
  if (text.length > most) {
    const rest = el("button", { type: "button", onclick: () => rest.replaceWith(text.slice(most)) }, `Show the other ${(text.length - most).toLocaleString("en")} characters`);
    shown.append(el("span", {}, " … "), rest);
  }
  return shown;
}

let said;

/** Says it to whoever listens or looks; it goes from sight after a moment. */
export function say(text) {
  const place = document.getElementById("said");
  place.textContent = text;
  place.classList.remove("hidden");
  clearTimeout(said);
  said = setTimeout(() => place.classList.add("hidden"), 3000);
}
