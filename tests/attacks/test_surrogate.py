import numpy as np
import torch

from diffmia_exp.attacks.loss import Loss
from diffmia_exp.attacks.surrogate import Surrogate
from diffmia_exp.diffusion import Diffusion, linear
from tests.attacks.conftest import Lab, random_net


def test_its_score_is_the_host_s_on_a_model_trained_on_the_target_s_samples(lab: Lab) -> None:
    seen: list[np.ndarray] = []
    other = Diffusion(random_net(5).double(), linear(1000), image_shape=(1, 8, 8))

    class AtHome:
        def train(self, pixels: np.ndarray) -> Diffusion:
            seen.append(pixels)
            return other

    attack, host = Surrogate(Loss(t=100), n_samples=6, steps=3), Loss(t=100)
    target = lab.diffusion()
    access = attack.access(target)
    attack.prepare(access, AtHome())
    assert access.evaluations == 18 == attack.nfe_once(1000)
    expected = (target.sample(6, 3, 0).numpy() + 1) * 127.5
    assert seen[0].dtype == np.uint8
    np.testing.assert_allclose(seen[0], expected, atol=0.5001)
    score = attack.signal(access, lab.x, lab.ids)[:, 0]
    torch.testing.assert_close(score, host.score(host.access(other), lab.x, lab.ids), rtol=0, atol=0)
    assert access.evaluations == 18, "candidates are put to the surrogate, not to the target"
