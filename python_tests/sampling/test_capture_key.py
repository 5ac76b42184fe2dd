"""What changes the key of a captured chain, what does not, and what keeps a module from being captured."""

import contextlib
import copy
import functools
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from models import UNETS, add_lora
from peft import LoraConfig, inject_adapter_in_model
from recorded import RecordedGraphs
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rftcore
from rftcore.sampling.capture_key import capture_key, reasons
from rftcore.sampling.graphs import Graphs

X = torch.zeros(2, 4, 8, 8)


@pytest.fixture(autouse=True)
def own_accelerator():
    """One process, one precision: what a test asks accelerate for is not the next one's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def unet():
    return rftcore.accelerate(add_lora(UNETS["sd1"]().eval()))


def first_adapted(unet):
    return unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q


def change(key, unet):
    return capture_key(unet, [X]).differences(key)


def scale(unet):
    first_adapted(unet).set_scale("default", 0.25)


def second_adapter(unet):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), unet, "second")


def switch(unet):
    first_adapted(unet)._active_adapter = []


def disable(unet):
    first_adapted(unet)._disable_adapters = True


def merge(unet):
    first_adapted(unet).merge()


def swap(unet):
    parameter = first_adapted(unet).lora_A["default"].weight
    parameter.data = parameter.data.clone()


CHANGES = {
    "adapters": [scale, switch, disable, merge],
    "modules": [
        lambda unet: unet.train(),
        lambda unet: unet.mid_block.resnets[0].eval().train(),
        lambda unet: rftcore.accelerate(unet),
        lambda unet: rftcore.accelerate(unet, "block"),
        lambda unet: rftcore.restore(unet),
        lambda unet: unet.set_attn_processor(AttnProcessor()),
        lambda unet: setattr(unet, "conv_act", nn.GELU()),
    ],
    "tensors": [
        swap,
        lambda unet: unet.requires_grad_(True),
        lambda unet: unet.conv_in.weight.requires_grad_(),
        lambda unet: unet.to(torch.bfloat16),
        lambda unet: unet.to(memory_format=torch.channels_last),
    ],
    "modules, adapters, tensors": [second_adapter],
}


@pytest.mark.parametrize(("fields", "index"), [(f, i) for f, changes in CHANGES.items() for i in range(len(changes))])
def test_what_changes_the_key(unet, fields, index):
    before = capture_key(unet, [X])
    CHANGES[fields][index](unet)
    assert set(change(before, unet)) == set(fields.split(", "))


@contextlib.contextmanager
def flag(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another autocast": lambda: torch.autocast("cpu", torch.float16),
    "attention": lambda: sdpa_kernel([SDPBackend.MATH]),
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "matrix products": lambda: flag(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions": lambda: flag(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "sums": lambda: flag(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "cudnn.benchmark": lambda: flag(torch.backends.cudnn, "benchmark", True),
    "cudnn.deterministic": lambda: flag(torch.backends.cudnn, "deterministic", True),
    "deterministic": deterministic_algorithms,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_the_key(unet, name):
    before = capture_key(unet, [X])
    with SURROUNDINGS[name]():
        inside = capture_key(unet, [X])
    assert inside.differences(before) == ["ambient"]
    assert capture_key(unet, [X]) == before


@pytest.mark.parametrize(
    "x",
    [X[:1], X.bfloat16(), X.to(memory_format=torch.channels_last)],
    ids=["shape", "dtype", "strides"],
)
def test_inputs_change_the_key(unet, x):
    assert "inputs" in capture_key(unet, [x]).differences(capture_key(unet, [X]))


def test_what_the_caller_gives_changes_the_key(unet):
    assert capture_key(unet, [X], ("plan", 1)).differences(capture_key(unet, [X], ("plan", 2))) == ["given"]


def test_values_do_not_change_the_key(unet):
    """Those of inputs, weights, gradients, and what comes back: keys are equal and hash alike."""
    unet.eval()
    before = capture_key(unet, [X])
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(0.5)
            parameter.grad = torch.zeros_like(parameter)
    unet.train()
    unet.eval()
    with rftcore.sampling.adapters.adapters_off(unet):
        assert change(before, unet) == ["adapters"]
    now = capture_key(unet, [torch.ones_like(X)])
    assert now == before
    assert hash(now) == hash(before)


def test_another_model_has_another_key(unet):
    assert capture_key(copy.deepcopy(unet), [X]) != capture_key(unet, [X])


def test_a_change_captures_anew(unet):
    """A scale is a number in the launches: as long as the key says so, no chain launches another's."""
    graphs = Graphs(RecordedGraphs)
    conditioning, t = torch.randn(2, 5, 12), torch.tensor(5)

    def chain(x):
        run = graphs.begin(capture_key(unet, [x]), reasons(unet, device_type="cpu"))
        assert run.reason is None
        now, out = run.keep("tensors", lambda: (torch.empty_like(x), torch.empty_like(x)))
        now.copy_(x)
        with torch.no_grad():
            run.run("step", lambda: out.copy_(unet(now, t, conditioning).sample))
        run.finish()
        return out.clone()

    for value in (1.5, 0.25, 1.5, 3.0):
        first_adapted(unet).scaling["default"] = value
        for _ in range(3):
            x = torch.randn_like(X)
            with torch.no_grad():
                assert torch.equal(chain(x), unet(x, t, conditioning).sample)


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Processor(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Convolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(x)


def own_forward(module, *args, **kwargs):
    return type(module).forward(module, *args, **kwargs)


def own_class(unet):
    unet.conv_in.__class__ = Convolution


def merged_and_disabled(unet):
    first_adapted(unet).merge()
    first_adapted(unet)._disable_adapters = True


def dropout(unet):
    unet.mid_block.resnets[0].dropout.p = 0.1
    unet.train()


def prepared_over(unet):
    unet.forward = functools.partial(own_forward, unet)
    Accelerator(cpu=True, mixed_precision="bf16").prepare(unet)


IN_THE_MODULE = {
    "forward hook": (lambda u: u.mid_block.register_forward_hook(lambda *_: None), "it has hooks, .*mid_block"),
    "pre hook": (lambda u: u.register_forward_pre_hook(lambda *_: None), "it has hooks, .*UNet2DConditionModel"),
    "backward hook": (lambda u: u.conv_in.register_full_backward_hook(lambda *_: None), "it has hooks, .*conv_in"),
    "backward pre hook": (
        lambda u: u.conv_in.register_full_backward_pre_hook(lambda *_: None),
        "it has hooks, .*conv_in",
    ),
    "dropout": (dropout, r"dropout p=0.1 is active: .*mid_block.resnets.0.dropout\)"),
    "own forward": (
        lambda u: setattr(u.conv_in, "forward", functools.partial(own_forward, u.conv_in)),
        "it has a forward of its own, .*conv_in",
    ),
    "own forward under accelerate": (prepared_over, "it has a forward of its own, .*UNet2DConditionModel"),
    "own class": (own_class, "the forward of Convolution is test_capture_key's code, .*conv_in"),
    "own processor": (
        lambda u: u.set_attn_processor(Processor()),
        "Processor is test_capture_key's code, .*down_blocks.0.*and 7 more",
    ),
    "checkpointing": (lambda u: u.enable_gradient_checkpointing(), "gradient checkpointing is switched on"),
    "compiled": (lambda u: u.conv_in.compile(), "torch.compile wraps it, .*conv_in"),
    "accelerate's hook": (lambda u: add_hook_to_module(u.conv_in, ModelHook()), "accelerate's ModelHook is attached"),
    "merged and disabled": (merged_and_disabled, "merged adapters are disabled"),
    "a subclass": (
        lambda u: setattr(u.conv_in, "bias", nn.Parameter(Weight(torch.zeros(16)))),
        "it holds a Weight .*conv_in",
    ),
    "another device": (lambda u: u.conv_in.to("meta"), "it is on meta, graphs are captured on cpu .*conv_in"),
}


class Weight(torch.Tensor):
    pass


@pytest.mark.parametrize("name", IN_THE_MODULE)
def test_why_a_module_cannot_be_captured(unet, name):
    assert reasons(unet, device_type="cpu") == []
    alter, expected = IN_THE_MODULE[name]
    alter(unet)
    (reason,) = reasons(unet, device_type="cpu")
    assert re.search(expected, reason)


def test_on_a_cpu_nothing_is_captured(unet):
    (reason,) = reasons(unet)
    assert re.fullmatch(r"it is on cpu, graphs are captured on cuda \(conv_in and \d+ more\)", reason)


AROUND = {
    "dispatch mode": (Mode, "a dispatch mode is active"),
    "function mode": (FunctionMode, "the mode FunctionMode is active"),
    "saved tensors": (torch.autograd.graph.save_on_cpu, "saved_tensors_hooks are active"),
    "anomaly": (torch.autograd.detect_anomaly, "anomaly detection is on"),
    "forward mode": (torch.autograd.forward_ad.dual_level, "forward-mode differentiation is active"),
    "global hooks": (
        lambda: contextlib.closing(Closing(register_module_forward_hook(lambda *_: None))),
        "hooks for all modules",
    ),
}


class Closing:
    def __init__(self, handle):
        self.close = handle.remove


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", AROUND)
def test_why_nothing_can_be_captured_here(unet, name):
    context, expected = AROUND[name]
    with context():
        (reason,) = reasons(unet, device_type="cpu")
    assert expected in reason
    assert reasons(unet, device_type="cpu") == []


@pytest.mark.parametrize(
    "alter",
    [
        lambda unet: unet.train(),
        lambda unet: Accelerator(cpu=True, mixed_precision="bf16").prepare(unet),
        lambda unet: rftcore.restore(unet),
        lambda unet: first_adapted(unet).merge(),
        lambda unet: first_adapted(unet).lora_A["default"].weight.register_hook(lambda grad: grad),
        lambda unet: unet.set_attn_processor(AttnProcessor()),
        lambda unet: unet.to(torch.bfloat16),
    ],
)
def test_what_can_be_captured(unet, alter):
    """Dropouts that drop nothing, what accelerate prepared, stock blocks, merged adapters, hooks of parameters.

    Those are the chain's to call, on the sum: its segments differentiate aliases.
    """
    alter(unet)
    assert reasons(unet, device_type="cpu") == []
    with torch.device("cpu"):
        assert reasons(unet, device_type="cpu") == []


def test_sampling_minds_no_checkpointing(unet):
    unet.enable_gradient_checkpointing()
    assert reasons(unet, differentiates=False, device_type="cpu") == []
    with torch.no_grad():
        assert reasons(unet, device_type="cpu") == []


def test_a_compiled_wrapper(unet):
    (reason,) = reasons(torch.compile(unet), device_type="cpu")
    assert "torch.compile wraps it" in reason
