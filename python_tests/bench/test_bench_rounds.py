"""Processes that take turns, and what becomes of one that cannot go on."""

import pytest

from rftcore.bench.methods import method
from rftcore.bench.rounds import Worker, in_turns
from rftcore.bench.run import bench
from rftcore.bench.worker import Failed
from rftcore.commands.bench_options import BenchOptions

OPTIONS = BenchOptions(model="tiny", work="train_step", device="cpu", threads=1, repeats=2, gradient_error="no")


def test_methods_take_turns_and_who_fails_has_no_more():
    order = []

    def run(name):
        order.append(name)
        return Failed("OOM") if name == "b" and len(order) > 3 else len(order)

    answers = in_turns("abc", 3, run)
    assert "".join(order) == "abcabcac"
    assert answers == {"a": [1, 4, 7], "b": [2, Failed("OOM")], "c": [3, 6, 8]}


@pytest.fixture
def start():
    workers = []

    def make(limit=2**40, timeout=300):
        workers.append(Worker(OPTIONS, limit, timeout))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def test_a_process_over_its_limit_is_a_status_and_not_the_end(start):
    small = start(limit=2**20)
    answer = small.call("prepare", method("stock"), None)
    assert isinstance(answer, Failed) and answer.status.startswith("OOM: held ") and "1.0 MiB" in answer.status
    assert small.dead and isinstance(small.call("run"), Failed)
    assert "took more than" in start(timeout=0.01).call("prepare", method("stock"), None).status
    sound = start()
    assert sound.call("prepare", method("stock"), None) > 0
    # What goes wrong inside is told, and the process goes on.
    assert "TypeError" in sound.call("prepare", "no method", None, None).status
    answer = sound.call("run")
    assert answer["seconds"] > 0 and 0 <= answer["rss_mib"] < 1000


def test_a_run_whose_methods_run_out_of_memory_has_all_its_rows():
    options = BenchOptions(**{**vars(OPTIONS), "memory_limit": "1MiB", "methods": "stock,compile,rftcore"})
    result = bench(options, tell=lambda line: None)
    assert [row["method"] for row in result.rows] == ["stock", "compile", "rftcore"]
    assert all(row["status"].startswith("OOM: held ") and "median_s" not in row for row in result.rows)
    assert result.pareto["holds"] is False
