"""Small chains that do what a sampler's do with its graphs."""

import torch
from models import UNETS, add_lora
from torch import nn

import rftcore
from rftcore.sampling.graphs import Run

STEPS, STORED, REPLAYED = 5, 2, 2


class Toy:
    """A chain of `STEPS` steps x + f(x, t) / 8 whose last `STORED` are stored, and the `REPLAYED` before them replayed.

    It does what a sampler's chain has to do: it copies inputs to static tensors, makes its leaves inside of segments,
    gives each stored slot a state of its own, and accumulates gradients in static tensors.
    """

    def __init__(self, evaluate, parameters, shape):
        self.evaluate, self.parameters, self.shape = evaluate, parameters, shape
        # How often Python ran a segment's work.
        self.work = 0

    def __call__(self, run, x, backward=True):
        """The last state and the gradients of half its square: of the first differentiated state and the parameters."""
        dtype = x.dtype
        # Not slices of one tensor: what autograd saved of one would be out of date when another is written.
        states = run.keep("states", lambda: [torch.empty(self.shape, dtype=dtype) for _ in range(STEPS + 1)])
        times = run.keep("times", lambda: torch.arange(STEPS, dtype=dtype))
        now, t = run.keep("now", lambda: (torch.empty(self.shape, dtype=dtype), torch.empty((), dtype=dtype)))
        after = run.keep("after", lambda: torch.empty(self.shape, dtype=dtype))
        grad = run.keep("grad", lambda: torch.empty(self.shape, dtype=dtype))
        sums = run.keep("sums", lambda: [torch.empty_like(p) for p in self.parameters.values()])
        for total in sums:
            total.zero_()
        states[0].copy_(x)

        def sample():
            self.work += 1
            with torch.no_grad():
                after.copy_(now + self.evaluate(now, t, self.parameters) / 8)

        def leaves(x):
            return x.detach().requires_grad_(), {n: p.detach().requires_grad_() for n, p in self.parameters.items()}

        def store(step):
            self.work += 1
            x, parameters = leaves(states[step])
            with torch.enable_grad():
                following = x + self.evaluate(x, times[step], parameters) / 8
            states[step + 1].copy_(following.detach())
            return following, x, list(parameters.values())

        def differentiate(following, x, parameters):
            self.work += 1
            found = torch.autograd.grad(following, [x, *parameters], grad, retain_graph=run.retain)
            grad.copy_(found[0])
            for total, g in zip(sums, found[1:], strict=True):
                total.add_(g)

        def replay():
            x, parameters = leaves(now)
            with torch.enable_grad():
                following = x + self.evaluate(x, t, parameters) / 8
            differentiate(following, x, list(parameters.values()))

        def load(step):
            now.copy_(states[step])
            t.copy_(times[step])

        slots = {}
        for step in range(STEPS):
            if step < STEPS - STORED:
                load(step)
                run.run("step", sample)
                states[step + 1].copy_(after)
            else:
                slots[step] = run.run(("store", step), lambda step=step: store(step))
        last = states[-1].clone()
        if not backward:
            return last
        grad.copy_(last)
        for step in reversed(range(STEPS - STORED - REPLAYED, STEPS)):
            if step in slots:
                run.run(("differentiate", step), lambda step=step: differentiate(*slots[step]))
                del slots[step]
            else:
                load(step)
                run.run("replay", replay)
        run.finish()
        return [last, grad.clone(), *(total.clone() for total in sums)]


def mlp(dtype=torch.float64):
    width = 6
    layers = nn.Sequential(nn.Linear(width + 1, 16), nn.SiLU(), nn.Linear(16, width)).to(dtype)
    parameters = dict(layers.named_parameters())

    def evaluate(x, t, parameters):
        inputs = torch.cat([x, t.expand(len(x), 1)], 1)
        return torch.func.functional_call(layers, parameters, (inputs,))

    return Toy(evaluate, parameters, (3, width))


def unet(kind="sd1", accelerated=True, dtype=torch.float32, **options):
    model = add_lora(UNETS[kind]().to(dtype).eval())
    if accelerated:
        rftcore.accelerate(model, **options)
    text = torch.randn(2, 5, 12, dtype=dtype)
    added = {"text_embeds": torch.randn(2, 10, dtype=dtype), "time_ids": torch.randint(0, 9, (2, 6)).to(dtype)}
    kwargs = {"encoder_hidden_states": text} if kind != "unconditional" else {}
    kwargs |= {"added_cond_kwargs": added} if kind == "sdxl" else {}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def evaluate(x, t, parameters):
        return torch.func.functional_call(model, parameters, (x, t), {**kwargs, "return_dict": False})[0]

    return Toy(evaluate, parameters, (2, 4, 8, 8)), model


def none(_):
    """For work that returns nothing."""


def plainly(toy, x):
    return toy(Run(None, None), x)


def train(toy):
    """What an optimizer does between two chains."""
    with torch.no_grad():
        for parameter in toy.parameters.values():
            parameter.mul_(0.9).add_(0.01)


def assert_equal(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def inputs(toy):
    return torch.randn(toy.shape, dtype=next(iter(toy.parameters.values())).dtype)


def assert_lives(toy, segments, chains=4):
    """Chains in all lives, each with other inputs and parameters, equal to one without graphs."""
    for _ in range(chains):
        x = inputs(toy)
        assert_equal(toy(segments.begin(), x), plainly(toy, x))
        train(toy)
        assert segments.refusal is None
