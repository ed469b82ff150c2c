(function () {
  "use strict";
  const PAGE = 25;
  const MARKS = { lost: "▽", gained: "▲", other: "•" };
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.tasks.length) return;
  const at = (id) => document.getElementById(id);
  const [task, model, kind, search] = ["task", "model", "kind", "search"].map(at);
  let found = [];
  let page = 0;

  function add(parent, tag, text, name) {
    const made = parent.appendChild(document.createElement(tag));
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  }
  function written(value) {
    if (value === null || value === undefined) return "–";
    return Number.isInteger(value) ? String(value) : value.toFixed(4);
  }
  function short(text, most) {
    if (text === null) return "none";
    const line = text.replace(/\s+/g, " ").trim();
    return line.length > most ? line.slice(0, most) + "…" : line;
  }
  const current = () => data.tasks[task.value];
  const compared = () => current().changes[model.value];

  function fillModels() {
    const before = model.value;
    model.replaceChildren();
    current().changes.forEach((changes, place) => {
      if (changes) model.add(new Option(data.models[place], place));
    });
    if ([...model.options].some((option) => option.value === before)) model.value = before;
  }
  function fillKinds() {
    const before = kind.value;
    const changes = compared();
    const total = Object.values(changes).reduce((sum, list) => sum + list.length, 0);
    kind.replaceChildren(new Option(`all changed items (${total})`, ""));
    for (const [name, text] of Object.entries(current().names)) {
      kind.add(new Option(`${text} (${changes[name].length})`, name));
    }
    kind.value = before;
  }
  // Lower case of all that is searched, made when it is first needed.
  function haystack(item) {
    if (item.words === undefined) {
      const replies = item.replies.map((reply) => reply && [reply[0], reply[1], reply[3]].join("\n"));
      item.words = [item.id, item.prompt, item.target, ...replies].join("\n").toLowerCase();
    }
    return item.words;
  }
  function find() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kinds = kind.value ? [kind.value] : Object.keys(current().names);
    found = [];
    for (const name of kinds) {
      for (const place of compared()[name]) {
        const item = current().items[place];
        if (words.every((word) => haystack(item).includes(word))) found.push([name, item]);
      }
    }
    page = 0;
    show();
  }
  function show() {
    const begin = page * PAGE;
    const end = Math.min(begin + PAGE, found.length);
    at("shown").textContent = found.length
      ? `Items ${begin + 1} to ${end} of ${found.length}. Open an item to see its prompt and replies.`
      : "No items match.";
    at("items").replaceChildren(...found.slice(begin, end).map(([name, item]) => line(name, item)));
    document.querySelector(".pager").hidden = found.length <= PAGE;
    at("before").disabled = page === 0;
    at("after").disabled = end >= found.length;
    at("prefix").hidden = !current().prefix;
    at("prefix").querySelector("pre").textContent = current().prefix;
  }
  function line(name, item) {
    const made = document.createElement("details");
    const summary = add(made, "summary");
    const [old, now] = [item.replies[0], item.replies[model.value]];
    const mark = add(summary, "span", MARKS[name], "mark");
    mark.title = current().names[name];
    mark.setAttribute("aria-label", current().names[name]);
    mark.setAttribute("role", "img");
    add(summary, "span", item.id, "id");
    add(summary, "span", short(item.prompt, 160), "start");
    const exact = current().exact;
    const said = (reply) => (exact ? short(reply[1], 24) : written(reply[2][current().main]));
    const target = exact && item.target !== null ? ` (target ${short(item.target, 24)})` : "";
    add(summary, "span", `${said(old)} → ${said(now)}${target}`, "step");
    const pair = [old, now].map((reply, place) => [place ? model.value : 0, reply]);
    made.addEventListener("toggle", () => {
      if (made.open && made.childElementCount === 1) body(made, item, pair);
    });
    return made;
  }
  function titled(parent, strong, rest, text) {
    const title = add(parent, "h4");
    add(title, "b", strong);
    title.append(rest);
    add(parent, "pre", text === null ? "none" : text);
  }
  function body(made, item, pair) {
    const parent = add(made, "div", undefined, "body");
    const other = pair[1][1][3];
    titled(parent, other === null ? "prompt" : `prompt of ${data.models[0]}`, "", item.prompt);
    if (other !== null) titled(parent, `prompt of ${data.models[pair[1][0]]}`, "", other);
    if (item.target !== null) titled(parent, "target", "", item.target);
    const both = add(parent, "div", undefined, "both");
    for (const [place, [reply, answer, scores]] of pair) {
      const side = add(both, "div");
      const marks = current().metrics.map((metric, m) => `${metric} ${written(scores[m])}`);
      const read = answer === null ? "no parsed answer" : `parsed answer: ${short(answer, 80)}`;
      titled(side, data.models[place], `: ${marks.join(", ")}; ${read}`, reply);
    }
  }
  function turn(by) {
    page += by;
    show();
    at("changes").scrollIntoView();
  }
  function choose() {
    fillModels();
    fillKinds();
    find();
  }

  data.tasks.forEach((each, place) => task.add(new Option(each.name, place)));
  task.addEventListener("change", choose);
  model.addEventListener("change", () => { fillKinds(); find(); });
  kind.addEventListener("change", find);
  let waiting;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(find, 120);
  });
  at("before").addEventListener("click", () => turn(-1));
  at("after").addEventListener("click", () => turn(1));
  for (const link of document.querySelectorAll("a[data-kind]")) {
    link.addEventListener("click", () => {
      task.value = link.dataset.task;
      fillModels();
      model.value = link.dataset.model;
      fillKinds();
      kind.value = link.dataset.kind;
      search.value = "";
      find();
    });
  }
  choose();
})();
