import numpy as np
import torch

from diffmia_exp.attacks.secmi import SecMI
from diffmia_exp.attacks.secmi_nns import SecMINNs
from tests.attacks.conftest import Lab


def test_its_signal_is_the_map_whose_square_secmi_sums(lab: Lab) -> None:
    attack = SecMINNs(t=60, stride=20)
    access = attack.access(lab.diffusion())
    maps = attack.signal(access, lab.x, lab.ids)
    assert maps.shape == (len(lab.x), 64)
    assert bool((maps >= 0).all())
    torch.testing.assert_close(-maps.square().sum(1), SecMI(60, 20).score(access, lab.x, lab.ids), rtol=1e-12, atol=0)


def test_its_head_never_sees_the_target(lab: Lab) -> None:
    """What the head learned is the same whatever the target's signals are."""
    from sklearn.linear_model import LogisticRegression

    from diffmia_exp.heads import judged_by
    from diffmia_exp.signals import Signals

    rng = np.random.default_rng(0)
    shadows, keep, pool = rng.normal(size=(3, 20, 4)), rng.random((3, 20)) < 0.5, np.ones((3, 20), dtype=bool)
    target = rng.normal(size=(20, 4))
    head = LogisticRegression()
    fitted = LogisticRegression().fit(shadows.reshape(60, 4), keep.reshape(60))
    for scale in (1.0, 100.0):
        signals = Signals(np.arange(20), target * scale, shadows, keep, pool, np.zeros(20, dtype=bool))
        np.testing.assert_allclose(judged_by(head, signals), fitted.predict_proba(target * scale)[:, 1], rtol=1e-12)
