"""The leaderboard as CSV, Markdown and LaTeX, and the command line."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from diffmia_exp.report.__main__ import main
from tests.report import building


def written(runs: Path, form: str, *arguments: str) -> str:
    out = runs.parent / f"out.{form}"
    main([str(runs), "--format", form, "--out", str(out), *arguments])
    return out.read_text()


def test_csv_holds_every_digit_of_one_line_per_attack(tmp_path: Path) -> None:
    for target in (0, 1, 3):
        building.write(tmp_path / "runs", building.config("multi_loss", target_index=target))
    building.write(tmp_path / "runs", building.config("lira", threat_model="white_box"), **building.controls(False))
    lines = list(csv.DictReader(io.StringIO(written(tmp_path / "runs", "csv"))))
    assert [(line["attack"], line["runs"], line["controls"]) for line in lines] == [
        ("multi_loss", "3", "not checked"),
        ("lira", "1", "unsound"),
    ]
    aucs = [building.metrics.auc(t.is_member, t.score)[0] for t in (building.scores(0, i, None, "multi_loss", 1.5, 240) for i in (0, 1, 3))]
    assert float(lines[0]["auc"]) == pytest.approx(np.mean(aucs), abs=1e-15)
    half = 4.302652729911275 * np.std(aucs, ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
    assert float(lines[0]["auc_low"]) == pytest.approx(np.mean(aucs) - half)
    assert lines[0]["tpr_at_0.001_fpr"] == ""


@pytest.mark.parametrize(("name", "form"), [("a.md", "markdown"), ("a.csv", "csv"), ("a.tex", "latex"), ("a.html", "html"), ("a", "html")])
def test_a_file_s_ending_says_its_format(name: str, form: str, tmp_path: Path) -> None:
    building.write(tmp_path / "runs", building.config())
    main([str(tmp_path / "runs"), "--out", str(tmp_path / name)])
    assert (tmp_path / name).read_text() == written(tmp_path / "runs", form)


def test_markdown_lists_what_is_unsound_and_what_is_missing(tmp_path: Path) -> None:
    building.write(tmp_path / "runs", building.config(attack__name="a|b<i>"), **building.controls(False))
    (tmp_path / "runs" / ".x.0123abcd.tmp").mkdir()
    text = written(tmp_path / "runs", "markdown")
    assert text.startswith("### digits, tiny network, 600 steps\n\n**Unsound:** blind control:")
    assert "\n| a\\|b\\<i\\> | gray_box | 1 | 0." in text
    assert "\n- unfinished: " in text


def test_what_the_models_are_worth_and_their_accounted_privacy_stand_in_the_tables_and_on_the_page(tmp_path: Path) -> None:
    for target, kid in enumerate((0.1, 0.3)):
        worth = {"kid": kid, "fid": 2.0, "loss_heldout": 0.5, "learned": target == 0}
        account = {"epsilon": 8.25, "delta": 1e-5, "accountant": "rdp", "noise_multiplier": 1.1}
        private = account | ({"audited": 1.5, "refuted": None} if target == 0 else {"audited": 9.5, "refuted": "privacy: <too much>"})
        building.write(tmp_path / "runs", building.config("loss", target_index=target), utility=worth, privacy=private)
        building.write(tmp_path / "runs", building.config("pia", target_index=target), utility=worth)
    (loss, pia) = sorted(csv.DictReader(io.StringIO(written(tmp_path / "runs", "csv"))), key=lambda line: line["attack"])
    assert [float(loss[key]) for key in ("kid", "fid", "loss_heldout", "learned", "epsilon_accounted")] == [0.2, 2, 0.5, 0.5, 8.25]
    assert (pia["kid"], pia["precision"], pia["epsilon_accounted"]) == ("0.2", "", "")
    text = written(tmp_path / "runs", "markdown")
    assert "\nUtility, mean of 2 models: kid 0.2, fid 2, loss_heldout 0.5; 1 of them have learned.\n" in text
    assert "\nDifferential privacy: the accountant's epsilon is 8.25; the audit proves 9.5 at most.\n" in text
    page = written(tmp_path / "runs", "html")
    assert page.count("privacy: &lt;too much&gt;") == 1
    assert '<td class="n">1.5</td><td class="n"><b>8.25</b></td><td class="n">1e-05</td><td>rdp</td><td class="n">1.1</td>' in page


def test_an_account_that_is_no_number_is_damage(tmp_path: Path) -> None:
    for wrong in ({"epsilon": "many"}, {"epsilon": 1.0, "audited": "none"}):
        building.write(tmp_path / "runs", building.config("loss"), privacy=wrong)
    text = written(tmp_path / "runs", "markdown")
    assert text.count("metrics.json: privacy is of another form than expected") == 2


def test_latex_escapes_names(tmp_path: Path) -> None:
    building.write(tmp_path / "runs", building.config("multi_loss", attack__name="multi_loss&5%"))
    text = written(tmp_path / "runs", "latex")
    assert r"multi\_loss\&5\% & gray\_box & 1 & 0." in text
    assert text.count(r"\begin{tabular}{llrrrrrl}") == text.count(r"\end{tabular}") == 1


def test_every_format_is_written_of_nothing(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    for form in ("html", "markdown", "csv", "latex"):
        assert written(runs, form)
    assert "no run folder and no sweep" in written(runs, "html")


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*nowhere: no such folder; give a folder with runs"):
        main([str(tmp_path / "nowhere")])
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(SystemExit, match=r"error: .*file.*: cannot be written to .*--out"):
        main([str(tmp_path), "--out", str(blocked / "report.html")])


def test_the_report_is_written_into_the_first_folder_and_found_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    building.write(tmp_path, building.config())
    for _ in range(2):  # the report of a report's folder is the same
        main([str(tmp_path), "--figures", str(tmp_path / "img")])
        assert capsys.readouterr().out == f"{tmp_path}/report.html: 1 runs in 1 group\n"
    assert {path.name for path in (tmp_path / "img").iterdir()} == {
        "A00-forest.png",
        "A01-roc.png",
        "A02-cost.png",
        "A03-histogram.png",
    }


def test_two_hundred_runs_fit_five_megabytes(tmp_path: Path) -> None:
    for n in range(50):
        for threat_model in ("gray_box", "white_box"):
            for seed in (0, 1):
                cell = building.config(f"attack{n}", threat_model, seed=seed)
                building.write(tmp_path / "runs", cell, effect=n / 20, files=n == 0, **building.controls())
    assert 1e5 < len(written(tmp_path / "runs", "html").encode()) < 5e6
