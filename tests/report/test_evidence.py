"""Curves, agreement, exposure and comparisons, against independent computations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from diffmia_exp.report import evidence, figures
from diffmia_exp.report.collect import collect
from diffmia_exp.report.groups import Group, grouped, names, target_runs
from tests.report import building


def group_of(runs: Path) -> Group:
    (group,) = grouped(collect([runs]))
    return group


def test_a_curve_holds_the_exact_tpr_at_every_whole_number_of_false_positives_it_shows(tmp_path: Path) -> None:
    building.write(tmp_path, building.config(), effect=1.0)
    (row,) = group_of(tmp_path).rows
    table = row.first.table
    members, others = table.score[table.is_member], np.sort(table.score[~table.is_member])[::-1]
    curve = evidence.curve(row)
    n = len(others)
    assert np.allclose(curve.fpr * n, (curve.fpr * n).round())
    assert {1, 2, 3, 4, 5, n} <= set((curve.fpr * n).round().astype(int).tolist())
    for fpr, tpr, low, high in zip(curve.fpr, curve.tpr, curve.low, curve.high, strict=True):
        k = round(fpr * n)
        threshold = others[k] if k < n else -np.inf  # k false positives score above the next one
        assert tpr == pytest.approx((members > threshold).mean())
        ci = stats.binomtest(round(tpr * len(members)), len(members)).proportion_ci(0.95, method="exact")
        assert (low, high) == pytest.approx((ci.low, ci.high))


def test_the_curve_of_several_runs_is_their_mean_with_their_range(tmp_path: Path) -> None:
    for seed in range(3):
        building.write(tmp_path, building.config(seed=seed), effect=1.0)
    (row,) = group_of(tmp_path).rows
    curve = evidence.curve(row)
    assert (curve.low <= curve.tpr).all()
    assert (curve.tpr <= curve.high).all()
    assert curve.tpr[-1] == 1
    assert (np.diff(curve.tpr) >= 0).all()


def test_exposure_is_the_share_of_non_members_below_so_its_mean_is_the_auc(tmp_path: Path) -> None:
    building.write(tmp_path, building.config())
    group = group_of(tmp_path)
    listed = evidence.exposure(group, {})
    table = group.rows[0].first.table
    assert len(listed) == table.is_member.sum()
    assert np.mean([e.exposure for e in listed]) == pytest.approx(roc_auc_score(table.is_member, table.score))
    assert listed[0].exposure >= listed[-1].exposure
    best = table.sample_id[table.is_member][np.argmax(table.score[table.is_member])]
    assert best in {e.sample_id for e in listed if e.exposure == listed[0].exposure}


def test_exposure_is_averaged_over_attacks_and_targets_that_trained_on_the_image(tmp_path: Path) -> None:
    for attack in ("pia", "loss"):
        for target in (0, 1):
            building.write(tmp_path, building.config(attack, target_index=target))
    group = group_of(tmp_path)
    tables = [run.table for run in group.runs]
    for e in evidence.exposure(group, {})[:20]:
        shares = []
        for table in tables:
            at = int(np.flatnonzero(table.sample_id == e.sample_id)[0])
            if table.is_member[at]:
                shares.append((table.score[~table.is_member] < table.score[at]).mean())
        assert len(shares) == e.tables
        assert e.exposure == pytest.approx(np.mean(shares))


def test_agreement_counts_the_members_that_both_attacks_find(tmp_path: Path) -> None:
    for attack in ("pia", "loss", "sima"):
        building.write(tmp_path, building.config(attack), effect=2.0)
    (_, on), *_ = target_runs(group_of(tmp_path))
    agree = evidence.agreement(on)
    assert agree is not None
    assert agree.fpr == 0.01
    found = []
    for row in agree.rows:
        table = row.first.table
        allowed = int(0.01 * (~table.is_member).sum())
        threshold = np.sort(table.score[~table.is_member])[::-1][allowed]
        found.append(set(table.sample_id[table.is_member & (table.score > threshold)].tolist()))
    for a in range(3):
        for b in range(3):
            assert agree.both(a, b) == (len(found[a] & found[b]), len(found[a] | found[b]))
    members = agree.rows[0].first.table.is_member
    expected = stats.spearmanr(*(agree.rows[i].first.table.score[members] for i in (0, 1))).statistic
    assert agree.correlation[0, 1] == pytest.approx(expected)


def test_only_attacks_on_the_same_target_are_compared(tmp_path: Path) -> None:
    building.write(tmp_path, building.config("pia", seed=0))
    building.write(tmp_path, building.config("loss", seed=1))
    targets = target_runs(group_of(tmp_path))
    assert len(targets) == 2
    for _, on in targets:
        assert evidence.agreement(on) is None
        assert evidence.comparisons(on) == []


def test_the_strongest_attack_is_compared_with_each_other_and_p_values_are_corrected(tmp_path: Path) -> None:
    for attack, effect in {"pia": 2.0, "loss": 1.9, "sima": 0.2}.items():
        building.write(tmp_path, building.config(attack), effect=effect)
    (_, on), *_ = target_runs(group_of(tmp_path))
    compared = {c.other: c for c in evidence.comparisons(on)}
    assert len(compared) == 2
    aucs = {row.name: row.auc[0] for row in on}
    best = max(aucs, key=lambda name: aucs[name])
    for other, c in compared.items():
        assert c.best == best
        assert c.difference[0] == pytest.approx(aucs[best] - aucs[other])
        assert c.difference[1] < c.difference[0] < c.difference[2]
    assert compared["sima"].p < 0.001


def test_several_targets_have_an_interval_over_targets_and_images(tmp_path: Path) -> None:
    for target in range(4):
        building.write(tmp_path, building.config("pia", target_index=target))
    building.write(tmp_path, building.config("loss"))
    pia, loss = sorted(group_of(tmp_path).rows, key=lambda row: -len(row.runs))
    over = evidence.over_targets(pia)
    assert over is not None
    assert over[0] == pytest.approx(pia.auc[0])
    assert over[1] < over[0] < over[2]
    assert evidence.over_targets(loss) is None


def test_a_set_is_recognised_where_the_attacks_say_something_and_not_where_they_do_not(tmp_path: Path) -> None:
    for attack in ("pia", "loss"):
        building.write(tmp_path, building.config(attack), effect=1.0)
        building.write(tmp_path, building.config(attack, threat_model="white_box"), effect=0.0)
    building.write(tmp_path, building.config("knn", threat_model="samples_only"))
    (_, on), *_ = target_runs(group_of(tmp_path))
    strong, weak = evidence.set_level(on)
    assert (strong.threat_model, strong.attacks, strong.members + strong.nonmembers) == ("gray_box", 2, 240)
    assert strong.p < 1e-4
    assert strong.needed is not None
    assert 4 <= strong.needed < 60
    assert (weak.threat_model, weak.needed) == ("white_box", None)
    assert weak.p > 0.05


def test_figures_are_drawn_where_there_is_reason_and_say_what_they_show(tmp_path: Path) -> None:
    outputs = building.sweep(tmp_path)
    group = grouped(collect([outputs]))[0]
    drawn = figures.of(group, evidence.agreement(target_runs(group)[0][1]))
    kinds = [figure.key for figure in drawn]
    assert {key: kinds.count(key) for key in kinds} == {"forest": 3, "roc": 3, "cost": 2, "training": 1, "histogram": 2, "agreement": 1}
    for figure in drawn:
        assert figure.alt
        assert figure.rows
        assert all(len(row) == len(figure.columns) for row in figure.rows)
    front = next(figure for figure in drawn if figure.key == "cost")
    on = [row for row in front.rows if row[-1] == "yes"]
    for row in front.rows:  # on the front: none is as good at less cost
        beaten = any(float(r[2]) <= float(row[2]) and float(r[3]) > float(row[3]) for r in front.rows)
        assert beaten == (row not in on)
    assert names(group.final).count("loss, gray_box") == 1
    assert drawn[0].png()[:4] == b"\x89PNG"
