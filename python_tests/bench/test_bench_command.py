"""`rftcore bench` as a user calls it, its JSON, and the committed matrix that is made with it."""

import contextlib
import io
import json
import subprocess
import sys

import pytest

from benchmarks import side_by_side, side_by_side_plot
from benchmarks.algorithms_plot import why_not
from rftcore import cli
from rftcore.bench.run import Result, bench
from rftcore.commands.bench import run, text
from rftcore.commands.bench_options import BenchOptions
from rftcore.errors import UsageError


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": "sd16"}, "--model sd16 is unknown; did you mean 'sd15'?"),
        ({"work": "drafts"}, "--work drafts is unknown; did you mean 'draft'?"),
        ({"dtype": "fp8"}, "--dtype fp8 is unknown"),
        ({"device": "tpu"}, "--device tpu is unknown"),
        ({"backprop_steps": "11"}, "--backprop_steps 11 must be all or lie in [1, 10], of --steps"),
        ({"backprop_steps": "some"}, "--backprop_steps some must be all"),
        ({"steps": 0, "backprop_steps": "all"}, "--steps 0 must be at least 1"),
        ({"work": "ddpo", "batch": 1}, "give at least 2"),
        ({"methods": " , "}, "--methods is empty"),
        ({"guidance_scale": float("nan")}, "--guidance_scale nan must be a finite number"),
    ],
)
def test_what_cannot_work_is_named(options, words):
    with pytest.raises(UsageError) as refused:
        BenchOptions(**options).validate()
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"resolution": 33, "model": "sd15"}, "--resolution 33 must be a multiple of 64"),
        ({"memory_limit": "much"}, "--memory_limit much must be a number of bytes"),
        ({"dtype": "fp16", "device": "cpu"}, "--dtype fp16 with --device cpu"),
        ({"methods": "fast"}, "--methods fast names nothing"),
    ],
)
def test_what_the_machine_or_the_model_cannot_is_named(options, words):
    with pytest.raises(UsageError, match=words):
        bench(BenchOptions(**{"model": "tiny", **options}))


def test_an_output_that_is_a_folder_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(UsageError, match="is a folder; give a file"):
        run(BenchOptions(model="tiny", output=str(tmp_path)))


def test_a_mistake_is_one_line_and_status_two():
    asked = [sys.executable, "-m", "rftcore", "bench", "--method", "stock", "--model", "digits"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("rftcore: error: ")
    assert "'--methods'" in done.stderr


@pytest.fixture(scope="module")
def by_command(tmp_path_factory):
    """What the command prints, and its JSON."""
    output = tmp_path_factory.mktemp("bench") / "folder" / "out.json"
    asked = ["--model", "tiny", "--work", "train_step", "--methods", "stock,fp32_lora,rftcore,rftcore@1KiB"]
    asked += ["--repeats", "2", "--threads", "1", "--output", str(output)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["rftcore", "bench", *asked])
        assert cli.main() == 0
    return printed.getvalue(), json.loads(output.read_text())


def test_the_command_prints_a_table_and_writes_it(by_command):
    printed, content = by_command
    rows = {row["method"]: row for row in content["rows"]}
    assert list(rows) == ["stock", "fp32_lora", "rftcore", "rftcore@1KiB"]
    assert rows["fp32_lora"]["status"].startswith("in fp32 it is stock")
    assert "cannot be kept" in rows["rftcore@1KiB"]["status"]
    for name in ("stock", "rftcore"):
        row = rows[name]
        assert row["status"] == "ok" and row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["samples_per_s"] == pytest.approx(1 / row["median_s"])
        assert row["tflop_per_s"] == pytest.approx(row["tflop"] / row["median_s"])
        assert 0 < row["ceiling_percent"] < 100 and f"| {name} | ok |" in printed
    assert rows["stock"]["extra_flop_percent"] == 0 and rows["rftcore"]["saved_mib"] < rows["stock"]["saved_mib"]
    assert rows["rftcore"]["gradient_error"] <= 2 * rows["stock"]["gradient_error"]
    assert content["environment"]["command"].startswith("rftcore bench --model tiny")
    assert content["settings"]["ceiling_tflop_per_s"] > 0 and "Pareto, time against memory" in printed


def test_what_is_written_reads_back_as_it_was_printed(by_command):
    printed, content = by_command
    assert text(Result(**content)) in printed


def test_a_part_that_is_run_again_replaces_its_rows_alone(by_command):
    result = Result(**by_command[1])
    content = side_by_side.merged({}, "digits/train_step", result)
    content = side_by_side.merged(content, "37m/train_step", result)
    again = side_by_side.merged(json.loads(json.dumps(content)), "37m/train_step", result)
    assert again == content
    assert [row["part"] for row in content["rows"]] == ["37m/train_step"] * 4 + ["digits/train_step"] * 4
    assert content["parts"]["digits/train_step"]["pareto"] == result.pareto
    assert not side_by_side.check(content)


def test_parts_are_what_the_command_takes():
    for part in side_by_side.PARTS.values():
        part.made(2).validate()
    assert side_by_side.JUDGED in side_by_side.PARTS
    with pytest.raises(SystemExit, match="names no part"):
        side_by_side._chosen(["38m/*"], False)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_plot_has_a_panel_for_each_number_of_steps(tmp_path):
    rows = [
        {"part": f"digits/draft/{count}", "method": method, "median_s": seconds, **mib}
        for count in side_by_side_plot.PANELS
        for method, seconds, mib in (
            ("stock+steps", 2.0, {"peak_mib": 10.0}), ("compile@0.5", 1.5, {"rss_mib": 30.0}),
            ("rftcore", 1.0, {"peak_mib": 20.0}), ("rftcore@least", 2.0, {"peak_mib": 5.0}),
        )
    ]  # fmt: skip
    drawn = side_by_side_plot.draw(rows, "digits", tmp_path / "plot.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")
