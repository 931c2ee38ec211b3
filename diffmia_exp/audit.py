"""A lower bound on epsilon from scores: if training were (epsilon, delta)-differentially private, they could hardly look like this.

`one_run` needs one model and a Bernoulli(1/2) split, and is right however the images influence each other. `classical` bounds TPR and
FPR, and needs the images to be independent trials. Neither says anything about how private a model is at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from diffmia_exp import metrics
from diffmia_exp.errors import ConfigError, UserError, number
from diffmia_exp.intervals import Labels, table
from diffmia_exp.metrics import Floats


@dataclass(frozen=True)
class Bound:
    """Training was not (e, delta)-differentially private for any e < epsilon, with this confidence.

    Args:
        epsilon: the lower bound; 0 where nothing is shown.
        delta: of the privacy definition.
        confidence: probability, over split and training, that the bound does not exceed the true epsilon, at least.
        guesses: images that were called member or non-member; the others were abstained from.
        correct: guesses that were right.
        images: images of the audit.
        tried: numbers of guesses, or thresholds, of which this was the best; the bound is corrected for their number.
        threshold: of `classical`: scores >= it were called members.
    """

    epsilon: float
    delta: float
    confidence: float
    guesses: int
    correct: int
    images: int
    tried: int
    threshold: float | None = None


def one_run(
    is_member: Labels,
    score: Floats,
    guesses: int | Sequence[int],
    *,
    bernoulli: bool,
    delta: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Bound:
    """The audit with one training run (Steinke, Nasr, Jagielski 2023).

    The k/2 images with the highest scores are guessed members, the k/2 with the lowest non-members. Epsilon is the largest whose
    `p_value` for the number of correct guesses is below 1 - confidence. The guesses may depend on scores and on anything else but the
    target's labels: choose k on shadow models, or give several; the best is taken at (1 - confidence) / number of them (Bonferroni).

    In a split of exact size a membership follows from the others, so the guesses are not independent even for a perfectly private
    model, and the theorem does not hold; such a split is refused.

    Args:
        is_member: bool [images], all images that the coin was flipped for (the audit set is not thinned out by label).
        score: float64 [images], higher = member. Equal scores are put in an order drawn from `seed`, since the order of the rows
            may give the labels away.
        guesses: even number k of guesses, or several of which the best is taken.
        bernoulli: whether each image was included independently with probability 1/2 (`split=bernoulli`).
        delta: of the privacy definition.
        confidence: of the bound.
        seed: of the order of equal scores.

    Raises:
        UserError: if the split was not Bernoulli(1/2), or by its numbers cannot have been; for scores that are not finite.
        ConfigError: for settings out of range.
    """
    table(is_member, score)
    _check(delta, confidence)
    total = len(score)
    if not bernoulli:
        raise UserError(
            "the one-run audit needs a split that includes every image independently with probability 1/2 (split=bernoulli); "
            "an exact size makes memberships depend on each other"
        )
    if stats.binomtest(int(is_member.sum()), total).pvalue < 1e-6:
        raise UserError(f"{int(is_member.sum())} members of {total} images cannot come from inclusion with probability 1/2")
    ks = list(guesses) if isinstance(guesses, Sequence) else [guesses]
    for k in ks:
        if not isinstance(k, int) or k % 2 or not 2 <= k <= total:
            raise ConfigError("guesses", k, f"must be an even number from 2 to {total}, the images of the audit")
    if not ks:
        raise ConfigError("guesses", ks, "must name at least one number of guesses")
    from_low = is_member[np.lexsort((np.random.default_rng(seed).permutation(total), score))]
    right = [int((~from_low[: k // 2]).sum() + from_low[total - k // 2 :].sum()) for k in ks]
    alpha = (1 - confidence) / len(ks)
    bounds = [epsilon_bound(total, k, v, delta, alpha) for k, v in zip(ks, right, strict=True)]
    best = int(np.argmax(bounds))
    return Bound(bounds[best], delta, confidence, ks[best], right[best], total, len(ks))


def p_value(images: int, guesses: int, correct: int, epsilon: float, delta: float = 0.0) -> float:
    """How likely so many correct guesses are at most, if training is (epsilon, delta)-differentially private.

    With B ~ Binomial(guesses, 1 / (1 + exp(-epsilon))), at most 1:
    P[B >= correct] + 2 images delta max_i P[correct > B >= correct - i] / i.

    Steinke, Nasr, Jagielski 2023, the theorem for approximate differential privacy and the code of its appendix D.
    """
    accuracy = 1 / (1 + math.exp(-epsilon))
    if correct == 0:
        return 1.0
    tail = float(special.bdtrc(correct - 1, guesses, accuracy))
    if delta == 0:
        return tail
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
    return min(1.0, tail + 2 * images * delta * float((below / np.arange(1, correct + 1)).max()))


def epsilon_bound(images: int, guesses: int, correct: int, delta: float, alpha: float) -> float:
    """The largest epsilon, from below, whose `p_value` is under alpha; 0 if there is none."""
    low, high = 0.0, 1.0
    while p_value(images, guesses, correct, high, delta) < alpha:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(images, guesses, correct, middle, delta) < alpha else (low, middle)
    return low if p_value(images, guesses, correct, 0.0, delta) < alpha else 0.0


def refuted(bound: float, epsilon: float) -> str | None:
    """What is wrong where a lower bound is above the epsilon that an accountant claims, at the same delta; None if it is not."""
    if bound <= epsilon:
        return None
    claimed = f"the accountant's epsilon {epsilon:.3g}"
    return f"privacy: the audit's lower bound {bound:.3g} exceeds {claimed}: the training is not as private as claimed"


def classical(
    is_member: Labels,
    score: Floats,
    threshold: float | Sequence[float],
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> Bound:
    """The bound from TPR and FPR: epsilon >= max(log((TPR - delta) / FPR), log((TNR - delta) / FNR)).

    TPR is replaced by its lower and FPR by its upper Clopper-Pearson limit, each one-sided at (1 - confidence) / 2, or at that over
    the number of thresholds; both directions rest on the same two limits (TNR = 1 - FPR, FNR = 1 - TPR).

    The limits are right if the images are independent trials at a threshold that does not depend on these scores: each score of a
    training of its own, or a mechanism that treats every image apart. For the scores of one model, whose images influence each
    other, that is an assumption, and `one_run` does without it.

    Args:
        is_member: bool [images].
        score: float64 [images]; those >= threshold are called members.
        threshold: chosen elsewhere, on shadow models say; or several of which the best is taken, with a correction for their number.
        delta: of the privacy definition.
        confidence: of the bound.

    Raises:
        UserError: for scores that are not finite, or of one class.
        ConfigError: for settings out of range.
    """
    table(is_member, score)
    _check(delta, confidence)
    thresholds = [number("threshold", c) for c in (threshold if isinstance(threshold, Sequence) else [threshold])]
    if not thresholds:
        raise ConfigError("threshold", threshold, "must be a number, or several")
    level = 1 - (1 - confidence) / len(thresholds)
    m, n = int(is_member.sum()), int((~is_member).sum())
    found = []
    for c in thresholds:
        true, false = int((score[is_member] >= c).sum()), int((score[~is_member] >= c).sum())
        tpr, fpr = metrics.clopper_pearson(true, m, level)[0], metrics.clopper_pearson(false, n, level)[1]
        ratio = max((tpr - delta) / fpr, (1 - fpr - delta) / (1 - tpr), 1.0)  # an upper limit is above 0, a lower one below 1
        found.append((math.log(ratio), true + n - false, c))
    best, correct, at = max(found, key=lambda one: one[0])
    return Bound(best, delta, confidence, m + n, correct, m + n, len(thresholds), at)


def _check(delta: float, confidence: float) -> None:
    number("delta", delta, least=0, most=1)
    if not 0 < confidence < 1:
        raise ConfigError("confidence", confidence, "must be a number between 0 and 1, such as 0.95")
