"""Controls: at 1/2 where there is nothing to find, away from it where the split gives members away, and said first."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from diffmia_exp import audit, blind, controls, epsilon, metrics, specs
from diffmia_exp.config import checked
from diffmia_exp.errors import ConfigError
from diffmia_exp.experiment import Experiment
from diffmia_exp.pipeline import run
from diffmia_exp.scores import ScoreTable
from diffmia_exp.workshop import Workshop
from tests import command
from tests.composing import composed
from tests.test_pipeline import quick

SHIFTED = {"members": range(0, 5), "nonmembers": range(5, 10)}


def split_file(folder: Path, shifted: bool) -> list[str]:
    """80 digits on either side: of different classes, or of all."""
    target, rng = load_digits().target, np.random.default_rng(1)
    if shifted:
        sides = {side: rng.permutation(np.flatnonzero(np.isin(target, classes)))[:80] for side, classes in SHIFTED.items()}
    else:
        drawn = rng.permutation(len(target))
        sides = {"members": drawn[:80], "nonmembers": drawn[80:160]}
    path = folder / f"split-{shifted}.json"
    path.write_text(json.dumps({side: ids.tolist() for side, ids in sides.items()}))
    return ["split=from_file", f"split.path={path}"]


def table(member: list[float], held_out: list[float]) -> ScoreTable:
    score = np.array([*member, *held_out])
    return ScoreTable(np.arange(len(score)), np.arange(len(score)) < len(member), score)


def test_members_of_other_classes_are_flagged_and_an_honest_split_is_not(tmp_path: Path) -> None:
    only = ["evaluation.controls=[blind]", f"output_dir={tmp_path}", "debug=quick"]
    shifted = command.run(*only, *split_file(tmp_path, shifted=True))
    assert shifted.returncode == 0, shifted.stderr
    assert shifted.stdout.splitlines()[0].startswith("UNSOUND: blind control: the images alone tell members from non-members")
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "run.log").read_text().startswith("UNSOUND: blind control")
    result = json.loads((folder / "metrics.json").read_text())
    assert result["sound"] is False
    assert result["controls"]["blind"]["auc_ci"][0] > 0.75
    assert len(result["unsound"]) == 1
    again = run(composed(*only, *split_file(tmp_path, shifted=True)))
    assert again.cached
    assert again["unsound"] == result["unsound"], "also where the run is found"
    honest = quick(tmp_path, "evaluation=default", "evaluation.controls=[blind]", *split_file(tmp_path, shifted=False))
    assert (honest["sound"], honest["unsound"]) == (True, [])
    assert honest.folder is not None
    assert "UNSOUND" not in (honest.folder / "run.log").read_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shadow attack on two targets of a grid, with all controls."""
    out = tmp_path_factory.mktemp("full")
    for target in (0, 1):
        quick(out, "evaluation=full", "attack=lira", "split.n_models=3", "split.pool=48", f"split.target_index={target}")
    return out


def test_every_control_runs_with_a_shadow_attack(full: Path) -> None:
    for path in full.glob("runs/*/metrics.json"):
        result = json.loads(path.read_text())
        assert set(result["controls"]) == {"blind", "permuted", "untrained", "held_out", "generated"}
        for name, control in result["controls"].items():
            assert control["what"]
            if name != "generated":
                assert control["auc_ci"][0] <= control["auc"] <= control["auc_ci"][1]
                assert control["expected"] == ("at most 1/2" if name == "held_out" else "1/2")
        assert result["sound"] is all(c["sound"] for c in result["controls"].values() if c["sound"] is not None)
        assert result["controls"]["generated"]["n"] == 64


def test_the_held_out_model_is_trained_on_the_targets_non_members_and_nothing_else_differs(full: Path) -> None:
    e = experiment(full, 0)
    own, other = specs.model(e, 0), specs.model(e, e.held_out)
    assert {k for k in own if own[k] != other[k]} <= {"members", "n_members"}
    assert other["members"] == e.images.where(e.split.pool[0] & ~e.split.keep[0]).fingerprint
    assert own["n_members"] + other["n_members"] == 48
    assert e.stores["models"].get(other) is not None
    assert len(list((full / "models").iterdir())) == 3 + 2, "one for each target"
    weights = [next(e.net(row).parameters()) for row in (0, e.held_out, e.untrained)]
    assert weights[0].equal(weights[1]), "the same initial weights"
    assert not weights[0].equal(weights[2])


def test_the_untrained_network_is_measured_once_for_all_targets(full: Path) -> None:
    stored = [yaml.safe_load(path.read_text()) for path in full.glob("signals/*/spec.yaml")]
    assert sum(spec["attacked"]["model"].startswith("untrained") for spec in stored) == 1
    e = experiment(full, 0)
    assert specs.attacked(e, e.untrained) == specs.attacked(experiment(full, 1), e.untrained)


def test_generated_images_change_nothing_for_the_others(full: Path) -> None:
    e = experiment(full, 0)
    workshop = Workshop(e)
    generated = workshop.judged_generated(e.candidates[0])
    assert generated.shape == (64,)
    assert np.isfinite(generated).all()
    path = next(path for path in full.glob("runs/*/metrics.json") if json.loads(path.read_text())["target_index"] == 0)
    scores = ScoreTable.load(path.parent / "scores.parquet")
    np.testing.assert_array_equal(workshop.judged(e.candidates[0], 0), scores.score)
    called = controls.called_members(scores, generated)
    assert json.loads(path.read_text())["controls"]["generated"] == called


def experiment(out: Path, target: int) -> Experiment:
    settings = ["attack=lira", "split.n_models=3", "split.pool=48", f"split.target_index={target}", f"output_dir={out}"]
    e = Experiment(checked(composed("debug=quick", "evaluation=full", *settings)))
    e.load()
    return e


def test_the_kl_term_stands_beside_the_trajectory_attack_alone(tmp_path: Path) -> None:
    result = quick(tmp_path, "attack=trajectory", "attack.stride=200", "evaluation.controls=[prior_bpd]")
    assert result.folder is not None
    scores = ScoreTable.load(result.folder / "scores.parquet")
    x = np.round(load_digits().images * (255 / 16))[scores.sample_id] / 127.5 - 1
    energy = (x**2).mean((1, 2))  # the KL term rises with it, and with nothing else of the image
    assert result["controls"]["prior_bpd"]["auc"] == pytest.approx(roc_auc_score(scores.is_member, -energy), abs=1e-12)
    for attack, beside in (("surrogate", True), ("loss", False)):
        workshop = Workshop(Experiment(checked(composed(f"attack={attack}", "evaluation.controls=[prior_bpd]", f"output_dir={tmp_path}"))))
        workshop.experiment.load()
        audited = workshop.experiment.audited
        n = ScoreTable(workshop.experiment.images.sample_id[audited], workshop.experiment.keep[audited], np.zeros(audited.sum()))
        out = controls.run(workshop, n, workshop.experiment.candidates[0])
        assert list(out["controls"]) == (["prior_bpd"] if beside else [])
        assert out["sound"] is (True if beside else None)


def test_exposed_members_are_those_with_the_highest_and_the_lowest_scores(full: Path) -> None:
    path = next(full.glob("runs/*/metrics.json")).parent
    scores, digits = ScoreTable.load(path / "scores.parquet"), load_digits().images
    with np.load(path / "exposed.npz", allow_pickle=False) as exposed:
        kept = {name: exposed[name] for name in exposed.files}
    assert set(kept) == {"sample_id", "score", "images"}
    assert (kept["images"].dtype, kept["score"].dtype, kept["sample_id"].dtype) == (np.uint8, np.float64, np.int64)
    members = np.sort(scores.score[scores.is_member])[::-1]
    assert len(members) < 48, "all are shown, none twice"
    np.testing.assert_array_equal(kept["score"], members)
    for i, score, image in zip(kept["sample_id"], kept["score"], kept["images"], strict=True):
        assert scores.score[scores.sample_id == i] == score
        np.testing.assert_array_equal(image[0], np.round(digits[i] * (255 / 16)))


@pytest.mark.parametrize("kind", ["classical", "network"])
def test_a_blind_classifier_finds_nothing_in_random_membership(kind: str) -> None:
    digits = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]
    rng = np.random.default_rng(0)
    areas, alarms = [], 0
    for seed in range(8):
        pixels, is_member = digits[rng.permutation(len(digits))[:100]], rng.random(100) < 0.5
        tested, score = blind.classify(pixels, is_member, kind, seed)
        assert tested.sum() in (79, 80, 81)
        areas.append(metrics.auc(is_member[tested], score)[0])
        alarms += controls.verdict("blind", ScoreTable(np.flatnonzero(tested), is_member[tested], score))["sound"] is False
    expected = np.sqrt((80 + 1) / (12 * 40 * 40))  # of the rank sum, where the blocks' errors are uncorrelated
    assert abs(np.mean(areas) - 0.5) < 3.3 * expected / np.sqrt(8)
    assert np.sqrt(np.mean((np.array(areas) - 0.5) ** 2)) < 1.81 * expected  # chi-squared, p < .001
    assert alarms == 0


def test_blind_scores_compare_images_within_their_block_only() -> None:
    """What the docstring claims: the pooled AUC is the mean of the blocks'."""
    rng = np.random.default_rng(0)
    pixels, is_member = rng.integers(0, 256, (100, 1, 4, 4), dtype=np.uint8), np.arange(100) % 2 == 0
    pixels[is_member] //= 2
    tested, score = blind.classify(pixels, is_member, "classical", 0)
    from sklearn.model_selection import StratifiedKFold

    position = np.full(100, -1)
    position[tested] = np.arange(tested.sum())
    blocks = [position[block] for _, block in StratifiedKFold(blind.BLOCKS, shuffle=True, random_state=0).split(pixels, is_member)]
    assert (blocks[0] == -1).all(), "nothing was taught before the first block"
    areas = [roc_auc_score(is_member[tested][block], score[block]) for block in blocks[1:]]
    assert metrics.auc(is_member[tested], score)[0] == pytest.approx(np.mean(areas), abs=1e-12)
    assert np.mean(areas) > 0.95


def test_features_describe_each_image_alone() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1030, 3, 9, 10), dtype=np.uint8)
    pixels[3] = 7  # no contrast at all
    described = blind.features(pixels)
    assert np.isfinite(described).all()
    np.testing.assert_allclose(described[1020:], blind.features(pixels[1020:]), rtol=1e-5, atol=1e-6)
    flat = pixels[0].reshape(3, -1) / 255
    statistics = described[0, 3 * 8 * 8 :].reshape(-1, 3)
    for row, reference in ((0, flat.mean(1)), (1, flat.std(1)), (2, stats.skew(flat, axis=1)), (3, stats.kurtosis(flat, axis=1) + 3)):
        np.testing.assert_allclose(statistics[row], reference, rtol=1e-4, atol=1e-4)


def test_few_images_are_said_to_tell_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "split.json").write_text(json.dumps({"members": [0, 1, 2, 3], "nonmembers": [4, 5, 6, 7, 8]}))
    e = Experiment(checked(composed("split=from_file", f"split.path={tmp_path / 'split.json'}", f"output_dir={tmp_path}")))
    e.load()
    assert controls.tested_blindly(Workshop(e)) is None
    assert "blind control: left out, it needs 5 members" in caplog.text


def test_the_p_value_is_that_of_the_exact_permutation_test() -> None:
    scores = table([3.0, 5.0, 4.0, 2.0], [1.0, 2.0, 0.0, 3.5, -1.0])
    area = roc_auc_score(scores.is_member, scores.score)
    every = [roc_auc_score(np.isin(np.arange(9), chosen), scores.score) for chosen in combinations(range(9), 4)]
    exact = np.mean(np.array(every) >= area - 1e-12)
    p = controls.p_value(scores.is_member, scores.score, seed=0)
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / controls.PERMUTATIONS))
    big = np.random.default_rng(0).normal(size=3000)  # more than one chunk
    is_member = np.arange(3000) < 1400
    reference = stats.mannwhitneyu(big[is_member], big[~is_member], alternative="greater").pvalue
    assert controls.p_value(is_member, big, seed=0) == pytest.approx(reference, abs=0.02)
    assert controls.p_value(is_member, is_member * 1.0, seed=0) == 1 / (1 + controls.PERMUTATIONS)


def test_a_control_at_one_half_rarely_raises_an_alarm() -> None:
    rng = np.random.default_rng(0)
    found = [controls.verdict("untrained", table(*rng.normal(size=(2, 100)).tolist())) for _ in range(1500)]
    assert sum(not one["sound"] for one in found) <= 7  # of 1.5 expected; more in 2 of 10,000 simulations
    assert sum(one["auc_ci"][0] > 0.5 or one["auc_ci"][1] < 0.5 for one in found) / 1500 == pytest.approx(0.05, abs=0.02)


def test_what_a_control_is_expected_to_be() -> None:
    rng = np.random.default_rng(0)
    low, high = rng.normal(size=100).tolist(), (rng.normal(size=100) + 2).tolist()
    for name in ("blind", "permuted", "untrained", "prior_bpd"):
        assert [controls.verdict(name, table(*sides))["sound"] for sides in ((high, low), (low, high))] == [False, False]
    assert controls.verdict("held_out", table(high, low))["sound"] is False
    assert controls.verdict("held_out", table(low, high))["sound"] is True, "an honest attack finds the held-out images there"


def test_generated_images_are_called_at_one_percent_or_what_is_resolved() -> None:
    few = table([5.0, 6.0], [float(n) for n in range(4)])
    assert controls.called_members(few, np.array([1.0, 2.0, 3.0, 5.0, 7.0]))["at_fpr"] == 0.25
    assert controls.called_members(few, np.array([1.0, 2.0, 3.0, 5.0, 7.0]))["called_members"] == 0.6
    many = table([5000.0], [float(n) for n in range(1000)])
    called = controls.called_members(many, np.array([989.0, 990.0]))
    assert (called["at_fpr"], called["called_members"], called["n"], called["sound"]) == (0.01, 0.5, 2, None)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("evaluation.controls=[blnd]", "evaluation.controls=blnd: must be one of blind, permuted, .*did you mean blind?"),
        ("evaluation.controls=blind", r"evaluation.controls=blind: must be a list of .*, as \[blind, permuted\]"),
        ("evaluation.blind=netwrk", "evaluation.blind=netwrk: must be one of classical, network; did you mean network?"),
    ],
)
def test_unknown_controls_are_refused(override: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=line):
        quick(tmp_path, override)


def test_a_checkpoint_has_no_held_out_control(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(ConfigError, match="held_out: needs the training of the attacked model"):
        quick(tmp_path, "evaluation=full", f"checkpoint={tmp_path / 'w.safetensors'}")


def test_stage_attack_trains_no_held_out_model(full: Path) -> None:
    settings = ["evaluation=full", "attack=lira", "split.n_models=3", "split.pool=48", "split.target_index=2"]
    with pytest.raises(ConfigError, match="needs model 5 to be trained; run the same with stage=train first"):
        quick(full, *settings, "stage=attack")
    assert experiment(full, 2).models == [2, 0, 1, 5], "what stage=train makes"


def test_epsilon_is_bounded_for_coin_flips_alone(tmp_path: Path) -> None:
    def bounds(*overrides: str) -> tuple[Experiment, ScoreTable, dict]:
        e = Experiment(checked(composed(*overrides, f"output_dir={tmp_path}")))
        e.load()
        score = e.keep[e.audited] + np.random.default_rng(0).normal(size=e.audited.sum()) / 4
        scores = ScoreTable(e.images.sample_id[e.audited], e.keep[e.audited], score)
        return e, scores, epsilon.bounds(e, scores, {"0.1": 0.5, "0.001": None})

    e, scores, found = bounds()
    assert found["one_run"]["valid"] is True
    assert (found["one_run"]["delta"], found["one_run"]["confidence"], found["one_run"]["tried"]) == (1e-5, 0.95, 5)
    each = [audit.one_run(scores.is_member, scores.score, k, bernoulli=True, delta=1e-5, confidence=0.99) for k in (256, 128, 64, 32, 16)]
    assert found["one_run"]["epsilon"] == pytest.approx(max(bound.epsilon for bound in each), rel=1e-9)
    assert found["one_run"]["epsilon"] > 1
    assert (found["classical"]["valid"], found["classical"]["tried"]) == (None, 1)
    assert list(epsilon.bounds(e, scores, {})) == ["one_run"]
    assert epsilon.bounds(e, scores, {}) == json.loads(json.dumps(epsilon.bounds(e, scores, {}), allow_nan=False))
    refused = bounds("split=exact")[2]
    assert list(refused) == ["one_run"]
    assert refused["one_run"]["valid"] is False
    assert "split=bernoulli" in refused["one_run"]["why"]
    fewer = ScoreTable(scores.sample_id[1:], scores.is_member[1:], scores.score[1:])
    assert "drop_duplicates" in epsilon.bounds(e, fewer, {})["one_run"]["why"]


def test_the_smallest_audit_has_a_bound(full: Path) -> None:
    for path in full.glob("runs/*/metrics.json"):
        bound = json.loads(path.read_text())["epsilon"]["one_run"]
        assert bound["images"] == 48
        assert 2 <= bound["guesses"] <= 48
        assert bound["epsilon"] >= 0
