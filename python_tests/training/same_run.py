"""Whether two runs are one and the same: bit for bit, but for what the clock and the machine decide."""

import json

import torch
from safetensors.torch import load_file


def metrics(folder):
    """Every line of metrics.jsonl, without what the clock and the machine decide."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if not key.startswith(("time/", "mem/"))} for line in lines]


def assert_same_run(folder, whole, step):
    """Weights, all states of the last checkpoint, metrics, images and results."""
    for name in ("trainable.safetensors", "pytorch_lora_weights.safetensors"):
        ours, theirs = (load_file(path / f"checkpoint-{step}" / name) for path in (folder, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (torch.load(path / f"checkpoint-{step}" / "state.pt", weights_only=True) for path in (folder, whole))
    assert_equal(ours, theirs, "state.pt")
    assert metrics(folder) == metrics(whole)
    images = [sorted(path.relative_to(root) for path in root.rglob("*.png")) for root in (folder, whole)]
    assert images[0] == images[1]
    for image in images[0]:
        assert (folder / image).read_bytes() == (whole / image).read_bytes(), image
    results = [json.loads((path / "results.json").read_text()) for path in (folder, whole)]
    for key in ("rewards", "samples", "reward_queries", "unet_evaluations"):
        assert results[0][key] == results[1][key]


def assert_equal(ours, theirs, where):
    """Nested states, tensors bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{where}: {key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(our, their, f"{where}: {number}")
    else:
        assert ours == theirs, where
