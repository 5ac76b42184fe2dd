"""How many kernels an accelerated SD1.5 step launches on a GPU: counted on fake tensors, every kernel of every op."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import rftcore
from benchmarks import shapes
from benchmarks.counts import launches
from rftcore.blocks import once
from rftcore.ops import fused_attention, fused_linears, jit
from rftcore.ops.backends import OPS

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="fake CPU tensors stand in for a GPU")

# What runs a fused op, by the op's name; the others launch as often as said.
FUSED = {
    "rftcore::lora_linears": fused_linears._run_linears,
    "rftcore::lora_linears_backward": fused_linears._run_linears_backward,
    "rftcore::gated_linear": fused_linears._run_gated,
    "rftcore::gated_linear_backward": fused_linears._run_gated_backward,
    "rftcore::attention": fused_attention._run_forward,
    "rftcore::attention_backward": fused_attention._run_backward,
}
LAUNCHES = {"rftcore::group_norm_silu": 2, "rftcore::group_norm_silu_backward": 2}


class Launched(TorchDispatchMode):
    """Counts launches: of fused ops those that they would make of tensors of these shapes, of others one a call."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.total, self.names = 0, {}
        monkeypatch.setattr(jit, "capability", lambda device: 90)
        monkeypatch.setattr(jit, "run", lambda device, *launches: self._add("triton", len(launches)))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in FUSED:
            with _disable_current_modes():
                FUSED[name](*map(on_meta, args))
        elif launches(function):
            self._add(name, LAUNCHES.get(name, 1))
        return function(*args, **(kwargs or {}))

    def _add(self, name, count):
        self.total += count
        self.names[name] = self.names.get(name, 0) + count


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return [on_meta(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.fixture
def sd15(monkeypatch):
    """The model, its mode and a call's arguments, as if Triton served it on a GPU."""
    for module in (fused_linears, fused_attention):
        monkeypatch.setattr(module, "_of_triton", lambda tensor: [])
    monkeypatch.setitem(OPS["geglu"].not_supported_reasons, "triton", lambda u: [])
    model, mode = shapes.unet("sd15", torch.bfloat16)
    return model, mode, *shapes.unet_inputs("sd15", mode)


def launched(monkeypatch, model, mode, args, kwargs):
    """The launches of a forward and of its backward."""
    with mode, Launched(monkeypatch) as forward:
        output = model(*args, **kwargs).sample
    with mode, Launched(monkeypatch) as backward:
        torch.autograd.grad(
            output.sum(), [args[0], *(p for p in model.parameters() if p.requires_grad)], allow_unused=True
        )
    return forward, backward


# PyTorch and PEFT launch 1240 forward and 1450 backward.
@pytest.mark.parametrize(("level", "forwards", "backwards"), [("none", 550, 925), ("qkv", 550, 995)])
def test_of_a_step(level, forwards, backwards, sd15, monkeypatch):
    rftcore.accelerate(sd15[0], level, backend="triton")
    forward, backward = launched(monkeypatch, *sd15)
    assert forward.total <= forwards, forward.names
    assert backward.total <= backwards, backward.names


def test_of_a_step_that_is_given_what_is_made_once_a_chain(sd15, monkeypatch):
    """Of 22 ResNets a SiLU and a projection less, and a row more; of 16 cross-attentions keys and values less."""
    model, mode, args, kwargs = sd15
    rftcore.accelerate(model, "none", backend="triton")
    usual, usual_backward = launched(monkeypatch, *sd15)
    with mode:
        values = once.compute(model, torch.arange(50), args[2])
    with once.given(model, {name: value.detach() for name, value in values.at(3).items()}):
        forward, backward = launched(monkeypatch, *sd15)
    assert forward.total <= usual.total - 60, forward.names
    assert backward.total < usual_backward.total, backward.names
