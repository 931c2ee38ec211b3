"""make bench-statistics: how often intervals cover, bounds hold and tests reject, as Markdown (about 5 minutes on one core).

Every figure is of experiments whose truth is known: scores of members N(d, 1), of non-members N(0, 1), so that the AUC is Phi(d / sqrt(2)),
and each image a member with probability 1/2. Its output stands in docs/statistics.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from diffmia_exp import audit, metrics, set_inference
from diffmia_exp.intervals import bootstrap_auc, compare, hierarchical_bootstrap, mean_interval
from diffmia_exp.metrics import Floats, Interval

Table = tuple[NDArray[np.bool_], Floats]
EXPERIMENTS = 1000
SIZES = (200, 2000)
AUCS = (0.5, 0.7, 0.9, 0.99)


def separation(auc: float) -> float:
    return float(np.sqrt(2) * stats.norm.ppf(auc))


def binormal(rng: np.random.Generator, images: int, d: float) -> Table:
    is_member = rng.random(images) < 0.5
    return is_member, rng.normal(size=images) + d * is_member


def heading(title: str, *columns: str) -> None:
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def row(*cells: object) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def covered(intervals: list[Interval], truth: float | list[float]) -> str:
    low, high = np.array(intervals).T
    below, above = float((high < truth).mean()), float((low > truth).mean())
    share = 1 - below - above
    return f"{share:.1%} ({above:.1%} / {below:.1%}){'' if 0.93 <= share <= 0.97 else ' *'}"


# --- coverage of intervals


def of_one_target() -> None:
    heading(
        "Coverage of 95% intervals of one target",
        "images",
        "true AUC",
        "DeLong (`metrics.auc`)",
        "stratified bootstrap",
        "Clopper-Pearson, TPR at the threshold",
        "the same, TPR at FPR 1% of the population",
    )
    for images in SIZES:
        for auc in AUCS:
            rng, d = np.random.default_rng([1, images, int(1000 * auc)]), separation(auc)
            delong, bootstrap, rate, at_threshold = [], [], [], []
            for seed in range(EXPERIMENTS):
                one = binormal(rng, images, d)
                delong.append(metrics.auc(*one)[1])
                bootstrap.append(bootstrap_auc(*one, n=600, seed=seed)[1])
                # Members above the highest false positive that is not allowed: its score is the threshold the rate belongs to.
                nonmembers = np.sort(one[1][~one[0]])[::-1]
                c = nonmembers[int(0.01 * len(nonmembers) + 1e-9)]
                rate.append(metrics.clopper_pearson(int((one[1][one[0]] > c).sum()), int(one[0].sum())))
                at_threshold.append(float(stats.norm.sf(c - d)))
            at_one_percent = float(stats.norm.sf(stats.norm.isf(0.01) - d))
            row(images, auc, *(covered(x, auc) for x in (delong, bootstrap)), covered(rate, at_threshold), covered(rate, at_one_percent))


def of_several_targets() -> None:
    heading(
        "Coverage of 95% intervals of the mean AUC over targets",
        "images per target",
        "targets",
        "spread of targets (sd of d)",
        "mean AUC",
        "Student's t (`mean_interval`)",
        "hierarchical bootstrap",
    )
    for images in SIZES:
        for k, spread, auc in ((3, 0.3, 0.7), (5, 0.0, 0.7), (5, 0.3, 0.95), (10, 0.3, 0.7))[: 4 if images == 200 else 3]:
            rng = np.random.default_rng([2, images, k, int(10 * spread), int(1000 * auc)])
            # Members' scores are N(d, 1) with d ~ N(centre, spread^2): the mean AUC over targets is Phi(centre / sqrt(2 + spread^2)).
            centre = float(np.sqrt(2 + spread**2) * stats.norm.ppf(auc))
            student, bootstrap = [], []
            for seed in range(EXPERIMENTS):
                tables = [binormal(rng, images, rng.normal(centre, spread)) for _ in range(k)]
                student.append(mean_interval([float(metrics.placements(*one)[0].mean()) for one in tables])[1])
                bootstrap.append(hierarchical_bootstrap(tables, n=200, seed=seed)[1])
            row(images, k, spread, auc, covered(student, auc), covered(bootstrap, auc))


# --- tests under the null


def calibration(p: list[float]) -> tuple[str, ...]:
    x = np.array(p)
    return f"{(x < 0.01).mean():.1%}", f"{(x < 0.05).mean():.1%}", f"{stats.kstest(x, 'uniform').pvalue:.2f}"


def of_comparisons() -> None:
    heading(
        "Paired comparison of two equally good attacks, correlated 0.5 per image",
        "images",
        "AUC of both",
        "p < .01",
        "p < .05",
        "KS p-value",
        "coverage of the difference",
    )
    for images in SIZES:
        for auc in AUCS:
            rng, d = np.random.default_rng([3, images, int(1000 * auc)]), separation(auc)
            found = []
            for _ in range(EXPERIMENTS):
                is_member, common = rng.random(images) < 0.5, rng.normal(size=images)
                a, b = (np.sqrt(0.5) * (common + rng.normal(size=images)) + d * is_member for _ in range(2))
                found.append(compare(is_member, a, b))
            row(images, auc, *calibration([c.p_value for c in found]), covered([c.interval for c in found], 0.0))


def features(rng: np.random.Generator, images: int) -> Floats:
    """Scores of eight correlated attacks, three of them with heavy tails."""
    x = rng.normal(size=(images, 1)) + rng.normal(size=(images, 8))
    x[:, :3] = np.exp(x[:, :3])
    return x


def of_sets() -> None:
    heading(
        "Set inference (CDI) on questioned images that are no members",
        "questioned / known non-members",
        "splits",
        "p < .01",
        "p < .05",
        "KS p-value",
    )
    for n, k, splits in ((70, 70, 1), (200, 200, 1), (200, 60, 1), (2000, 2000, 1), (200, 200, 11)):
        rng = np.random.default_rng([4, n, k, splits])
        tests = EXPERIMENTS // 2 if splits == 1 else EXPERIMENTS // 10
        p = [set_inference.p_value(features(rng, n), features(rng, k), splits, seed) for seed in range(tests)]
        *rates, ks = calibration(p)
        row(f"{n} / {k}", splits, *rates, ks if splits == 1 else "conservative by construction")


# --- bounds on epsilon


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The exact epsilon of the Gaussian mechanism of sensitivity 1 (Balle & Wang 2018, theorem 8)."""

    def excess(e: float) -> float:
        a, b = 1 / (2 * sigma), e * sigma
        return float(stats.norm.cdf(a - b) - np.exp(e + stats.norm.logcdf(-a - b)) - delta)

    return float(optimize.brentq(excess, 0.0, 100.0))


def response(rng: np.random.Generator, images: int, epsilon: float) -> Table:
    """Randomised response: tells the truth with probability exp(epsilon) / (1 + exp(epsilon))."""
    is_member = rng.random(images) < 0.5
    honest = rng.random(images) < 1 / (1 + np.exp(-epsilon))
    return is_member, np.where(honest, is_member, ~is_member).astype(np.float64)


def bounds() -> Iterator[tuple[str, float, str, Callable[[np.random.Generator], float]]]:
    several = (100, 200, 500, 1000, 2000)
    for epsilon in (0.5, 1.0, 2.0, 4.0):
        for guesses in (1000, 2000, several):
            shown = guesses if isinstance(guesses, int) else f"best of {', '.join(map(str, several))}"
            yield (
                f"randomised response, {shown} guesses",
                epsilon,
                "one run",
                lambda rng, e=epsilon, g=guesses: audit.one_run(*response(rng, 2000, e), g, bernoulli=True).epsilon,
            )
        yield (
            "randomised response, threshold 1/2",
            epsilon,
            "classical",
            lambda rng, e=epsilon: audit.classical(*response(rng, 2000, e), 0.5).epsilon,
        )
    for sigma, deltas in ((2.0, (0.01,)), (1.0, (0.0001, 0.01)), (0.5, (0.0001,))):
        for delta in deltas:
            epsilon = gaussian_epsilon(sigma, delta)
            yield (
                f"Gaussian, sigma {sigma}, delta {delta}, 200 guesses",
                epsilon,
                "one run",
                lambda rng, s=sigma, d=delta: audit.one_run(*binormal(rng, 2000, 1 / s), 200, bernoulli=True, delta=d).epsilon,
            )
            thresholds = tuple(1 / sigma + z for z in (0.0, 1.0, 2.0))
            yield (
                f"Gaussian, sigma {sigma}, delta {delta}, best of 3 thresholds",
                epsilon,
                "classical",
                lambda rng, s=sigma, d=delta, c=thresholds: audit.classical(*binormal(rng, 2000, 1 / s), c, delta=d).epsilon,
            )


def of_audits() -> None:
    heading(
        "Bounds on epsilon at 95% confidence, 2,000 canaries",
        "mechanism",
        "audit",
        "true epsilon",
        "above the truth",
        "median bound / truth",
    )
    for i, (mechanism, epsilon, kind, bound) in enumerate(bounds()):
        rng = np.random.default_rng([5, i])
        found = np.array([bound(rng) for _ in range(EXPERIMENTS)])
        row(mechanism, kind, f"{epsilon:.3f}", f"{(found > epsilon).mean():.1%}", f"{np.median(found) / epsilon:.2f}")


def main() -> None:
    begun = time.process_time()
    print(f"{EXPERIMENTS:,} experiments per cell, of set inference half (one split) or a tenth (eleven).")
    print("Coverage is shown with the shares where the truth lay (below / above) the interval; * marks what is outside 93 to 97%.")
    for part in (of_one_target, of_several_targets, of_comparisons, of_sets, of_audits):
        part()
    print(f"\n{time.process_time() - begun:.0f} s of one core.")


if __name__ == "__main__":
    main()
