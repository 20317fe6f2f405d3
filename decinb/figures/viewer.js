(function () {
  const root = document.getElementById("__ID__");
  if (!root || root.classList.contains("live")) return;
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const find = (name) => root.querySelector("." + name);
  const figures = [...root.querySelectorAll("figure")];
  const sources = figures.map((figure) => figure.querySelector("img").src);
  const cells = data.cells, first = data.has_input ? 1 : 0;
  const frame = find("frame"), over = find("over"), under = find("under"), wipe = find("wipe"), other = find("other");
  let current = 0, timer = null;
  const sliders = {};

  for (const axis of data.axes) {
    const label = document.createElement("label"), value = document.createElement("span"), slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, max: axis.values.length - 1, step: 1, value: 0 });
    slider.setAttribute("aria-label", axis.label);
    slider.dataset.axis = axis.name;
    slider.addEventListener("input", () => show(nearest(axis.name, Number(slider.value))));
    label.append(axis.label + " ", value, slider);
    find("axes").append(label);
    sliders[axis.name] = { slider, value, axis };
  }
  figures.forEach((figure, i) => {
    const option = document.createElement("option");
    option.value = i;
    option.textContent = figure.querySelector("figcaption").textContent;
    other.append(option);
    if (i >= first) figure.addEventListener("click", () => show(i - first));
  });

  // The cell with this value on the axis that moved, and otherwise as near to the current cell as the design has it.
  function nearest(name, index) {
    let best = current, least = Infinity;
    cells.forEach((cell, i) => {
      let distance = 1e6 * Math.abs(cell.at[name] - index);
      for (const axis of data.axes) if (axis.name !== name) distance += Math.abs(cell.at[axis.name] - cells[current].at[axis.name]);
      if (distance < least) { least = distance; best = i; }
    });
    return best;
  }

  function show(i) {
    current = (i + cells.length) % cells.length;
    const cell = cells[current], figure = figures[current + first];
    over.src = sources[current + first];
    over.alt = figure.querySelector("img").alt;
    for (const { slider, value, axis } of Object.values(sliders)) {
      slider.value = cell.at[axis.name];
      value.textContent = axis.values[cell.at[axis.name]];
      slider.setAttribute("aria-valuetext", value.textContent);
    }
    figures.forEach((one, k) => one.classList.toggle("chosen", k === current + first));
    const facts = find("facts");
    facts.replaceChildren();
    for (const [name, text] of cell.facts) {
      const row = facts.insertRow(), head = document.createElement("th");
      head.textContent = name;
      row.append(head);
      row.insertCell().textContent = text;
    }
    const link = find("download");
    link.href = over.src;
    link.download = cell.file;
    compare();
  }

  function compare() {
    const share = Number(wipe.value), chosen = Number(other.value);
    under.hidden = share === 0;
    under.src = sources[chosen];
    under.alt = share ? figures[chosen].querySelector("img").alt : "";
    under.style.clipPath = "inset(0 " + (100 - share) + "% 0 0)";
    find("wipe-value").textContent = share + "%";
  }

  function play(on) {
    clearInterval(timer);
    timer = on ? setInterval(() => (root.isConnected ? show(current + 1) : play(false)), 700) : null;
    find("play").textContent = on ? "pause" : "play";
    find("play").setAttribute("aria-pressed", String(on));
  }

  function say(text) { find("status").textContent = text; }

  async function copy() {
    const code = cells[current].code;
    try { await navigator.clipboard.writeText(code); say("copied"); } catch (error) { say(code); }
  }

  wipe.addEventListener("input", compare);
  other.addEventListener("change", () => { if (wipe.value === "0") wipe.value = 50; compare(); });
  find("previous").addEventListener("click", () => show(current - 1));
  find("next").addEventListener("click", () => show(current + 1));
  find("play").addEventListener("click", () => play(timer === null));
  find("code").addEventListener("click", copy);
  find("zoom").addEventListener("click", () => {
    const on = frame.classList.toggle("pixels");
    frame.style.width = on ? 4 * over.naturalWidth + "px" : "";
    find("zoom").setAttribute("aria-pressed", String(on));
  });
  root.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (move) { show(current + move); event.preventDefault(); }
    else if (event.key === " " && event.target.tagName !== "BUTTON") { play(timer === null); event.preventDefault(); }
    else return;
    event.stopPropagation(); // a notebook has keys of its own
  });

  root.tabIndex = 0;
  root.classList.add("live");
  find("stage").hidden = false;
  show(0);
})();
