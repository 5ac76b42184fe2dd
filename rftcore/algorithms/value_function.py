"""DPOK's value function: the final reward, foretold from a state of the chain (Fan et al., arXiv 2305.16381)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueFunction(nn.Module):
    """V(x_t, c, t): an MLP over the flattened state and the text feature, each hidden layer gated by the step.

    h = relu(gate[step] * (W h + b)), three times, then a linear layer to one value. Gates start uniform in [0, 1), the
    weights Xavier-normal, from the global random state. Runs in its parameters' dtype.
    Source: google-research/dpok, reward_model.py (`ValueMulti`), for latents (4, 64, 64), text features of 768 (CLIP
    ViT-L/14's projected ones, not normalised), 50 steps and hidden 256.

    Args:
        latent_size: C * h * w.
        text_size: entries of a text feature.
        num_steps: steps of a chain.
    """

    def __init__(self, latent_size: int, text_size: int, num_steps: int, hidden: int = 256) -> None:
        super().__init__()
        self.latent_size, self.text_size = latent_size, text_size
        sizes = [latent_size + text_size, hidden, hidden]
        self.layers = nn.ModuleList(nn.Linear(size, hidden) for size in sizes)
        self.gates = nn.ModuleList(nn.Embedding(num_steps, hidden) for _ in sizes)
        self.output = nn.Linear(hidden, 1)
        for layer in (*self.layers, self.output):
            nn.init.xavier_normal_(layer.weight)
        for gate in self.gates:
            nn.init.uniform_(gate.weight)

    def forward(self, x_t: Tensor, text: Tensor, step: Tensor) -> Tensor:
        """The values.

        Shapes: x_t (N, C, h, w), text (N, text_size), step (N,) whole numbers in [0, num_steps), the places in the
        chain; result (N,). Units: reward points.
        Raises: ValueError for shapes that do not agree.
        """
        N = len(step)
        latent = x_t.flatten(1)  # (N, C * h * w)
        if step.ndim != 1 or latent.shape != (N, self.latent_size) or text.shape != (N, self.text_size):
            raise ValueError(
                f"x_t, text and step must have shapes (N, C, h, w) with C * h * w = {self.latent_size}, "
                f"(N, {self.text_size}) and (N,), not {tuple(x_t.shape)}, {tuple(text.shape)} and {tuple(step.shape)}"
            )
        h = torch.cat([latent, text], dim=1).to(self.output.weight.dtype)
        for layer, gate in zip(self.layers, self.gates, strict=True):
            h = (gate(step) * layer(h)).relu()  # (N, hidden)
        return self.output(h).squeeze(1)
