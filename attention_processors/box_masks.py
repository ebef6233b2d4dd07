"""Box control by masks (MIFO and Bounded Attention): where the subjects are, and which tokens a cell may see.

Self-attention: a cell of a box sees its own boxes and the background, a background cell sees everything
(`RegionKeyMask`). Cross-attention, on the conditional half only (`token_visibility`): a subject's tokens are for the
cells of its box; in guidance passes the background sees them too, so that the loss has something to push out, in
denoising passes it sees neither them nor the end token. Boxes hold until masks found by clustering replace them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.regions import RegionPyramidBatch, token_grid


PassMode = Literal["guide", "denoise"]
PaddingRule = Literal["open", "like_end"]


@dataclass(frozen=True)
class PromptSubjects:
    """The subjects of one prompt, as positions in the encoded prompt (start token = 0).

    Attributes:
        token_indices: per subject its tokens, at least one each; several subjects may share a token.
        leading_indices: per subject the one token that labels clusters.
        end_index: position of the first end token.
        filtered_indices: tokens that no cell sees (function words).
    """

    token_indices: tuple[tuple[int, ...], ...]
    leading_indices: tuple[int, ...]
    end_index: int
    filtered_indices: tuple[int, ...] = ()


def token_visibility(
    members: torch.Tensor, subjects: PromptSubjects, num_keys: int, mode: PassMode, padding: PaddingRule = "open"
) -> torch.Tensor:
    """Which tokens the cells of one grid see.

    Args:
        members: bool `(S, Q)`, the cells of each subject; they may overlap.
        subjects: the prompt's subjects, S of them.
        num_keys: positions of the text states, K.
        mode: "guide" opens the subjects' tokens to the background, "denoise" closes them, and the end token, to it.
        padding: "open" leaves what follows the end token open to all, as the authors do; "like_end" treats it as the
            end token, for models that read the prompt from their padding.

    Returns:
        bool `(Q, K)`. The start token is open to all.
    """
    owners = torch.zeros(len(members), num_keys, dtype=torch.bool)
    for row, tokens in zip(owners, subjects.token_indices, strict=True):
        row[list(tokens)] = True
    members = members.cpu()
    background = ~members.any(0)[:, None]  # (Q, 1)
    own = (members.T.float() @ owners.float()) > 0  # (Q, K)
    visible = ~owners.any(0) | own
    if mode == "guide":
        visible |= background
    elif len(members):
        last = subjects.end_index + 1 if padding == "open" else num_keys
        visible[background[:, 0], subjects.end_index : last] = False
    visible[:, list(subjects.filtered_indices)] = False
    return visible


class SubjectRegions:
    """Where the subjects of each picture are, on every grid: their boxes, later the refined masks.

    Args:
        boxes: the boxes of B pictures, as {0, 1} on every grid.

    Attributes:
        boxes: as given.
        version: counts the changes, so that what was built from the regions can be kept.
    """

    def __init__(self, boxes: RegionPyramidBatch) -> None:
        self.boxes = boxes
        self.version = 0
        self._refined: torch.Tensor | None = None

    @property
    def is_refined(self) -> bool:
        return self._refined is not None

    @property
    def present(self) -> torch.Tensor:
        """bool `(B, S)`: False for padded subjects."""
        return self.boxes.valid

    def refine(self, masks: torch.Tensor) -> None:
        """Replace the regions.

        Args:
            masks: `(B, S, h, w)`, {0, 1}, on one grid of the canvas.
        """
        self._refined = masks.float().cpu()
        self.version += 1

    def at_tokens(self, num_tokens: int, device: Any = None) -> torch.Tensor:
        """The regions on the grid with `num_tokens` cells, `(B, S, h, w)`, {0, 1}."""
        if self._refined is None:
            return self.boxes.at_tokens(num_tokens, device)
        grid = token_grid(num_tokens, *self.boxes.canvas)
        masks = F.interpolate(self._refined, size=grid, mode="nearest-exact")
        return masks.to(device)


class TokenVisibility:
    """The tables of `token_visibility` for all pictures and grids; each is built once per version of the regions.

    Args:
        regions: where the subjects are.
        subjects: per picture.
        num_keys: positions of the text states.
        padding: see `token_visibility`.

    Attributes:
        mode: of the coming pass.
    """

    def __init__(
        self,
        regions: SubjectRegions,
        subjects: Sequence[PromptSubjects],
        num_keys: int,
        padding: PaddingRule = "open",
    ) -> None:
        self.regions, self.subjects, self.num_keys, self.padding = regions, list(subjects), num_keys, padding
        self.mode: PassMode = "denoise"
        self._version = 0
        self._tables: dict[tuple[str, int, str], torch.Tensor] = {}

    def at_tokens(self, num_tokens: int, device: Any = None) -> torch.Tensor:
        """bool `(B, Q, K)` for the grid with `num_tokens` cells."""
        if self._version != self.regions.version:
            self._version, self._tables = self.regions.version, {}
        key = (self.mode, num_tokens, str(device))
        if key not in self._tables:
            members = self.regions.at_tokens(num_tokens).flatten(2) > 0  # (B, S, Q)
            rows = [
                token_visibility(row[: len(subjects.token_indices)], subjects, self.num_keys, self.mode, self.padding)
                for row, subjects in zip(members, self.subjects, strict=True)
            ]
            self._tables[key] = torch.stack(rows).to(device)
        return self._tables[key]
