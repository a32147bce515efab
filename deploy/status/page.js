// Shows one report. The file holds its data; the served page fetches it and shows it again whenever it changed.

const $ = (id) => document.getElementById(id);
const WORDS = {
  working: "● working", present: "● present", silent: "○ did not answer", lost: "✕ lost", refused: "✕ refused",
  replied: "replied", none: "did not answer",
};
let reports = [];
let clockSkew = 0; // the server's clock less ours, seconds
let live = false; // a page that a server gives; a saved one has no "ago"

const now = () => Date.now() / 1000 + clockSkew;
const moment = (at) => (at ? new Date(at * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : "–");
const ago = (at) => (at && live ? `${duration(Math.max(0, now() - at))} ago` : moment(at));
const LONG = 200; // characters: a longer text scrolls in its place, by keyboard too
const MARKS = ["first", "second", "third", "first dashed", "second dashed", "third dashed"];
const values = (points, key) => points.map((one) => one[key]).filter((value) => value !== null);

function take(data) {
  clockSkew = data.generated - Date.now() / 1000;
  reports = data.runs;
  const chosen = $("runs").value || decodeURIComponent(new URLSearchParams(location.hash.slice(1)).get("run") ?? "");
  $("runs").replaceChildren(...reports.map(({ run }) => html("option", { value: run.name }, `${run.name} · ${run.state}`)));
  if (reports.some(({ run }) => run.name === chosen)) $("runs").value = chosen;
  document.querySelector(".picker").hidden = reports.length < 2;
  compare();
  render();
}

function render() {
  const report = reports.find(({ run }) => run.name === $("runs").value) ?? reports[0];
  $("main").hidden = !report;
  if (!report) return;
  head(report);
  figures(report);
  curves(report);
  nodes(report);
  turns(report);
  costs(report);
  panel(report);
  answers(report);
  prints(report);
  notes(report);
}

function compare() {
  $("comparison").hidden = reports.length < 2;
  const choice = (name) => {
    const button = html("button", { type: "button", class: "quiet" }, name);
    button.addEventListener("click", () => { $("runs").value = name; render(); $("main").focus(); scrollTo(0, 0); });
    return html("th", { scope: "row" }, button);
  };
  const change = (found) => (found.length > 1 ? `${decimal(3)(found[0])} → ${decimal(3)(found.at(-1))}` : decimal(3)(found[0]));
  const shown = reports.slice(0, MARKS.length);
  lineChart($("overlay"), "Held-out loss of the runs, nats a token", reports.length < 2 ? [] : shown.map(({ run, evaluations }, i) => ({
    name: run.name, mark: MARKS[i], values: new Map(evaluations.filter(({ loss }) => loss !== null).map(({ round, loss }) => [round, loss])),
  })));
  table(
    $("comparison").querySelector("table"),
    ["Run", "Method", "State", "Rounds", "Held-out loss", "Training loss", "Rouge-L", "Sent by nodes", "Received", "Time"],
    reports.map(({ run, rounds, evaluations, totals }) => [
      choice(run.name), run.method, run.state, `${run.round} of ${run.rounds}`, change(values(evaluations, "loss")),
      change(values(rounds, "train_loss")), change(values(evaluations, "rouge_l")), bytes(totals.bytes_up), bytes(totals.bytes_down),
      duration(run.seconds),
    ]),
  );
}

function head({ run }) {
  document.title = `${run.state === "running" ? `${run.round}/${run.rounds} ` : ""}${run.name} – FedTune`;
  $("title").textContent = run.name;
  const restarts = run.restarts ? `, resumed ${run.restarts === 1 ? "once" : `${run.restarts} times`}` : "";
  $("subtitle").textContent = `${run.method} on ${run.model}, started ${moment(run.started)}${restarts}, FedTune ${run.version}`;
  const state = { running: "▶ running", finished: "✓ finished", failed: "✕ failed", stopped: "■ stopped", unreadable: "✕ cannot be read" }[run.state] ?? run.state;
  if ($("state").textContent !== state) $("state").textContent = state;
  $("state").dataset.state = run.state;
  $("progress").max = run.rounds || 1;
  $("progress").value = run.round;
  const left = run.seconds_left !== null ? `, about ${duration(run.seconds_left)} left` : "";
  $("place").textContent = `Round ${run.round} of ${run.rounds}${run.phase ? `: ${run.phase}` : ""}${left}; newest record ${ago(run.updated)}${run.kept === null ? "" : `; kept: round ${run.kept}`}`;
  $("message").textContent = run.message + (run.exit_code ? ` (exit code ${run.exit_code})` : "");
  $("message").hidden = !run.message;
  $("settings").parentElement.hidden = !Object.keys(run.settings).length;
  $("settings").replaceChildren(
    ...Object.entries(run.settings).flatMap(([key, value]) => [html("dt", {}, html("code", {}, key)), html("dd", {}, String(value))]),
  );
}

function figures({ run, totals, evaluations, rounds }) {
  const change = (key, digits) => {
    const values = evaluations.map((one) => one[key]).filter((value) => value !== null);
    if (values.length === 0) return null;
    const last = values.at(-1).toFixed(digits);
    return [last, values.length > 1 ? `from ${values[0].toFixed(digits)}` : "before tuning"];
  };
  const trained = rounds.map((one) => one.train_loss).filter((value) => value !== null);
  const shown = [
    ["Held-out loss", change("loss", 3)],
    ["Held-out perplexity", change("perplexity", 2)],
    ["Rouge-L", change("rouge_l", 3)],
    ["Training loss", trained.length ? [trained.at(-1).toFixed(3), `from ${trained[0].toFixed(3)}`] : null],
    ["Nodes", [`${totals.nodes_alive} of ${totals.nodes}`, run.state === "running" ? "alive" : "alive at the end"]],
    ["Sent by the nodes", [bytes(totals.bytes_up), `${bytes(totals.bytes_down)} to them`]],
    ["Replies", [String(totals.replies), `${totals.refused} refused`]],
    ["Time", [duration(run.seconds), `${bytes(totals.peak_memory)} at most on a node`]],
  ];
  $("figures").replaceChildren(
    ...shown.filter(([, values]) => values).map(([name, values]) =>
      html("div", {}, html("dt", {}, name), ...values.map((value) => html("dd", {}, value)))),
  );
}

function curves({ rounds, evaluations }) {
  const over = (points, key) => new Map(points.filter((one) => one[key] !== null).map((one) => [one.round, one[key]]));
  lineChart($("loss"), "Loss, nats a token", [
    { name: "held-out", mark: "first", values: over(evaluations, "loss") },
    { name: "training", mark: "second dashed", values: over(rounds, "train_loss") },
  ]);
  const rouge = over(evaluations, "rouge_l");
  lineChart($("rouge"), "Rouge-L of held-out answers", [
    { name: "Rouge-L", mark: "third", values: rouge.size > 1 ? rouge : new Map() },
  ], { zero: true });
}

function nodes({ nodes: rows, run }) {
  const status = ({ state, step }) => html("td", { "data-status": state }, WORDS[state] + (step ? `, step ${step[0]} of ${step[1]}` : ""));
  table(
    $("nodes"),
    ["Node", run.state === "running" ? "Is" : "Was", "Last seen", "Examples", "Replies", "Refused", "Loss", "Sent", "Received",
      "Computing", "Peak memory", "By"],
    rows.map((node) => [
      node.name, status(node), ago(node.last_seen), String(node.examples), String(node.replies), String(node.refused),
      decimal(3)(node.loss), bytes(node.bytes_up), bytes(node.bytes_down), duration(node.seconds), bytes(node.peak_memory),
      node.way || "–",
    ]),
  );
}

function turns({ turns: all, run, nodes: rows }) {
  const rounds = [...new Set(all.map(({ round }) => round))];
  const names = rows.map(({ name }) => name).filter((name) => all.some(({ node }) => node === name));
  const blocks = all.some(({ block }) => block !== undefined);
  const title = blocks ? "Turns: which node trained which block" : "Who took part in which round";
  const found = new Map(all.map((turn) => [`${turn.round}/${turn.node}`, turn]));
  const words = (turn) => `${turn.block === undefined ? "" : `block ${turn.block}, `}${WORDS[turn.state].replace("● ", "")}`;
  const kinds = ["replied", "working", "none", "refused"].filter((kind) => all.some(({ state }) => state === kind));
  show($("turns"), title, rounds.length === 0 ? null : {
    stops: rounds.length,
    describe(at) {
      const turn = all.filter(({ round }) => round === rounds[at]);
      const states = turn.length > 4
        ? kinds.map((kind) => ["", WORDS[kind].replace("● ", ""), String(turn.filter(({ state }) => state === kind).length)])
        : turn.map((one) => ["", one.node, words(one)]);
      return [["", blocks ? "turn" : "round", String(rounds[at])], ...states];
    },
    headings: ["Round", "Node", ...(blocks ? ["Block"] : []), "Reply", "Loss", "Seconds"],
    rows: all.map((turn) => [
      String(turn.round), turn.node, ...(blocks ? [String(turn.block ?? "–")] : []), WORDS[turn.state].replace("● ", ""),
      decimal(3)(turn.loss), decimal(1)(turn.seconds),
    ]),
    draw(width) {
      const left = Math.min(width * 0.3, 14 + 7 * Math.max(...names.map((name) => Math.min(16, name.length))));
      const step = Math.max(4, (width - left) / rounds.length);
      const row = names.length > 30 ? 10 : 26, height = names.length * row + 24;
      const place = (i) => left + step * (i + 0.5);
      const drawn = [];
      names.forEach((name, y) => {
        if (row > 10 || y % 3 === 0) {
          drawn.push(svg("text", { x: left - 10, y: y * row + row / 2 + 4, "text-anchor": "end" }, short(name, 16)));
        }
        rounds.forEach((round, x) => {
          const turn = found.get(`${round}/${name}`);
          if (!turn) return;
          drawn.push(svg("rect", { class: `cell ${turn.state}`, x: left + x * step, y: y * row, width: step, height: row, rx: 5 }));
          const sign = { refused: "✕", none: "–" }[turn.state] ?? turn.block;
          if (sign !== undefined && step >= 16 && row > 10) {
            const on = ["replied", "refused"].includes(turn.state) ? "inside on" : "inside";
            drawn.push(svg("text", { class: on, x: place(x), y: y * row + row / 2 + 4 }, sign));
          }
        });
      });
      const stride = Math.max(1, Math.ceil(32 / step));
      rounds.forEach((round, i) => {
        if (i % stride === 0) drawn.push(svg("text", { x: place(i), y: height - 4, "text-anchor": "middle" }, String(round)));
      });
      return { nodes: drawn, height, ...upright(place, rounds.length, height) };
    },
  });
}

function costs({ nodes: rows, rounds }) {
  barChart($("bytes"), "Bytes of each node", rows
    .filter(({ replies }) => replies > 0)
    .sort((a, b) => b.bytes_up + b.bytes_down - a.bytes_up - a.bytes_down)
    .map(({ name, bytes_up: up, bytes_down: down }) => ({ name, values: [up, down] })),
  [{ name: "sent", mark: "fill-first" }, { name: "received", mark: "fill-second" }], bytes);
  columnChart($("phases"), "Seconds of a round", rounds.slice(-60).map(({ round, seconds }) => ({
    label: String(round), values: [seconds.waiting ?? 0, seconds.aggregation ?? 0, seconds.evaluation ?? 0],
  })), [
    { name: "until the last reply", mark: "fill-first" },
    { name: "aggregation", mark: "fill-second" },
    { name: "evaluation", mark: "fill-third" },
  ], duration, { tick: (y) => `${Number(y.toFixed(2))} s` });
}

// What the run's method shows beside what all methods show.
function panel({ panel: own }) {
  const columns = own?.columns.map(([label, height]) => ({ label, values: [height] })) ?? [];
  columnChart($("panel"), own?.title ?? "", columns, [{ name: own?.unit ?? "", mark: "fill-first" }], String,
    { of: own?.title, heading: own?.title });
  if (!own) return;
  const note = $("panel").querySelector(".note") ?? html("p", { class: "note" });
  note.textContent = own.note;
  $("panel").querySelector("figcaption").after(note);
}

function answers({ answers: all }) {
  $("answers").hidden = all.length === 0;
  const same = (answer, expected) => answer?.trim() === expected;
  $("answers").querySelector("ol").replaceChildren(...all.map(({ prompt, expected, before, after }) => {
    const line = (name, answer) => [
      html("dt", {}, name),
      html("dd", { class: `clamp${same(answer, expected) && name !== "Expected" ? " same" : ""}`, tabindex: answer?.length > LONG && 0 },
        answer === null ? "not answered yet" : `${answer.trim() || "(nothing)"}${same(answer, expected) && name !== "Expected" ? " ✓" : ""}`),
    ];
    return html("li", {}, html("p", { class: "clamp", tabindex: prompt.length > LONG && 0 }, prompt.trim()),
      html("dl", {}, ...line("Expected", expected), ...line("Before", before), ...line("After", after)));
  }));
}

function prints({ rounds, evaluations }) {
  const after = new Map(evaluations.map(({ round, fingerprint }) => [round, fingerprint]));
  const weights = (round) => html("td", { class: "mono" }, after.get(round) || "–");
  const rows = rounds.slice(-60).reverse().map(({ round, fingerprints, replies }) => [
    String(round),
    html("td", { class: "mono" }, fingerprints.join(", ") || "–"),
    html("td", { "data-status": fingerprints.length > 1 ? "differs" : "match" },
      fingerprints.length > 1 ? "✕ they differ" : replies ? `✓ ${plural(replies, "node")}` : "–"),
    weights(round),
  ]);
  if (after.has(0)) rows.push(["0", "–", "–", weights(0)]);
  table($("prints"), ["Round", "Weights that the nodes worked on", "Alike on", "Weights after it"], rows);
}

function notes({ notes: all }) {
  $("notes").hidden = all.length === 0;
  $("notes").querySelector("ol").replaceChildren(...all.map(({ time, round, node, kind, reason }) =>
    html("li", {}, html("span", { class: "note" }, `${moment(time)}${round ? `, round ${round}` : ""} · `),
      html("b", {}, `${node || "ledger"} ${kind}`), `: ${reason}`)));
}

// The served page

async function follow() {
  live = true;
  let token = new URLSearchParams(location.hash.slice(1)).get("token") ?? sessionStorage.getItem("token") ?? "";
  if (location.hash.includes("token=")) history.replaceState(null, "", location.pathname);
  let seen = "", pause = 3;
  $("access").addEventListener("submit", (event) => {
    event.preventDefault();
    token = $("token").value.trim();
    poll();
  });
  async function poll() {
    clearTimeout(follow.timer);
    try {
      const headers = { ...(token && { Authorization: `Bearer ${token}` }), ...(seen && { "If-None-Match": seen }) };
      const answer = await fetch("report.json", { headers, cache: "no-store", signal: AbortSignal.timeout(15000) });
      if (answer.status === 401) return refuse(token);
      if (answer.ok) {
        take(await answer.json());
        seen = answer.headers.get("ETag");
        if (token) sessionStorage.setItem("token", token);
        $("access").hidden = true;
      } else if (answer.status !== 304) throw new Error(answer.statusText);
      pause = 3;
      const waiting = answer.status !== 304 && reports.length === 0;
      $("link").textContent = waiting ? "No run yet: this page will show it" : "Live";
    } catch {
      pause = Math.min(60, pause * 2);
      $("link").textContent = "The server does not answer; trying again";
    }
    follow.timer = setTimeout(poll, pause * 1000);
  }
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(follow.timer) : poll()));
  poll();
  setInterval(() => reports.length > 0 && !document.hidden && render(), 30000);
}

function refuse(token) {
  $("main").hidden = true;
  $("access").hidden = false;
  $("denied").textContent = token ? "That token is not the one of this server." : "";
  $("link").textContent = "";
}

// Colours: as the system, or as chosen here

const THEMES = ["system", "light", "dark"];
function colours(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
  $("theme").title = $("theme").getAttribute("aria-label");
  $("theme").textContent = { system: "◐", light: "☀", dark: "☾" }[theme];
}
function remembered() {
  try { return localStorage.getItem("theme") ?? "system"; } catch { return "system"; }
}
let theme = THEMES.includes(remembered()) ? remembered() : "system";
colours(theme);
$("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  colours(theme);
  try { localStorage.setItem("theme", theme); } catch { /* a file without storage */ }
});
$("runs").addEventListener("change", render);

const data = JSON.parse($("data").textContent);
if (data) take(data);
else follow();
