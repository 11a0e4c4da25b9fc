"use strict";
// The view of tokens: colours them by one of their numbers, and shows the numbers of one.
(() => {
  const channel = document.getElementById("channel");
  if (!channel) return;
  const tokens = [...document.querySelectorAll(".t")];

  function paint() {
    const name = channel.value;
    const known = tokens.filter((token) => name in token.dataset);
    const largest = Math.max(...known.map((token) => Math.abs(token.dataset[name])), 1e-9);
    for (const token of tokens) {
      token.style.background = "";
      if (!(name in token.dataset)) continue;
      const value = Number(token.dataset[name]);
      const strength = Math.round(100 * Math.sqrt(Math.abs(value) / largest) * 0.75);
      const colour = value < 0 ? "#3b82f6" : "#f97316";
      token.style.background = `color-mix(in srgb, ${colour} ${strength}%, white)`;
    }
    document.getElementById("legend").textContent = `largest: ${largest.toPrecision(3)}`;
  }

  function describe(token) {
    return Object.entries(token.dataset).map(([name, value]) => `${name} ${value}`).join(", ");
  }

  function tell(event) {
    const token = event.target.closest(".t");
    if (token) token.closest(".sample").querySelector(".numbers").textContent = describe(token);
  }

  channel.addEventListener("change", paint);
  for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, tell);
  paint();
})();
