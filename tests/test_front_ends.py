"""The page of front ends shows what was run."""

import json

import front_ends


def test_the_page_has_the_table_of_all_rows():
    rows = [front_ends.Row(**json.loads(line)) for line in front_ends.ROWS.read_text().splitlines()]
    assert front_ends.BEGIN + front_ends.table(rows) + front_ends.END in front_ends.PAGE.read_text()
    trained = {row.name for row in rows if isinstance(row.result, float)}
    assert all(row.result < 1e-9 and row.ran for row in rows if row.name in trained)
