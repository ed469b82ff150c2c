(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const first = document.getElementById("first");
  const second = document.getElementById("second");
  const body = document.querySelector("#pairs tbody");

  function written(value) {
    if (value !== 0 && Math.abs(value) < 5e-5) return value.toExponential(1);
    return Math.abs(value) < 100 ? value.toFixed(4) : value.toPrecision(4);
  }
  function cell(row, text, kind) {
    const made = row.appendChild(document.createElement(kind || "td"));
    made.textContent = text;
    if (kind) made.scope = "row";
    else made.className = "num";
  }
  function show() {
    const a = first.value;
    const b = second.value;
    const verdict = data.verdicts[a + "\n" + b];
    document.getElementById("verdict").textContent = verdict || "Choose two different methods.";
    document.getElementById("name-first").textContent = a;
    document.getElementById("name-second").textContent = b;
    body.replaceChildren();
    for (const seed of Object.keys(data.scores[a])) {
      if (a === b || !(seed in data.scores[b])) continue;
      const row = body.appendChild(document.createElement("tr"));
      const difference = data.scores[a][seed] - data.scores[b][seed];
      const sign = difference < 0 ? "−" : "+";
      cell(row, seed, "th");
      cell(row, written(data.scores[a][seed]));
      cell(row, written(data.scores[b][seed]));
      cell(row, sign + written(Math.abs(difference)));
    }
  }
  if (data.methods.length < 2) {
    document.querySelector(".selectors").hidden = true;
    document.getElementById("pairs").hidden = true;
    document.getElementById("verdict").textContent = "Fewer than two methods have final runs.";
    return;
  }
  for (const label of data.methods) {
    first.add(new Option(label, label));
    second.add(new Option(label, label));
  }
  second.selectedIndex = 1;
  first.addEventListener("change", show);
  second.addEventListener("change", show);
  show();
})();
