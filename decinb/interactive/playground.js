(function boot(image, tries) {
  const root = image.closest(".decinb-playground");
  if (!root) { // the widget is not on the page yet
    if (tries) setTimeout(boot, 50, image, tries - 1);
    return;
  }
  if (root.dataset.booted) return;
  root.dataset.booted = "1";
  const find = (name) => root.querySelector(".decinb-" + name);
  const past = [];
  let last = null;

  function ask() {
    const button = root.querySelector("button.decinb-ask, .decinb-ask button");
    if (button) button.click();
  }

  function send(message) {
    const area = root.querySelector(".decinb-sent textarea");
    area.value = JSON.stringify({ ...message, at: Date.now() });
    for (const kind of ["input", "change"]) area.dispatchEvent(new Event(kind, { bubbles: true }));
  }

  function put(source) {
    const canvas = find("canvas");
    if (!canvas) return setTimeout(put, 50, source);
    canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
    canvas.setAttribute("aria-label", "the input image, " + source.alt + "; draw on it");
    past.length = 0;
  }

  function place(event, canvas) {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
  }

  function draw(event, canvas) {
    const pen = canvas.getContext("2d"), to = place(event, canvas);
    pen.strokeStyle = find("colour").value;
    pen.lineWidth = Number(find("brush").value) * canvas.width / 100;
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(...(last || to));
    pen.lineTo(to[0] + 0.01, to[1]);
    pen.stroke();
    last = to;
  }

  const sendDrawing = () => send({ kind: "drawing", data: find("canvas").toDataURL("image/png") });

  // A photo is made smaller here, so that a notebook on a slow line does not have to send all of it.
  async function take(file) {
    try {
      const photo = await createImageBitmap(file), scale = Math.min(1, 1536 / Math.max(photo.width, photo.height));
      const canvas = document.createElement("canvas");
      canvas.width = Math.max(1, Math.round(photo.width * scale));
      canvas.height = Math.max(1, Math.round(photo.height * scale));
      const pen = canvas.getContext("2d");
      pen.imageSmoothingQuality = "high";
      pen.drawImage(photo, 0, 0, canvas.width, canvas.height);
      send({ kind: "file", data: canvas.toDataURL("image/jpeg", 0.95) });
    } catch (error) {
      send({ problem: file.name + " is not an image that this browser can read" });
    }
  }

  root.addEventListener("load", (event) => {
    if (event.target.dataset.ask) ask();
    if (event.target.classList.contains("decinb-source")) put(event.target);
    if (event.target.classList.contains("decinb-run")) {
      new Function(event.target.parentElement.querySelector("script:not([type])").textContent)();
    }
  }, true); // "load" does not bubble
  root.addEventListener("pointerdown", (event) => {
    if (!event.target.matches(".decinb-canvas")) return;
    const canvas = event.target;
    canvas.setPointerCapture(event.pointerId);
    past.push(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height));
    last = null;
    draw(event, canvas);
    event.preventDefault();
  });
  root.addEventListener("pointermove", (event) => {
    if (last && event.target.matches(".decinb-canvas")) draw(event, event.target);
  });
  root.addEventListener("pointerup", () => {
    if (last) sendDrawing();
    last = null;
  });
  root.addEventListener("change", (event) => {
    if (event.target.matches(".decinb-file") && event.target.files.length) {
      take(event.target.files[0]);
      event.target.value = "";
    }
  });
  root.addEventListener("click", async (event) => {
    if (event.target.matches(".decinb-undo") && past.length) {
      find("canvas").getContext("2d").putImageData(past.pop(), 0, 0);
      sendDrawing();
    }
    if (event.target.matches(".decinb-copy")) {
      const code = event.target.parentElement.querySelector("pre"), copied = event.target.parentElement.querySelector(".decinb-copied");
      try {
        await navigator.clipboard.writeText(code.textContent);
        copied.textContent = " copied";
      } catch (error) { // the page may not be allowed to
        event.target.parentElement.querySelector("details").open = true;
        getSelection().selectAllChildren(code);
        copied.textContent = " press Ctrl+C";
      }
    }
  });
  const source = find("source");
  if (source && source.complete) put(source);
})(this, 200);
