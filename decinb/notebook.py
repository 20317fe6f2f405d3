"""Where the code runs."""

import sys


def in_notebook() -> bool:
    """Whether there is a notebook to show pictures in."""
    ipython = sys.modules.get("IPython")  # where it was never imported, nobody can be in a notebook
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")
