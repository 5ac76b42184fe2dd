"""The averaged weights are the formula's, they come and go without a trace, and they are what is judged and saved."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rftcore.training import Trainer
from rftcore.training.ema import Ema


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5, dtype=torch.float64))]


def test_average_is_the_formula():
    weights = parameters()
    ema, expected = Ema(weights, decay=0.3), [weight.detach().clone() for weight in weights]
    for number in range(6):
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn_like(weight))
        ema.step()
        decay = 0.0 if number == 0 else min(0.3, (1 + number) / (10 + number))
        expected = [decay * old + (1 - decay) * new.detach() for old, new in zip(expected, weights, strict=True)]
    with ema.applied():
        for weight, value in zip(weights, expected, strict=True):
            assert weight.dtype == value.dtype
            torch.testing.assert_close(
                weight.detach(), value, rtol=1e-5 if weight.dtype == torch.float32 else 1e-14, atol=0
            )


def test_swap_leaves_no_trace():
    weights = parameters()
    ema = Ema(weights, decay=0.5)
    with torch.no_grad():
        weights[0].mul_(3)
    before = [(weight.data_ptr(), weight.detach().clone(), weight._version) for weight in weights]
    with pytest.raises(KeyError), ema.applied():
        assert not torch.equal(weights[0], before[0][1])
        # Unlike a write through `.data`, autograd sees this one.
        assert all(weight._version > version for weight, (_, _, version) in zip(weights, before, strict=True))
        assert all(weight.data_ptr() == pointer for weight, (pointer, _, _) in zip(weights, before, strict=True))
        with pytest.raises(RuntimeError, match="in place already"), ema.applied():
            pass
        raise KeyError
    for weight, (pointer, value, _) in zip(weights, before, strict=True):
        assert weight.data_ptr() == pointer and torch.equal(weight, value) and weight.requires_grad


def config(model, folder, decay=0.6, **groups):
    train = {"max_train_steps": 4, "ema_decay": decay}
    fixed = {"train": train, "eval": {"validation_steps": 2}, "checkpointing_steps": 2}
    return tiny.config(model, folder, **(fixed | groups))


@pytest.fixture(scope="module")
def averaged(model, tmp_path_factory):
    """Folder of a run that averages."""
    folder = tmp_path_factory.mktemp("ema") / "output"
    Trainer(config(model, folder)).train()
    return folder


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if not key.startswith(("time/", "mem/"))} for line in lines]


def layers(folder, name="pytorch_lora_weights.safetensors"):
    """The values of a LoRA file in the order of the trained parameters' names."""
    tensors = load_file(folder / name)
    return [tensors[key] for key in sorted(tensors, key=lambda key: key.replace("unet.", "").replace(".default", ""))]


def test_training_goes_on_with_the_raw_weights(model, averaged, tmp_path):
    Trainer(config(model, tmp_path / "raw", decay=None)).train()
    for ours, theirs in zip(
        layers(averaged / "checkpoint-4", "trainable.safetensors"),
        layers(tmp_path / "raw" / "checkpoint-4", "trainable.safetensors"),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    # What is trained on is the same, what is judged is not: the first average is the first update's weights.
    ours, theirs = metrics(averaged), metrics(tmp_path / "raw")
    trained = [[line["train/loss"] for line in lines if "train/loss" in line] for lines in (ours, theirs)]
    assert trained[0] == trained[1]
    judged = [
        [line["eval/reward/brightness"] for line in lines if "eval/reward/brightness" in line]
        for lines in (ours, theirs)
    ]
    assert judged[0][0] == judged[1][0] and all(a != b for a, b in zip(judged[0][1:], judged[1][1:], strict=True))


def test_what_is_saved_is_the_average_that_was_judged(model, averaged):
    state = torch.load(averaged / "checkpoint-4" / "state.pt", weights_only=True)["ema"]
    trainable = load_file(averaged / "checkpoint-4" / "trainable.safetensors")
    for folder in (averaged, averaged / "checkpoint-4"):
        assert [value.shape for value in layers(folder)] == [trainable[name].shape for name in sorted(trainable)]
        shadows = {tuple(value.flatten().tolist()) for value in state["shadow_params"]}
        assert {tuple(value.flatten().tolist()) for value in layers(folder)} == shadows
        assert not all(
            torch.equal(value, trainable[name]) for value, name in zip(layers(folder), sorted(trainable), strict=True)
        )
    # Judged again by a run that averages nothing and takes no step.
    trainer = Trainer(config(model, averaged.parent / "judge", decay=None))
    loaded = dict(zip(sorted(trainable), layers(averaged), strict=True))
    with torch.no_grad():
        for name, parameter in trainer.engine.model.named_parameters():
            if name in loaded:
                parameter.copy_(loaded[name])
    scores = trainer.validation().scores
    progress = json.loads((averaged / "checkpoint-4" / "progress.json").read_text())["progress"]
    assert scores == {name: progress["evaluations"]["4"][name] for name in scores}


def test_resumed_run_is_the_uninterrupted_one(model, averaged, tmp_path):
    folder = tmp_path / "run"
    Trainer(config(model, folder)).train()
    for name in ("checkpoint-4",):
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()
    Trainer(config(model, folder, resume_from_checkpoint="latest")).train()
    ours, theirs = (
        torch.load(path / "checkpoint-4" / "state.pt", weights_only=True)["ema"] for path in (folder, averaged)
    )
    assert ours["optimization_step"] == theirs["optimization_step"] == 4
    assert all(torch.equal(a, b) for a, b in zip(ours["shadow_params"], theirs["shadow_params"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(layers(folder), layers(averaged), strict=True))
    assert metrics(folder) == metrics(averaged)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_nothing_of_a_chain_outlives_the_swap(model, tmp_path, weights):
    """With rftcore's blocks: casts and text values made of the weights are those of the weights in place."""
    trainer = Trainer(config(model, tmp_path / "run", train={"weights": weights, "ema_decay": 0.5}))
    ema, unet = trainer.trained.ema, trainer.engine.model
    images = {}

    def draw():
        with torch.no_grad():
            samples = trainer.engine.samples(1, range(2))
            return trainer.engine.sample(trainer.method.sampler, samples).latents.clone()

    images["start"] = draw()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.full_like(parameter, 0.05))
    images["raw"] = draw()
    with ema.applied():
        images["averaged"] = draw()
    images["raw again"] = draw()
    assert torch.equal(images["averaged"], images["start"]) and torch.equal(images["raw again"], images["raw"])
    assert not torch.equal(images["raw"], images["start"])
