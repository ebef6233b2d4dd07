"""Box control the plain way: whole attention tables under additive masks, built cell by cell, in the paper's words."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from objectcompose.attention_processors.box_masks import PromptSubjects
from objectcompose.attention_processors.regions import RegionPyramid, RegionPyramidBatch


TWO_BOXES = ((0.05, 0.1, 0.5, 0.6), (0.45, 0.35, 1.0, 0.95))  # they overlap a little
TWO_SUBJECTS = PromptSubjects(((2,), (5, 6)), (2, 6), end_index=8, filtered_indices=(1, 3))
ONE_BOX = ((0.3, 0.2, 0.8, 0.7),)
ONE_SUBJECT = PromptSubjects(((4,),), (4,), end_index=6, filtered_indices=(3,))
NO_SUBJECT = PromptSubjects((), (), end_index=5)


def box_pyramids(canvas, *boxes_of_pictures):
    return RegionPyramidBatch([RegionPyramid(boxes, canvas, rule="round") for boxes in boxes_of_pictures])


def box_members(boxes, side):
    """bool `(S, side * side)`, by loops over cells; halves round upwards."""
    rounded = [[math.floor(corner * side + 0.5) for corner in box] for box in boxes]
    members = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    for subject, (x0, y0, x1, y1) in enumerate(rounded):
        for row in range(side):
            for column in range(side):
                members[subject, row, column] = y0 <= row < y1 and x0 <= column < x1
    return members.flatten(1)


def explicit_cross_mask(members, subjects, num_keys, mode, padding="open"):
    """Additive `(Q, K)`: 0 or -inf."""
    mask = torch.zeros(members.shape[1], num_keys)
    every_token = {token for tokens in subjects.token_indices for token in tokens}
    for cell in range(members.shape[1]):
        inside = [subject for subject in range(len(members)) if members[subject, cell]]
        for key in range(num_keys):
            hidden = key in subjects.filtered_indices
            if key in every_token:
                own = any(key in subjects.token_indices[subject] for subject in inside)
                hidden |= not own and not (mode == "guide" and not inside)
            is_end = key == subjects.end_index or (padding == "like_end" and key > subjects.end_index)
            if is_end and len(members) and not inside and mode == "denoise":
                hidden = True
            if hidden:
                mask[cell, key] = float("-inf")
    return mask


def explicit_self_mask(members):
    """Additive `(Q, Q)`: 0 or -inf."""
    background = ~members.any(0)
    together = torch.einsum("sx,sy->xy", members.float(), members.float()) > 0
    allowed = together | background[:, None] | background[None, :]
    return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))


@lru_cache(maxsize=64)
def known_mask(boxes, side, subjects, num_keys, mode):
    """The additive mask of one picture and grid; `num_keys` None is self-attention. The loops take a while."""
    members = box_members(boxes, side)
    return explicit_self_mask(members) if num_keys is None else explicit_cross_mask(members, subjects, num_keys, mode)


class ExplicitBoxProcessor:
    """Attention with the whole table in memory; `tables` keeps it per layer, `(2 B, heads, Q, K)`."""

    def __init__(self, name, tables, boxes, subjects, mode):
        self.name, self.tables, self.boxes, self.subjects, self.mode = name, tables, boxes, subjects, mode

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, states in ((attn.to_q, hidden_states), (attn.to_k, keys), (attn.to_v, keys))
        )
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        table = (logits + self.mask(logits, encoder_hidden_states is not None)).softmax(-1)
        self.tables[self.name] = table
        return attn.to_out[0]((table @ value).transpose(1, 2).flatten(2))

    def mask(self, logits, is_cross):
        side, num_keys = int(logits.shape[2] ** 0.5), logits.shape[3] if is_cross else None
        pictures = zip(self.boxes, self.subjects, strict=True)
        conditional = torch.stack([known_mask(boxes, side, prompt, num_keys, self.mode) for boxes, prompt in pictures])
        unconditional = torch.zeros_like(conditional) if is_cross else conditional
        return torch.cat([unconditional, conditional])[:, None].to(logits)


def explicit_forward(unet, inputs, boxes, subjects, mode):
    """Prediction and tables of a batch `[uncond, cond]`, all of the UNet."""
    tables = {}
    originals = dict(unet.attn_processors)
    unet.set_attn_processor(
        {
            name: ExplicitBoxProcessor(name.removesuffix(".processor"), tables, boxes, subjects, mode)
            for name in originals
        }
    )
    try:
        return unet(**inputs).sample, tables
    finally:
        unet.set_attn_processor(originals)


def explicit_box_loss(tables, layers, boxes, subjects, penalty, weights=(1.5, 0.5)):
    """The loss of each picture from the tables of the conditional half, summed entry by entry."""
    totals = []
    first = len(next(iter(tables.values()))) // 2
    for picture, (own_boxes, prompt) in enumerate(zip(boxes, subjects, strict=True)):
        total = torch.zeros(())
        for weight, kind in zip(weights, ("attn2", "attn1"), strict=True):
            for subject in range(len(own_boxes)):
                inside, outside = [], []
                for layer in layers:
                    if not layer.endswith(kind):
                        continue
                    table = tables[layer][first + picture].sum(0)  # heads; (Q, K)
                    members = box_members(own_boxes, int(table.shape[0] ** 0.5))
                    background = ~members.any(0)
                    keys = [prompt.end_index, *prompt.token_indices[subject]] if kind == "attn2" else members[subject]
                    mass = table[:, keys].sum(1)
                    inside.append(mass[members[subject]].sum())
                    outside.append(mass[background].sum())
                mean_inside, mean_outside = sum(inside) / len(inside), sum(outside) / len(outside)
                reward = (1 - mean_inside / (mean_inside + mean_outside)) ** 2
                total = total + weight * (reward + penalty * torch.log(1 + mean_outside))
        totals.append(total)
    return torch.stack(totals)
