"""The site and the slides hold every page and notebook, open from a disk, and fetch nothing."""

import re
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("myst_nb", reason="needs the extra site")
pytest.importorskip("nbconvert")
pytest.importorskip("latex2mathml")

from tools import make_site, make_slides

ROOT = Path(__file__).parents[2]


def test_badges_become_links_with_the_same_text():
    badge = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.org/x)"
    assert make_site.with_links_for_badges(f"a {badge} b") == "a [Open in Colab](https://colab.org/x) b"


def test_the_first_page_leads_to_every_page(tmp_path):
    make_site.stage(tmp_path / "source")
    first = (tmp_path / "source" / "index.md").read_text(encoding="utf-8")
    for page in [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("docs/*.md")]:
        name = page.relative_to(ROOT).with_suffix("").as_posix()
        assert f"\n{name}\n" in first or name == "docs/README"


def test_formulas_become_mathml_but_code_stays():
    text = make_slides.with_formulas("$a_t$ and $$x^2$$ but `$b$` and a $5 roof")
    assert text.count("<math") == 2 and "`$b$`" in text and "a $5 roof" in text


def test_a_section_is_a_slide_and_a_second_figure_one_below_it():
    figure = nbformat.v4.new_output("display_data", {"text/html": "<img>"})
    new = nbformat.v4
    cells = [
        new.new_markdown_cell("# A title"),
        new.new_code_cell("from importlib.metadata import packages_distributions"),
        new.new_code_cell("a", outputs=[figure]),
        new.new_code_cell("b", outputs=[figure]),
        new.new_markdown_cell("## Next"),
        new.new_code_cell("c"),
    ]
    notebook = make_slides.as_slides(new.new_notebook(cells=cells))
    kinds = [cell.metadata["slideshow"]["slide_type"] for cell in notebook.cells]
    assert kinds == ["slide", "skip", "-", "subslide", "skip", "skip"]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_pages_and_slides_fit_a_phone_follow_the_theme_and_fetch_nothing(tmp_path, monkeypatch):
    browser = pytest.importorskip("playwright.sync_api")
    monkeypatch.setattr(make_site, "SITE", tmp_path)
    monkeypatch.setattr(make_site, "ROOT", ROOT)
    monkeypatch.setattr(make_slides, "FOLDER", tmp_path / "slides")
    assert make_site.build(tmp_path / "source", tmp_path / "html") == 0
    make_slides.main()
    notebook = sorted(ROOT.glob("notebooks/*.ipynb"))[2].stem
    with browser.sync_playwright() as playwright:
        chromium = next((path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(path).exists()), None)
        if chromium is None:
            pytest.skip("no browser")
        window = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        fetched, faults, colours = [], [], {}
        for scheme in ("light", "dark"):
            page = window.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
            page.on("request", lambda request: fetched.append(request.url))
            page.on("pageerror", lambda fault: faults.append(str(fault)))
            for name in (f"html/notebooks/{notebook}.html", "html/docs/the_guide.html", "html/index.html"):
                page.goto((tmp_path / name).as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
            colours[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            page.goto((tmp_path / "html/search.html").as_uri() + "?q=guidance")
            page.wait_for_selector("#search-results li")
            page.goto((tmp_path / "slides" / f"{notebook}.html").as_uri())
            page.wait_for_selector(".reveal.ready")
        wide = window.new_page(viewport={"width": 1280, "height": 800})
        wide.goto((tmp_path / f"html/notebooks/{notebook}.html").as_uri())
        figures = wide.locator(".cell_output img")
        assert figures.count() > 3
        assert all(figures.evaluate_all("all => all.map(one => one.width <= one.parentElement.clientWidth + 1)"))
        window.close()
    assert colours["light"] != colours["dark"] and not faults
    assert not [url for url in fetched if not re.match(r"file:|data:|blob:", url)]
