"""Accuracy by tick budget: budgets by default, models without a loop, one cell for each size and budget."""

import pytest

from stepladder.eval.depth import NO_LOOP, budgets, depth, table
from stepladder.eval.suite import Job


def job(loaded):
    return Job(loaded.model, loaded.tokenizer, loaded.run, loaded.run.eval)


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [(3, (), (1, 2, 3, 6, 12)), (1, (), (1, 2, 4)), (2, (), (1, 2, 4, 8)), (4, (5, 1, 5), (1, 5))],
)
def test_budgets_bracket_the_trained_one(make, trained, asked, expected):
    loaded = make(model="shared_loop", fields={"ticks": trained})
    assert budgets(loaded.model, loaded.run.model, asked) == expected


def test_budgets_are_honoured_item_by_item(make):
    loaded = make(model="shared_loop", fields={"ticks": 2}, eval={"samples": 6, "ticks": [1, 4]})
    outcome = depth(job(loaded))
    assert len(outcome.records) == 6 * 5 * 2
    assert all(record["ticks"] == record["budget"] for record in outcome.records)
    assert [(c["task"], c["size"], c["ticks"], c["n"]) for c in outcome.body["cells"]] == [
        (task, size, ticks, 6)
        for task, sizes in (("parity", (8, 16, 20)), ("addition", (4, 6)))
        for ticks in (1, 4)
        for size in sizes
    ]
    shown = table(outcome.body)
    assert [column.header for column in shown.columns] == ["task", "size", "", "1", "4"]
    assert shown.row_count == 5


def test_without_a_loop_there_is_one_row_and_a_sentence(make):
    loaded = make(eval={"samples": 6, "ticks": [2, 4]})
    outcome = depth(job(loaded))
    assert {cell["ticks"] for cell in outcome.body["cells"]} == {1}
    assert outcome.body["note"] == NO_LOOP
    assert table(outcome.body).caption == NO_LOOP
