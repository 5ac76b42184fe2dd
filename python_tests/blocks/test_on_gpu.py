"""Accelerated models on a GPU: every level and dtype against fp64, with stock PyTorch as the yardstick."""

import pytest
import torch
from against_stock import inputs, make, pair, randomise_adapters, tensors
from checks import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def results(model, dtype, kind):
    """The output and all gradients, each as fp64."""
    call = {name: to_gpu(value, dtype) for name, value in inputs(kind).items()}
    output = model(**call).sample
    leaves = [t for t in tensors(call) if t.requires_grad] + [p for p in model.parameters() if p.requires_grad]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(output, leaves, grad.to(output), allow_unused=True)
    return output.double(), [g.double() for g in gradients if g is not None]


def to_gpu(value, dtype):
    if isinstance(value, dict):
        return {name: to_gpu(v, dtype) for name, v in value.items()}
    if not value.is_floating_point():
        return value.cuda()
    return value.detach().to("cuda", dtype).requires_grad_(value.requires_grad)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("level", ["none", "ff", "qkv", "block"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients(kind, level, dtype):
    unet = randomise_adapters(make(kind)).cuda().to(memory_format=torch.channels_last)
    exact, exact_gradients = results(unet, torch.float64, kind)
    stock, ours = pair(unet.to(dtype), recompute=level)
    (theirs, their_gradients), (output, gradients) = (results(model, dtype, kind) for model in (stock, ours))
    if dtype == torch.float64:
        assert relative_error(output, exact) < 1e-11
        assert all(relative_error(g, e) < 1e-11 for g, e in zip(gradients, exact_gradients, strict=True))
        return
    assert relative_error(output, exact) <= 2 * relative_error(theirs, exact) + 1e-6
    assert together(gradients, exact_gradients) <= 2 * together(their_gradients, exact_gradients) + 1e-6


def together(gradients, exact):
    """The root mean square of the gradients' relative errors: one of a few elements scatters by chance."""
    errors = [relative_error(g, e) ** 2 for g, e in zip(gradients, exact, strict=True)]
    return (sum(errors) / len(errors)) ** 0.5


def test_a_forward_and_a_backward_can_be_captured():
    """Nothing in a step waits for the GPU or allocates outside of the graph's pool."""
    unet = randomise_adapters(make("sd1")).float().cuda()
    _, ours = pair(unet)
    call = {name: to_gpu(value, torch.float32) for name, value in inputs("sd1").items()}
    trained = [p for p in ours.parameters() if p.requires_grad]

    def step():
        return torch.autograd.grad(ours(**call).sample.square().sum(), trained)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [g.clone() for _ in range(3) for g in step()][-len(trained) :]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
