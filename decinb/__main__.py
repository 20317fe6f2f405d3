"""``python -m decinb``: what a bug report needs."""

from decinb.report import report

print(report())
