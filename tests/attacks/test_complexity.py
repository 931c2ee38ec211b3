import zlib

import numpy as np
import pytest

from diffmia_exp.attacks.lira import LiRA
from diffmia_exp.attacks.loss import Loss
from diffmia_exp.attacks.plugins.complexity import Complexity
from diffmia_exp.errors import ConfigError
from diffmia_exp.signals import Signals
from tests.attacks.conftest import Lab


def test_formula(lab: Lab) -> None:
    host = Loss()
    access = host.access(lab.diffusion())
    s = host.score(access, lab.x, lab.ids).numpy()
    c = np.array([len(zlib.compress(np.round((x.numpy() + 1) * 127.5).astype(np.uint8).tobytes(), 9)) / 64 for x in lab.x])
    none, public = np.empty((0, 6), dtype=bool), np.arange(6) >= 2
    target = Complexity(host).signal(access, lab.x, lab.ids).numpy()
    signals = Signals(lab.ids.numpy(), target, np.empty((0, 6, 2)), none, none, public)
    np.testing.assert_allclose(Complexity(host).judge(signals), s / c, rtol=1e-12)
    design = np.column_stack([np.ones(4), c[2:]])
    alpha, beta = np.linalg.lstsq(design, s[2:], rcond=None)[0]
    np.testing.assert_allclose(Complexity(host, "regress").judge(signals), s - alpha - beta * c, rtol=1e-8)


def test_an_attack_on_shadows_is_refused() -> None:
    with pytest.raises(ConfigError, match="single model"):
        Complexity(LiRA(Loss()))
