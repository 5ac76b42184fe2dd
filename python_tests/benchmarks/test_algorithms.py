"""The algorithms' benchmark: what its claims are asked of, on curves made by hand; its runs' command lines."""

import json

import pytest
import torch

from benchmarks import algorithms, best_of_n
from benchmarks.algorithms_claims import Curve, claims, common_level, crossing, raises_reward, reward_at
from rftcore.training import load_config, recipes
from rftcore.training.algorithm_configs import ALGORITHMS


def made(queries, reward, drift=None):
    zeros = [0.0] * len(queries)
    return Curve(queries, queries, zeros, zeros, reward, zeros, drift or zeros)


def test_crossing_is_linear_between_evaluations_and_the_first():
    c = made([0, 10, 20, 30], [-2.0, -1.0, -1.5, 0.0], [0.0, 1.0, 2.0, 3.0])
    assert crossing(c, -1.5, "queries") == 5.0
    assert crossing(c, -0.75, "queries") == 25.0
    assert crossing(c, -0.75, "drift") == 2.5
    assert crossing(c, -3.0, "queries") == 0
    with pytest.raises(ValueError, match="never reached 1.0; its best was 0.0"):
        crossing(c, 1.0, "queries")
    assert reward_at(c, 5) == -1.5 and reward_at(c, 30) == 0.0


def test_common_level_is_what_the_worst_run_reached():
    good, bad = made([0, 10], [-2.0, 0.0]), made([0, 10], [-2.0, -1.0])
    assert common_level([good], [good, bad]) == -1.0
    assert common_level([good], [made([0, 10], [-2.0, -2.5])]) is None


def test_rising_beyond_seed_noise_asks_the_mean_and_every_run():
    runs = [made([0, 10], [-2.0, last]) for last in (-1.0, -1.1, -0.9)]
    assert raises_reward(runs)
    assert not raises_reward([*runs, made([0, 10], [-2.0, -2.01])])
    assert not raises_reward([made([0, 10], [-2.0, last]) for last in (-1.9, 3.0, -1.8)])


def test_claims_tell_what_was_seen():
    slow = [made([0, 1000], [-2.0, -1.0], [0.0, 0.4])] * 2
    fast = [made([0, 40], [-2.0, 0.0], [0.0, 0.2])] * 2
    found = {row["claim"]: row for row in claims({"draft": fast, "ddpo": slow, "dpok": fast, "sft": slow})}
    row = found["draft needs 10 times fewer reward queries than ddpo for one reward"]
    assert row["reproduces"] == "yes" and row["seen"].startswith("50.0 times fewer at -1.00: 20 ± 0 against 1000 ± 0")
    row = found["dpok's KL keeps its drift below ddpo's at one reward"]
    assert row["reproduces"] == "yes" and "0.1000" in row["seen"] and "0.4000" in row["seen"]
    assert found["online dpok beats KL-regularised sft"]["reproduces"] == "yes"
    assert found["online ddpo beats KL-regularised sft"]["reproduces"] == "no"
    swapped = claims({"draft": slow, "ddpo": fast})
    assert swapped[1]["reproduces"] == "no" and swapped[1]["seen"].startswith("0.0 times fewer")


def test_rows_are_all_recipes_for_digits_and_their_command_lines_parse(tmp_path):
    assert {algorithms.PREFIX + row for row in algorithms.ROWS} == {
        name for name in recipes.names() if name.startswith(algorithms.PREFIX) and "_jpeg_" not in name
    }
    assert {recipes.algorithm(algorithms.PREFIX + row) for row in algorithms.ROWS} == set(ALGORITHMS)
    for row in algorithms.ROWS:
        algorithm, _, recipe, *flags = algorithms.command(row, 3, tmp_path / row)[4:]
        values = load_config(algorithm, recipe, *flags)
        assert values.seed == 3 and values.sampling.eta == 1.0 and values.eval.seed == algorithms.EVALUATION_SEED
        assert 4 <= values.train.max_train_steps / values.eval.validation_steps <= algorithms.EVALUATIONS + 1


def test_curve_reads_metrics(tmp_path):
    evaluation = {"eval/reward/digits": -1.0, "eval/reward/digits_held_out": 0.5, "eval/drift/eps": 0.1}
    epoch = {"count/reward_queries": 8, "count/samples": 4, "count/unet_evaluations": 160, "time/epoch_s": 1.5}
    lines = [{"step": 0, **evaluation}, {"step": 1, **epoch}, {"step": 2, **epoch, "count/reward_queries": 16}]
    lines.append({"step": 2, **evaluation, "eval/reward/digits": -0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    c = algorithms.curve(tmp_path)
    assert (
        c.queries == [0, 16] and c.seconds == [0, 3.0] and c.reward == [-1.0, -0.5] and c.unet_evaluations == [0, 160]
    )


def test_finished_runs_are_not_repeated_and_a_failed_one_is_told(tmp_path, monkeypatch):
    runs = algorithms.Runs(tmp_path, jobs=2)
    done = runs.folder("draft", 0)
    done.mkdir(parents=True)
    (done / "results.json").write_text("{}")
    monkeypatch.setattr(algorithms, "command", lambda *_: ["false"])
    runs.carry_out([("draft", 0)])
    with pytest.raises(RuntimeError, match="false ended with status 1; see .*draft/1.log"):
        runs.carry_out([("draft", 0), ("draft", 1)])


def test_best_of_n_figures():
    r, held_out = torch.tensor([[0.0, 1.0], [2.0, 4.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert best_of_n.figures(r, held_out) == [
        {"n": 1, "reward": 1.75, "held_out": 0.5},
        {"n": 2, "reward": 2.5, "held_out": 0.5},
    ]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import algorithms_plot

    curves = {"draft": [made([0, 10, 20], [-2.0, -1.0, 0.0])._replace(seconds=[0, 1, 2])] * 2}
    yardstick = [{"points": [{"n": 1, "reward": -2.0, "held_out": 0.5}]}]
    assert algorithms_plot.draw(curves, yardstick, tmp_path / "plot.png").stat().st_size > 10_000
