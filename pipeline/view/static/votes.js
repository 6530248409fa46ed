// The blind vote, one ballot at a time, and what the votes say of the judges.
import { address, breakable, choice, el, interval, link, longText, number, say, table } from "./dom.js";
import { ballot, get, isFolder, vote } from "./source.js";

const KEPT = "refscore-voter";

export async function votePage(page) {
  const { run, overview, parameters } = page;
  const title = el("h1", {}, `Vote on ${run}`);
  if (isFolder) return [title, el("p", {}, "These pages are files, which take no votes: refscore view does.")];
  if (!overview.comparisons.length) return [title, el("p", {}, "There is nothing to vote on: refscore eval writes samples of two models.")];
  const voter = parameters.get("voter");
  if (!voter) return [title, whoForm(page)];
  const [model, baseline] = [parameters.get("model") ?? overview.comparisons[0][0], parameters.get("baseline") ?? overview.comparisons[0][1]];
  const asked = { voter, model, baseline, seed: parameters.get("seed") || "0" };
  const place = el("div", { class: "ballot" });
  const open = { current: await ballot(run, asked), since: performance.now(), busy: false };
  const send = async (content) => {
    if (open.busy || !page.isShown()) return;
    open.busy = true;
    try {
      open.current = await vote({ run, ...asked, seed: Number(asked.seed), version: open.current.version, ...content });
      open.since = performance.now();
      draw();
      say(content.take_back ? "Your last vote is taken back." : "Counted.");
    } catch (error) {
      say(`Not counted: ${error.message}`);
      place.querySelector("[role=alert]").textContent = `Not counted: ${error.message}`;
    } finally {
      open.busy = false;
    }
  };
  const choose = (choice) => {
    if (open.current.number === null) return;
    const note = place.querySelector("textarea")?.value ?? "";
    send({ number: open.current.number, choice, note, seconds: Math.round(performance.now() - open.since) / 1000 });
  };
  const draw = () => place.replaceChildren(...ballotView(open.current, run, voter, choose, () => send({ take_back: true })));
  page.onKeys({ 1: () => choose("first"), 2: () => choose("second"), 0: () => choose("tie"), s: () => choose("skip"), u: () => send({ take_back: true }) });
  draw();
  return [title, el("p", { class: "soft" }, `${voter}, order ${asked.seed}. Which response is better? Who wrote which is not shown. Keys: 1 first, 2 second, 0 a tie, s skip, u take back.`), place];
}

function ballotView(current, run, voter, choose, back) {
  const progress = el("p", {}, el("progress", { max: current.ballots, value: current.answered, "aria-label": "answered" }), ` ${current.answered} of ${current.ballots} answered`, current.identical ? `; ${current.identical} with identical responses are left out` : "");
  const alert = el("p", { class: "problem", role: "alert" });
  const undo = current.answered ? el("button", { type: "button", onclick: back }, "Take the last vote back (u)") : null;
  if (current.number === null) {
    return [progress, alert, el("p", {}, "That was the last. ", link(["runs", run, "votes"], {}, "See what the votes say"), ". "), undo];
  }
  const sides = [["first", "1"], ["second", "2"]];
  return [
    progress,
    alert,
    el("h2", {}, "Prompt"),
    longText(current.prompt || "(empty)", { class: "prompt" }),
    el("div", { class: "sides" }, sides.map(([side, key]) => el("section", { "aria-label": `${side} response` }, el("h2", {}, side === "first" ? "First response" : "Second response"), longText(current[side] || "(empty)"), el("button", { type: "button", class: "choice", onclick: () => choose(side) }, `The ${side} is better (${key})`)))),
    el("p", { class: "choices" }, el("button", { type: "button", onclick: () => choose("tie") }, "A tie (0)"), el("button", { type: "button", onclick: () => choose("skip") }, "Skip (s)"), undo),
    el("label", {}, el("span", {}, "a note on this vote"), el("textarea", { rows: 2, maxlength: 4000 })),
  ];
}

function whoForm(page) {
  const name = el("input", { name: "voter", required: true, pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]{0,63}", value: remembered(), title: "letters, digits, '.', '_' and '-'" });
  const seed = el("input", { name: "seed", inputmode: "numeric", pattern: "[0-9]{1,9}", value: "0" });
  const two = el("select", {}, page.overview.comparisons.map(([model, baseline], place) => el("option", { value: place }, `${model} and ${baseline}`)));
  const begin = (event) => {
    event.preventDefault();
    remember(name.value);
    const [model, baseline] = page.overview.comparisons[Number(two.value)];
    location.hash = address(["runs", page.run, "vote"], { voter: name.value, seed: seed.value || "0", model, baseline });
  };
  return el(
    "form",
    { class: "filters", onsubmit: begin },
    el("label", {}, el("span", {}, "your name"), name),
    el("label", {}, el("span", {}, "order (a number)"), seed),
    el("label", {}, el("span", {}, "models"), two),
    el("button", {}, "Begin, or go on"),
  );
}

function remembered() {
  try {
    return localStorage.getItem(KEPT) || "";
  } catch {
    return "";
  }
}

function remember(name) {
  try {
    localStorage.setItem(KEPT, name);
  } catch {
    // a browser that keeps nothing asks again
  }
}

export async function votesPage(page) {
  const { run, overview, parameters } = page;
  const title = el("h1", {}, `Votes on ${run}`);
  if (!overview.comparisons.length) return [title, el("p", {}, "There is nothing to vote on: refscore eval writes samples of two models.")];
  const asked = overview.comparisons.findIndex(([model, baseline]) => model === parameters.get("model") && baseline === parameters.get("baseline"));
  const pair = Math.max(0, asked);
  const [model, baseline] = overview.comparisons[pair];
  const others = overview.comparisons.map(([one, other], place) => [String(place), `${one} against ${other}`]);
  const found = await get(`runs/${encodeURIComponent(run)}/votes/${pair}.json`, `${overview.votes} ${overview.versions.samples} ${overview.versions.judgements}`);
  const begin = isFolder ? null : el("p", {}, link(["runs", run, "vote"], { model, baseline }, "Vote, or go on voting"));
  const models = others.length > 1 ? el("div", { class: "filters" }, choice("models", String(pair), others, (place) => (location.hash = page.with({ model: overview.comparisons[place][0], baseline: overview.comparisons[place][1] })))) : null;
  return [title, models, begin, found.voters.length ? figures(found) : el("p", {}, "Nobody has voted yet.")];
}

function figures({ model, baseline, people, human, voters, judges, between, prompts }) {
  const agreement = (row) => [String(row.comparisons), interval(row.same), interval(row.decided), interval(row.kappa)];
  const head = ["common", "same verdict (95 %)", "where both decide", "kappa"];
  const numbers = new Set([1]);
  const topics = judges.flatMap((row) => Object.entries(row.topics).map(([topic, found]) => [breakable(row.judge), topic || "(none)", ...agreement(found)]));
  const votesOf = (one) => [one.votes, one.wins, one.losses, one.ties, one.skips].map(String);
  return [
    human ? el("p", { class: "verdict" }, `${model} wins ${interval(human.rate)} of ${human.prompts} prompts by people's votes, ties half.`) : el("p", {}, "No vote but skips yet."),
    people ? el("p", {}, `${people.voters} ${people.voters === 1 ? "person" : "people"} voted on ${people.comparisons} of ${people.of_comparisons} comparisons, of ${people.prompts} of ${prompts} prompts.`, people.ignored ? ` ${people.ignored} votes are on other responses and count no more.` : "", " refscore eval takes the votes into its report as the judge human.") : null,
    judges.length ? table("Which automatic judge deserves trust: agreement with people, the lower end of kappa's interval first", ["judge", ...head], judges.map((row) => [breakable(row.judge), ...agreement(row)]), { numbers }) : null,
    topics.length ? table("By topic, if 20 comparisons or more are common", ["judge", "topic", ...head], topics, { numbers: new Set([2]) }) : null,
    between.length ? table("Between voters", ["voters", ...head], between.map((row) => [`${row.first} and ${row.second}`, ...agreement(row)]), { numbers }) : null,
    table(
      `Who voted; wins are those of ${model} against ${baseline}`,
      ["voter", "votes", "wins", "losses", "ties", "skips", "the first is better", "seconds per vote, median", "notes"],
      voters.map((one) => [one.voter, ...votesOf(one), interval(one.first_share), number(one.seconds, 0), String(one.notes)]),
      { numbers: new Set([1, 2, 3, 4, 5, 7, 8]) },
    ),
  ];
}
