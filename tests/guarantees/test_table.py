"""The table of guarantees is written when all cases were observed, whichever process observed them."""

import random

from tests.helpers.guarantees import GUARANTEES, Observed


def test_the_table_does_not_depend_on_the_order_of_the_files(tmp_path):
    tests = [("tests/a.py::one", "first"), ("tests/b.py::one", "second"), ("tests/b.py::two", "third")]
    tables = set()
    for order in range(3):
        files = ["tests/a.py", "tests/b.py"]
        random.Random(order).shuffle(files)
        observed = Observed()
        for file in files:
            for case in GUARANTEES:
                for test, outcome in tests:
                    if test.startswith(file):
                        observed.record(case, outcome, test)
        tables.add(observed.table())
    (table,) = tables
    assert "| first<br>second<br>third |" in table


def test_a_table_is_written_only_when_every_case_was_observed(tmp_path):
    observed = Observed()
    for case in list(GUARANTEES)[1:]:
        observed.record(case, "passed", "tests/a.py::one")
    observed.write(tmp_path / "table.md")
    assert not list(tmp_path.iterdir())
    observed.record(next(iter(GUARANTEES)), "at 127.0.0.1:1234: /folder/of/a/file.png a | b", "tests/a.py::one")
    observed.write(tmp_path / "table.md")
    assert "| at 127.0.0.1: file.png a \\| b |" in (tmp_path / "table.md").read_text()
