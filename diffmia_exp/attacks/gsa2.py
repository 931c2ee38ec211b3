"""GSA2: gradients as signals, one backward pass per image and timestep.

"White-box Membership Inference Attacks against Diffusion Models", 2023 (arXiv 2308.06405).
"""

from __future__ import annotations

from torch import Tensor

from diffmia_exp.attacks.gsa1 import GSA1
from diffmia_exp.threat_models import WhiteBox


class GSA2(GSA1):
    """As GSA1, but the norms are taken at each timestep and then averaged.

    signal = (mean_t ||d L_t / d W||_2 for each parameter tensor W), score = P(member | signal) by the head.

    Args:
        n_timesteps, seed, head: as in `GSA1`.
    """

    def signal(self, access: WhiteBox, x: Tensor, sample_id: Tensor) -> Tensor:
        return self.norms(access, x, sample_id, together=1).unflatten(0, (len(x), self.n_timesteps)).mean(1)
