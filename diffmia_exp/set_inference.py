"""CDI: were these images, as a set, among the training images? (Dubinski et al. 2024, "CDI: Copyrighted Data Identification in
Diffusion Models")

Attacks too weak to tell about one image add up over many: their scores are combined by a logistic model, fitted on one half of the
questioned and of the known non-members, and the other halves are compared by a one-sided Welch test.

The null hypothesis is that questioned images and known non-members are alike. So both must come from the same source: a shift between
them, however small, is found as surely as membership.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from diffmia_exp.errors import ConfigError, UserError, whole
from diffmia_exp.metrics import Floats

LEAST = 4  # images of a set: two to fit, two to test
ROUNDING = 1e-12  # probabilities closer than that are equal


def p_value(questioned: Floats, nonmembers: Floats, splits: int = 1, seed: int = 0) -> float:
    """P-value of the hypothesis that the questioned images are no members, and so alike the known non-members.

    Which way each attack points is learned with the model: the test is one-sided in its output, the probability of membership.

    One split into halves gives a p-value that is uniform under the null, but depends on the split. Several are combined as twice their
    median, at most 1, which is valid however the p-values depend on each other (Rüger 1978; Meinshausen, Meier, Bühlmann 2009) and
    conservative under the null. Their plain mean or median is not valid.

    Args:
        questioned: float64 [n, attacks], scores of the questioned images, one column per attack, higher = member.
        nonmembers: float64 [k, attacks], the same of images known to be no members, from the same source.
        splits: random halves.
        seed: of the halves.

    Raises:
        UserError: for fewer than four images in a set, attacks that differ, or scores that are not finite.
    """
    _check(questioned, nonmembers)
    whole("splits", splits, least=1)
    p = [_one_split(questioned, nonmembers, np.random.default_rng([seed, i])) for i in range(splits)]
    return p[0] if splits == 1 else min(1.0, 2 * float(np.median(p)))


def images_needed(questioned: Floats, nonmembers: Floats, alpha: float = 0.01, draws: int = 51, seed: int = 0) -> int | None:
    """The smallest number of questioned images for p < alpha, in the median over random subsets; None if all do not suffice.

    Each draw is an order of the images and one split; the first n questioned images stand against as many non-members, or all there are.
    n is found by bisection, which takes the median p-value to fall with n. Half of the n images fit the model, half test it.
    It describes the attack, and is no test: the p-value of a claim is that of `p_value` on all images.

    Args:
        questioned: float64 [n, attacks], as for `p_value`.
        nonmembers: float64 [k, attacks].
        alpha: what the median p-value must be below.
        draws: random subsets per number of images.
        seed: of the subsets and halves.
    """
    _check(questioned, nonmembers)
    whole("draws", draws, least=1)
    if not 0 < alpha < 1:
        raise ConfigError("alpha", alpha, "must be a number between 0 and 1, such as 0.01")

    def enough(n: int) -> bool:
        p = []
        for i in range(draws):
            rng = np.random.default_rng([seed, i])
            one, other = rng.permutation(len(questioned))[:n], rng.permutation(len(nonmembers))[:n]
            p.append(_one_split(questioned[one], nonmembers[other], rng))
        return bool(np.median(p) < alpha)

    low, high = LEAST - 1, len(questioned)
    if not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _one_split(questioned: Floats, nonmembers: Floats, rng: np.random.Generator) -> float:
    """Fit on one half of each, compare the probabilities of membership of the other halves."""
    (fit_q, test_q), (fit_n, test_n) = (np.array_split(x[rng.permutation(len(x))], 2) for x in (questioned, nonmembers))
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit(np.concatenate([fit_q, fit_n]), np.repeat([1, 0], [len(fit_q), len(fit_n)]))
    of_q, of_n = (model.predict_proba(x)[:, 1] for x in (test_q, test_n))
    if max(np.ptp(of_q), np.ptp(of_n)) < ROUNDING:  # no variance to test with: the exact permutation test
        return 1 / math.comb(len(of_q) + len(of_n), len(of_q)) if of_q[0] - of_n[0] > ROUNDING else 1.0
    return float(stats.ttest_ind(of_q, of_n, equal_var=False, alternative="greater").pvalue)


def _check(questioned: Floats, nonmembers: Floats) -> None:
    for name, x in (("questioned", questioned), ("known non-member", nonmembers)):
        if x.ndim != 2 or len(x) < LEAST or x.shape[1] < 1:
            raise UserError(f"set inference needs at least {LEAST} {name} images with one column per attack, here {x.shape}")
        if not np.isfinite(x).all():
            raise UserError(f"{int((~np.isfinite(x)).sum())} scores of {name} images are not finite")
    if questioned.shape[1] != nonmembers.shape[1]:
        raise UserError(f"both sets need the same attacks, here {questioned.shape[1]} and {nonmembers.shape[1]} columns")
