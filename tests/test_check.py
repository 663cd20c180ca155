"What the maintainer's own tools find: what a change can break, and outputs that are stale."
import changed
import notebooks
import pytest


@pytest.fixture
def affected(monkeypatch):
    "Notebooks and tests, with their distances, that a change of a module's text reaches."
    def find(path, now, before):
        text = changed.text_of
        assert now in text(path)
        monkeypatch.setattr(changed, "changed_files", lambda base: [path])
        monkeypatch.setattr(changed, "text_of", lambda path, base=None: text(path).replace(now, before) if base else text(path))
        return {(path, test): distance for distance, path, tests in changed.affected() for test in tests or [""]}
    return find


def test_a_change_reaches_what_names_it(affected):
    found = affected("hpl_nb/loss.py", "weight*(pseudo_label - prediction)**2", "weight*(prediction - pseudo_label)**2")
    assert found["nbs/40_loss.ipynb", ""] == found["tests/test_methods.py", "TestPhi"] == 1, "its lessons, and a test of it"
    assert found["nbs/61_methods.hpl.ipynb", ""] == 2, "the lessons of a method that it is part of"
    assert not {"nbs/84_tabular.ipynb", "nbs/30_models.ipynb", "tests/test_metrics.py"} & {path for path, _ in found if found[path, _] < 3}


def test_a_change_reaches_nothing_else(affected):
    found = affected("hpl_nb/tabular.py", "Errors on one table in words", "Errors of one table in words")
    assert {path for path, _ in found} == {"nbs/84_tabular.ipynb", "nbs/experiments/tabular.ipynb", changed.ALWAYS}


def test_a_patched_method_belongs_to_its_class(affected):
    found = affected("hpl_nb/predictor.py", "predictor_content(self)", "predictor_content(self, self)")
    assert found["nbs/75_predictor.ipynb", ""] == 1 and found["nbs/83_estimator.ipynb", ""] == 2
    assert found["tests/test_predictor.py", "test_frames"] == 1, "it names the class"


def test_every_test_is_reached_by_its_own_change(affected):
    found = affected("tests/small_runs.py", "METHODS = ", "METHODS =  ")
    assert list(found) == [(changed.ALWAYS, "")], "spaces change nothing"
    found = affected("tests/test_check.py", "spaces change nothing", "spaces change all")
    assert found["tests/test_check.py", "test_every_test_is_reached_by_its_own_change"] == 0


@pytest.mark.parametrize("stored, now, same", [
    ("MAE 5.01 years", "MAE 5.02 years", True), ("MAE 5.01 years", "MAE 5.51 years", False), ("12 runs", "13 runs", False),
    ("0.09", "0.10", True),
    ("1,234 rows", "1234 rows", True), ("<A>", "<A at 0x7f99>", True), ("in 3.1 s", "in 9 s", True), ("HPL", "UPS", False)])
def test_outputs_are_compared_as_words_and_numbers(stored, now, same):
    assert notebooks.is_same(*(notebooks.said({"text": [text]}) for text in (stored, now))) == same


def test_stale_outputs_are_named():
    def cell(text): return [{"output_type": "execute_result", "data": {"text/plain": [text]}}]
    warning = [{"output_type": "stream", "name": "stderr", "text": ["a warning"]}]
    assert notebooks.stale(cell("a\n  b"), cell("a b") + warning) == ""
    assert notebooks.stale(cell("R2 of 0.9"), cell("R2 of 0.7")) == "stored '0.9', now '0.7'"
    assert "stored" in notebooks.stale(cell("a"), []) and "now" in notebooks.stale([], cell("a"))
