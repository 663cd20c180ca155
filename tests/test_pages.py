"The pages in a browser without a network: every figure is drawn, moves, holds on a phone and can be read in the dark."
import json
import re
import sys

import check
import pages
import pytest
from browser import DESK, PHONE, ROOT, chromium, needs_browser, open_page, screenshot
from test_notebooks import NOTEBOOKS

PICTURED = ("21_figures", "42_hypergrad", "experiments/rotated_digits", "experiments/results")
HEAD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="{up}styles.css"><style>:root{{color-scheme:light dark}}
body{{font:16px/1.5 system-ui,sans-serif;margin:auto;padding:0 12px;max-width:54rem;background:#fff;color:#222}}
@media(prefers-color-scheme:dark){{body{{background:#222;color:#fff}}}}</style></head><body>"""


def name(notebook): return notebook.relative_to(ROOT/"nbs").with_suffix("").as_posix()


def outputs(notebook):
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []): yield cell, output.get("data", {})


def number_of_figures(notebook): return sum(pages.PLOTLY in data for _, data in outputs(notebook))


WITH_FIGURES = [notebook for notebook in NOTEBOOKS if number_of_figures(notebook)]


@pytest.fixture(scope="module")
def project():
    "A copy of the project with its notebooks processed for the site."
    with check.copy_of_project() as copy:
        assert not check.run(sys.executable, "tests/pages.py", folder=copy, quiet=True)
        yield copy


@pytest.fixture(scope="module")
def site(project):
    "The processed notebooks as plain pages with the site's style sheet: what Quarto does to them, without its themes."
    found = sorted((project/"_proc").rglob("*.ipynb"))
    command = (check.SCRIPTS/"jupyter", "nbconvert", "--log-level=ERROR", "--to=html", "--template=basic", "--no-prompt")
    assert not check.run(*command, *found, folder=project, quiet=True)
    for page in (path.with_suffix(".html") for path in found):
        up = "../" * (len(page.relative_to(project/"_proc").parts) - 1)
        page.write_text(HEAD.format(up=up) + page.read_text(encoding="utf-8") + "</body></html>", encoding="utf-8")
    return project/"_proc"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser: yield browser


def visit(page, site, notebook):
    "Open a notebook's page and wait until its figures are drawn; what it asks of others than this machine."
    asked = []
    page.on("request", lambda request: asked.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)
    page.goto((site/notebook.relative_to(ROOT/"nbs")).with_suffix(".html").as_uri())
    page.wait_for_function("n => document.querySelectorAll('.js-plotly-plot:has(.subplot)').length >= n", arg=number_of_figures(notebook))
    return asked


def widths(page):
    "How wide the page is, and how far its figures reach."
    return page.evaluate("""() => [document.documentElement.scrollWidth,
        ...[...document.querySelectorAll('.js-plotly-plot, .js-plotly-plot .main-svg')].map(part => part.getBoundingClientRect().right)]""")


def contrasts(page):
    "The least contrast of each figure's text with the page."
    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (part / 12.92 if part <= .04045 else ((part + .055) / 1.055) ** 2.4 for part in parts)
        return .2126 * red + .7152 * green + .0722 * blue
    background, texts, papers = page.evaluate("""() => [getComputedStyle(document.body).backgroundColor,
        [...document.querySelectorAll('.main-svg text')].filter(text => !text.closest('.hoverlayer') && text.textContent)
            .map(text => getComputedStyle(text).fill),
        [...document.querySelectorAll('.main-svg')].map(paper => getComputedStyle(paper).backgroundColor)]""")
    assert set(papers) <= {"rgba(0, 0, 0, 0)"} and texts
    behind = luminance(background)
    return [(max(light, behind) + .05) / (min(light, behind) + .05) for light in map(luminance, set(texts))]


@needs_browser
@pytest.mark.parametrize("notebook", WITH_FIGURES, ids=name)
def test_every_figure_is_drawn_without_a_network(browser, site, notebook):
    with open_page(browser, offline=True, dark=True, viewport=PHONE) as (page, errors):
        asked, number = visit(page, site, notebook), number_of_figures(notebook)
        assert page.locator(".js-plotly-plot:has(.subplot)").count() == page.locator("figure.hpl-figure[aria-label]").count() == number
        assert not page.get_by_text("has not run here").count() and not errors and not asked
        assert min(contrasts(page)) >= 3, "text in the dark"
        assert max(widths(page)) <= PHONE["width"], "on a phone"
        if name(notebook) in PICTURED: screenshot(page, f"{notebook.stem}-dark-phone", full_page=True)
        page.emulate_media(color_scheme="light")
        assert min(contrasts(page)) >= 3, "text in the light"
        if name(notebook) not in PICTURED: return
        page.set_viewport_size(DESK)
        page.wait_for_timeout(300)
        assert max(widths(page)) <= DESK["width"]
        screenshot(page, f"{notebook.stem}-light", full_page=True)


@needs_browser
@pytest.mark.parametrize("notebook", [notebook for notebook in NOTEBOOKS if notebook not in WITH_FIGURES], ids=name)
def test_other_pages_hold_on_a_phone(browser, site, notebook):
    with open_page(browser, offline=True, viewport=PHONE) as (page, errors):
        asked = visit(page, site, notebook)
        assert max(widths(page)) <= PHONE["width"] and not errors and not asked


def drawn(plot):
    "Where the points of a figure are, and their colours."
    return plot.evaluate("""plot => [...plot.querySelectorAll('.scatterlayer .point')]
        .map(point => point.getAttribute('transform') + point.style.fill)""")


def slide(plot, part):
    "Click on a slider, so far along."
    rail = plot.locator(".slider-rail-touch-rect")
    rail.scroll_into_view_if_needed()
    box = rail.bounding_box()
    rail.click(position=dict(x=part * (box["width"] - 2) + 1, y=box["height"] / 2), force=True)


@needs_browser
def test_sliders_and_the_play_button_move_the_points(browser, site):
    with open_page(browser, offline=True) as (page, errors):
        visit(page, site, ROOT/"nbs"/"21_figures.ipynb")
        movie = page.locator(".js-plotly-plot", has=page.locator(".updatemenu-button"))
        frames = movie.evaluate("plot => plot._transitionData._frames.map(frame => frame.name)")
        label, first = movie.locator(".slider-label").first, drawn(movie)
        slide(movie, 1)
        page.wait_for_function("([label, end]) => label.textContent.trim() == 'Epoch ' + end", arg=[label.element_handle(), frames[-1]])
        last = drawn(movie)
        assert len(first) == len(last) and sum(one != two for one, two in zip(first, last)) > len(first) / 2
        screenshot(page, "movie-last-epoch")
        slide(movie, 0)
        page.wait_for_function("label => label.textContent.trim() == 'Epoch 1'", arg=label.element_handle())
        assert drawn(movie) == first
        movie.locator(".updatemenu-button", has_text="Play").click()
        page.wait_for_function("label => Number(label.textContent.replace('Epoch', '')) >= 3", arg=label.element_handle())
        movie.locator(".updatemenu-button", has_text="Pause").click()
        page.wait_for_timeout(100)
        paused = drawn(movie)
        assert paused != first
        page.wait_for_timeout(900)
        assert drawn(movie) == paused and set(errors) <= {"undefined"} # plotly's own promise of the frames that a pause takes back
        scatter = page.locator(".js-plotly-plot", has=page.locator(".slider-label", has_text="True label"))
        before = drawn(scatter)
        slide(scatter, 1)
        page.wait_for_function("plot => plot.querySelector('.slider-label').textContent.includes('50')", arg=scatter.element_handle())
        assert drawn(scatter) != before


@pytest.mark.parametrize("notebook", [notebook for notebook in NOTEBOOKS if pages.modules_of(notebook)], ids=name)
def test_every_exported_name_is_documented_with_its_source(project, notebook):
    page = project/"_proc"/notebook.relative_to(ROOT/"nbs")
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(part) for cell in cells for part in
                     (cell["source"] if cell["cell_type"] == "markdown" else "",
                      *(output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", []))))
    for file in pages.modules_of(notebook):
        lines = (project/file.relative_to(ROOT)).read_text(encoding="utf-8").splitlines()
        for exported in pages.definitions(file):
            entry = re.search(rf"\[source\]\(\S+/{file.relative_to(ROOT).as_posix()}#L(\d+)\)[^\n]*\n+### {exported}\n", text)
            assert entry, f"{exported} of {file.name} has no documentation with a link to its source"
            assert exported in "".join(lines[int(entry[1]) - 1:int(entry[1]) + 3]), f"the link of {exported} leads elsewhere"


def test_no_widget_reaches_a_page(project):
    for page in (project/"_proc").rglob("*.ipynb"):
        text = page.read_text(encoding="utf-8")
        assert pages.WIDGET not in text and '"widgets"' not in text.split('"metadata"')[-1], page.name


def test_pages_use_the_one_copy_of_plotly_and_pictures_are_there(project):
    site = project/"_proc"
    assert [path.relative_to(site).as_posix() for path in site.rglob("plotly*.js")] == [pages.LIBRARY]
    assert pages.LIBRARY in (site/"_quarto.yml").read_text(encoding="utf-8")
    for page in site.rglob("*.ipynb"):
        for cell, data in outputs(page):
            assert pages.PLOTLY not in data
            for address in re.findall(r'src: "([^"]+)"', "".join(data.get("text/html", ""))):
                assert (page.parent/address).resolve() == (site/pages.LIBRARY).resolve(), page.name
        text = page.read_text(encoding="utf-8")
        for picture in re.findall(r"!\[[^\]]*\]\(([\w./-]+)\)", text): assert (page.parent/picture).exists(), f"{page.name}: {picture}"


def test_views_of_widgets_are_stripped(tmp_path):
    view = {"output_type": "display_data", "metadata": {}, "data": {pages.WIDGET: {"model_id": "1"}, "text/plain": "VBox()"}}
    both = {"output_type": "display_data", "metadata": {}, "data": {pages.WIDGET: {"model_id": "1"}, "image/png": "=="}}
    text = {"output_type": "stream", "name": "stdout", "text": "kept"}
    nb = {"cells": [{"cell_type": "code", "source": "", "outputs": [view, both, text]}], "metadata": {"widgets": {"state": {}}}}
    (tmp_path/"nbs"/"sub").mkdir(parents=True)
    notebook = tmp_path/"nbs"/"sub"/"a.ipynb"
    notebook.write_text(json.dumps(nb), encoding="utf-8")
    pages.strip_widgets(tmp_path)
    stripped = json.loads(notebook.read_text(encoding="utf-8"))
    assert stripped["cells"][0]["outputs"] == [dict(both, data={"image/png": "=="}), text] and stripped["metadata"] == {}
    before = notebook.stat().st_mtime_ns
    pages.strip_widgets(tmp_path)
    assert notebook.stat().st_mtime_ns == before
