"""Box control computed the plain way, as code on the attention tables does it; what `benchmarks.mifo` compares with.

Every attention layer keeps its whole table, masks are float tables built anew in every layer and call, guidance runs
both halves of the batch and the whole UNet, and all weights collect what their gradients would need. The formulas are
those of `MIFOPipeline` without mask refinement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from objectcompose.attention_processors.box_control import BoxControlOptions
from objectcompose.attention_processors.box_loss import box_control_loss, descent_step_size, mean_box_masses
from objectcompose.attention_processors.box_masks import PromptSubjects, token_visibility
from objectcompose.attention_processors.regions import rasterize


class NaiveBoxProcessor:
    """Attention with its whole table, masked; of layers in `kept` the conditional half of the table stays."""

    def __init__(self, name: str, control: NaiveBoxControl):
        self.name, self.control = name, control

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, states in ((attn.to_q, hidden_states), (attn.to_k, keys), (attn.to_v, keys))
        )
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        table = (logits + self.control.additive_mask(logits, encoder_hidden_states is not None)).softmax(-1)
        if self.name in self.control.kept:
            self.control.tables[self.name] = table[len(table) // 2 :]
        return attn.to_out[0]((table @ value).transpose(1, 2).flatten(2))


class NaiveBoxControl:
    """Box control of one picture.

    Args:
        subjects: of the prompt.
        boxes: one per subject.
        kept: layers that the loss reads.
    """

    def __init__(self, subjects: PromptSubjects, boxes: Sequence[Any], kept: Sequence[str]):
        self.subjects, self.boxes, self.kept = subjects, boxes, set(kept)
        self.mode: Any = "denoise"
        self.tables: dict[str, torch.Tensor] = {}

    def regions(self, num_cells: int) -> torch.Tensor:
        """`(S, h, w)` on a square grid."""
        side = int(num_cells**0.5)
        return torch.stack([rasterize(box, (side, side), "round") for box in self.boxes])

    def additive_mask(self, logits: torch.Tensor, is_cross: bool) -> torch.Tensor:
        """0 or the dtype's least value, `(2, 1, Q, K)`; the unconditional half sees all tokens."""
        members = self.regions(logits.shape[2]).flatten(1).to(logits.device) > 0
        if is_cross:
            visible = token_visibility(members, self.subjects, logits.shape[3], self.mode).to(logits.device)
            visible = torch.stack([torch.ones_like(visible), visible])
        else:
            background = ~members.any(0)
            together = (members.T.float() @ members.float()) > 0
            visible = (together | background[:, None] | background[None, :])[None].expand(2, -1, -1)
        hidden = torch.zeros(visible.shape, dtype=logits.dtype, device=logits.device)
        return hidden.masked_fill(~visible, torch.finfo(logits.dtype).min)[:, None]

    def losses(self, penalty: float) -> torch.Tensor:
        """The box loss from the tables that were kept."""
        options = BoxControlOptions()
        cross, own = {}, {}
        for name, table in self.tables.items():
            if name.endswith("attn2"):
                keys = [[*tokens, self.subjects.end_index] for tokens in self.subjects.token_indices]
                cross[name] = torch.stack([table[..., chosen].sum(-1) for chosen in keys], -1)
            else:
                own[name] = table @ self.regions(table.shape[-1]).flatten(1).T.to(table)
        found = {"cross": mean_box_masses(cross, _Grids(self)), "self": mean_box_masses(own, _Grids(self))}
        weights = {"cross": options.cross_weight, "self": options.self_weight}
        present = torch.ones_like(found["self"][0])
        return box_control_loss(found, weights, penalty, present).total


class _Grids:
    """The boxes on every grid, as the losses take them."""

    def __init__(self, control: NaiveBoxControl):
        self.control = control

    def at_tokens(self, num_tokens: int, device: Any = None) -> torch.Tensor:
        return self.control.regions(num_tokens).to(device)


def naive_sampling(
    unet: Any,
    scheduler: Any,
    latents: torch.Tensor,
    text: torch.Tensor,
    control: NaiveBoxControl,
    num_steps: int,
    guided_steps: int,
    guidance_scale: float = 7.5,
    iterations: int = 5,
) -> torch.Tensor:
    """Sample one picture to latents, all iterations in every guided step.

    Args:
        unet, scheduler: of the model.
        latents: noise `(1, C, h, w)`.
        text: `(2, L, D)`, [uncond, cond].
        control: masks and loss.
        num_steps: denoising steps.
        guided_steps: how many of them are guided, from the first.
        guidance_scale: of classifier-free guidance.
        iterations: in each guided step.
    """
    options = BoxControlOptions()
    originals = dict(unet.attn_processors)
    unet.set_attn_processor({name: NaiveBoxProcessor(name.removesuffix(".processor"), control) for name in originals})
    try:
        scheduler.set_timesteps(num_steps, device=latents.device)
        for step, timestep in enumerate(scheduler.timesteps):
            if step < guided_steps:
                control.mode = "guide"
                size = descent_step_size(step, guided_steps, *options.step_sizes)
                for _ in range(iterations):
                    with torch.enable_grad():
                        states = latents.detach().requires_grad_()
                        unet(torch.cat([states] * 2), timestep, encoder_hidden_states=text)
                        control.losses(options.penalty_at(step, guided_steps)).sum().backward(inputs=[states])
                    assert states.grad is not None
                    latents = latents - size * states.grad
                    control.tables.clear()
                control.mode = "denoise"
            with torch.no_grad():
                batch = torch.cat([latents] * 2)
                uncond, cond = unet(batch, timestep, encoder_hidden_states=text).sample.chunk(2)
            control.tables.clear()
            noise = uncond + guidance_scale * (cond - uncond)
            latents = scheduler.step(noise, timestep, latents).prev_sample
        return latents
    finally:
        unet.set_attn_processor(originals)
