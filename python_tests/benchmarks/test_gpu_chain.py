"""The benchmark of chains on a GPU runs, here with tiny models and emulated graphs: what it measures needs a GPU."""

import json
import types
import warnings
from pathlib import Path

import pytest
import torch

import rftcore
from benchmarks import gpu_chain, gpu_chain_plans, harness
from benchmarks.draft_step import relative_error
from benchmarks.gpu_chain import CAPTURED, CHECKPOINTED, EXACTNESS, NO_LORA, PLAIN, STOCK, Bench
from benchmarks.gpu_chain_models import (
    GUIDANCE,
    SCHEDULER,
    Ours,
    Stock,
    Training,
    add_lora,
    make_inputs,
    make_unet,
    make_vae,
    our_rewards,
    stock_rewards,
)
from benchmarks.gpu_chain_plans import FULL, TINY, asked, plans
from rftcore.sampling import sampler as sampler_module
from rftcore.sampling.captures import Captures

CPU = torch.device("cpu")
GIB = 2**30


# Of a machine with a GPU, emulated here: half a minute.
pytestmark = pytest.mark.slow


@pytest.fixture
def emulated(monkeypatch):
    """Graphs are captured on the CPU, as the sampler's own tests emulate them."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "sampling")
    from recorded import RecordedGraphs

    def captures(denoiser, enabled):
        return Captures(denoiser, enabled, lambda device: RecordedGraphs(), "cpu")

    monkeypatch.setattr(sampler_module, "Captures", captures)


@pytest.fixture(scope="module")
def plans_file(tmp_path_factory):
    """With all plans of the tiny works."""
    file = tmp_path_factory.mktemp("runs") / "made" / "plans.json"
    gpu_chain.main(["--tiny", "--only-plans", "--plans", str(file)])
    return file


@pytest.fixture
def run(monkeypatch, tmp_path, plans_file):
    """Runs it tiny, and reads what it wrote."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")

    def run(*arguments):
        try:
            gpu_chain.main(["--tiny", "--device", "cpu", "--repeats", "1", "--plans", str(plans_file), *arguments])
        finally:
            content = json.loads((tmp_path / "results" / "gpu_chain_tiny.json").read_text())
            run.rows = content["rows"]
        return run.rows

    return run


def bench(seconds=1e9):
    return Bench(TINY, CPU, 1, seconds)


def test_every_case_is_run(emulated, run):
    rows = run()
    assert [row for row in rows if "error" in row] == []
    by_work = {}
    for row in rows:
        by_work.setdefault(row["work"], {})[row["case"]] = row
    for cases in by_work.values():
        if CAPTURED in cases:
            assert cases[CAPTURED]["uncaptured"] is None
            assert cases[PLAIN]["uncaptured"] == "capture=False"
    exact = by_work.pop(EXACTNESS)
    assert exact[PLAIN]["met"] and exact[CAPTURED]["met"] and exact[CAPTURED]["gradients_off"] == 0
    sampled = by_work.pop("sampling, tiny, 1 image")
    assert {CAPTURED, NO_LORA, PLAIN, STOCK} < sampled.keys()
    assert sampled[CAPTURED]["latents_off"] == 0 and sampled[CAPTURED]["host_ms_a_step"] > 0
    seconds = {name: row.get("seconds") for name, row in sampled.items()}
    assert sampled["times as fast as stock"]["figure"] == pytest.approx(seconds[STOCK] / seconds[CAPTURED])
    lora = 100 * (seconds[CAPTURED] / seconds[NO_LORA] - 1)
    assert sampled["a step with LoRA, % longer"]["figure"] == pytest.approx(lora)
    for work in TINY.works:
        memory = work.memory[-1]
        missing = "" if memory == work.memory[0] else f" ({work.memory[0]} are not there)"
        cases = by_work.pop(f"{work.name}, {memory}{missing}")
        assert cases.keys() == {PLAIN, CAPTURED}
        assert cases[CAPTURED]["gradients_off"] == 0
        assert ("replayed" in cases[CAPTURED]["plan"]) == (memory == "1.5MiB")
        assert all(row["seconds"] > 0 and row["floor_s"] > 0 for row in cases.values())
    # Stock once a chain, whatever the memory of ours.
    stock = {work.name: {STOCK} | ({CHECKPOINTED} if work.backprop_steps > 1 else set()) for work in TINY.works}
    assert {name: set(cases) for name, cases in by_work.items()} == stock


def test_what_has_no_time_left_says_so(run):
    with pytest.raises(SystemExit, match="the rest is worth nothing"):
        run("--seconds", "0")
    # The yardstick is made whatever the time.
    assert run.rows[0]["work"] == EXACTNESS and run.rows[0]["case"] == STOCK
    assert {row.get("error") for row in run.rows[1:]} == {"no time left"}


def test_wrong_gradients_end_it(run, monkeypatch):
    monkeypatch.setattr(gpu_chain, "rows", lambda bench, *others: bench.exactness())
    monkeypatch.setattr(gpu_chain, "plans", lambda *others: {})
    latents = Ours.latents
    monkeypatch.setattr(Ours, "latents", lambda self: 1.2 * latents(self))
    with pytest.raises(SystemExit, match="rftcore, capture=False and rftcore"):
        run()
    assert [row["met"] for row in run.rows if "met" in row] == [False, False]


def test_out_of_memory_is_a_row(monkeypatch, plans_file):
    def too_large(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 311 GiB.")

    monkeypatch.setattr(Stock, "latents", too_large)
    rows = {row["case"]: row for row in bench().training(TINY.works[2], plans([], plans_file, 1), 1e12)}
    assert rows[STOCK]["error"].startswith("OOM") and "error" not in rows[CAPTURED]


@pytest.mark.parametrize("model", ["tiny", "tiny-xl"])
def test_stock_does_the_same_work(model):
    """In fp64: the same rewards and the same gradients."""
    unet, vae = add_lora(make_unet(model, CPU)).double(), make_vae(model, CPU).double()
    inputs = make_inputs(unet, 2).double()

    def gradients(chain, rewards):
        return Training(chain, unet, rewards).gradients(), rewards(chain.latents()).detach()

    expected, score = gradients(Stock(unet, inputs, 4, 2), stock_rewards(vae))
    assert (
        relative_error(gradients(Stock(unet, inputs, 4, 2, checkpointed=True), stock_rewards(vae))[0], expected) < 1e-9
    )
    rftcore.accelerate(unet)
    ours, our_score = gradients(Ours(unet, inputs, 4, 2, capture=True), our_rewards(vae))
    # The reward is a mean in fp32.
    assert relative_error(ours, expected) < 1e-5
    torch.testing.assert_close(our_score.double(), score.double(), rtol=1e-6, atol=0)


def test_a_training_step_changes_the_lora_and_gradients_do_not():
    unet, vae = add_lora(make_unet("tiny", CPU)), make_vae("tiny", CPU)
    training = Training(Stock(unet, make_inputs(unet, 1), 2, 1), unet, stock_rewards(vae))
    before = [p.detach().clone() for p in unet.parameters()]
    training.gradients()
    assert all(torch.equal(p, value) for p, value in zip(unet.parameters(), before, strict=True))
    training.step()
    changed = {p.requires_grad for p, value in zip(unet.parameters(), before, strict=True) if not torch.equal(p, value)}
    assert changed == {True}


def test_the_plan_is_the_one_that_the_sampler_makes_for_that_budget(plans_file):
    """Plans are made beforehand, of the configs alone."""
    work = TINY.works[1]
    plan = plans([], plans_file, 1)[asked(work, TINY.steps, work.memory[0])].plan
    unet = rftcore.accelerate(add_lora(make_unet(work.model, CPU)))
    sampler = rftcore.CheckpointedSampler(
        unet, SCHEDULER, num_inference_steps=TINY.steps, guidance_scale=GUIDANCE,
        backprop_steps=work.backprop_steps, memory_budget=plan.budget,
    )  # fmt: skip
    sampler(**make_inputs(unet, work.batch).of_sampler())
    assert sampler.plan == plan


def test_plans_are_made_once_and_for_every_device(plans_file, monkeypatch):
    every = {asked(work, TINY.steps, memory) for work in TINY.works for memory in work.memory}
    monkeypatch.setattr(gpu_chain_plans, "predict", None)
    assert plans(list(every), plans_file, 1).keys() == every


@pytest.mark.parametrize(("gib", "memory"), [(139, "110GiB"), (79, "72GiB"), (24, "72GiB")])
def test_the_first_memory_that_the_device_has(gib, memory, monkeypatch):
    properties = types.SimpleNamespace(total_memory=gib * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert Bench(FULL, torch.device("cuda"), 1, 0).memory(FULL.works[1]) == memory


def test_time_is_asked_for_in_the_memory_that_it_was_meant_for():
    on_gpu = Bench(FULL, torch.device("cuda"), 1, 0)
    work, row = FULL.works[1], {"seconds": 1.7, "reserved_gib": 71.5}
    assert on_gpu._reached(row, work, "110GiB") == {"required": "<= 110 GiB, <= 1.8 s", "met": True}
    assert on_gpu._reached({**row, "seconds": 1.9}, work, "110GiB")["met"] is False
    assert on_gpu._reached({**row, "seconds": 1.9}, work, "72GiB") == {"required": "<= 72 GiB", "met": True}
    assert on_gpu._reached({**row, "reserved_gib": 72.5}, work, "72GiB")["met"] is False


def test_waits_are_counted_and_the_mode_is_put_back(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert gpu_chain.syncs(waits) == 2
    assert modes == ["warn", "default"]


def test_full_models_are_refused_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu_chain.main(["--device", "cpu"])
    assert "--tiny runs anywhere" in capsys.readouterr().err
