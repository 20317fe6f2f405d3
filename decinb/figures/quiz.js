(function () {
  const root = document.getElementById("__ID__");
  if (!root || root.classList.contains("live")) return;
  root.classList.add("live");
  const items = [...root.querySelectorAll("li")], score = root.querySelector(".score");
  let right = 0, answered = 0;
  for (const item of items) {
    const details = item.querySelector("details"), choices = item.querySelector(".choices");
    choices.hidden = false;
    details.hidden = true;
    choices.addEventListener("click", (event) => {
      const chosen = event.target.closest("button");
      if (!chosen || item.dataset.answered) return;
      item.dataset.answered = "1";
      answered += 1;
      right += chosen.dataset.right ? 1 : 0;
      if (!chosen.dataset.right) chosen.classList.add("wrong");
      choices.querySelector("[data-right]").classList.add("right");
      for (const button of choices.querySelectorAll("button")) button.setAttribute("aria-disabled", "true");
      details.hidden = false;
      details.open = true;
      score.hidden = false;
      score.textContent = right + " of " + answered + " right" + (answered < items.length ? "" : "; that was all");
    });
  }
})();
