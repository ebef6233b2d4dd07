"""The steps that an IP-Adapter needs: pictures to embeddings, repeated and ordered as the UNet's batch is."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import ImageProjection


class ImagePromptStepsMixin:
    """Part of `StableDiffusionStepsMixin`; each step returns what that of `diffusers.StableDiffusionPipeline` does."""

    unet: Any
    feature_extractor: Any
    image_encoder: Any

    def encode_image(
        self, image: Any, device: torch.device | str, num_images_per_prompt: int, output_hidden_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed pictures for an IP-Adapter.

        Returns:
            The embeddings and their unconditional counterparts: `(B * n, C)` each, or `(B * n, L, C)` hidden states of
            the last but one layer with `output_hidden_states`.
        """
        dtype = next(self.image_encoder.parameters()).dtype
        if not isinstance(image, torch.Tensor):
            image = self.feature_extractor(image, return_tensors="pt").pixel_values
        image = image.to(device=device, dtype=dtype)
        if output_hidden_states:
            embeds = self.image_encoder(image, output_hidden_states=True).hidden_states[-2]
            # the adapters that read hidden states were trained with an all-zero picture as the unconditional one
            blank = self.image_encoder(torch.zeros_like(image), output_hidden_states=True).hidden_states[-2]
            blank = blank.repeat_interleave(num_images_per_prompt, dim=0)
        else:
            embeds = self.image_encoder(image).image_embeds
            blank = torch.zeros_like(embeds).repeat_interleave(num_images_per_prompt, dim=0)
        return embeds.repeat_interleave(num_images_per_prompt, dim=0), blank

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: list[torch.Tensor] | None,
        device: torch.device | str,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
    ) -> list[torch.Tensor]:
        """One tensor per loaded IP-Adapter, its rows ordered `[uncond, cond]` under guidance.

        `num_images_per_prompt` is how often the embeddings are repeated: diffusers passes the whole batch here.
        """
        pairs: list[tuple[Any, ...]]
        if ip_adapter_image_embeds is None:
            images = ip_adapter_image if isinstance(ip_adapter_image, list) else [ip_adapter_image]
            pairs = []
            for image, layer in zip(images, self.unet.encoder_hid_proj.image_projection_layers, strict=True):
                embeds, blank = self.encode_image(image, device, 1, not isinstance(layer, ImageProjection))
                pairs.append((blank[None, :], embeds[None, :]))
        elif do_classifier_free_guidance:
            pairs = [tuple(embeds.chunk(2)) for embeds in ip_adapter_image_embeds]
        else:
            pairs = [(None, embeds) for embeds in ip_adapter_image_embeds]

        prepared = []
        for blank, embeds in pairs:
            rows = torch.cat([embeds] * num_images_per_prompt, dim=0)
            if do_classifier_free_guidance:
                rows = torch.cat([torch.cat([blank] * num_images_per_prompt, dim=0), rows], dim=0)
            prepared.append(rows.to(device=device))
        return prepared
