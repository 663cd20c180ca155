"The explorer and the live view in JupyterLab, in a real browser: what is touched there changes what is seen."
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from browser import ROOT, chromium, needs_browser, open_page, screenshot

pytestmark = needs_browser
PLOT = "Array.from(document.querySelectorAll('.js-plotly-plot'))"
LONG = 600 # seconds until a test gives up: a busy machine may need minutes for what takes one, and waiting ends when the condition holds


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab of its own, without the user's settings: (address of a notebook by name, folder)."
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("home")
    shutil.copy(ROOT/"nbs"/"22_explorer.ipynb", folder)
    shutil.copytree(ROOT/"nbs"/"images", folder/"images")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, environ = secrets.token_hex(8), {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("CONFIG", "DATA", "RUNTIME"): environ[f"JUPYTER_{name}_DIR"] = str(home/name)
    quiet = home/"CONFIG"/"labconfig"/"default_setting_overrides.json"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"@jupyterlab/apputils-extension:notification": {"checkForUpdates": False, "fetchNews": "false"}}))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}",
               "--allow-root", f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0"]
    with open(home/"log", "w") as log:
        server = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder)
    try:
        wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}").status == 200, (home/"log").read_text)
        yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}.ipynb?reset&token={token}", folder
    finally:
        server.terminate()
        server.wait(30)


def wait_for(condition, explain=str, seconds=LONG):
    "Until a condition holds, whatever it raises before."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition(): return value
        except Exception: pass
        time.sleep(.2)
    raise AssertionError(f"waited in vain: {explain()}")


def written(lab, name, cells):
    "The address of a new notebook with these cells."
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
                                  metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(nb, lab[1]/f"{name}.ipynb")
    return lab[0](name)


@pytest.fixture(scope="module")
def browser():
    with chromium() as running: yield running


@contextmanager
def notebook(browser, address):
    "A notebook in JupyterLab that has been run from top to bottom, and what the console called an error."
    with open_page(browser, viewport={"width": 1500, "height": 1100}) as (page, errors):
        page.set_default_timeout(1000*LONG)
        page.goto(address)
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_selector("#jp-main-statusbar >> text=| Idle")
        page.click("text=Run >> nth=0")
        page.click("li[data-command='runmenu:run-all'] >> nth=0")
        try: yield page, errors
        except Exception:
            screenshot(page, "failed")
            raise


def idle(page):
    "Wait until all cells have run."
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")


def ours(errors):
    "Without what a busy machine causes: anywidget complains of a widget that is not there within two seconds, and shows it all the same."
    return [error for error in errors if not re.search("favicon|Failed to load resource|Failed to initialize model", error)]


@pytest.fixture(scope="module")
def explorer(lab, browser):
    "The explorer, run; it begins with all labels and the last epoch of the first run."
    with notebook(browser, lab[0]("22_explorer")) as (page, errors):
        page.wait_for_selector(".js-plotly-plot .nsewdrag", state="attached")
        idle(page)
        choice(page, "Method").select_option(label="HPL")
        wait_for(lambda: choice(page, "Vertical").locator("option").count() == 3)
        choice(page, "Vertical").select_option(index=0)
        page.get_by_role("button", name="All labels").click()
        press(page, "Epoch", "End")
        page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
        wait_for(lambda: len(values(page, 0, "x")) > 1000 and "Epoch 6:" in words(page) and "variance" in words(page))
        yield page, errors


def fits(page):
    "Whether no figure is wider than its place."
    return page.evaluate(f"{PLOT}.every(plot => plot.querySelector('.main-svg').clientWidth <= plot.clientWidth + 1)")


def values(page, plot, name, trace=0):
    "An array of a trace as plotly has it in the page."
    return page.evaluate(f"Array.from({PLOT}[{plot}]._fullData[{trace}].{name} || [])")


def words(page): return page.locator(".widget-html >> text=samples, mean absolute error").last.inner_text()


def cards(page): return page.locator(".jupyter-widgets .hpl-card")


def number_chosen(page): return int(re.search(r"(\d+) chosen", page.locator(".widget-html >> text=chosen").last.inner_text())[1])


def drag(page, plot, left, top, right, bottom):
    "Drag over a part of a plot's first panel, in shares of its width and height."
    page.locator(".js-plotly-plot").nth(plot).scroll_into_view_if_needed()
    box = page.locator(".js-plotly-plot").nth(plot).locator(".nsewdrag").first.bounding_box()
    def at(x, y): return box["x"] + x*box["width"], box["y"] + y*box["height"]
    page.mouse.move(*at(left, top))
    page.mouse.down()
    page.mouse.move(*at((left + right)/2, (top + bottom)/2), steps=4)
    page.mouse.move(*at(right, bottom), steps=4)
    page.mouse.up()


def choice(page, name): return page.locator(f".widget-dropdown:has-text('{name}') select").first


UNDER_TOOLBAR = f"""{PLOT}.filter(plot => {{ // whose legend reaches into the toolbar, shown or not
    const [legend, bar] = [".legend", ".modebar"].map(name => plot.querySelector(name)?.getBoundingClientRect());
    return legend && bar && legend.top < bar.bottom && legend.right > bar.left;
}}).length"""


def press(page, name, key):
    "Press a key on the handle of a slider."
    page.locator(f".widget-slider:has-text('{name}') .noUi-handle").first.press(key)


def test_points_are_selected_and_their_samples_shown(explorer):
    page, errors = explorer
    wait_for(lambda: cards(page).count() == 0)
    drag(page, 0, .15, .02, .98, .5)
    wait_for(lambda: cards(page).locator("img").count() >= 2)
    wait_for(lambda: number_chosen(page) == len(values(page, 0, "x", 1)))
    assert number_chosen(page) >= cards(page).count()
    assert "digit 0" in cards(page).first.inner_text()
    wait_for(lambda: fits(page))
    page.set_viewport_size({"width": 1500, "height": 1500})
    screenshot(page.locator(".jp-OutputArea-output:has(.js-plotly-plot)").first, "explorer")
    assert not ours(errors)


def test_the_epoch_slider_moves_all_views_and_keeps_the_samples(explorer):
    page, errors = explorer
    before, points, boxes = words(page), values(page, 0, "y"), values(page, 1, "median", 1)
    chosen, shown = number_chosen(page), cards(page).all_inner_texts()
    press(page, "Epoch", "ArrowLeft")
    wait_for(lambda: words(page) != before and values(page, 0, "y") != points and values(page, 1, "median", 1) != boxes)
    assert "Epoch 5" in words(page) and len(values(page, 0, "y")) == len(points)
    wait_for(lambda: cards(page).all_inner_texts() != shown)
    wait_for(lambda: number_chosen(page) == chosen == len(values(page, 0, "x", 1)))
    assert not ours(errors)


def test_a_range_of_labels_is_followed_by_the_boxes(explorer):
    page, errors = explorer
    everything, boxes = len(values(page, 0, "x")), len(values(page, 1, "median", 1))
    for _ in range(20): press(page, "True label", "ArrowUp")
    wait_for(lambda: len(values(page, 0, "x")) < everything and len(values(page, 1, "median", 1)) < boxes)
    wait_for(lambda: sum(values(page, 1, "y")) == len(values(page, 0, "x")))
    page.get_by_role("button", name="All labels").click()
    wait_for(lambda: len(values(page, 0, "x")) == everything and cards(page).count() == 0)
    drag(page, 1, .3, .1, .6, .9) # over the histogram
    wait_for(lambda: len(values(page, 0, "x")) < everything and len(values(page, 1, "median", 1)) < boxes)
    wait_for(lambda: min(values(page, 1, "x")) > -60 and sum(values(page, 1, "y")) == len(values(page, 0, "x")))
    screenshot(page, "explorer-range")
    page.get_by_role("button", name="All labels").click()
    wait_for(lambda: len(values(page, 0, "x")) == everything)
    assert not ours(errors)


def test_play_goes_through_the_epochs(explorer):
    page, errors = explorer
    for _ in range(5): press(page, "Epoch", "ArrowLeft")
    wait_for(lambda: "Epoch 1:" in words(page))
    page.locator(".widget-play button, .jupyter-widget-play button").first.click()
    wait_for(lambda: "Epoch 6:" in words(page))
    assert not ours(errors)


def test_another_run_and_a_method_without_a_variance(explorer):
    page, errors = explorer
    before = values(page, 0, "x")
    choice(page, "Run").select_option(label="digits/HPL/1")
    wait_for(lambda: values(page, 0, "x") != before)
    choice(page, "Method").select_option(label="PseudoLabel")
    wait_for(lambda: "disagreement" in words(page) and choice(page, "Vertical").locator("option").count() == 2)
    assert choice(page, "Run").locator("option").all_inner_texts() == ["digits/PseudoLabel/0"]
    choice(page, "Method").select_option(label="HPL")
    wait_for(lambda: choice(page, "Vertical").locator("option").count() == 3)
    assert not ours(errors)


WATCH = f"""number => {{ // an explorer has two plots; its words are the last that Python sends
    const said = [...document.querySelectorAll(".widget-html")].filter(each => each.innerText.includes("samples, mean"))[number];
    const words = () => said.innerText;
    const point = () => {PLOT}[2*number]._fullData[0].x[0], before = [point(), words()];
    window.moved = 0;
    document.addEventListener("keydown", () => {{
        const start = performance.now();
        const look = () => point() === before[0] || words() === before[1] ? setTimeout(look) : window.moved = performance.now() - start;
        look();
    }}, {{once: true, capture: true}});
}}"""


def seconds_to_move(page, number):
    "From a key on an explorer's epoch slider until its points and words have changed, by the page's own clock."
    wait_for(lambda: page.evaluate(f"number => {PLOT}[2*number]._fullData[0].x.length", number)) # drawn
    page.evaluate(WATCH, number)
    page.locator(".widget-slider:has-text('Epoch') .noUi-handle").nth(number).press("ArrowLeft")
    return wait_for(lambda: page.evaluate("window.moved"))/1000


def test_ten_thousand_points_are_nearly_as_quick_as_five_hundred(lab, browser, capsys):
    "The quickest of ten epochs of each, in turn: what else the machine does makes single ones slower, and none quicker."
    cells = ["import numpy as np, pandas as pd\nfrom hpl_nb.explorer import Explorer", """def table(n, epochs=11):
    rng = np.random.default_rng(0)
    y = rng.uniform(20, 60, n)
    return pd.concat([pd.DataFrame(dict(run="r", method="HPL", epoch=e, index=range(n), y_true=y, pseudo_label=y + rng.normal(size=n)*10/e,
                                        strong_prediction=y, log_variance=rng.normal(size=n))) for e in range(1, epochs + 1)])""",
             "few = Explorer(table(500)); few", "many = Explorer(table(10_000)); many"]
    with notebook(browser, written(lab, "many", cells)) as (page, errors):
        wait_for(lambda: page.locator(".js-plotly-plot").count() == 4 and len(values(page, 2, "x")) == 10_000)
        idle(page)
        times = [(seconds_to_move(page, 0), seconds_to_move(page, 1)) for _ in range(10)]
        assert not ours(errors)
    few, many = map(min, zip(*times))
    with capsys.disabled(): print(f"\nexplorer: an epoch further in {few:.2f} s with 500 points, {many:.2f} s with 10,000")
    assert many < 6*few


@pytest.mark.parametrize("way", ["button", "interrupt"])
def test_a_live_run_can_be_stopped_and_resumed(lab, browser, way):
    "By the view's own button, which must get past the busy kernel, and by Jupyter's interrupt."
    cells = ["""from hpl_nb.core import seed_everything
from hpl_nb.data.rotated_digits import rotated_digits
from hpl_nb.live import fit_live
from hpl_nb.methods.hpl import HPL
from hpl_nb.models import small_cnn
from hpl_nb.training.loop import fit
from hpl_nb.training.state import OptimizerSettings, Train""", f"""data = rotated_digits()
settings = Train(epochs=1000, iterations_per_epoch=25, optimizer=OptimizerSettings(lr_body=3e-3, lr_head=3e-3))
def hpl():
    seed_everything(0)
    return HPL.paper(learner_lr=1e-3).build(small_cnn(width=8))
run = await fit_live(hpl(), data, settings, folder="run-{way}")""", "print('ended:', run.finished, len(run.log))",
             f"""seen = []
again = fit(hpl(), data, settings, folder="run-{way}", progress=False, watch=lambda progress: seen.append(progress.step) or True)
print("resumed:", again.finished, seen[0] > 25*len(run.log), len(again.log) >= len(run.log))"""]
    with notebook(browser, written(lab, f"live-{way}", cells)) as (page, errors):
        wait_for(lambda: len(values(page, 2, "y")) >= 8 and len(values(page, 0, "y")) >= 8)
        assert len(values(page, 1, "y")) >= 8
        wait_for(lambda: fits(page))
        wait_for(lambda: page.evaluate(UNDER_TOOLBAR) == 0)
        screenshot(page.locator(".jp-OutputArea-output:has(.js-plotly-plot)").first, f"live-{way}")
        if way == "button": page.locator(".jupyter-button:has-text('Stop')").click(force=True)
        else: page.locator("[title*='Interrupt the kernel'], [data-jp-item-name=interrupt] *").first.click()
        def printed(): return page.locator(".jp-OutputArea-output pre").all_inner_texts()
        wait_for(lambda: any("resumed:" in text for text in printed()), printed)
        assert any("ended: False" in text for text in printed()) and any("resumed: False True True" in text for text in printed())
        assert "Stopped; the same call goes on from there." in page.locator(".widget-html").first.inner_text()
        assert not ours(errors)
