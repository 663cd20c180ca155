"Where things are; one thread, since several processes share the machine; and what the notebooks' cells measure."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root():
    "The repository."
    return ROOT


@pytest.fixture(scope="session")
def shared():
    "The folder of data and weights beside the repository; tests that need it are skipped without it."
    folder = ROOT.parent/"shared"
    if not (folder/"data").is_dir(): pytest.skip("no shared data beside the repository")
    return folder


def pytest_terminal_summary(terminalreporter):
    lengths = getattr(terminalreporter.config, "export_cell_lengths", None)
    if lengths: terminalreporter.write_line(f"{len(lengths)} exported cells: median {median(lengths):.0f} lines, longest {max(lengths)}")
