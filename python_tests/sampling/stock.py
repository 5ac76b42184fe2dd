"""The same chain by diffusers' own scheduler and plain autograd: what every gradient is compared with."""

import torch


def unet_output(unet, x, t, conditioning, guidance_scale):
    """The guided output, the way diffusers' pipelines compute it."""
    if not conditioning:
        return unet(x, t, return_dict=False)[0]
    guided = guidance_scale != 1.0
    prompt = conditioning["prompt_embeds"]
    added = conditioning.get("added_cond_kwargs")
    if guided:
        prompt = torch.cat([conditioning["negative_prompt_embeds"], prompt])
        x = torch.cat([x, x])
        if added:
            negative = {"time_ids": added["time_ids"], **conditioning["negative_added_cond_kwargs"]}
            added = {name: torch.cat([negative[name], tensor]) for name, tensor in added.items()}
    kwargs = {"added_cond_kwargs": added} if added else {}
    output = unet(x, t, encoder_hidden_states=prompt, return_dict=False, **kwargs)[0]
    if not guided:
        return output
    negative, positive = output.chunk(2)
    return negative + guidance_scale * (positive - negative)


def sample(unet, scheduler, x, conditioning, *, steps, guidance_scale, backprop_steps, generator, eta=None):
    """The last state of a chain whose last `backprop_steps` steps carry a gradient."""
    scheduler.set_timesteps(steps)
    options = {"generator": generator}
    if eta is not None:
        options["eta"] = eta
    for index, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(index >= steps - backprop_steps):
            output = unet_output(unet, x, t, conditioning, guidance_scale)
            x = scheduler.step(output, t, x, **options, return_dict=False)[0]
    return x
