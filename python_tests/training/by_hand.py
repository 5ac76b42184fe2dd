"""The training loops once more, slowly: stock diffusers models, the formulas written out, no code of the package.

Only what is drawn at random is taken from the package, by `rftcore.training.batches`.
"""

import copy
import math

import torch
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig, inject_adapter_in_model

from rftcore.training.batches import endless, generator, shuffled_in_lanes


class ByHand:
    """A run's model as diffusers has it, in fp64, with the chain's maths written out.

    Args:
        pipe: stock, in fp64, without an adapter; used in place.
        trainer: whose random draws, settings and trained weights are followed.
        reward: (images, prompts) -> rewards.
    """

    def __init__(self, pipe, trainer, reward):
        self.trainer, self.config, self.reward = trainer, trainer.config, reward
        self.vae, self.latent = getattr(pipe, "vae", None), hasattr(pipe, "vae")
        self.base = pipe.unet.requires_grad_(False)
        self.unet = copy.deepcopy(pipe.unet)
        if self.latent:
            self.vae.requires_grad_(False)
            encoded = {prompt: self._encoded(pipe, prompt) for prompt in ["", *self.config.prompts]}
            self.text = {prompt: output[0] for prompt, output in encoded.items()}
            # A value function's features are fp32.
            self.pooled = {prompt: output[1][0].float().double() for prompt, output in encoded.items()}
        lora = LoraConfig(
            r=self.config.lora.rank,
            lora_alpha=self.config.lora.rank,
            target_modules=self.config.lora.target_modules,
        )
        if self.latent:
            self.unet.add_adapter(lora)
        else:
            inject_adapter_in_model(lora, self.unet)
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self.unet.double()
        self.follow()
        options = pipe.scheduler.config
        self.kind, self.clip = options.prediction_type, options.clip_sample_range if options.clip_sample else math.inf
        self.alphas = pipe.scheduler.alphas_cumprod.double().tolist()
        self.T = self.config.sampling.num_inference_steps
        self.stride = 1000 // self.T
        self.t = [(self.T - 1 - i) * self.stride + options.get("steps_offset", 0) for i in range(self.T)]
        ends_on_one = options.get("set_alpha_to_one", True) or self.config.sampling.scheduler == "ddpm"
        self.final = 1.0 if ends_on_one else self.alphas[0]
        self.buffer = []

    @staticmethod
    @torch.no_grad()
    def _encoded(pipe, prompt):
        tokens = pipe.tokenizer(
            [prompt], padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True
        )
        return pipe.text_encoder(torch.tensor(tokens["input_ids"]))

    def follow(self):
        """Takes over the trained weights."""
        self.unet.load_state_dict(self.trainer.engine.model.state_dict())

    def parameters(self):
        return {name: parameter for name, parameter in self.unet.named_parameters() if parameter.requires_grad}

    def output(self, x, t, prompts, *, base=False, positive_only=False):
        """m = negative + w (positive - negative); with `positive_only` its gradient is positive's."""
        unet, w = self.base if base else self.unet, self.config.sampling.guidance_scale
        if not self.latent:
            return unet(x, t).sample
        positive = unet(x, t, encoder_hidden_states=torch.cat([self.text[prompt] for prompt in prompts])).sample
        if w == 1.0:
            return positive
        empty = self.text[self.config.sampling.negative_prompt].expand(len(x), -1, -1)
        negative = unet(x, t, encoder_hidden_states=empty).sample
        if positive_only:
            return (negative + w * (positive - negative) - positive).detach() + positive
        return negative + w * (positive - negative)

    def a(self, i):
        """alpha_bar at step i and at the one after it."""
        t = self.t[i]
        return self.alphas[t], self.alphas[t - self.stride] if t >= self.stride else self.final

    def x0_and_eps(self, a_t, x, m):
        if self.kind == "epsilon":
            return ((x - math.sqrt(1 - a_t) * m) / math.sqrt(a_t)).clamp(-self.clip, self.clip), m
        assert self.kind == "v_prediction"
        x0 = math.sqrt(a_t) * x - math.sqrt(1 - a_t) * m
        return x0.clamp(-self.clip, self.clip), math.sqrt(a_t) * m + math.sqrt(1 - a_t) * x

    def sigma(self, i):
        a_t, a_p = self.a(i)
        if self.config.sampling.scheduler == "ddpm":
            return math.sqrt((1 - a_p) / (1 - a_t) * (1 - a_t / a_p))
        return (self.config.sampling.eta or 0.0) * math.sqrt((1 - a_p) / (1 - a_t)) * math.sqrt(1 - a_t / a_p)

    def mean(self, i, x, m):
        (a_t, a_p), sigma = self.a(i), self.sigma(i)
        x0, eps = self.x0_and_eps(a_t, x, m)
        if self.config.sampling.scheduler == "ddpm":
            alpha = a_t / a_p
            return (math.sqrt(a_p) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - a_p) * x) / (1 - a_t)
        return math.sqrt(a_p) * x0 + math.sqrt(1 - a_p - sigma**2) * eps

    def noisy(self):
        """The steps that draw noise."""
        return [i for i in range(self.T) if self.sigma(i) > 0]

    def log_probs(self, rows):
        """Of (step, x, next x, prompt) each."""
        steps, x, next_x, prompts = zip(*rows, strict=True)
        m = self.output(torch.cat(x), torch.tensor([self.t[i] for i in steps]), prompts)
        found = []
        for row, i in enumerate(steps):
            sigma = self.sigma(i)
            z = (next_x[row][0] - self.mean(i, x[row][0], m[row])) / sigma
            found.append((-(z**2) / 2 - math.log(sigma) - math.log(2 * math.pi) / 2).mean())
        return found

    def differences(self, rows):
        """mean (m_theta - m_pre)^2 of (step, x, prompt) each."""
        steps, x, prompts = zip(*rows, strict=True)
        x, t = torch.cat(x), torch.tensor([self.t[i] for i in steps])
        with torch.no_grad():
            base = self.output(x, t, prompts, base=True)
        return ((self.output(x, t, prompts) - base) ** 2).mean(dim=(1, 2, 3)).unbind()

    def eps_differences(self, rows):
        """mean (eps_theta - eps_pre)^2 of (step, x, prompt) each: d eps / d v = sqrt(alpha_bar)."""
        scale = [1.0 if self.kind == "epsilon" else self.a(i)[0] for i, *_ in rows]
        return [a * difference for a, difference in zip(scale, self.differences(rows), strict=True)]

    def kls(self, rows):
        """Per element, at shared variance: c^2 / (2 sigma^2) d eps^2, of a model of eps without clipping."""
        assert self.kind == "epsilon" and self.clip == math.inf
        found = []
        for (i, *_), difference in zip(rows, self.eps_differences(rows), strict=True):
            (a_t, a_p), sigma = self.a(i), self.sigma(i)
            c = math.sqrt(1 - a_p - sigma**2) - math.sqrt(a_p) * math.sqrt(1 - a_t) / math.sqrt(a_t)
            found.append(c**2 / (2 * sigma**2) * difference)
        return found

    def prompt(self, epoch, index):
        return self.trainer.engine.plan.prompt(epoch, index)

    def chain(self, epoch, indices, modes=None, *, x0=False, base=False, positive_only=False):
        """Samples' states (B, C, h, w), with the graph that the modes leave; with `x0` the last is the predicted x0."""
        sources = [self.trainer.engine.plan.noise(epoch, index) for index in indices]
        prompts = [self.prompt(epoch, index) for index in indices]
        shape = (len(indices), self.unet.config.in_channels, *[self.unet.config.sample_size] * 2)

        def noise():
            return randn_tensor(shape, generator=sources, dtype=torch.float64)

        x = noise()
        states = [x]
        for i in range(self.T) if modes is None else range(len(modes)):
            mode = "none" if modes is None else modes[i]
            if mode in ("none", "detach_x"):
                x = x.detach()
            with torch.set_grad_enabled(mode != "none"):
                seen = x.detach() if mode == "detach_input" else x
                m = self.output(seen, self.t[i], prompts, base=base, positive_only=positive_only)
                if mode == "detach_eps":
                    m = m.detach()
                if x0 and i == len(modes) - 1:
                    x = self.x0_and_eps(self.a(i)[0], x, m)[0]
                else:
                    x = self.mean(i, x, m)
                    if self.sigma(i) > 0:
                        x = x + self.sigma(i) * noise()
            states.append(x)
        return states

    def r(self, latents, prompts):
        """The rewards of images (B, C, h, w)."""
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample if self.latent else latents
        return self.reward((images / 2 + 0.5).clamp(0, 1), prompts)

    def take(self):
        """The gradient that was added up, by parameter; cleared."""
        found = {name: parameter.grad.clone() for name, parameter in self.parameters().items()}
        self.unet.zero_grad(set_to_none=True)
        return found

    def batch(self, epoch):
        """Numbers and prompts of the samples of a reward gradient's only batch."""
        indices = range(self.config.train.batch_size)
        return indices, [self.prompt(epoch, index) for index in indices]

    def reward_gradient(self, epoch, loss, path, **options):
        """The mean over the batch of loss(r), 0 where there is no r, along a path."""
        indices, prompts = self.batch(epoch)
        end = self.chain(epoch, indices, path.modes, x0=path.output == "x0", **options)[-1]
        (sum_of_finite(loss(self.r(end, prompts))) / len(indices)).backward()

    def draft_lv(self, epoch, positive_only=False):
        (indices, prompts), t = self.batch(epoch), self.t[-1]
        a = self.alphas[t]
        x_0 = self.chain(epoch, indices, ["none"] * (self.T - 1) + ["full"], positive_only=positive_only)[-1]
        total = self.r(x_0, prompts)
        for draw in range(self.config.train.noise_draws):
            sources = [generator(self.config.seed, "noise again", epoch, index, draw) for index in indices]
            x_1 = math.sqrt(a) * x_0.detach() + math.sqrt(1 - a) * randn_tensor(x_0.shape, sources, dtype=x_0.dtype)
            m = self.output(x_1, t, prompts, positive_only=positive_only)
            total = total + self.r(self.x0_and_eps(a, x_1, m)[0], prompts)
        (-sum_of_finite(total) / len(indices)).backward()

    def draft_plus(self, epoch):
        train, (indices, prompts) = self.config.train, self.batch(epoch)
        first = self.T - train.backprop_steps
        states = self.chain(epoch, indices, ["none"] * first + ["full"] * train.backprop_steps)
        rows = [(i, states[i][[n]].detach(), prompt) for i in range(first, self.T) for n, prompt in enumerate(prompts)]
        d = torch.stack(self.differences(rows))
        (train.kl_coeff * d.mean() - sum_of_finite(self.r(states[-1], prompts)) / len(indices)).backward()

    @torch.no_grad()
    def rollout(self, epoch, *, base=False):
        """Of each sample of an epoch: its prompt, its states (1, C, h, w), its reward."""
        indices = range(self.config.train.samples_per_epoch)
        states, prompts = self.chain(epoch, indices, base=base), [self.prompt(epoch, index) for index in indices]
        rewards = self.r(states[-1], prompts).tolist()
        return [(prompt, [x[[n]] for x in states], rewards[n]) for n, prompt in enumerate(prompts)]

    def steps_taken(self, rollout, numbers_and_steps):
        """(step, x, next x, prompt) of (sample, step) each."""
        rows = []
        for n, i in numbers_and_steps:
            prompt, states, _ = rollout[n]
            rows.append((i, states[i], states[i + 1], prompt))
        return rows

    def ddpo(self, epoch, remembered):
        """The gradient of each update in turn; `remembered` holds each prompt's rewards of all epochs so far."""
        train, B = self.config.train, self.config.train.batch_size
        N, noisy = train.samples_per_epoch, self.noisy()
        rollout = self.rollout(epoch)
        everything = [(n, i) for n in range(N) for i in noisy]
        with torch.no_grad():
            old = dict(zip(everything, self.log_probs(self.steps_taken(rollout, everything)), strict=True))
        A = self.advantages([prompt for prompt, *_ in rollout], [r for *_, r in rollout], remembered)
        count = math.floor(train.timestep_fraction * len(noisy))
        for inner in range(train.inner_epochs):
            lanes = torch.arange(N // B)[:, None].expand(-1, B)
            if inner:
                lanes = shuffled_in_lanes(N // B, B, self.config.seed, "lanes", epoch, inner)
            for batch in range(N // B):
                taken = []
                for lane in range(B):
                    n = int(lanes[batch, lane]) * B + lane
                    source = generator(self.config.seed, "timesteps", epoch, inner, n)
                    order = torch.randperm(len(noisy), generator=source)[:count].tolist()
                    taken += [(n, noisy[place]) for place in order]
                losses = []
                self.ratios = []
                for key, log_p in zip(taken, self.log_probs(self.steps_taken(rollout, taken)), strict=True):
                    advantage, ratio = A[key[0]], torch.exp(log_p - old[key])
                    self.ratios.append(ratio.item())
                    if train.loss == "sf":
                        losses.append(-advantage * log_p)
                    else:
                        low, high = 1 - train.clip_range, 1 + train.clip_range
                        inside = low <= ratio.item() <= high
                        clipped = ratio if inside else torch.tensor(min(max(ratio.item(), low), high))
                        losses.append(max(-advantage * ratio, -advantage * clipped, key=lambda loss: loss.item()))
                (sum(losses) / len(losses)).backward()
                yield self.take()

    def advantages(self, prompts, rewards, remembered):
        """Of the rewards that are numbers; 0 for the others."""
        train = self.config.train

        def moments(values):
            mean = math.fsum(values) / len(values)
            return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))

        kept = [r for r in rewards if math.isfinite(r)]
        for prompt, r in zip(prompts, rewards, strict=True):
            if math.isfinite(r):
                remembered.setdefault(prompt, []).append(r)
        found = []
        for prompt, r in zip(prompts, rewards, strict=True):
            mean, std = moments(kept)
            own = remembered.get(prompt, [])[-train.statistics_buffer_size :]
            if train.per_prompt_statistics and len(own) >= train.statistics_min_count:
                mean, std = moments(own)
            A = (r - mean) / (std + (1e-6 if train.per_prompt_statistics else 1e-8))
            found.append(max(-train.advantage_clip, min(train.advantage_clip, A)) if math.isfinite(r) else 0.0)
        return found

    def dpok(self, epoch, value):
        """The gradient of each update in turn; `value` is updated before the first."""
        train, seed = self.config.train, self.config.seed
        with torch.no_grad():
            for prompt, states, r in self.rollout(epoch):
                if not math.isfinite(r):
                    continue
                rows = [(i, states[i], states[i + 1], prompt) for i in self.noisy()]
                target = max(r, 0.0) if train.reward_filter else r
                self.buffer += [(*row, p, target) for row, p in zip(rows, self.log_probs(rows), strict=True)]
        self.buffer = self.buffer[-train.buffer_size :]
        for update in range(train.value_updates):
            losses = []
            for minibatch in range(train.value_minibatches):
                source = generator(seed, "value batch", epoch, update, minibatch)
                taken = torch.randperm(len(self.buffer), generator=source)[: train.value_batch_size]
                losses.append(torch.stack([(value(self.buffer[n]) - self.buffer[n][-1]) ** 2 for n in taken]).mean())
            value.step(sum(losses) / len(losses))
        for update in range(train.policy_steps):
            taken = endless(len(self.buffer), 0, train.batch_size, seed, "policy batch", epoch, update)
            rows = [self.buffer[n] for n in taken]
            now = self.log_probs([row[:4] for row in rows])
            distance = {"exact": self.kls, "uniform": self.eps_differences}[train.kl]
            total = train.kl_weight * sum(distance([(i, x, prompt) for i, x, _, prompt, *_ in rows])) / len(rows)
            self.ratios = []
            for row, log_p in zip(rows, now, strict=True):
                ratio = torch.exp(log_p - row[4])
                self.ratios.append(ratio.item())
                if abs(self.ratios[-1] - 1) <= train.clip_range:
                    advantage = row[5] - value(row).item()
                    total = total - train.reward_weight * advantage * ratio / len(rows)
            total.backward()
            yield self.take()

    def regression(self, epoch):
        """RWR's and SFT's gradients, update by update."""
        train, seed, B = self.config.train, self.config.seed, self.config.train.batch_size
        sft = self.config.algorithm == "sft"
        rollout = self.rollout(epoch, base=sft)
        weights = [r + train.gamma for *_, r in rollout] if sft else self.rwr_weights(rollout)
        counting = [n for n, w in enumerate(weights) if math.isfinite(w) and (sft or w)]
        for update in range(train.updates_per_epoch):
            order = endless(len(counting), update * B, B, seed, "order", epoch)
            x, t, targets, prompts, w = [], [], [], [], []
            for place, n in enumerate(counting[number] for number in order):
                source = generator(seed, "time", epoch, update, place)
                t.append(int(torch.randint(1000, (), generator=source)))
                x_0, a = rollout[n][1][-1], self.alphas[t[-1]]
                noise = torch.randn(x_0.shape[1:], generator=source, dtype=x_0.dtype)[None]
                x.append(math.sqrt(a) * x_0 + math.sqrt(1 - a) * noise)
                targets.append(noise if self.kind == "epsilon" else math.sqrt(a) * noise - math.sqrt(1 - a) * x_0)
                prompts.append(rollout[n][0])
                w.append(weights[n])
            x, t = torch.cat(x), torch.tensor(t)
            m = self.output(x, t, prompts)
            loss = (torch.tensor(w, dtype=m.dtype) * (m - torch.cat(targets)).square().mean(dim=(1, 2, 3))).mean()
            if sft and train.regulariser == "kl_d":
                with torch.no_grad():
                    base = self.output(x, t, prompts, base=True)
                loss = loss + train.beta * (m - base).square().mean()
            loss.backward()
            yield self.take()

    def rwr_weights(self, rollout):
        train = self.config.train
        groups = [list(range(len(rollout)))]
        if train.per_prompt:
            groups = [[n for n, (p, *_) in enumerate(rollout) if p == prompt] for prompt in {p for p, *_ in rollout}]
        weights = [0.0] * len(rollout)
        for group in groups:
            group = [n for n in group if math.isfinite(rollout[n][2])]
            if train.weighting == "dense":
                total = math.fsum(math.exp(train.temperature * rollout[n][2]) for n in group)
                for n in group:
                    weights[n] = len(group) * math.exp(train.temperature * rollout[n][2]) / total
            else:
                best = sorted(group, key=lambda n: -rollout[n][2])
                for n in best[: max(1, math.floor(train.top * len(group) + 1e-9))]:
                    weights[n] = 1.0
        return weights


class ValueByHand:
    """DPOK's value function, from the same weights, with an optimizer of its own."""

    def __init__(self, hand, module):
        self.features = hand.pooled
        self.weights = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=hand.config.train.value_learning_rate)

    def __call__(self, row):
        i, x, _, prompt, *_ = row
        h = torch.cat([x.flatten(), self.features[prompt]])
        for layer in range(3):
            w, b = (self.weights[f"layers.{layer}.{name}"] for name in ("weight", "bias"))
            h = (self.weights[f"gates.{layer}.weight"][i] * (w @ h + b)).relu()
        return (self.weights["output.weight"] @ h + self.weights["output.bias"])[0]

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def sum_of_finite(values):
    """Of those that are numbers, with their gradient."""
    return values[values.isfinite()].sum()
