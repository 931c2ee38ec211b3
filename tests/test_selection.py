from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from diffmia_exp import metrics, selection
from diffmia_exp.attacks.base import Attack
from diffmia_exp.errors import ConfigError
from diffmia_exp.selection import Candidate, Rehearsal
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import GrayBox
from tests.attacks.shadow_world import made_up
from tests.composing import composed


class Noise(Attack):
    """Scores that know nothing: a candidate is a column of pure noise."""

    access = GrayBox

    def __init__(self, column: int) -> None:
        self.column = column

    def nfe(self, T: int) -> int:
        return 1

    def judge(self, signals: Signals) -> np.ndarray:
        return signals.target[:, self.column]


@pytest.mark.parametrize("seed", range(3))
def test_pure_noise_stays_at_one_half_through_the_whole_path(seed: int) -> None:
    """Chosen among 30 columns of noise on shadows, the choice is still noise on the target; chosen on the target it would not be."""
    signals, is_member = made_up(K=6, n=500, F=30, shift=0.0, seed=seed)
    noise = np.random.default_rng([seed, 1]).normal(size=(7, *signals.target.shape))
    signals = Signals(signals.sample_id, noise[0], noise[1:], signals.keep, signals.pool, signals.public)
    options = [Candidate({"column": c}, Noise(c), {}) for c in range(30)]
    chosen, rehearsal, tried = selection.choose(options, lambda _: signals, rehearsals=4)
    assert rehearsal.auc == max(t["shadow_auc"] for t in tried)
    score = chosen.attack.judge(signals)
    low, high = metrics.auc(is_member, score)[1]
    assert low <= 0.5 <= high
    best_on_target = max(metrics.auc(is_member, noise[0][:, c])[0] for c in range(30))
    assert best_on_target > 0.53
    for fpr, at in selection.transferred(is_member, score, selection.thresholds(rehearsal, (0.1, 0.05))).items():
        for rate, n in ((at["fpr"], (~is_member).sum()), (at["tpr"], is_member.sum())):
            assert binomtest(round(rate * n), int(n), float(fpr)).pvalue > 1e-3


def test_the_better_candidate_is_chosen_on_shadows_alone() -> None:
    signals, _ = made_up(K=4, n=300, F=2, shift=0.0, seed=3)
    shadows = signals.shadows.copy()
    shadows[..., 1] += 2 * signals.keep  # column 1 betrays the shadows' members; the target's column 1 is noise
    signals = Signals(signals.sample_id, signals.target, shadows, signals.keep, signals.pool, signals.public)
    chosen, rehearsal, tried = selection.choose([Candidate({}, Noise(c), {}) for c in (0, 1)], lambda _: signals, rehearsals=2)
    assert chosen.attack.column == 1  # type: ignore[attr-defined]
    expected = []
    for k in (0, 1):
        member, other = (shadows[k, signals.keep[k] == kept, 1] for kept in (True, False))
        expected.append(np.mean(member[:, None] > other[None, :]))
    assert rehearsal.auc == pytest.approx(np.mean(expected))
    assert len(tried) == 2


def test_a_rehearsal_is_judged_by_the_other_shadows() -> None:
    signals, _ = made_up(K=5)
    played = signals.playing(2)
    assert np.array_equal(played.target, signals.shadows[2])
    assert np.array_equal(played.shadows, signals.shadows[[0, 1, 3, 4]])
    assert np.array_equal(played.keep, signals.keep[[0, 1, 3, 4]])


def test_thresholds_hold_on_the_rehearsals_and_are_the_least_that_do() -> None:
    nonmembers = np.random.default_rng(0).integers(0, 50, 200).astype(float)  # with ties
    for fpr, threshold in selection.thresholds(Rehearsal(0.5, nonmembers), (0.1, 0.01, 0.001)).items():
        if fpr == "0.001":
            assert threshold is None  # 200 scores cannot resolve it
            continue
        assert threshold is not None
        assert (nonmembers >= threshold).mean() <= float(fpr)
        reached = nonmembers[nonmembers < threshold].max()
        assert (nonmembers >= reached).mean() > float(fpr)


def test_a_grid_is_every_combination() -> None:
    config = composed("attack=pia", "attack.select=shadow")["attack"]
    options = selection.candidates(config)
    assert [o.settings for o in options][:3] == [{"t": 50, "p": 2}, {"t": 50, "p": 4}, {"t": 100, "p": 2}]
    assert len(options) == 10
    assert options[0].attack.t == 50  # type: ignore[attr-defined]
    assert selection.candidates(composed("attack=pia")["attack"])[0].settings == {}


def measures(*overrides: str) -> dict[str, Any]:
    return selection.candidates(composed(*overrides)["attack"])[0].measures


def test_what_only_the_judgement_uses_measures_nothing_anew() -> None:
    assert (
        measures("attack=lira")
        == measures("attack=lira", "attack.online=false")
        == measures("attack=reference")
        == measures("attack=multi_loss")
    )
    assert measures("attack=gsa1") == measures("attack=gsa1", "attack.head.max_iter=7")
    assert measures("attack=gsa1") != measures("attack=gsa1", "attack.n_timesteps=4")
    assert measures("attack=lira") != measures("attack=lira", "attack.host.t=[7]")
    assert measures("attack=pia") != measures("attack=pia", "attack/plugin=fremia")
    assert measures("attack=trajectory") == measures("attack=trajectory", "attack.statistic=min", "attack.end=3")
    assert measures("attack=trajectory") != measures("attack=trajectory", "attack.quantity=mse")
    # But what takes the host's scores for its signals depends on how these are judged.
    for host in ("attack/plugin=complexity", "attack@attack.host=trajectory"):
        attack, at = ("quantile", "attack.host.statistic") if "host" in host else ("trajectory", "attack.statistic")
        assert measures(f"attack={attack}", host) != measures(f"attack={attack}", host, f"{at}=min"), host


@pytest.mark.parametrize("grid", ["{t: 50}", "{t: []}", "[1]", "{t: [50, 5000.5]}"])
def test_a_grid_that_makes_no_sense_is_refused(grid: str) -> None:
    config = composed("attack=sima", "attack.select=shadow")["attack"]
    import yaml

    with pytest.raises(ConfigError, match="attack"):
        selection.candidates(config | {"grid": yaml.safe_load(grid)})


def test_an_image_that_every_shadow_holds_is_imputed_from_the_others() -> None:
    keep = np.array([[1, 1, 0], [1, 0, 0]], dtype=bool)
    shadows = np.array([[5.0, 4.0, 1.0], [7.0, 1.0, 3.0]])[..., None]
    signals = Signals(np.arange(3), np.zeros((3, 1)), shadows, keep, np.ones_like(keep), np.zeros(3, dtype=bool))
    inside, outside = signals.inside_and_outside()
    np.testing.assert_allclose(inside[:, 0], [6, 4, 5])  # the gap is 3, from the one image that has both
    np.testing.assert_allclose(outside[:, 0], [3, 1, 2])
    assert torch.tensor(signals.mixed).tolist() == [False, True, False]
