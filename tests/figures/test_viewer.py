"""The viewer of a sweep: its page is complete without JavaScript, safe with any prompt, and answers in a browser."""

import base64
import html
import io
import re

import pytest
from PIL import Image

from decinb import InputError, Sweep
from decinb.figures.viewer import page, viewer
from tests.helpers.browser import open_browser

STRENGTHS, SCALES = (0.3, 0.5, 0.75, 1.0), (1, 7.5, 12)
HOSTILE = "a </script><script>document.title='owned'</script><b>house</b> \"at\" night"


def colour(strength: float, scale: float) -> tuple[int, int, int]:
    return int(255 * strength), int(20 * scale), 90


def record(strength: float, scale: float, prompt: str = HOSTILE) -> dict:
    return {
        "image": "day",
        "prompt": prompt,
        "negative_prompt": None,
        "strength": strength,
        "guidance_scale": scale,
        "num_inference_steps": 30,
        "seed": 0,
        "steps_run": int(30 * strength),
        "seconds": 1.25,
    }


@pytest.fixture(scope="module")
def sweep() -> tuple[list[Image.Image], list[dict]]:
    cells = [(strength, scale) for strength in STRENGTHS for scale in SCALES]
    return [Image.new("RGB", (64, 64), colour(*cell)) for cell in cells], [record(*cell) for cell in cells]


@pytest.fixture(scope="module")
def fragment(sweep) -> str:
    images, records = sweep
    scores = {"adherence": [i / len(images) for i in range(len(images))]}
    return viewer(images, records, Image.new("RGB", (64, 64), "white"), scores, lossless=True)


def test_every_image_is_there_once_with_its_label_as_alt_text(sweep, fragment):
    images, _ = sweep
    figures = re.findall(r'<figure><img src="data:image/webp;base64,([^"]+)" alt="([^"]+)"', fragment)
    assert [alt for _, alt in figures[:2]] == ["input", "strength 0.3, guidance 1"]
    assert len(figures) == 1 + len(images)
    for image, (data, _) in zip(images, figures[1:], strict=True):
        with Image.open(io.BytesIO(base64.b64decode(data))) as embedded:
            assert embedded.convert("RGB").tobytes() == image.tobytes()


def test_controls_stay_hidden_without_javascript(fragment):
    assert '<div class="stage" hidden>' in fragment


def test_prompts_and_titles_cannot_end_a_tag_or_a_script(fragment):
    assert HOSTILE not in fragment and "<b>house</b>" not in fragment
    assert "<title>&lt;b&gt;</title>" in page("<b>", fragment)
    label = viewer([Image.new("RGB", (8, 8))], [record(0.5, 1)], None)
    assert label.count("</script>") == 2


def test_a_page_is_at_most_1_4_times_its_images(sweep):
    images = [Image.effect_noise((128, 128), 60).convert("RGB") for _ in range(48)]
    records = [record(0.5, 1 + i) for i in range(48)]
    whole = page("noise", viewer(images, records, lossless=True))
    bytes_of_images = 0
    for image in images:
        data = io.BytesIO()
        image.save(data, "WEBP", lossless=True, quality=90, method=4)
        bytes_of_images += data.tell()
    assert len(whole.encode()) < 1.4 * bytes_of_images


def test_a_sweep_shows_itself_in_a_notebook_and_as_a_file(sweep, tmp_path):
    images, records = sweep
    made = Sweep(Image.new("RGB", (64, 64)), HOSTILE, [{}] * len(images), images, records)
    assert made.explore()._repr_html_().count("<figure>") == 1 + len(images)
    file = made.to_html(tmp_path / "new" / "sweep.html", {"score": range(len(images))})
    text = file.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and HOSTILE not in text and "http" not in text.replace("http-equiv", "")


def test_scores_that_do_not_fit_and_empty_sweeps_are_refused(sweep):
    images, records = sweep
    with pytest.raises(InputError, match=r"scores\['a'\] must have one value per image, 12, got 1"):
        viewer(images, records, None, {"a": [1.0]})
    with pytest.raises(InputError, match=r"^scores\['x{39}…x{39}'\] must have one value per image, 12, got 1$"):
        viewer(images, records, None, {"x" * 5000: [1.0]})
    with pytest.raises(InputError, match="the sweep is empty"):
        Sweep(None, "").explore()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as chromium:
        yield chromium


@pytest.fixture
def opened(browser, fragment, tmp_path):
    """The page opened from disk, in a browser without a network."""
    file = tmp_path / "sweep.html"
    file.write_text(page("a sweep", fragment), encoding="utf-8")
    context = browser.new_context(offline=True, viewport={"width": 1000, "height": 900})
    tab = context.new_page()
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.goto(file.as_uri())
    yield tab
    context.close()
    assert problems == []


def centre(tab) -> tuple[int, ...]:
    """The colour in the middle of the image in view."""
    with Image.open(io.BytesIO(tab.locator(".frame").screenshot())) as shot:
        return shot.convert("RGB").getpixel((shot.width * 3 // 4, shot.height // 2))


def move(tab, axis: str, index: int) -> None:
    tab.locator(f'input[data-axis="{axis}"]').evaluate(
        "(slider, index) => { slider.value = index; slider.dispatchEvent(new Event('input')); }", index
    )


@pytest.mark.browser
def test_a_slider_shows_the_cell_that_it_names(opened):
    for i, strength in enumerate(STRENGTHS):
        for k, scale in enumerate(SCALES):
            move(opened, "strength", i)
            move(opened, "guidance_scale", k)
            assert centre(opened) == colour(strength, scale)
            assert f"strength {strength:g}, guidance {scale:g}" in opened.locator(".over").get_attribute("alt")
    assert opened.locator(".facts").inner_text().count("adherence") == 1


@pytest.mark.browser
def test_keys_buttons_and_play_turn_the_pages(opened):
    opened.locator(".decinb-viewer").focus()
    opened.keyboard.press("ArrowRight")
    assert centre(opened) == colour(STRENGTHS[0], SCALES[1])
    opened.keyboard.press("ArrowLeft")
    opened.locator(".previous").click()
    assert centre(opened) == colour(STRENGTHS[-1], SCALES[-1]), "before the first comes the last"
    opened.locator(".play").click()
    opened.locator('.over[alt^="strength 0.3"]').wait_for()
    opened.locator(".play").click()
    assert opened.locator(".play").inner_text() == "play"


@pytest.mark.browser
def test_the_wipe_shows_two_images_side_by_side(opened):
    opened.locator(".other").select_option("0")
    with Image.open(io.BytesIO(opened.locator(".frame").screenshot())) as shot:
        left, right = shot.convert("RGB").getpixel((9, 99)), shot.convert("RGB").getpixel((shot.width - 9, 99))
    assert left == (255, 255, 255) and right == colour(STRENGTHS[0], SCALES[0])


@pytest.mark.browser
def test_a_hostile_prompt_is_only_text(opened):
    assert opened.title() == "a sweep"
    assert HOSTILE in html.unescape(opened.locator(".facts").inner_text())


@pytest.mark.browser
def test_a_narrow_dark_screen_shows_everything(opened):
    opened.emulate_media(color_scheme="dark")
    opened.set_viewport_size({"width": 380, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth <= 380")
    colours = opened.locator(".decinb-viewer").evaluate(
        "(root) => [getComputedStyle(root).color, getComputedStyle(root).backgroundColor]"
    )
    assert colours == ["rgb(230, 233, 237)", "rgb(22, 25, 29)"]


@pytest.mark.browser
def test_the_file_of_a_sweep_of_48_cells_answers_sliders_and_keys_without_a_network(browser, tmp_path):
    cells = [(0.25 * (1 + i), 1.0 + k) for i in range(4) for k in range(12)]
    images = [Image.new("RGB", (128, 128), colour(*cell)) for cell in cells]
    sweep = Sweep(None, "a house", [{}] * 48, images, [record(*cell) for cell in cells])
    context = browser.new_context(offline=True)
    tab = context.new_page()
    tab.goto(sweep.to_html(tmp_path / "sweep.html").as_uri())
    move(tab, "strength", 2)
    move(tab, "guidance_scale", 7)
    assert centre(tab) == colour(0.75, 8.0)
    tab.locator(".decinb-viewer").focus()
    tab.keyboard.press("ArrowRight")
    assert centre(tab) == colour(0.75, 9.0)
    context.close()
