"""The playground in a real browser: in JupyterLab with ipykernel 7, and with the versions that Colab has.

The tests share one page in each environment. Screenshots are in ``runs/browser``.
"""

import base64
import io
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

import decinb
from tests.helpers.browser import SHOTS, Jupyter, open_browser, open_tab, python_of, run_all

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STEPS = 6
CELL = {"prompt": "a red house on snow at night", "strength": 1.0, "num_inference_steps": STEPS, "seed": 1}
SETUP = "import decinb\npipe = decinb.load_pipeline('tiny', 'cpu')"
SHOW = f"play = decinb.playground(pipe, **{CELL!r})\nplay"


class Page:
    """The playground in a tab, and what a user does with it."""

    def __init__(self, tab, app: str):
        self.tab, self.app, self.problems = tab, app, []
        self.root = tab.locator(".decinb-playground")
        self.output = self.root.locator(".decinb-panes .widget-html-content").filter(has_text="output")
        tab.on("pageerror", lambda error: self.problems.append(str(error)))

    def click(self, name: str) -> None:
        self.root.get_by_role("button", name=name, exact=True).click()

    def generate(self, caption: str = "strength 1, ") -> None:
        """Make an image, and wait for it."""
        self.output.first.evaluate("(one) => { one.textContent = 'output' }")  # what the last run left
        self.click("Generate")
        self.wait_for(caption)

    def text(self) -> str:
        return self.output.first.inner_text()

    def wait_for(self, pattern: str) -> None:
        self.output.filter(has_text=re.compile(pattern)).first.wait_for()

    def status(self, pattern: str) -> None:
        self.root.locator("[role=status], [role=alert]").filter(has_text=re.compile(pattern)).first.wait_for()

    def choose(self, label: str, option: str) -> None:
        self.root.get_by_label(label, exact=True).first.select_option(label=option)

    def shown(self) -> Image.Image:
        """The image in the output, as the page has it."""
        return decode(self.output.locator("img.decinb-shown").get_attribute("src"))

    def canvas(self) -> np.ndarray:
        """The pixels of the canvas."""
        return np.asarray(decode(self.root.locator(".decinb-canvas").evaluate("(one) => one.toDataURL()")))

    def save(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=SHOTS / f"{self.app}-{name}.png")


def decode(url: str) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) as image:
        return image.convert("RGB")


def difference(one: Image.Image, other: Image.Image) -> float:
    return decinb.mean_abs_difference(one, other)


@pytest.fixture(scope="module", params=["lab", "classic"])
def page(request, tmp_path_factory):
    python = python_of(request.param)
    with open_browser() as browser:
        server = Jupyter(python, request.param, tmp_path_factory.mktemp(request.param))
        try:
            tab = open_tab(browser, viewport={"width": 1300, "height": 1000}, color_scheme="light")
            opened = Page(tab, request.param)
            tab.goto(server.write("play.ipynb", SETUP, SHOW))
            run_all(tab, request.param)
            opened.root.locator(".decinb-canvas").wait_for()
            yield opened
            assert opened.problems == []
        finally:
            server.stop()


@pytest.fixture(scope="module")
def expected(tiny):
    """The image that the settings give, made without a page."""
    return decinb.run_sweep(tiny, "day", "", [CELL], progress=False).images[0]


def test_each_step_shows_what_is_predicted_and_the_end_is_the_image(page, expected):
    page.output.evaluate(
        """(one) => { window.seen = []; new MutationObserver(() => {
            const image = one.querySelector("img.decinb-shown");
            if (image) window.seen.push([one.innerText, image.src, performance.now() - window.clicked]);
        }).observe(one, { childList: true, subtree: true });
        addEventListener("click", (event) => {  // not those of the page's script, which asks for steps
            if (event.isTrusted) window.clicked = performance.now();
        }, true); }"""
    )
    page.generate()
    seen = page.tab.evaluate("window.seen")
    times = {"ms_to_preview": seen[0][2], "ms_to_image": seen[-1][2]}
    SHOTS.mkdir(parents=True, exist_ok=True)
    (SHOTS / f"{page.app}-click.json").write_text(json.dumps(times))
    steps = {}
    for text, source, _ in seen:
        if match := re.search(r"step (\d+) of (\d+)", text):
            assert int(match[2]) == STEPS
            steps[int(match[1])] = source
    assert min(steps) == 1 and max(steps) < STEPS, "the first, and some of the others but the last, the result"
    assert difference(page.shown(), expected) < 0.02
    assert len(set(steps.values())) == len(steps), "each has its own prediction"
    page.save("generated")
    page.root.screenshot(path=SHOTS / f"{page.app}-playground.png")  # the picture in the README


def test_stop_ends_the_run_and_the_next_image_is_right(page, expected):
    steps = page.root.locator(".noUi-handle, .ui-slider-handle").nth(2)
    steps.focus()
    steps.press("End")  # long enough to be stopped on a fast machine
    page.click("Generate")
    page.wait_for(r"step \d+ of 100")
    clicked = time.perf_counter()
    page.click("Stop")
    page.status("stopped; 0 images finished")
    SHOTS.mkdir(parents=True, exist_ok=True)
    (SHOTS / f"{page.app}-stop.json").write_text(json.dumps({"seconds_to_stop": time.perf_counter() - clicked}))
    before = page.text()
    time.sleep(1)
    assert page.text() == before, "nothing runs on"
    steps.focus()
    for key in ("Home", *["ArrowRight"] * (STEPS - 1)):
        steps.press(key)
    page.generate()
    assert difference(page.shown(), expected) < 0.02


def test_wrong_input_is_said_and_nothing_breaks(page, expected):
    prompt = page.root.get_by_label("prompt", exact=True).first
    prompt.fill('<img src="x" onerror="document.title=1"> ' + "very " * 90 + "long")
    page.generate()
    page.status("prompt is too long")
    page.choose("what to sweep", "prompt")
    page.click("Sweep this")
    page.status("one on each line")
    assert page.tab.title() != "1"
    prompt.fill(CELL["prompt"])
    page.generate()
    assert difference(page.shown(), expected) < 0.02


def test_a_swept_slider_answers_with_its_images_and_the_viewer_compares_them(page):
    page.choose("what to sweep", "strength")
    page.click("Sweep this")
    viewer = page.root.locator(".decinb-viewer.live").first
    viewer.wait_for()
    page.wait_for("strength 1, ")
    images = [decode(url) for url in viewer.locator("figure img").evaluate_all("(all) => all.map((one) => one.src)")]
    assert len(images) == 1 + 8
    handle = page.root.locator(".noUi-handle, .ui-slider-handle").first
    handle.focus()
    for _ in ("0.95", "0.9", "0.85", "0.8"):
        handle.press("ArrowLeft")
    page.wait_for("strength 0.8, ")
    assert difference(page.shown(), images[6]) < 0.02
    page.save("swept")
    viewer.locator(".other").select_option("0")
    frame = viewer.locator(".frame")
    frame.scroll_into_view_if_needed()
    with Image.open(io.BytesIO(frame.screenshot())) as shot:
        compared = shot.convert("RGB").resize((128, 128))
    left, right = compared.crop((8, 8, 56, 120)), compared.crop((72, 8, 120, 120))
    assert difference(left, images[0].crop((8, 8, 56, 120))) < 0.05, "the input"
    assert difference(right, images[1].crop((72, 8, 120, 120))) < 0.05, "the first cell"
    viewer.focus()
    page.tab.keyboard.press("ArrowRight")
    assert "strength 0.4" in viewer.locator(".over").get_attribute("alt")
    page.save("compared")


def test_a_drawing_is_the_input(page):
    page.choose("image", "blank canvas")
    page.tab.wait_for_function("document.querySelector('.decinb-canvas').ariaLabel.includes('your image')")
    canvas = page.root.locator(".decinb-canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.root.locator(".decinb-colour").fill("#ff0000")
    page.tab.mouse.move(box["x"] + 40, box["y"] + box["height"] / 2)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + box["width"] - 40, box["y"] + box["height"] / 2, steps=4)
    page.tab.mouse.up()
    pixels = page.canvas()
    assert tuple(pixels[64, 64]) == (255, 0, 0) and tuple(pixels[5, 5]) == (255, 255, 255)
    page.generate("strength 0.8, ")
    page.click("Keep")
    page.status("kept 1")
    kept = page.root.locator(".decinb-viewer.live").last
    source = decode(kept.locator("figure img").first.get_attribute("src"))
    assert np.abs(np.asarray(source, int) - pixels).mean() < 6, "the input is what was drawn"
    page.save("drawn")


def test_a_photo_of_12_megapixels_becomes_the_input(page, tmp_path):
    photo = Image.new("RGB", (4000, 3000), (200, 40, 30))
    photo.paste((20, 60, 210), (2000, 0, 4000, 3000))
    noise = Image.effect_noise((4000, 3000), 30).convert("RGB")
    file = tmp_path / "photo.jpg"
    Image.blend(photo, noise, 0.1).save(file, quality=95)
    page.root.locator(".decinb-file").set_input_files(file)
    page.status("your image is the input")
    page.tab.wait_for_function(
        "document.querySelector('.decinb-canvas').getContext('2d').getImageData(100, 64, 1, 1).data[2] > 150"
    )
    pixels = page.canvas()
    assert pixels.shape[:2] == (128, 128) and pixels[64, 20, 0] > 150 > pixels[64, 20, 2]
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    page.root.locator(".decinb-file").set_input_files(text)
    page.status("text.jpg is not an image")


def test_the_code_is_there_to_copy(page, tiny, expected):
    page.choose("image", "day")
    handle = page.root.locator(".noUi-handle, .ui-slider-handle").first
    handle.focus()
    handle.press("End")
    page.generate()
    names: dict = {}
    exec(page.root.locator("pre").first.text_content(), names)
    assert difference(names["sweep"].images[0], expected) < 0.01
    page.click("Copy as code")
    page.root.locator(".decinb-copied").filter(has_text=re.compile("copied|Ctrl")).wait_for()


def test_a_narrow_page_shows_everything_and_a_dark_one_is_dark(page):
    if page.app == "lab":
        page.tab.evaluate("document.body.dataset.jpThemeLight = 'false'")
    page.tab.emulate_media(color_scheme="dark")
    colours = page.root.evaluate("(root) => [getComputedStyle(root).color, getComputedStyle(root).backgroundColor]")
    assert colours == ["rgb(230, 233, 237)", "rgb(22, 25, 29)"]
    page.save("dark")
    page.tab.emulate_media(color_scheme="light")
    if page.app == "lab":
        page.tab.evaluate("document.body.dataset.jpThemeLight = 'true'")
    page.root.evaluate("(root) => { root.style.width = '360px'; }")
    widest = page.root.evaluate(
        """(root) => Math.max(...[...root.querySelectorAll("button, canvas, img, textarea, .slider-container, select")]
            .filter((one) => one.offsetParent).map((one) => one.getBoundingClientRect().right))
            - root.getBoundingClientRect().left"""
    )
    assert widest <= 361
    page.save("narrow")
