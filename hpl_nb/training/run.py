from hpl_nb.core import RunFolder
from hpl_nb.trainer import Run, load_run
