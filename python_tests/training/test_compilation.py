"""A run on a compiled UNet is the run without; a compiler that gets it wrong is found out before the first step."""

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rftcore.training import Trainer, UsageError, compilation


def config(model, folder, **memory):
    """One sample at a time: every other batch size is compiled anew, and so is every scale of the LoRA."""
    memory = {"accelerate": False, "compile": True, **memory}
    evaluation = {"batch_size": 1, "lora_scales": []}
    return tiny.config(model, folder, memory=memory, train={"max_train_steps": 2, "batch_size": 1}, eval=evaluation)


def lora(folder):
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_right_compilers_are_accepted(model, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    Trainer(config(model, tmp_path / "run"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_compiled_run_is_the_same_run(model, tmp_path, monkeypatch):
    """With Dynamo's graphs alone: what Inductor makes of them is its own matter, and checked where a run starts."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch._dynamo.reset()
    Trainer(config(model, tmp_path / "compiled")).train()
    Trainer(config(model, tmp_path / "plain", compile=False)).train()
    ours, theirs = lora(tmp_path / "compiled"), lora(tmp_path / "plain")
    assert torch.linalg.norm(ours - theirs) <= 1e-5 * torch.linalg.norm(theirs)


def broken(graph, inputs):
    """A compiler of graphs whose output is right and whose gradient is not."""

    def run(*given):
        return tuple(value + 0.1 * (value - value.detach()) for value in graph(*given))

    return run


def failing(graph, inputs):
    raise RuntimeError("no C++ compiler\nand more")


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (broken, "compiled UNet's gradient differs.* by 0.1 relative"),
        pytest.param(failing, "does not compile here .*no C.. compiler", marks=pytest.mark.slow),
    ],
)
def test_wrong_compilers_are_refused(model, tmp_path, monkeypatch, backend, message):
    monkeypatch.setattr(compilation, "BACKEND", backend)
    torch._dynamo.reset()
    with pytest.raises(UsageError, match=message):
        Trainer(config(model, tmp_path / "run"))


def test_rftcores_blocks_leave_nothing_to_compile(model, tmp_path):
    with pytest.raises(UsageError, match="memory.compile=true with memory.accelerate=true"):
        Trainer(config(model, tmp_path / "run", accelerate=True))
