"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const METHODS = ["influence", "neuron", "shapley", "replay"];
  const TITLES = {
    influence: "influence (effect of leaving the client out)",
    neuron: "neuron (the paper’s)",
    shapley: "Shapley values (the coalition truth)",
    replay: "replay (the whole run without the client)",
  };
  const MOST_THUMBS = 60;

  // Texts of others go in as text only; an isolate keeps their direction to themselves.
  const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
  const show = (text, most = 60) => {
    if (!String(text).trim()) return "(blank)";
    const letters = [...String(text).slice(0, 4 * most).replace(UNSEEN, "\ufffd")];
    return letters.length <= most ? letters.join("") : letters.slice(0, most - 1).join("") + "…";
  };
  const isolated = (text) => "\u2068" + show(text) + "\u2069";
  const element = (kind, attributes = {}, ...children) => {
    const made = document.createElement(kind);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null));
    return made;
  };
  const named = (text) => element("bdi", {}, show(text));
  const number = (value, sign = false) => {
    if (value === null || value === undefined) return "–";
    const large = Math.abs(value) >= 1000, small = value !== 0 && Math.abs(value) < 1e-4;
    const plain = small || Math.abs(value) >= 1e6 ? value.toExponential(2) : large ? value.toFixed(0) : value.toPrecision(3);
    return (sign && value > 0 ? "+" : "") + plain.replace(/^-/, "−");
  };
  const bar = (value, most) => {
    const drawn = document.createElementNS(SVG, "svg"), rect = document.createElementNS(SVG, "rect");
    const length = most > 0 ? (50 * Math.abs(value)) / most : 0;
    for (const [name, text] of [["class", "bar"], ["viewBox", "-50 0 100 8"], ["aria-hidden", "true"]]) drawn.setAttribute(name, text);
    const place = { class: value < 0 ? "minus" : "plus", x: value < 0 ? -length : 0, width: length, height: 8 };
    for (const [name, text] of Object.entries(place)) rect.setAttribute(name, text);
    drawn.append(rect);
    return drawn;
  };
  const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0);

  // Copying: the clipboard where it is allowed, else the text is selected.
  const copy = async (button) => {
    const code = button.parentElement.querySelector("code");
    const back = () => { button.textContent = "Copy"; };
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      const range = document.createRange();
      range.selectNodeContents(code);
      const selection = getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
    if (byId("status")) byId("status").textContent = button.textContent === "Copied" ? "The command is copied." : "The command is selected.";
    setTimeout(back, 2000);
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.copy");
    if (button) copy(button);
  });
  for (const part of document.querySelectorAll("[data-script]")) part.hidden = false;
  for (const part of document.querySelectorAll("[data-plain]")) part.hidden = true;
  const command = (text, label) => {
    const code = element("pre", { tabindex: "0", role: "region", "aria-label": label }, element("code", {}, text));
    return element("div", { class: "command" }, code, element("button", { type: "button", class: "copy" }, "Copy"));
  };

  if (!byId("choose")) return;
  const anyHeld = data.label_counts.some((counts) => counts !== null);
  const all = data.predictions;
  const rounds = [...new Set(all.map((one) => one.r))].sort((a, b) => a - b);
  const now = { r: rounds[rounds.length - 1], m: "influence", i: null };
  const rank = (method) => (METHODS.includes(method) ? METHODS.indexOf(method) : 9);
  const isWrong = (one) => one.p !== one.y;
  const className = (label) => isolated(data.classes[label]);

  const inRound = () => all.filter((one) => one.r === now.r);
  const choices = () => inRound().filter((one) => one.m === now.m && (!byId("wrong").checked || isWrong(one)));
  const fill = (select, options, chosen) => {
    select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
    select.value = String(chosen);
  };
  const told = (one) => "predicted " + className(one.p) + (isWrong(one) ? ", true class " + className(one.y) : "");

  const update = () => {
    const methods = [...new Set(inRound().map((one) => one.m))].sort((a, b) => rank(a) - rank(b));
    if (!methods.includes(now.m)) now.m = methods[0];
    const anyWrong = inRound().some((one) => one.m === now.m && isWrong(one));
    const anyRight = inRound().some((one) => one.m === now.m && !isWrong(one));
    byId("wrong-label").hidden = !(anyWrong && anyRight);
    if (byId("wrong-label").hidden) byId("wrong").checked = false;
    const some = choices();
    if (!some.some((one) => one.i === now.i)) now.i = some[0].i;
    fill(byId("round"), rounds.map((r) => [r, r]), now.r);
    fill(byId("method"), methods.map((m) => [m, TITLES[m] ?? m]), now.m);
    fill(byId("input"), some.map((one) => [one.i, one.i + " · " + told(one)]), now.i);
    const place = some.findIndex((one) => one.i === now.i);
    byId("previous").disabled = place === 0;
    byId("next").disabled = place === some.length - 1;
    thumbs(some);
    draw(some[place]);
  };
  const chosen = () => {
    update();
    try { history.replaceState(null, "", "#r=" + now.r + "&m=" + now.m + "&i=" + now.i); } catch { /* in a frame */ }
  };
  const choose = (input) => {
    now.i = input;
    chosen();
    const one = all.find((other) => other.r === now.r && other.m === now.m && other.i === now.i);
    byId("status").textContent = "Input " + one.i + ", " + told(one) + ". " + answer(one);
  };

  const thumbs = (some) => {
    const pictured = some.filter((one) => data.inputs[one.i]?.picture);
    const focused = document.activeElement?.dataset?.input;
    byId("thumbs").replaceChildren();
    if (pictured.length < 2 || pictured.length > MOST_THUMBS) return;
    for (const one of pictured) {
      const picture = element("img", { src: "data:image/png;base64," + data.inputs[one.i].picture, alt: "Input " + one.i + ", " + told(one), width: "36", height: "36" });
      const button = element("button", { type: "button", "aria-pressed": String(one.i === now.i), "data-input": one.i }, picture);
      if (isWrong(one)) button.className = "wrong";
      button.addEventListener("click", () => choose(one.i));
      byId("thumbs").append(button);
      if (focused === String(one.i)) button.focus();
    }
  };

  const answer = (one) => {
    const name = isolated(data.clients.client[one.c[0]]);
    if (one.k === 1) return "Client " + name + " alone took part.";
    if (!one.v.some(Boolean)) return data.words.no_difference + ".";
    const against = data.words.log_odds.includes(one.m) && one.v[0] < 0;
    const first = against ? "No client adds to this prediction; client " + name + " takes least from it" : "Client " + name + " contributes most";
    const others = one.set - 1;
    let told = ", and " + others + (others > 1 ? " others" : " other") + " cannot be told from it";
    if (others <= 0) told = others ? ", but nobody can be told apart from the others" : ", ahead of all others";
    return first + told + " (" + data.words.sure[one.e ? "errors" : "spread"] + ").";
  };
  const server = (one) => {
    if (one.s === undefined) return "";
    if (Math.abs(one.s) <= 1e-4 * largest(one.v) && !one.n) return " The server itself added next to nothing.";
    const more = Math.abs(one.s) > largest(one.v) ? ", more than any client" : "";
    return " The server itself added " + number(one.s, true) + more + (one.n ? ", of which its noise " + number(one.n, true) : "") + ".";
  };
  const boxed = (label, table) => element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": label }, table);
  const wideHead = (name) => element("th", { scope: "col", colspan: "2" }, name);

  const ranking = (one) => {
    const truth = one.m === "shapley" ? null : all.find((other) => other.r === one.r && other.i === one.i && other.m === "shapley");
    const most = largest(one.v);
    const titles = element("tr", {}, element("th", { scope: "col" }, "Client"), wideHead("Contribution"));
    if (one.e) titles.append(element("th", { scope: "col" }, "Standard error"));
    if (truth) titles.append(element("th", { scope: "col" }, "Coalition truth"));
    if (anyHeld) titles.append(element("th", { scope: "col" }, "Examples of ", named(data.classes[one.p])));
    titles.append(element("th", { scope: "col", class: "text" }, "Answer"));
    const rows = one.c.map((who, place) => {
      const row = element("tr", {}, element("th", { scope: "row" }, named(data.clients.client[who])));
      row.append(element("td", {}, number(one.v[place], true)), element("td", { class: "bars" }, bar(one.v[place] ?? 0, most)));
      if (one.e) row.append(element("td", {}, number(one.e[place])));
      if (truth) {
        const there = truth.c.indexOf(who);
        const error = there >= 0 && truth.e ? " ± " + number(truth.e[there]) : "";
        row.append(element("td", {}, there < 0 ? "–" : number(truth.v[there], true) + error));
      }
      if (anyHeld) row.append(element("td", {}, String(data.label_counts[who]?.[one.p] ?? "–")));
      row.append(element("td", { class: "text" }, one.in.includes(place) ? (place ? "in the answer" : "first") : "–"));
      return row;
    });
    const left = one.k - one.c.length;
    const meaning = data.words.meaning[one.m] ? ": " + data.words.meaning[one.m] : "";
    const rest = left > 0 ? " " + left + " others together: " + number(one.rest, true) + "." : "";
    const table = element("table", {}, element("caption", {}, "Clients by contribution" + meaning + ". " + rest), element("thead", {}, titles), element("tbody", {}, ...rows));
    return boxed("Clients by contribution", table);
  };
  const layers = (one) => {
    if (!one.l) return null;
    const most = largest(one.l.map(([, value]) => value));
    const rows = one.l.map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row" }, show(data.layers[name])), element("td", {}, number(value, true)), element("td", { class: "bars" }, bar(value ?? 0, most))));
    const left = one.lk - one.l.length;
    const caption = element("caption", {}, "Layers through which client ", named(data.clients.client[one.c[0]]), " contributes.");
    if (left > 0) caption.append(" " + left + " other layers together: " + number(one.lrest, true) + ".");
    const titles = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Layer"), wideHead("Contribution")));
    return boxed("Layers", element("table", {}, caption, titles, element("tbody", {}, ...rows)));
  };
  const again = (one) =>
    data.again.methods.includes(one.m) ? data.again.trace + " --round " + one.r + " --index " + one.i + " --method " + one.m : data.command;

  const draw = (one) => {
    const shown = data.inputs[one.i] ?? {};
    const seen = element("figure", { class: "seen" });
    if (shown.picture) seen.append(element("img", { src: "data:image/png;base64," + shown.picture, alt: "Input " + one.i + ", " + told(one), width: "176", height: "176" }));
    if (shown.text !== undefined) seen.append(element("blockquote", { dir: "auto" }, show(shown.text, 1300)));
    const heading = element("h3", { id: "prediction-head" }, "Input " + one.i + ", round " + one.r);
    const line = element("p", {}, "Predicted ", element("strong", {}, named(data.classes[one.p])), ", ");
    if (isWrong(one)) line.append(element("span", { class: "wrong-mark" }, "✗ wrong: true class ", named(data.classes[one.y])));
    else line.append("✓ which is the true class");
    line.append(".");
    const tables = element("div", { class: "tables" }, ranking(one), layers(one));
    const text = element("div", {}, heading, line, element("p", {}, answer(one) + server(one)), tables);
    if (again(one)) {
      const what = data.again.methods.includes(one.m) ? "This command gives the answer again:" : "The run’s command gives the answer again:";
      text.append(element("p", { class: "note" }, what), command(again(one), "The command of this answer"));
    }
    const panel = byId("prediction");
    panel.classList.toggle("texts", !shown.picture);
    panel.replaceChildren(...(seen.childNodes.length ? [seen] : []), text);
  };

  byId("choose").addEventListener("submit", (event) => event.preventDefault());
  byId("round").addEventListener("change", (event) => { now.r = Number(event.target.value); chosen(); });
  byId("method").addEventListener("change", (event) => { now.m = event.target.value; chosen(); });
  byId("input").addEventListener("change", (event) => choose(Number(event.target.value)));
  byId("wrong").addEventListener("change", chosen);
  const step = (by) => {
    const some = choices();
    choose(some[some.findIndex((one) => one.i === now.i) + by].i);
    if (byId("next").disabled) byId("previous").focus();
    else if (byId("previous").disabled) byId("next").focus();
  };
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  const fromAddress = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (!rounds.includes(Number(asked.get("r")))) return;
    now.r = Number(asked.get("r"));
    now.m = asked.get("m") ?? now.m;
    now.i = Number(asked.get("i"));
    byId("wrong").checked = false;
    update();
    byId("predictions").scrollIntoView();
  };
  addEventListener("hashchange", fromAddress);
  update();
  fromAddress();
})();
