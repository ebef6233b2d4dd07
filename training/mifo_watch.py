"""Watches a known trap of learning with the out-of-mask penalty: attention that goes to 0.

The penalty is least where an instance's placeholder is attended to nowhere, inside of its mask as little as outside
(MIFO, arXiv 2511.00542, section F.2: it is flat in how much attention the instance itself gets). Only the reward
before it and the reconstruction keep attention up, and where they are too weak the placeholder comes to mean nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence


logger = logging.getLogger(__name__)

#: Draws of an instance whose mean is looked at; single ones differ by timestep and noise.
WATCHED_DRAWS = 20
#: Share of its highest mean below which attention counts as lost, where it is also below that of a random token.
LOST_SHARE = 0.5


class AttentionWatch:
    """Warns once for each instance whose attention inside of its mask is lost.

    Lost is attention whose mean over the last `WATCHED_DRAWS` draws is both below `LOST_SHARE` of its highest mean so
    far and below what each token had if attention were even. What is watched is not part of checkpoints: after a
    resume it starts anew.

    Args:
        names: of the instances, for the warning.
        even_share: attention of an instance's tokens together, were it even among all tokens; in (0, 1].
    """

    def __init__(self, names: Sequence[str], even_share: float) -> None:
        self.names, self.even_share = list(names), even_share
        self._recent: list[deque[float]] = [deque(maxlen=WATCHED_DRAWS) for _ in names]
        self._highest = [0.0] * len(self.names)
        self._is_lost = [False] * len(self.names)

    def add(self, instance: int, inside: float) -> None:
        """Note one draw of an instance: its mean attention inside of the mask, in [0, 1]."""
        recent = self._recent[instance]
        recent.append(inside)
        if len(recent) < WATCHED_DRAWS or self._is_lost[instance]:
            return
        mean = sum(recent) / WATCHED_DRAWS
        self._highest[instance] = max(self._highest[instance], mean)
        if mean < min(LOST_SHARE * self._highest[instance], self.even_share):
            self._is_lost[instance] = True
            logger.warning(
                f"Attention of {self.names[instance]} inside of its mask goes to 0: {mean:.2g} over its last"
                f" {WATCHED_DRAWS} draws, {self._highest[instance]:.2g} at best. It may come to mean nothing. Learn"
                " again with a larger learning rate, a larger `reward_weight` (or more `reward_steps`) beside"
                " `penalty_weight`, or from another word (`initial`)."
            )
