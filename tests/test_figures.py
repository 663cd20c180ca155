"Figures hold the rows that they were given, look the same everywhere, and reports need nothing but themselves."
import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from hpl_nb import cli, companion, figures, metrics
from hpl_nb import report as report_module
from hpl_nb.core import HplError
from hpl_nb.estimator import SemiSupervisedRegressor
from hpl_nb.training.state import Train


def predictions(n=200, seed=0, method="a", epoch=3):
    rng = np.random.default_rng([seed, ord(method[0])])
    y, sigma = np.random.default_rng(9).integers(20, 40, n).astype(float), np.exp(rng.normal(size=n))
    return pd.DataFrame(dict(
        run=f"{method}{seed}", method=method, dataset="made-up", label_ratio=.1, seed=seed, epoch=epoch, split="unlabelled",
        index=range(n), output=0, y_true=y, y_pred=y + rng.normal(size=n),
        pseudo_label=y + sigma * rng.normal(size=n), strong_prediction=y, log_variance=2 * np.log(sigma)))


def log(seed=0, method="a", epochs=5):
    e = np.arange(epochs)
    return pd.DataFrame(dict(run=f"{method}{seed}", method=method, seed=seed, epoch=e, log_variance_mean=e / 9,
                             log_variance_sd=.1, weight_mean=1., val_mae=9. - e, val_r2=e / 10))


@pytest.fixture
def both(): return pd.concat([predictions(), predictions(method="b")], ignore_index=True)


def all_figures(table, **more):
    "Every figure of the module."
    logs, runs = pd.concat([log(), log(1), log(method="b")]), metrics.evaluate(table)
    return dict(
        boxes=figures.pseudo_label_boxplots(table, **more), scatter=figures.variance_scatter(table, **more),
        slider=figures.variance_scatter(table, at=[25, 30], **more), grid=figures.variance_grid(table, [25, 30, 35], **more),
        groups=figures.group_error_lines(metrics.group_errors(table, "pseudo_label"), **more),
        reliability=figures.reliability_diagram(metrics.reliability(table), **more),
        curves=figures.learning_curves(logs, **more), variance=figures.log_variance_curves(logs, methods=more.get("methods")),
        results=figures.results_chart(metrics.summarise(runs), runs, **more))


def test_every_figure_has_titles_units_and_a_transparent_background(both):
    before = both.copy()
    for name, figure in all_figures(both, unit="years").items():
        assert isinstance(figure, go.Figure) and figure.layout.title.text and figure.layout.width is None, name
        assert figure.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)" and figure.layout.template.layout.autosize
        titles = [axis.title.text for axis in (*figure.select_xaxes(), *figure.select_yaxes()) if axis.title.text]
        assert titles and (name == "variance" or any("years" in title for title in titles)), name
    pd.testing.assert_frame_equal(both, before)


def test_a_method_keeps_its_colour(both):
    only_b = both[both.method == "b"]
    for name, figure in all_figures(only_b, methods=["a", "b"]).items():
        colours = {t.line.color or t.fillcolor or t.marker.color for t in figure.data
                   if t.name in ("b", "b (n = 1)") and t.type != "bar"}
        assert colours == {"#D55E00"}, name


def test_styles_are_stable_and_differ():
    styles = figures.method_styles(f"method {i}" for i in range(14))
    assert len(set(styles.values())) == 14
    assert figures.method_styles(["method 0"])["method 0"] == styles["method 0"]


def test_boxes_are_tukeys_and_stay_small():
    table = predictions(100_000)
    figure = figures.pseudo_label_boxplots(table, width=1)
    bars, box, points = figure.data
    values = table.pseudo_label[table.y_true == box.x[3]]
    assert [box.q1[3], box.median[3], box.q3[3]] == pytest.approx(np.quantile(values, [.25, .5, .75]).tolist())
    assert sum(bars.y) == 100_000 and len(points.x) <= 2000 and len(figure.to_json()) < 500_000
    assert values.min() <= box.lowerfence[3] <= box.q1[3]


def test_samples_are_counted_once_for_several_runs(both):
    assert sum(figures.pseudo_label_boxplots(both).data[0].y) == 200
    assert len(figures.pseudo_label_boxplots(both.assign(y_true=30., pseudo_label=31.)).data[0].x) == 1


def test_scatter_shows_the_rows_and_names_them(both):
    names = [f"<b>{i}</b>.jpg" for i in both["index"]]
    first = figures.variance_scatter(both.assign(sample_name=names), at=30, width=4).data[0]
    rows = both[(both.method == "a") & both.y_true.between(28, 32)]
    assert list(first.x) == pytest.approx((rows.pseudo_label - rows.y_true).abs().tolist(), rel=1e-3)
    assert list(first.y) == pytest.approx(np.exp(rows.log_variance).tolist(), rel=1e-3)
    assert first.customdata[0][0] == f"&lt;b&gt;{rows['index'].iloc[0]}&lt;/b&gt;.jpg"
    assert figures.variance_scatter(both).layout.yaxis.type == "log"
    assert figures.variance_scatter(both.assign(log_variance=1.)).layout.yaxis.type is None


def test_scatter_slider_shows_one_label_at_a_time(both):
    figure = figures.variance_scatter(both, at=[25, 30, 35])
    assert [trace.visible for trace in figure.data] == [True, True] + 4 * [False]
    assert list(figure.layout.sliders[0].steps[1].args[0]["visible"]) == [False, False, True, True, False, False]


@pytest.mark.parametrize("panels", [1, 2, 3, 6])
def test_grid_has_a_panel_for_each_label_on_the_same_axes(both, panels):
    ats = [22, 25, 28, 30, 32, 35][:panels]
    figure, slider = figures.variance_grid(both, ats, unit="years"), figures.variance_scatter(both, at=ats)
    assert [note.text for note in figure.layout.annotations] == [f"{at} years" for at in ats]
    assert [list(trace.x) for trace in figure.data] == [list(trace.x) for trace in slider.data]
    assert len({trace.xaxis for trace in figure.data}) == panels and sum(trace.showlegend for trace in figure.data) == 2
    assert sum(axis.matches is None for axis in figure.select_xaxes()) == sum(axis.matches is None for axis in figure.select_yaxes()) == 1
    named = [axis for axis in figure.select_xaxes() if axis.title.text]
    assert len(named) == min(panels, 2) and all(axis.showticklabels is not False for axis in named)
    assert len(figures.variance_grid(both, ats, max_points=3).data[0].x) == 3
    many = pd.concat([predictions(20_000), predictions(20_000, method="b")])
    small = figures.variance_grid(many, ats)
    assert len(json.dumps(figures.show(small)._repr_mimebundle_())) < 100_000 and len(small.data[0].x) >= min(400, 400 / panels)


def moving(epochs, n=100, method="a", **more):
    tables = (predictions(n, method=method, epoch=epoch) for epoch in epochs)
    return pd.concat([table.assign(pseudo_label=table.pseudo_label + table.epoch, **more) for table in tables], ignore_index=True)


def test_movie_shows_the_same_samples_in_every_epoch():
    table = moving(range(1, 8))
    known = table.drop(index=table.index[(table.epoch == 3) & (table["index"] == 5)])
    figure = figures.pseudo_label_movie(known.sample(frac=1, random_state=0), unit="years")
    assert [frame.name for frame in figure.frames] == list("1234567") and len(figure.data[0].x) == 99
    assert "sample 5" not in figure.data[0].customdata and "sample 6" in figure.data[0].customdata
    for frame in figure.frames:
        rows = table[(table.epoch == int(frame.name)) & (table["index"] != 5)]
        points, = frame.data
        assert list(points.y) == pytest.approx(rows.pseudo_label.tolist(), rel=1e-3) and points.x is None
        low, high = table.log_variance[table["index"] != 5].agg(["min", "max"])
        assert points.marker.color / 255 * (high - low) + low == pytest.approx(rows.log_variance, abs=(high - low) / 500)
    low, high = figure.layout.yaxis.range
    assert low < min(known.pseudo_label.min(), 20) and high > max(known.pseudo_label.max(), 39)


def test_movie_colour_bar_names_variances():
    bar = figures.pseudo_label_movie(moving([1, 2]), unit="years").data[0].marker.colorbar
    z = moving([1, 2]).log_variance
    places = [(np.log(float(text)) - z.min()) / (z.max() - z.min()) * 255 for text in bar.ticktext]
    assert bar.title.text == "σ² (years²)" and list(bar.tickvals) == pytest.approx(places, abs=.6)
    for constant in (0., -700.): figures.pseudo_label_movie(moving([1, 2], log_variance=constant))


@pytest.mark.parametrize("epochs", [2, 20, 100])
def test_movie_is_small(epochs):
    table = moving(range(epochs), 2000).assign(sample_name=lambda rows: "faces/" + rows["index"].astype(str) + ".jpg.chip.jpg")
    figure = figures.pseudo_label_movie(table)
    assert len(figure.frames) == min(epochs, 30) and figure.frames[-1].name == str(epochs - 1)
    assert 100 <= len(figure.data[0].x) <= 400 and len(json.dumps(figures.show(figure)._repr_mimebundle_())) < 100_000


def test_movie_without_a_variance_and_of_wrong_tables():
    for table in (moving([1, 2]).drop(columns="log_variance"), moving([1, 2], log_variance=np.nan)):
        figure = figures.pseudo_label_movie(table)
        assert figure.data[0].marker.color == "#0072B2" and figure.frames[0].data[0].marker.color is None
    with pytest.raises(HplError, match="record_every"): figures.pseudo_label_movie(moving([1]))
    with pytest.raises(HplError, match="2 runs"): figures.pseudo_label_movie(pd.concat([moving([1, 2]), moving([1, 2], method="b")]))
    with pytest.raises(HplError, match="twice"): figures.pseudo_label_movie(pd.concat([moving([1, 2]), moving([2, 3])]))
    other_samples = moving([2]).assign(index=lambda rows: rows["index"] + 500)
    with pytest.raises(HplError, match="every epoch"): figures.pseudo_label_movie(pd.concat([moving([1]), other_samples]))
    with pytest.raises(HplError, match="ats is empty"): figures.variance_grid(predictions(), [])


def test_every_figure_says_what_it_shows(both):
    for name, figure in dict(all_figures(both), movie=figures.pseudo_label_movie(moving([1, 2, 3]))).items():
        shown = figures.show(figure)._repr_mimebundle_()
        words = re.search(r'<figure class="hpl-figure" aria-label="([^"]+)">', shown["text/html"])[1]
        assert words in shown["text/html"].split("<p>")[1] and len(words) > 40 and " series" in words, name
    assert "3 frames." in words and shown["text/plain"].startswith("Figure: Pseudo-labels of a")
    given = figures.show(figure, alt='<"A" & B>')._repr_mimebundle_()["text/html"]
    assert given.count("&lt;&quot;A&quot; &amp; B&gt;") == 2 and '<"A"' not in given


def test_results_show_every_seed_and_no_spread_of_one():
    runs = metrics.evaluate(pd.concat([predictions(seed=s) for s in range(3)] + [predictions(method="b")]))
    figure = figures.results_chart(metrics.summarise(runs), runs, "mse")
    seeds, mean, _, alone = figure.data
    assert len(seeds.x) == 3 and mean.error_x.array[0] > 0 and alone.error_x.array[0] is None
    assert [mean.y[0], alone.y[0]] == ["a (n = 3)", "b (n = 1)"]
    with pytest.raises(HplError, match="several rows"):
        figures.results_chart(metrics.summarise(pd.concat([runs, runs.assign(split="test")])))


def test_log_figures_keep_epochs_in_order_and_skip_methods_without_a_variance():
    table = pd.concat([log()[::-1], log(method="b").assign(log_variance_mean=np.nan)])
    assert list(figures.learning_curves(table).data[0].x) == [0, 1, 2, 3, 4]
    assert len(figures.log_variance_curves(table).data) == 3
    assert figures.learning_curves(table, "val_r2").layout.yaxis.title.text == "Validation R²"
    with pytest.raises(HplError, match="learn no variance"):
        figures.log_variance_curves(table.assign(log_variance_mean=np.nan))


def test_wrong_tables_are_refused(both):
    two = pd.concat([both, both.assign(epoch=4)])
    for draw in (figures.pseudo_label_boxplots, figures.variance_scatter):
        with pytest.raises(HplError, match="last_epochs"): draw(two)
        with pytest.raises(HplError, match="no rows"): draw(both[:0])
        with pytest.raises(HplError, match="no column pseudo_label"): draw(both.drop(columns="pseudo_label"))
    with pytest.raises(HplError, match="labels run from"): figures.variance_scatter(both, at=90)
    with pytest.raises(HplError, match="no column val_mse"): figures.learning_curves(log(), "val_mse")
    with pytest.raises(HplError, match="group errors"): figures.group_error_lines(both)


def test_show_is_deterministic_and_safe_in_html(both):
    one, two = (figures.show(figures.variance_scatter(both.assign(method="</script><script>alert(1)")))._repr_mimebundle_()
                for _ in range(2))
    assert one == two and one["text/html"].count("</script>") == 1
    assert "data" in one["application/vnd.plotly.v1+json"] and one["text/plain"].startswith("Figure: ")
    assert len(json.dumps(one)) < 100_000


@pytest.fixture
def report(tmp_path, both):
    sections = [(f"{name} & more", "First.\n\nSecond </script> <b>.", figure) for name, figure in all_figures(both).items()]
    table = metrics.format_table(metrics.summarise(metrics.evaluate(both))).assign(method="x" * 80 + "<i>")
    return figures.save_report(tmp_path/"new"/"report.html", "Title <1>", [("Table", "", table), ("None", "t", None), *sections])


def test_report_needs_nothing_else(report):
    page = report.read_text(encoding="utf-8")
    head, body = page.split("<body>")
    assert head.count("plotly.js v") == 1 and 'name="viewport"' in head and "prefers-color-scheme:dark" in head
    assert "default-src 'none'" in head and not re.search(r'(src|href)="', body) and "cdn.plot.ly" not in body
    assert "Title &lt;1&gt;" in body and "Second &lt;/script&gt; &lt;b&gt;." in body and "x" * 80 + "&lt;i&gt;" in body
    assert body.count("aria-labelledby") == body.count("<figure") == 9
    assert len(set(re.findall(r' id="([^"]+)"', body))) == len(re.findall(r' id="([^"]+)"', body))


def test_report_is_whole_or_not_there(report):
    before = report.read_bytes()
    with pytest.raises(HplError, match="holds a str"): figures.save_report(report, "t", [("Wrong", "", "text")])
    assert report.read_bytes() == before and [path.name for path in report.parent.iterdir()] == ["report.html"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_report_is_drawn_without_a_network(report, tmp_path):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path/'profile'}",
               "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000", "--dump-dom", report.as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert page.count('class="plot-container') == 9 and "has not run here.</p>" not in page


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    "Run folders of estimators without true labels of the unlabelled rows: with validation rows, without, and one of another method."
    rng, top = np.random.default_rng(0), tmp_path_factory.mktemp("runs")
    X, y = rng.normal(size=(80, 3)), np.where(np.arange(80) < 40, rng.normal(size=80), np.nan)
    how = dict(train=Train(epochs=2, iterations_per_epoch=2), random_state=0)
    SemiSupervisedRegressor(folder=top/"validated", **how).fit(X, y)
    SemiSupervisedRegressor(folder=top/"bare", validation_fraction=0., **how).fit(X, y)
    SemiSupervisedRegressor("supervised", folder=top/"supervised", **how).fit(X, y)
    return top


def headings(path): return re.findall(r"<h2[^>]*>(.*?)</h2>", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("folder", "drawn"), [
    ("validated", ["Error on the validation rows", "Rank correlations", "Validation error", "Log-variance over training"]),
    ("bare", ["Rank correlations", "Log-variance over training"]),
    ("supervised", ["Error on the validation rows", "Validation error"])])
def test_figures_of_an_estimators_run_without_true_labels(blind, folder, drawn, tmp_path):
    cli.hpl_figures([str(blind/folder), "--out", str(out := tmp_path/"report.html")])
    assert [name for name in headings(out) if name not in ("Results", "Errors of the pseudo-labels")] == drawn
    page = out.read_text(encoding="utf-8").split("<body>")[1]
    assert page.count("The true labels of the unlabelled rows are unknown, so the figures that need them are left out") == 1
    assert ("No rows were held out" in page) == (folder == "bare") and ("No test rows were held out" in page) == (folder != "bare")
    assert "test_mae" not in page and "<td>n/a</td>" not in page and page.count("<figure") == len(drawn) - ("Rank correlations" in drawn)


def test_report_of_runs_of_several_kinds(blind, tmp_path):
    runs = report_module.finished_runs([blind])
    assert len(runs) == 3 and report_module.results_frame(runs)["mae"].isna().all()
    table = report_module.results_table(report_module.results_frame([run for run in runs if "val_mae" in run.metrics]))
    assert {"val_mae", "seconds"} <= set(table) and not {"mae", "mse", "r2", "pseudo_label_mae"} & set(table)
    assert len(headings(report_module.report([runs[1], runs[2]], tmp_path/"two.html", "Two"))) == 6
    assert "HPL (paper)" in companion.how_made(runs)
    with pytest.raises(HplError, match="no run to report"): report_module.report([], tmp_path/"none.html", "None")


@pytest.mark.parametrize(("file", "change", "says"), [
    *[("config.json", {name: None}, f"config has {name} = None")
      for name in ("run", "dataset", "method", "unit", "label_ratio", "seed", "settings")],
    ("config.json", {"settings": []}, "config has settings = []"), ("config.json", {"format": None}, "earlier version"),
    ("config.json", {"experiment": "x"}, ""), ("config.json", {"experiment": {"data": 3}}, ""), ("config.json", None, "damaged"),
    *[("metrics.json", {name: None}, f"metrics has {name} = None") for name in ("epoch", "epochs", "steps", "seconds")],
    ("metrics.json", {"val_mae": "<b>"}, "metrics has val_mae = '<b>'"), ("metrics.json", {"epoch": 7}, "no row of the selected epoch 7")])
def test_a_forged_or_incomplete_run_folder_is_refused(blind, tmp_path, file, change, says):
    folder = shutil.copytree(blind/"validated", tmp_path/"run")
    (folder/"checksums.json").unlink()
    content = json.loads((folder/file).read_text())
    new = {name: value for name, value in {**content, **(change or {})}.items() if value is not None}
    (folder/file).write_text(json.dumps(new) if change else "[1, 2]")
    with pytest.raises(SystemExit) if says else nullcontext() as error: cli.hpl_figures([str(folder), "--out", str(tmp_path/"report.html")])
    assert not says or says in str(error.value) and str(folder) in str(error.value)


def test_the_common_look_keeps_the_legend_out_of_the_toolbar():
    "Plotly puts a legend that is beyond its container at the top, where the toolbar is, so it stands below the title in each."
    from hpl_nb.live import LiveView
    view = LiveView()
    for figure in (view.losses, view.variance, view.validation, figures.learning_curves(log())):
        legend = figure.layout.legend
        assert (legend.yref, legend.yanchor) == ("container", "top") and 30 < (1 - legend.y)*figure.layout.height < 60
    view.close()


def test_figures_are_not_imported_with_the_package():
    code = "import sys, hpl_nb, hpl_nb.metrics; print('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
