"""Utility: agreement with other implementations, an unbiased estimate with an honest error, and a run that says what its model is worth."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.datasets import load_digits
from torch import nn

from diffmia_exp import summary, utility
from diffmia_exp.config import NO_UTILITY, checked
from diffmia_exp.data import Images
from diffmia_exp.diffusion import Diffusion, Schedule, cosine, linear
from diffmia_exp.errors import ConfigError
from diffmia_exp.evaluation import Evaluation
from diffmia_exp.features import Pixels
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.report import collect, groups, logged, page, sections
from diffmia_exp.scores import ScoreTable
from diffmia_exp.tracking import tables
from diffmia_exp.utility import Utility, fid, kid, linear_loss, losses, precision_recall, strata
from tests.composing import composed
from tests.report import building
from tests.test_pipeline import quick

DIGITS = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]
ON = ["utility=pixels", "utility.n_samples=8", "utility.steps=2", "utility.timesteps=3"]


def samples(n: int = 40, m: int = 53, d: int = 6, shift: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.gamma(2.0, size=(n, d)) - 1 + shift, rng.normal(size=(m, d)) * np.linspace(0.5, 1.5, d)


def looped_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Pair by pair."""
    k = lambda a, b: (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3  # noqa: E731
    within = [[k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j] for z in (x.tolist(), y.tolist())]
    return float(np.mean(within[0]) + np.mean(within[1]) - 2 * np.mean([k(a, b) for a in x.tolist() for b in y.tolist()]))


def test_kid_is_the_mean_over_all_pairs_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = samples()
    assert kid(x, y)[0] == pytest.approx(looped_mmd(x, y), rel=1e-10)
    whole = kid(x, y)
    for entries in (1, 53 * 7, 53 * 39):
        monkeypatch.setattr(utility, "ENTRIES", entries)
        assert kid(x, y) == pytest.approx(whole, rel=1e-12)
    assert kid(y, x) == pytest.approx(whole, rel=1e-12)


def test_kids_error_is_the_jackknifes() -> None:
    x, y = samples(9, 7, 3)
    without = [np.array([kid(np.delete(x, i, 0), y)[0] for i in range(9)]), np.array([kid(x, np.delete(y, i, 0))[0] for i in range(7)])]
    variance = sum((len(u) - 1) / len(u) * ((u - u.mean()) ** 2).sum() for u in without)
    assert kid(x, y)[1] == pytest.approx(np.sqrt(variance), rel=1e-10)


def test_kid_is_unbiased_and_its_error_is_not_too_small() -> None:
    rng, repeats = np.random.default_rng(0), 400
    same = np.array([(*kid(x, y), biased(x, y)) for x, y in (rng.normal(size=(2, 25, 4)) for _ in range(repeats))])
    of_mean = same[:, [0, 2]].std(0) / np.sqrt(repeats)
    assert abs(same[:, 0].mean()) < 3 * of_mean[0]
    assert same[:, 2].mean() > 10 * of_mean[1], "the estimate with the diagonal is biased, and the simulation would tell"
    assert (same[:, 1] ** 2).mean() > same[:, 0].var()

    shift = np.array([0.5, 0.0, 0.0, 0.0])
    apart = np.array([kid(x + shift, y) for x, y in (rng.normal(size=(2, 60, 4)) for _ in range(repeats))])
    exact = expected_kernel(shift, shift) + expected_kernel(0 * shift, 0 * shift) - 2 * expected_kernel(shift, 0 * shift)
    assert abs(apart[:, 0].mean() - exact) < 3 * apart[:, 0].std() / np.sqrt(repeats)
    assert (apart[:, 1] ** 2).mean() == pytest.approx(apart[:, 0].var(), rel=0.35)
    covered = (np.abs(apart[:, 0] - exact) < 1.96 * apart[:, 1]).mean()
    assert covered > 0.9


def biased(x: np.ndarray, y: np.ndarray) -> float:
    """The biased estimate, which counts each image's kernel with itself."""
    return float(sum(((a @ b.T / a.shape[1] + 1) ** 3).mean() * sign for a, b, sign in ((x, x, 1), (y, y, 1), (x, y, -2))))


def expected_kernel(a: np.ndarray, b: np.ndarray) -> float:
    """E (x.y / d + 1)^3 for independent x ~ N(a, I), y ~ N(b, I): x.y given y is N(a.y, |y|^2)."""
    aa, bb, ab, d = a @ a, b @ b, a @ b, len(a)
    second = d + aa + bb + ab**2
    third = ab**3 + 3 * aa * ab + 3 * ab * (d + bb) + 6 * ab
    return 1 + 3 * ab / d + 3 * second / d**2 + third / d**3


def test_fid_agrees_with_the_root_of_the_matrix_and_of_gaussians() -> None:
    for n, m, d in ((60, 80, 6), (5, 60, 9), (12, 6, 20)):
        x, y = samples(n, m, d)
        c, k = np.cov(x.T), np.cov(y.T)
        # Roots of the eigenvalues of C K, which scipy's sqrtm gets wrong where C K is singular.
        root = np.sqrt(np.maximum(linalg.eigvals(c @ k).real, 0)).sum()
        assert fid(x, y) == pytest.approx(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + k) - 2 * root, rel=1e-6)
        assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-12)
    x, y = samples(60, 80, 6)
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    assert fid(x, y) == pytest.approx(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root), rel=1e-9)
    assert fid(x, x[::-1]) == pytest.approx(0, abs=1e-12)
    assert fid(x[:4], x[3::-1]) == pytest.approx(0, abs=1e-12)
    assert fid(x, 2 * x + 1) == pytest.approx(((x.mean(0) + 1) ** 2).sum() + np.trace(np.cov(x.T)), rel=1e-10)


def test_torchmetrics_agrees() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class AsIs(nn.Module):
        num_features = 5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).double()

    x, y = samples(50, 50, 5)
    for metric, ours in (
        (KernelInceptionDistance(AsIs(), subsets=1, subset_size=50), kid(x, y)[0]),
        (FrechetInceptionDistance(AsIs(), input_img_size=(5, 1, 1)), fid(x, y)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric.set_dtype(torch.float64)
            for z, real in ((x, False), (y, True)):
                metric.update(torch.from_numpy(z)[:, :, None, None], real=real)
            theirs = metric.compute()
        assert float(theirs[0] if isinstance(theirs, tuple) else theirs) == pytest.approx(ours, rel=1e-8)


def looped_inside(queries: np.ndarray, sample: np.ndarray, k: int) -> float:
    """Ball by ball."""
    radius = [sorted(np.linalg.norm(a - b) for j, b in enumerate(sample) if j != i)[k - 1] for i, a in enumerate(sample)]
    return float(np.mean([any(np.linalg.norm(q - a) <= r for a, r in zip(sample, radius, strict=True)) for q in queries]))


@pytest.mark.parametrize("k", [1, 3, 12])
def test_precision_and_recall_agree_with_a_loop(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = samples(30, 13, 2, shift=0.9)
    monkeypatch.setattr("diffmia_exp.attacks.knn.ENTRIES", 50)
    expected = looped_inside(x, y, k), looped_inside(y, x, k)
    assert precision_recall(x, y, k) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(y, x, k) == pytest.approx(expected[::-1], abs=1e-12)
    assert min(expected) > 0


def test_precision_and_recall_tell_poor_images_from_few_kinds() -> None:
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(100, 3)), rng.normal(size=(100, 3)) + 50])
    one_mode = rng.normal(size=(80, 3))
    precision, recall = precision_recall(one_mode, real, 3)
    assert precision > 0.8
    assert 0.3 < recall < 0.5, "half of the kinds"
    assert precision_recall(real, real.copy(), 3) == (1, 1)
    assert precision_recall(real + 1000, real, 3) == (0, 0)


class Net(nn.Module):
    """Something that depends on image and time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.scale * x + t[:, None, None, None].double() / 1000


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_the_loss_is_the_written_out_one(prediction: str) -> None:
    a, t = linear(100), strata(100, 4)
    assert t == [12, 37, 62, 87]
    images = Images(DIGITS[:7], np.arange(7) * 11 + 3)
    diffusion = Diffusion(Net(), a, prediction, (1, 8, 8))
    measured = losses(diffusion, images, t, 5, Evaluation(batch_size=3, device="cpu"))
    assert measured.dtype == np.float64
    for i, image in enumerate(DIGITS[:7]):
        x0, total = image.astype(np.float64) / 127.5 - 1, 0.0
        for s in t:
            eps = gaussian(derive(5, "utility"), torch.tensor([images.sample_id[i]]), (1, 8, 8), s)[0].numpy()
            root, noise = float(a[s]) ** 0.5, (1 - float(a[s])) ** 0.5
            target = {"epsilon": eps, "v": root * eps - noise * x0, "sample": x0}[prediction]
            total += ((0.7 * (root * x0 + noise * eps) + s / 1000 - target) ** 2).mean() / 4
        assert measured[i] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("schedule", [linear(50), cosine(50)])
def test_the_linear_loss_is_that_of_the_best_linear_denoiser_and_of_no_other(prediction: str, schedule: torch.Tensor) -> None:
    pixels, t = DIGITS[:400], [3, 20, 45]
    x0 = torch.from_numpy(pixels).double() / 127.5 - 1
    found, constant = [], []
    for s in t:
        noise = torch.cat([gaussian(1, torch.arange(400), (1, 8, 8), draw) for draw in range(8)])
        clean, a, b = x0.repeat(8, 1, 1, 1), schedule[s].sqrt(), (1 - schedule[s]).sqrt()
        x_t, target = a * clean + b * noise, {"epsilon": noise, "v": a * noise - b * clean, "sample": clean}[prediction]
        x_c, target = x_t - x_t.mean(0), target - target.mean(0)
        slope = (x_c * target).mean(0) / x_c.square().mean(0)
        found.append(float((slope * x_c - target).square().mean()))
        constant.append(float(target.square().mean()))
    bound = linear_loss(pixels, Schedule(schedule), prediction, t)
    assert bound == pytest.approx(np.mean(found), rel=0.03), "fitted to draws"
    assert bound < np.mean(constant)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_a_model_that_knows_no_image_has_not_learned_and_one_that_does_has(prediction: str) -> None:
    a = linear(1000)
    mean, v = (torch.from_numpy(f(DIGITS / 127.5 - 1, 0)) for f in (np.mean, np.var))
    known = torch.from_numpy(DIGITS[:30]).double() / 127.5 - 1

    class Zero(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return 0 * x

    def predicted(x: torch.Tensor, t: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        root, noise = (s.reshape(-1, 1, 1, 1) for s in (a[t].sqrt(), (1 - a[t]).sqrt()))
        eps = (x - root * x0) / noise
        return {"epsilon": eps, "v": root * eps - noise * x0, "sample": x0}[prediction]

    class Wiener(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            s = a[t].reshape(-1, 1, 1, 1)
            return predicted(x, t, mean + s.sqrt() * v / (s * v + 1 - s) * (x - s.sqrt() * mean))

    class Memory(nn.Module):
        """The best denoiser of its 30 images."""

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            apart = torch.cdist(x.flatten(1), (a[t[0]].sqrt() * known).flatten(1)).square()
            return predicted(x, t, ((-apart / 2 / (1 - a[t[0]])).softmax(1) @ known.flatten(1)).reshape(x.shape))

    how, cpu = Utility(n_samples=8, timesteps=10), Evaluation(device="cpu")
    members, others = Images(DIGITS[:30], np.arange(30)), Images(DIGITS[300:400], np.arange(300, 400))
    facts = {
        net.__name__: utility.measure(how, Diffusion(net(), a, prediction, (1, 8, 8)), DIGITS[30:60], others, members, others, cpu)
        for net in (Zero, Wiener, Memory)
    }
    assert [facts[name]["learned"] for name in ("Zero", "Wiener", "Memory")] == [False, False, True]
    assert facts["Wiener"]["loss_heldout"] == pytest.approx(facts["Wiener"]["loss_linear"], rel=0.1)
    assert facts["Memory"]["loss_members"] < facts["Memory"]["loss_heldout"]


def test_real_digits_are_close_to_real_digits_and_noise_is_not() -> None:
    order = np.random.default_rng(0).permutation(len(DIGITS))
    describe = lambda pixels: Pixels()(torch.from_numpy(pixels).double() / 127.5 - 1).numpy()  # noqa: E731
    real = describe(DIGITS[order[:500]])
    same, noise = describe(DIGITS[order[500:1000]]), np.random.default_rng(1).uniform(-1, 1, (500, 64))
    estimate, error = kid(same, real)
    assert abs(estimate) < 3 * error
    assert kid(noise, real)[0] > 50 * error
    assert fid(noise, real) > 10 * fid(same, real)
    assert min(precision_recall(same, real, 3)) > 0.8
    assert max(precision_recall(noise, real, 3)) < 0.05


# --- in a run


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The same run without and with its utility."""
    out = tmp_path_factory.mktemp("out")
    return out, quick(out, "attack=loss"), quick(out, "attack=loss", *ON)


def test_a_run_says_what_its_model_is_worth(measured: tuple[Path, Any, Any]) -> None:
    out, bare, result = measured
    u = result["utility"]
    assert set(u) == {
        *("kid", "kid_se", "fid", "precision", "recall", "loss_members", "loss_heldout", "loss_linear", "learned", "heldout"),
        *("n_generated", "n_reference", "features", "seconds"),
    }
    assert (u["n_generated"], u["n_reference"], u["features"], u["heldout"]) == (8, bare["n_nonmembers"], "Pixels", "nonmembers")
    assert u["learned"] is False, "after four steps"
    assert result.folder is not None
    assert "has not learned" in (result.folder / "run.log").read_text()
    assert json.loads((result.folder / "metrics.json").read_text())["utility"] == u
    (drawn,) = (path for path in out.glob("samples/*/samples.npz") if len(np.load(path)["images"]) == 8)
    generated = np.load(drawn)["images"].reshape(8, -1) / 127.5 - 1
    table = ScoreTable.load(result.folder / "scores.parquet")
    real = DIGITS[table.sample_id[~table.is_member]].reshape(-1, 64) / 127.5 - 1
    assert u["kid"] == pytest.approx(looped_mmd(generated, real), rel=1e-9)
    assert u["precision"] == looped_inside(generated, real, 3)


def test_nothing_else_changes(measured: tuple[Path, Any, Any]) -> None:
    _, bare, result = measured
    assert bare["run_key"] != result["run_key"]
    differ = {key for key in result if bare.get(key) != result[key]}
    assert differ <= {"utility", "run_key", "name"}
    assert "utility" not in bare
    asked = composed("debug=quick", "utility=none")
    assert "utility" not in checked(asked)
    assert checked({k: v for k, v in asked.items() if k != "utility"}) == checked(asked), "configs from before there was such a group"
    assert asked["utility"] == NO_UTILITY


def test_it_is_measured_once_for_all_attacks(measured: tuple[Path, Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    out, _, first = measured
    before = {path: path.stat().st_mtime_ns for kind in ("samples", "controls") for path in out.glob(f"{kind}/*/*")}
    again, other = quick(out, "attack=loss", *ON), quick(out, "attack=sima", *ON)
    assert again.cached
    assert other["utility"] == first["utility"]
    assert {path: path.stat().st_mtime_ns for kind in ("samples", "controls") for path in out.glob(f"{kind}/*/*")} == before
    summary.single(again)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("utility"))
    assert line.startswith(f"utility: NOT LEARNED; KID {first['utility']['kid']:.3g} ± ")
    assert line.endswith(f"(Pixels, 8 generated, {first['utility']['n_reference']} real)")


def test_what_a_service_does_to_its_images_is_seen(measured: tuple[Path, Any, Any]) -> None:
    out, _, result = measured
    noisy = quick(out, "attack=loss", *ON, "defense=output_perturbation", "defense.sigma=0.5")
    assert noisy["train_key"] == result["train_key"]
    drawn = [np.load(path)["images"] for path in out.glob("samples/*/samples.npz")]
    assert sum(len(images) == 8 for images in drawn) == 2, "those of the model, and those that the service gives"
    same = {key for key in noisy["utility"] if noisy["utility"][key] == result["utility"][key]}
    assert "kid" not in same
    assert {"loss_members", "loss_heldout", "learned"} <= same


def test_public_images_stand_beside_the_held_out_ones(measured: tuple[Path, Any, Any]) -> None:
    out, bare, _ = measured
    public = quick(out, "attack=loss", *ON, "utility.heldout=public", "split.public=20")
    assert public["train_key"] == bare["train_key"]
    assert public["utility"]["n_reference"] == bare["n_nonmembers"] + 20
    assert public["utility"]["heldout"] == "public"


def test_the_report_and_tracking_have_it(tmp_path: Path) -> None:
    facts = {"kid": 0.0123, "kid_se": 0.001, "fid": 3.5, "precision": 0.81, "recall": 0.4, "loss_members": 0.08, "loss_heldout": 0.11}
    facts |= {"loss_linear": 0.25, "learned": False, "heldout": "nonmembers", "n_generated": 512, "n_reference": 640, "features": "Pixels"}
    building.write(tmp_path, building.config("pia"), utility=facts)
    building.write(tmp_path, building.config("loss"), utility=facts)
    building.write(tmp_path, building.config("loss", seed=1))
    found = collect.collect([tmp_path])
    made = [sections.of(group, found) | {"figures": []} for group in groups.grouped(found)]  # drawing takes seconds
    (u,) = made[0]["utility"]
    assert u["numbers"] == facts, "one target, whatever the number of attacks"
    text = page.html(found, made, [tmp_path])
    assert "0.0123" in text
    assert text.count('aria-label="Utility') == 1
    shown = logged.content(found, made)["report/utility"]
    assert [dict(zip(shown.columns, row, strict=True)) for row in shown.rows] == [
        {"group": "A", "seed": 0, "target_index": 0, "snapshot": None, **facts}
    ]
    numbers = tables.numbers(json.loads(next(tmp_path.glob("pia*/metrics.json")).read_text()))
    assert (numbers["utility/kid"], numbers["utility/learned"]) == (0.0123, False)


def test_settings_say_what_is_wrong_with_them() -> None:
    wrong: dict[str, dict[str, Any]] = {
        "n_samples=3: must be at least 4, more than the k=3": {"n_samples": 3},
        "n_samples=2: must be at least 3": {"n_samples": 2, "k": 1},
        "k=0": {"k": 0},
        "heldout=members: must be one of nonmembers, public": {"heldout": "members"},
        "timesteps=0": {"timesteps": 0},
        "features=3": {"features": 3},
    }
    for message, settings in wrong.items():
        with pytest.raises(ConfigError, match=message):
            Utility(**settings)
    assert Utility(n_samples=4).least == 4
