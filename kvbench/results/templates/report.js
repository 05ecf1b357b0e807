"use strict";
(function () {
  const PAGE = 40; // samples that are listed at once
  const LONG = 800; // words of an answer that are compared one by one
  const get = (id) => document.getElementById(id);
  const data = JSON.parse(get("data").textContent);
  const state = new URLSearchParams();
  const controls = { budget: "f-budget", method: "f-method", category: "f-category", dataset: "f-dataset", arm: "f-arm" };
  let listed = PAGE;

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "class") element.className = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  const headsOf = (table) => Array.from(table.tHead.rows[table.tHead.rows.length - 1].cells);

  // ---- tables -------------------------------------------------------------------------------------------------------
  function filterRows() {
    const budget = state.get("budget"), method = state.get("method");
    for (const row of document.querySelectorAll("tr[data-method], .line[data-method]")) {
      const full = "full" in row.dataset;
      const wrongBudget = budget && "budget" in row.dataset && row.dataset.budget !== budget;
      const wrong = !full && ((method && row.dataset.method !== method) || wrongBudget);
      row.toggleAttribute("hidden", Boolean(wrong));
      if (row.tagName === "g") row.setAttribute("display", wrong ? "none" : "inline");
    }
    const category = state.get("category");
    for (const table of document.querySelectorAll(".heated")) {
      const wrong = (head) => Boolean(category) && "category" in head.dataset && head.dataset.category !== category;
      for (const group of table.querySelectorAll(".groups th")) group.hidden = wrong(group);
      headsOf(table).forEach((head, column) => {
        for (const row of table.rows) if (row.className !== "groups") row.cells[column].hidden = wrong(head);
      });
    }
  }

  function sortRows() {
    const [key, direction] = (state.get("sort") || "").split(/ (?=[^ ]*$)/);
    for (const table of document.querySelectorAll(".sortable")) {
      const heads = headsOf(table), body = table.tBodies[0];
      const column = heads.findIndex((head) => head.dataset.key === key);
      heads.forEach((head) => head.removeAttribute("aria-sort"));
      if (key && column >= 0) heads[column].setAttribute("aria-sort", direction === "down" ? "descending" : "ascending");
      const sign = direction === "down" ? -1 : 1;
      const value = (row) => {
        const cell = row.cells[column];
        if (!("v" in cell.dataset)) return cell.textContent;
        return cell.dataset.v === "" ? null : Number(cell.dataset.v);
      };
      const rows = Array.from(body.rows);
      rows.forEach((row, index) => { if (!row.dataset.order) row.dataset.order = index; });
      rows.sort((a, b) => {
        const byOrder = a.dataset.order - b.dataset.order;
        if (!key || column < 0) return byOrder;
        const x = value(a), y = value(b);
        if (x === null || y === null) return (x === null) - (y === null) || byOrder;
        return sign * (typeof x === "string" ? x.localeCompare(y) : x - y) || byOrder;
      });
      body.append(...rows);
    }
    get("f-sort").value = ["kl", "score", "arm"].includes(key) ? key : "";
  }

  function sortBy(key) {
    const first = key === "kl" || key === "arm" ? "up" : "down", other = first === "up" ? "down" : "up";
    if (!key) state.delete("sort");
    else state.set("sort", key + " " + (state.get("sort") === key + " " + first ? other : first));
    show();
  }

  // ---- samples ------------------------------------------------------------------------------------------------------
  const nameOf = (sample) => sample.slice(0, 3).join("/");
  const losers = (sample) => sample[6].filter((arm) => arm[3]).map((arm) => data.arms[arm[0]]);

  function wanted(sample) {
    const arm = state.get("arm"), dataset = state.get("dataset");
    if (dataset && sample[1] !== dataset) return false;
    if (arm && !sample[6].some((one) => data.arms[one[0]] === arm)) return false;
    if (!state.has("lost")) return true;
    return arm ? losers(sample).includes(arm) : losers(sample).length > 0;
  }

  function listSamples() {
    const found = data.samples.filter(wanted), open = state.get("sample");
    const shown = found.slice(0, listed);
    const opened = data.samples.find((sample) => nameOf(sample) === open);
    if (opened && !shown.includes(opened)) shown.unshift(opened);
    get("list").replaceChildren(...shown.map(entry));
    get("f-count").textContent = found.length + " of " + data.samples.length + " samples";
    get("more").hidden = found.length <= listed;
  }

  function entry(sample) {
    const n = losers(sample).length, name = nameOf(sample);
    const summary = make("summary", {}, make("span", { class: "id" }, sample[2]), make("span", { class: "tag" }, sample[1]),
      make("span", { class: "tag" }, "full " + sample[5]));
    if (n) summary.append(make("span", { class: "tag lost" }, n + " lost"));
    const details = make("details", { class: "sample" }, summary);
    const build = () => { if (details.children.length < 2) details.append(view(sample)); };
    if (state.get("sample") === name) { build(); details.open = true; }
    details.addEventListener("toggle", () => {
      if (details.open) {
        build();
        if (state.get("sample") !== name) { state.set("sample", name); state.delete("a"); state.delete("b"); remember(); }
      } else if (state.get("sample") === name) { state.delete("sample"); state.delete("a"); state.delete("b"); remember(); }
    });
    return details;
  }

  function view(sample) {
    const arms = sample[6].map((arm) => data.arms[arm[0]]), mine = state.get("sample") === nameOf(sample);
    const start = (key, other) => (mine && arms.includes(state.get(key)) ? state.get(key) : other);
    const full = arms.includes("full") ? "full" : arms[0];
    const picked = arms.includes(state.get("arm")) ? state.get("arm") : losers(sample)[0];
    let a = start("a", full), b = start("b", picked || arms.find((arm) => arm !== a) || a);
    const pair = make("div", { class: "pair" }), box = make("div");
    const choose = (key, chosen) => {
      const select = make("select", { "aria-label": key === "a" ? "left arm" : "right arm" });
      for (const arm of arms) select.append(make("option", {}, arm));
      select.value = chosen;
      select.addEventListener("change", () => set(key, select.value));
      return select;
    };
    const set = (key, arm) => {
      if (key === "a") a = arm; else b = arm;
      state.set("sample", nameOf(sample)); state.set("a", a); state.set("b", b);
      remember(); compare();
    };
    function compare() {
      const [one, two] = [a, b].map((arm) => sample[6][arms.indexOf(arm)]);
      const [left, right] = wordDiff(one[4], two[4]);
      const side = (key, arm, row, parts) => make("div", {}, choose(key, arm),
        make("p", { class: row[3] ? "facts lost" : "facts" }, "score " + row[1] + " · " + row[2]),
        make("pre", { tabindex: "0", "data-side": key }, ...parts));
      pair.replaceChildren(side("a", a, one, left), side("b", b, two, right));
    }
    compare();
    const prompt = sample[4] === null ? make("em", {}, "not kept in this run folder (prompts.jsonl)")
      : make("pre", { tabindex: "0" }, sample[4]);
    const gold = make("div", { class: "gold" }, make("strong", {}, "Gold answer: "), sample[3].length ? sample[3].join(" | ") : "none");
    const rows = sample[6].map((row) => {
      const button = make("button", { type: "button" }, "compare");
      button.addEventListener("click", () => set("b", data.arms[row[0]]));
      return make("tr", {}, make("th", { scope: "row" }, data.arms[row[0]]), make("td", { class: row[3] ? "lost" : "" }, row[1]),
        make("td", {}, button), make("td", {}, make("span", { class: "clip" }, row[4])));
    });
    const head = make("tr", {}, ...["arm", "score", "", "answer"].map((text) => make("th", { scope: "col" }, text)));
    const all = make("div", { class: "scroll" }, make("table", { class: "all" }, make("thead", {}, head), make("tbody", {}, ...rows)));
    box.append(make("details", {}, make("summary", {}, "Prompt"), prompt), gold, pair,
      make("details", {}, make("summary", {}, "All " + arms.length + " arms"), all));
    return box;
  }

  // Both texts in pieces; words outside their longest common subsequence are marked. Long texts: from the first on.
  function wordDiff(one, two) {
    const a = one.split(/(\s+)/), b = two.split(/(\s+)/);
    let start = 0, enda = a.length, endb = b.length;
    while (start < enda && start < endb && a[start] === b[start]) start += 1;
    while (enda > start && endb > start && a[enda - 1] === b[endb - 1]) { enda -= 1; endb -= 1; }
    const n = enda - start, m = endb - start, same = [new Set(), new Set()];
    if (n <= LONG && m <= LONG) {
      const length = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
      for (let i = n - 1; i >= 0; i -= 1)
        for (let j = m - 1; j >= 0; j -= 1)
          length[i][j] = a[start + i] === b[start + j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
      for (let i = 0, j = 0; i < n && j < m;) {
        if (a[start + i] === b[start + j]) { same[0].add(start + i); same[1].add(start + j); i += 1; j += 1; }
        else if (length[i + 1][j] >= length[i][j + 1]) i += 1;
        else j += 1;
      }
    }
    const marked = (words, end, known) => {
      const parts = [];
      let run = null;
      words.forEach((word, index) => {
        const differs = index >= start && index < end && !known.has(index) && (word.trim() !== "" || run);
        if (!differs) { run = null; parts.push(word); return; }
        if (!run) { run = make("mark", {}); parts.push(run); }
        run.append(word);
      });
      return parts.length > 1 || words[0] ? parts : [make("mark", {}, "⌫")];
    };
    return [marked(a, enda, same[0]), marked(b, endb, same[1])];
  }

  // ---- the address --------------------------------------------------------------------------------------------------
  function remember() {
    try { history.replaceState(null, "", "#" + state); } catch (error) { /* a page without an address of its own */ }
  }

  function show() {
    filterRows(); sortRows(); listSamples(); remember();
  }

  function read() {
    if (!location.hash.includes("=")) return false;
    for (const key of Array.from(state.keys())) state.delete(key);
    for (const [key, value] of new URLSearchParams(location.hash.slice(1))) state.set(key, value);
    for (const [key, id] of Object.entries(controls)) {
      const control = get(id);
      if (!control) continue;
      control.value = state.get(key) || "";
      if (control.selectedIndex < 0) { control.value = ""; state.delete(key); }
    }
    get("f-lost").checked = state.has("lost");
    return true;
  }

  for (const [key, id] of Object.entries(controls)) {
    if (get(id)) get(id).addEventListener("change", (event) => {
      if (event.target.value) state.set(key, event.target.value); else state.delete(key);
      listed = PAGE; show();
    });
  }
  get("f-lost").addEventListener("change", (event) => {
    if (event.target.checked) state.set("lost", "1"); else state.delete("lost");
    listed = PAGE; show();
  });
  get("f-sort").addEventListener("change", (event) => { state.delete("sort"); sortBy(event.target.value); });
  get("more").addEventListener("click", () => { listed += PAGE; listSamples(); });
  for (const head of document.querySelectorAll(".sortable th[data-key]")) {
    const button = make("button", { type: "button" }, ...head.childNodes);
    button.addEventListener("click", () => sortBy(head.dataset.key));
    head.append(button);
  }
  for (const id of ["filters", "show"]) get(id).addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", () => { if (read()) show(); });
  const linked = read();
  show();
  if (linked && state.has("sample")) {
    const open = document.querySelector(".sample[open]");
    if (open) open.scrollIntoView();
  }
})();
