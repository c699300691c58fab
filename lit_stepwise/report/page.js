// ---- which trajectories

const phaseName = (each) => (each.stage === "train" ? `iteration ${each.iteration}` : each.stage === "evaluate" ? `evaluation, step ${each.step}` : "play");
const outcomeOf = (each) => (each.stop === "failed" ? "failed" : each.success ? "solved" : "not solved");
const mark = (each) => ({ solved: "✓", "not solved": "✗", failed: "!" })[outcomeOf(each)];
const COLUMNS = [
  ...(data.runs.length > 1 ? [{ name: "Run", of: (each) => letter(each.run) }] : []),
  { name: "Phase", of: phaseName, by: (each) => each.phase },
  { name: "Task", of: (each) => each.task },
  { name: "Attempt", of: (each) => each.sample, minor: true, right: true },
  { name: "Turns", of: (each) => each.num_turns, right: true },
  { name: "Tokens", of: (each) => each.tokens, minor: true, right: true },
  { name: "Reward", of: (each) => number(each.reward), by: (each) => each.reward, right: true },
  { name: "Advantage", of: (each) => (each.advantage === null ? "" : signed(each.advantage)), by: (each) => each.advantage ?? -Infinity, minor: true, right: true },
  { name: "Solved", of: (each) => mark(each), by: (each) => Number(each.success) },
];
const WIDE = 1080; // from here on list and reader stand beside each other, as page.css has it
const STEP = window.innerWidth < WIDE ? 20 : 100;
const state = { found: [], sort: null, falling: false, most: STEP, open: -1, wanted: "advantage", color: "none" };

const words = (index) => {
  const each = data.trajectories[index];
  each.words ??= [each.task, phaseName(each), each.failure, data.prompts[each.prompt] ?? "", ...each.turns.flatMap((turn) => [turn.response, turn.observation, turn.sql, turn.status])].join("\n").toLowerCase();
  return each.words;
};

function setFilters() {
  const all = data.trajectories;
  const once = (values) => [...new Set(values)];
  const options = (id, pairs) => byId(id).replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
  const phases = once(all.map((each) => each.phase)).sort().map((phase) => all.find((each) => each.phase === phase));
  const stages = [["train", "all of training"], ["evaluate", "all of evaluation"]].filter(([stage]) => phases.filter((each) => each.stage === stage).length > 1);
  options("run", [["", "both"], ...data.runs.map((run, i) => [i, `${run.letter}: ${run.name}`])]);
  options("phase", [["", "all"], ...stages, ...phases.map((each) => [each.phase, phaseName(each)])]);
  options("task", [["", "all"], ...once(all.map((each) => each.task)).sort().map((task) => [task, task])]);
  options("outcome", [["", "all"], ...once(all.map(outcomeOf)).sort().map((outcome) => [outcome, outcome])]);
  for (const label of document.querySelectorAll("[data-many]")) label.hidden = byId(label.dataset.many).options.length < 3;
}

function filter() {
  const [run, phase, task, outcome, search] = ["run", "phase", "task", "outcome", "search"].map((id) => byId(id).value);
  const wanted = search.toLowerCase().split(/\s+/).filter(Boolean);
  state.found = data.trajectories.map((_, i) => i).filter((i) => {
    const each = data.trajectories[i];
    return (!run || each.run === Number(run)) && (!phase || each.phase === phase || each.stage === phase) && (!task || each.task === task)
      && (!outcome || outcomeOf(each) === outcome) && wanted.every((word) => words(i).includes(word));
  });
  const by = state.sort && (state.sort.by ?? state.sort.of);
  if (by) {
    const keys = state.found.map((i) => [by(data.trajectories[i]), i]);
    keys.sort(([a, i], [b, j]) => (a < b ? -1 : a > b ? 1 : 0) * (state.falling ? -1 : 1) || i - j);
    state.found = keys.map(([, i]) => i);
  }
  state.most = STEP;
  list();
}

function list() {
  byId("columns").replaceChildren(...COLUMNS.map((column) => make("th", { scope: "col", class: look(column), "aria-sort": state.sort === column ? (state.falling ? "descending" : "ascending") : null },
    make("button", { type: "button", onclick: () => sortBy(column) }, column.name + (state.sort === column ? (state.falling ? " ↓" : " ↑") : "")))));
  byId("rows").replaceChildren(...state.found.slice(0, state.most).map(row));
  byId("count").textContent = `${state.found.length.toLocaleString("en")} of ${data.trajectories.length.toLocaleString("en")} trajectories`;
  byId("more").hidden = state.found.length <= state.most;
}
const look = (column) => [column.minor && "minor", column.right && "number"].filter(Boolean).join(" ") || null;

function sortBy(column) {
  [state.falling, state.sort] = [state.sort === column ? !state.falling : false, column];
  filter();
  [...byId("columns").children][COLUMNS.indexOf(column)].firstChild.focus();
}

function row(index) {
  const each = data.trajectories[index];
  const cells = COLUMNS.map((column) => {
    const text = visible(String(column.of(each)));
    const isSolved = column.name === "Solved";
    const content = column.name === "Task" ? make("button", { type: "button" }, ...text) : isSolved ? make("span", { role: "img", "aria-label": outcomeOf(each) }, ...text) : text;
    return make("td", { class: isSolved ? (each.success ? "good" : "bad") : look(column) }, content);
  });
  return make("tr", { "data-index": index, "aria-selected": index === state.open ? "true" : null, onclick: () => go(index) }, ...cells);
}

// ---- reading one

const go = (index) => { if (location.hash === `#trajectory-${index}`) open(); else location.hash = `trajectory-${index}`; };

function open() {
  const match = /^#trajectory-(\d+)$/.exec(location.hash);
  if (!match || !data.trajectories[match[1]]) return;
  state.open = Number(match[1]);
  for (const each of byId("rows").children) each.toggleAttribute("aria-selected", false);
  byId("rows").querySelector(`[data-index="${state.open}"]`)?.setAttribute("aria-selected", "true");
  read(state.open);
  byId("reader").scrollTop = 0;
  byId("reader").scrollIntoView({ block: "nearest" });
  if (window.innerWidth < WIDE) byId("reader").scrollIntoView();
  byId("reader").focus({ preventScroll: true });
}

const COLORS = {
  none: { label: "none", has: () => true },
  advantage: { label: "advantage", has: (turn) => turn.advantage !== undefined, of: (turn, i) => turn.advantages?.[i] ?? turn.advantage ?? null },
  drift: { label: "drift from the trainer", has: (turn) => turn.drifts || turn.gap !== undefined, of: (turn, i) => (i === undefined ? turn.gap ?? null : turn.drifts?.[i] ?? null) },
  doubt: { label: "probability", has: (turn) => turn.logprobs, of: (turn, i) => turn.logprobs?.[i] ?? null },
};
const widest = data.runs.map((_, run) => Math.max(1e-9, ...data.trajectories.filter((each) => each.run === run).flatMap((each) => each.turns).flatMap((turn) => [Math.abs(turn.advantage ?? 0), ...(turn.advantages ?? []).map(Math.abs)])));

// A value's colour: which, and how much of it from 0 to 1.
function shade(mode, value, run) {
  if (value === null || mode === "none") return "";
  const paint = (name, share) => (share > 0.01 ? `rgba(var(--${name}), ${(0.07 + Math.min(share, 1) * 0.45).toFixed(3)})` : "");
  if (mode === "advantage") return paint(value >= 0 ? "plus" : "minus", Math.abs(value) / widest[run]);
  if (mode === "drift") return paint("drift", (Math.log10(Math.max(Math.abs(value), 1e-12)) + 3) / 3);
  return paint("doubt", 1 - Math.exp(value));
}

function scale(mode, run) {
  const ramps = {
    advantage: ["worse than its group " + signed(-widest[run]), [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1].map((each) => each * widest[run]), signed(widest[run]) + " better"],
    drift: ["0.001 nats or less", [-3, -2.5, -2, -1.5, -1, -0.5, 0].map((each) => 10 ** each), "1 nat or more, by logarithm"],
    doubt: ["the engine gave the token 100\u00a0%", [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0].map(Math.log), "0\u00a0%"],
  };
  if (!ramps[mode]) return [];
  const [low, values, high] = ramps[mode];
  const cells = values.map((value) => { const cell = make("i"); cell.style.backgroundColor = shade(mode, value, run); return cell; });
  return [make("span", {}, low), make("span", { class: "ramp", "aria-hidden": "true" }, ...cells), make("span", {}, high)];
}

function read(index) {
  const each = data.trajectories[index];
  const turns = each.turns.map((turn, i) => turnOf(each, turn, i));
  const position = state.found.indexOf(index);
  const step = (by, text) => make("button", { type: "button", disabled: position < 0 || state.found[position + by] === undefined, onclick: () => go(state.found[position + by]) }, text);
  const facts = [
    make("li", { class: each.success ? "good" : "bad" }, `${mark(each)} ${outcomeOf(each)}`), make("li", {}, `reward ${number(each.reward)}`), make("li", {}, `ended: ${each.stop.replace("_", " ")}`),
    make("li", {}, each.temperature === 0 ? "greedy" : `temperature ${each.temperature}`), make("li", {}, `weights of step ${each.step}`), make("li", {}, make("code", {}, `${each.phase}/${each.group}/${each.sample}`)),
    each.left_out ? make("li", { class: "bad" }, `not trained: ${each.left_out}`) : null,
    each.failure ? make("li", { class: "bad" }, ...visible(each.failure)) : null,
  ];
  byId("reader").replaceChildren(
    make("header", {}, make("h3", {}, ...visible(each.task)), make("span", { class: "note" }, [letter(each.run) && `run ${letter(each.run)}`, phaseName(each), `attempt ${each.sample}`].filter(Boolean).join(" · ")),
      make("span", { class: "steps" }, make("button", { type: "button", class: "back", onclick: () => byId("trajectories").scrollIntoView() }, "List"), step(-1, "Previous"), step(1, "Next"))),
    make("ul", { class: "chips" }, ...facts), ...siblings(each, index), ...choices(each, turns),
    ...(!data.prompts[each.prompt] ? [] : [make("details", { class: "prompt", open: true }, make("summary", {}, "First prompt"), make("div", { class: "said" }, make("pre", { dir: "auto" }, ...visible(data.prompts[each.prompt]))))]),
    ...turns.map(({ element }) => element));
  byId("readout").hidden = true;
  for (const turn of turns) turn.paint();
}

// The attempts at the same task in the same phase that are in this file.
function siblings(each, index) {
  const group = data.trajectories.map((other, i) => [other, i]).filter(([other]) => other.run === each.run && other.phase === each.phase && other.group === each.group);
  if (group.length < 2) return [];
  group.sort(([a], [b]) => a.sample - b.sample);
  const buttons = group.map(([other, i]) => make("button", { type: "button", "aria-current": i === index ? "true" : null, onclick: () => go(i) }, `${other.sample} ${mark(other)} ${number(other.reward)}`));
  return [make("div", { class: "attempts", role: "group", "aria-label": "attempts at this task" }, make("span", { class: "note" }, "Attempts"), ...buttons)];
}

function choices(each, turns) {
  const usable = Object.keys(COLORS).filter((mode) => each.turns.some((turn) => COLORS[mode].has(turn)));
  state.color = [state.wanted, "doubt", "none"].find((mode) => usable.includes(mode));
  const legend = make("div", { class: "scale" }, ...scale(state.color, each.run));
  const choose = (mode) => { state.wanted = state.color = mode; legend.replaceChildren(...scale(mode, each.run)); for (const turn of turns) turn.paint(); };
  const radios = Object.entries(COLORS).map(([mode, { label }]) => make("label", {},
    make("input", { type: "radio", name: "color", value: mode, checked: state.color === mode, disabled: !usable.includes(mode), onchange: () => choose(mode) }), label));
  const why = each.turns.some((turn) => turn.pieces) ? null : make("p", { class: "note" }, "Whole turns are coloured: ", data.runs[each.run].no_tokens || "token ids were not stored", ".");
  return [make("fieldset", {}, make("legend", {}, "Colour responses by"), ...radios, legend, why)];
}

function turnOf(each, turn, position) {
  const text = make("pre", { dir: "auto" });
  const spans = (turn.pieces ?? []).map((piece, i) => make("span", { class: "token", "data-i": i }, ...visible(data.pieces[piece])));
  if (spans.length) tokensIn(text, turn, spans, position); else text.append(...visible(turn.response ?? ""));
  const cut = spans.length && spans.length < turn.tokens ? make("p", { class: "note" }, `The report leaves out ${(turn.tokens - spans.length).toLocaleString("en")} more tokens.`) : null;
  const rewards = Object.entries(turn.rewards).map(([name, value]) => make("li", {}, ...visible(name), " ", signed(value)));
  const chips = [
    turn.reward !== undefined && `reward ${signed(turn.reward)}`, turn.return !== undefined && `return ${signed(turn.return)}`, turn.advantage !== undefined && `advantage ${signed(turn.advantage)}`,
    `${number(turn.tokens)} tokens after ${number(turn.prompt_tokens)}`, turn.gap !== undefined && `drift ${number(turn.gap)}, at most ${number(turn.gap_max)}`,
    `engine ${seconds(turn.seconds[0] ?? 0)}, environment ${seconds(turn.seconds[1] ?? 0)}`, turn.finish === "length" && "cut: out of tokens", turn.format_error && "no readable action",
  ].filter(Boolean).map((chip) => make("li", { class: /^(cut|no read)/.test(chip) ? "bad" : null }, chip));
  const status = turn.status ? make("span", { class: turn.status === "ok" ? "good" : "bad" }, turn.status) : null;
  const details = Object.entries(turn.details).filter(([name]) => name !== "action").map(([name, value]) => make("li", {}, ...visible(name), " ", ...visible(value)));
  const element = make("section", { class: "turn", "aria-label": `turn ${position}` }, make("h4", {}, `Turn ${position}`), make("ul", { class: "chips" }, ...rewards, ...chips),
    make("div", { class: "said model" }, make("span", { class: "who" }, "response"), text, cut),
    turn.sql ? make("div", { class: "said" }, make("span", { class: "who" }, "statement ", status), make("pre", { dir: "auto" }, ...visible(turn.sql)), details.length ? make("ul", { class: "chips" }, ...details) : null) : null,
    turn.observation ? make("div", { class: "said" }, make("span", { class: "who" }, "observation"), make("pre", { dir: "auto" }, ...visible(turn.observation))) : null);
  const paint = () => {
    const { of } = COLORS[state.color];
    text.style.backgroundColor = spans.length || !of ? "" : shade(state.color, of(turn), each.run);
    spans.forEach((span, i) => { span.style.backgroundColor = of ? shade(state.color, of(turn, i), each.run) : ""; });
  };
  return { element, paint };
}

// Tokens under the pointer, a finger or the arrow keys say their numbers at the foot of the page.
function tokensIn(text, turn, spans, position) {
  let at = -1;
  const point = (i) => {
    spans[at]?.classList.remove("current");
    at = i;
    spans[at]?.classList.add("current");
    readout(turn, at);
  };
  const under = (event) => { const span = event.target.closest(".token"); if (span) point(Number(span.dataset.i)); };
  fill(text, { tabindex: 0, role: "group", "aria-label": `response of turn ${position}, ${spans.length} tokens; arrow keys go through them`, onpointerover: under, onclick: under,
    ...walked(point, () => at, spans.length, () => spans[at].scrollIntoView({ block: "nearest" })) }, spans);
}

function readout(turn, i) {
  byId("readout").hidden = i < 0;
  if (i < 0) return;
  const [logprob, drift, advantage] = [turn.logprobs?.[i] ?? null, turn.drifts?.[i] ?? null, turn.advantages?.[i] ?? turn.advantage ?? null];
  const parts = [
    `token ${i + 1} of ${turn.tokens}`,
    logprob === null ? null : `log-probability ${number(logprob)} (${percent(Math.exp(logprob))})`,
    logprob === null || drift === null ? null : `trainer ${number(logprob - drift)}, drift ${number(Math.abs(drift))} nats`,
    advantage === null ? null : `advantage ${signed(advantage)}`,
  ].filter((part) => part !== null);
  const text = data.pieces[turn.pieces[i]].replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  byId("readout").replaceChildren(make("code", {}, ...(text ? visible(text) : ["part of a character"])), ...parts.map((part) => make("span", {}, part)));
}

// ---- tasks that changed

function changes(run, index) {
  const { steps, counts, rows, left_out } = run.tasks;
  if (steps.length < 2) return [];
  const said = Object.entries(counts).map(([name, count]) => `${count.toLocaleString("en")} ${name}`).join(", ");
  const at = (task, step) => data.trajectories.findIndex((each) => each.run === index && each.stage === "evaluate" && each.task === task && each.step === step);
  const link = (task, step, text) => { const found = at(task, step); return found < 0 ? null : make("button", { type: "button", "aria-label": `${text} attempt at ${task}`, onclick: () => go(found) }, text); };
  const dot = (solved) => (solved === null ? "·" : solved === 1 ? "●" : solved === 0 ? "○" : "◐");
  const line = ({ task, gain, history }) => make("tr", {}, make("td", {}, ...visible(task)), make("td", { class: gain < 0 ? "bad" : "good" }, gain < 0 ? "worse" : "better"),
    make("td", { class: "history", "aria-label": history.map((solved) => (solved === null ? "not played" : percent(solved))).join(", ") }, history.map(dot).join("")),
    make("td", {}, link(task, steps[0], "first"), " ", link(task, steps[steps.length - 1], "last")));
  return [
    run.letter ? make("h3", {}, `${run.letter}: ${run.name}`) : null,
    make("p", { class: "counts" }, `From the evaluation at step ${steps[0]} to the one at step ${steps[steps.length - 1]}: ${said}. ● solved, ○ not, one sign an evaluation${left_out ? `; ${left_out} more are left out` : ""}.`),
    rows.length ? make("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "tasks that changed" }, make("table", {}, make("thead", {}, make("tr", {}, ...["Task", "Became", "Evaluations", "Read"].map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows.map(line)))) : null,
  ];
}

// ---- the page

function start() {
  const parts = [];
  const sections = [...new Set(data.charts.map((chart) => chart.section))];
  sections.forEach((name, i) => {
    byId("charts").append(make("section", { id: `part-${i}`, "aria-labelledby": `part-title-${i}` }, make("h2", { id: `part-title-${i}` }, name),
      make("div", { class: i ? "grid" : "grid first" }, ...data.charts.filter((chart) => chart.section === name).map(figure))));
    parts.push([`part-${i}`, name]);
  });
  const changed = data.runs.flatMap(changes).filter(Boolean);
  byId("changes").append(...changed);
  byId("tasks").hidden = !changed.length;
  if (changed.length) parts.push(["tasks", "Tasks that changed"]);
  parts.push(["trajectories", "Trajectories"]);
  byId("parts").append(...parts.map(([id, name]) => make("li", {}, make("a", { href: "#" + id }, name))));
  byId("left-out").textContent = data.runs.map((run) => `${run.letter ? run.letter + ": " : ""}${run.shown.toLocaleString("en")} of ${run.total.toLocaleString("en")} trajectories are in this file`
    + (run.shown < run.total ? ": the last evaluation as far as it fits, of the first the tasks that changed, and of the iterations the best, the worst and some at random" : "")).join(". ") + ". The charts are of all.";
  setFilters();
  filter();
  byId("filters").addEventListener("input", filter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(filter));
  byId("more").addEventListener("click", () => { state.most += STEP; list(); });
  window.addEventListener("hashchange", open);
  open();
}
start();
