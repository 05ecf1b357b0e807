"use strict";
(function () {
  const dataset = document.getElementById("f-dataset");
  const arm = document.getElementById("f-arm");
  const lost = document.getElementById("f-lost");
  const count = document.getElementById("f-count");
  const samples = Array.from(document.querySelectorAll(".sample"));
  function apply() {
    let shown = 0;
    for (const sample of samples) {
      const losers = JSON.parse(sample.dataset.lost);
      const wrong = !lost.checked || (arm.value ? losers.includes(arm.value) : losers.length > 0);
      const visible = wrong && (!dataset.value || sample.dataset.dataset === dataset.value);
      sample.hidden = !visible;
      shown += visible ? 1 : 0;
      for (const article of sample.querySelectorAll("article")) {
        const key = article.dataset.arm;
        article.hidden = arm.value !== "" && key !== arm.value && key !== "full";
      }
    }
    count.textContent = shown + " of " + samples.length + " samples";
  }
  for (const control of [dataset, arm, lost]) control.addEventListener("change", apply);
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  apply();
})();
