"""What is logged to W&B, read back with W&B's own reader from the offline runs; the views over it; and what would be uploaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffmia_exp import dashboard, metrics, sync
from diffmia_exp.pipeline import run
from diffmia_exp.report.__main__ import main as report
from diffmia_exp.scores import ScoreTable
from diffmia_exp.tracking import Wandb, tables, views
from diffmia_exp.tracking.runs import FINISHED
from diffmia_exp.tracking.tables import ROC_ROWS, roc_line, roc_rows
from tests import command
from tests.composing import composed
from tests.offline import Logged, wandb
from tests.report import building

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A target, an attack on it and a report of that."""
    out = tmp_path_factory.mktemp("tracked")
    given = ["tracking=wandb", "tracking.tags=[t1]", "tracking.project=mine", "trainer.log_every=1", f"output_dir={out}"]
    result = run(composed("debug=quick", "split.pool=32", *given), sweep="my-sweep")
    report([str(out), "--wandb"])
    return out, result


@pytest.fixture(scope="module")
def attack(tracked: tuple[Path, Any]) -> Logged:
    return Logged(tracked[0], tracked[1]["run_key"])


@pytest.fixture(scope="module")
def training(tracked: tuple[Path, Any]) -> Logged:
    return Logged(tracked[0], tracked[1]["train_key"])


@pytest.fixture(scope="module")
def reported(tracked: tuple[Path, Any]) -> Logged:
    out, result = tracked
    known = (result["run_key"], result["train_key"])
    (folder,) = (f for f in (out / "wandb").glob("offline-run-*") if not f.name.endswith(known))
    return Logged(out, folder.name.split("-")[-1])


def test_the_attack_can_be_read_back(tracked: tuple[Path, Any], attack: Logged) -> None:
    _, result = tracked
    run_record = attack.run
    assert (run_record["job_type"], run_record["run_group"], run_record["tags"]) == ("attack", "my-sweep", ["t1"])
    assert run_record["display_name"] == result["name"]
    config = run_record["config"]["update"]
    assert {k: config["attack"][k] for k in ("name", "t", "p", "select")} == {"name": "pia", "t": 200, "p": 4, "select": "published"}
    assert config["train_key"] == result["train_key"]
    assert "_target_" not in json.dumps(attack.records)
    numbers = {"test/auc": result["auc"], "test/sound": result["sound"], "cost/nfe_per_image": result["nfe_per_image"]}
    numbers |= {f"memorisation/{key}": result["memorisation"][key] for key in ("n_generated", "near_copies", "near_copies_of_held_out")}
    numbers |= {"epsilon/one_run": result["epsilon"]["one_run"]["epsilon"], "cost/train_seconds": result["train_seconds"]}
    assert {key: attack.summary[key] for key in numbers} == numbers


def test_the_attack_holds_what_its_run_folder_holds(tracked: tuple[Path, Any], attack: Logged) -> None:
    folder = tracked[1].folder
    for name in ("roc", "scores", "samples", "near_copies"):
        (picture,) = attack.pictures(name)
        assert picture.read_bytes() == (folder / f"{name}.png").read_bytes()
    scores = ScoreTable.load(folder / "scores.parquet")
    columns, rows = attack.table("score_table")
    assert columns == ["sample_id", "is_member", "score"]
    np.testing.assert_array_equal([row[0] for row in rows], scores.sample_id)
    np.testing.assert_array_equal([row[2] for row in rows], scores.score)
    _, rows = attack.table("control_table")
    assert {row[0]: row[1] for row in rows} == {name: c["sound"] for name, c in tracked[1]["controls"].items()}
    with np.load(folder / "exposed.npz") as exposed, np.load(folder / "near_copies.npz") as copies:
        assert [row[0] for row in attack.table("exposed_table")[1]] == exposed["sample_id"].tolist()
        assert [row[3] for row in attack.table("near_copies_table")[1]] == copies["ratio"].tolist()
        held = next(a for a in attack.records["artifact"] if a["name"].endswith("exposed_table"))["manifest"]["contents"]
        assert sum(entry["path"].endswith(".png") for entry in held) == len(np.unique(exposed["images"], axis=0))
    line = [(step["roc/fpr"], step["roc/tpr"]) for step in attack.steps if "roc/fpr" in step]
    assert line == [(point["roc/fpr"], point["roc/tpr"]) for point in roc_line(scores)]


def test_the_training_can_be_read_back(training: Logged) -> None:
    assert training.run["job_type"] == "train"
    assert [step["train/loss"] > 0 for step in training.steps if "train/loss" in step] == [True] * 4


def test_the_lineage_leads_from_the_model_to_the_report(
    tracked: tuple[Path, Any], training: Logged, attack: Logged, reported: Logged
) -> None:
    """An input is the very artifact that was logged before: W&B tells artifacts of one name apart by their digest."""
    model, scores = f"model-{tracked[1]['train_key']}", f"scores-{tracked[1]['run_key']}"
    made, used = training.artifacts()[model], attack.artifacts()[model]
    assert (made["digest"], made.get("use_after_commit")) == (used["digest"], None)
    assert used["use_after_commit"]
    made, used = attack.artifacts()[scores], reported.artifacts()[scores]
    assert (made["digest"], made.get("use_after_commit")) == (used["digest"], None)
    assert used["use_after_commit"]
    outputs = [name for name, artifact in reported.artifacts().items() if not artifact.get("use_after_commit")]
    assert outputs == [reported.run["display_name"]]
    assert not [e["path"] for logged in (training, attack) for a in logged.artifacts().values() for e in a["manifest"]["contents"] if
                e["path"].endswith(("safetensors", "ckpt"))]  # fmt: skip


def test_the_report_stands_where_its_runs_do(tracked: tuple[Path, Any], reported: Logged) -> None:
    record = reported.run
    assert (record["job_type"], record["run_group"], record["tags"], record["project"]) == ("report", "my-sweep", ["t1"], "mine")
    assert record["config"]["update"]["scores"] == [f"scores-{tracked[1]['run_key']}"]
    assert reported.table("report/leaderboard")[1][0][3] == "pia"


def test_a_training_that_is_cut_off_goes_on_in_its_run_and_its_first_part_is_marked_failed(tmp_path: Path) -> None:
    slow = ["debug=quick", "split.pool=32", "stage=train", "training.steps=80", "trainer.checkpoint_every=5", "trainer.log_every=1"]
    slow += ["tracking=wandb", "tracking.mode=offline", f"output_dir={tmp_path}"]
    first = command.start(*slow)
    while not list(tmp_path.glob("models/*.partial/last.ckpt")):
        assert first.is_alive()
        time.sleep(0.02)
    first.terminate()  # as a time-out or a preemption does
    first.join(60)
    assert first.exitcode == 143
    assert command.run(*slow).returncode == 0
    before, after = (Logged(tmp_path, folder=folder) for folder in sorted((tmp_path / "wandb").glob("offline-run-*")))
    assert before.run["run_id"] == after.run["run_id"] == next((tmp_path / "models").glob("*/DONE")).parent.name
    assert [part.records["exit"][0].get("exit_code", 0) for part in (before, after)] == [1, 0]
    at = [[int(step["trainer/global_step"]) for step in part.steps if "train/loss" in step] for part in (before, after)]
    assert at[0] == list(range(1, at[0][-1] + 1))
    assert at[1] == list(range(at[1][0], 81))
    assert 1 < at[1][0] <= at[0][-1] + 1, "no step is missing between them"


def test_of_processes_that_train_together_one_logs(tmp_path: Path) -> None:
    two = ["trainer.devices=2", "trainer.accelerator=cpu", "training.batch_size=16"]
    done = command.run(
        "debug=quick", "split.pool=32", "stage=train", "tracking=wandb", "tracking.mode=offline", *two, f"output_dir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_nothing_is_logged_twice_and_a_later_wish_is_honoured(tmp_path: Path) -> None:
    quiet = composed("debug=quick", "split.pool=32", f"output_dir={tmp_path}")
    assert run(quiet).tracked is None
    assert not (tmp_path / "wandb").exists()
    wished = composed("debug=quick", "split.pool=32", "tracking=wandb", f"output_dir={tmp_path}")
    assert run(wished).tracked is not None
    again = run(wished)
    assert again.tracked is None
    assert again.cached
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize(
    ("config", "variable", "expected"), [(None, None, "offline"), (None, "online", "online"), ("offline", "online", "offline")]
)
def test_mode(config: str | None, variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert Wandb(mode=config).effective_mode == expected


def test_the_roc_table_and_line_are_exact_where_fpr_is_low() -> None:
    rng = np.random.default_rng(0)
    n = 30000
    table = ScoreTable(np.arange(n), rng.random(n) < 0.5, rng.standard_normal(n))
    curve, rows = metrics.roc(table.is_member, table.score), np.array(roc_rows(table))
    low = curve.fpr <= 0.01
    np.testing.assert_array_equal(rows[: low.sum(), 0], curve.fpr[low])
    np.testing.assert_array_equal(rows[: low.sum(), 1], curve.tpr[low])
    assert len(rows) == low.sum() + ROC_ROWS
    assert tuple(rows[-1, :2]) == (1, 1)
    line = np.array([list(point.values()) for point in roc_line(table)])
    k = np.arange(1, (~table.is_member).sum() // 100 + 1)
    np.testing.assert_allclose(line[: len(k), 0], k / (~table.is_member).sum())
    for fpr, tpr in line:
        assert tpr == curve.tpr[curve.fpr <= fpr + 1e-12].max()
    assert tuple(line[-1]) == (1, 1)
    assert len(line) < 1000


def test_settings_chosen_on_shadows_are_tables(tmp_path: Path) -> None:
    tried = [{"settings": {"t": t}, "shadow_auc": t / 1000} for t in (100, 200)]
    transfer = {"0.1": {"threshold": 0.5, "tpr": 0.4, "tpr_ci": [0.3, 0.5], "fpr": 0.1, "fpr_ci": [0.05, 0.2]}}
    chosen = {"select": "shadow", "settings": {"t": 200}, "tried": tried}
    folder = building.write(tmp_path, building.config(), selection=chosen, transfer=transfer)
    found = tables.of_run(folder)
    assert found["selection_table"].rows == [('{"t": 100}', 0.1, False), ('{"t": 200}', 0.2, True)]
    assert dict(zip(found["transfer_table"].columns, found["transfer_table"].rows[0], strict=True))["fpr_high"] == 0.2
    assert tables.words(json.loads((folder / "metrics.json").read_text()))["selection/settings"] == '{"t": 200}'


def test_the_views_hold_five_sections_of_what_is_logged(tmp_path: Path, attack: Logged, training: Logged) -> None:
    dashboard.main(["--entity", "me", "--project", "mine", "--offline", str(tmp_path / "w.json")])
    dashboard.main(["--entity", "me", "--project", "mine", "--report", "--offline", str(tmp_path / "r.json")])
    workspace, text = (json.loads((tmp_path / name).read_text()) for name in ("w.json", "r.json"))
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Leaderboard", "ROC", "Cost", "Training", "Samples"]
    assert all(section["panels"] for section in sections)
    headings = [block["children"][0]["text"] for block in text["spec"]["blocks"] if block["type"] == "heading"]
    assert headings == [section["name"] for section in sections]
    assert (text["project"]["entityName"], text["project"]["name"], workspace["entity"]) == ("me", "mine", "me")

    named = set(views.COLUMNS)
    for panel in [panel for section in sections for panel in section["panels"]]:
        config = panel["config"]
        named |= {*config.get("mediaKeys", []), *config.get("metrics", [])}
        named |= {config[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis") if axis in config}
        if panel["viewType"] == "Weave":
            named.add(config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"])
    unresolvable = {key for key in named if key.startswith("test/tpr_at_fpr")}  # with the 16 non-members here
    reports = {key for key in named if key.startswith(("report/", "figures/"))}  # tests/report/test_logged.py
    assert named - unresolvable - reports <= attack.keys | training.keys


@pytest.mark.parametrize("view", [views.workspace, views.report])
def test_a_view_survives_being_read_back(view: Any) -> None:
    made = view("me", "mine")
    spec = views.spec(made)
    model = type(made._to_model()).model_validate(spec)

    def without_sizes(node: Any) -> Any:  # which the library forgets of tables and of reports
        if isinstance(node, dict):
            return {key: without_sizes(value) for key, value in node.items() if key not in ("layout", "width")}
        return [without_sizes(value) for value in node] if isinstance(node, list) else node

    assert without_sizes(views.spec(type(made)._from_model(model))) == without_sizes(spec)


def test_what_is_uploaded_is_uploaded_once(tracked: tuple[Path, Any], attack: Logged, training: Logged) -> None:
    out, _ = tracked
    said = sync.sync(out, dry_run=True).splitlines()
    assert said[0] == "3 runs to upload"
    assert {Path(line.strip()) for line in said[1:]} == set((out / "wandb").glob("offline-run-*"))
    theirs = wandb("sync", "--yes", "--dry-run", *[str(f) for f in (out / "wandb").glob("offline-run-*")])
    assert "Would sync 3 run(s)" in theirs
    mark, finished = attack.file.with_name(f"{attack.file.name}.synced"), training.folder / FINISHED
    try:
        mark.touch()
        assert "Would sync 2 run(s)" in wandb("sync", "--dry-run", "--yes", str(out / "wandb"))
        assert sync.sync(out, dry_run=True).splitlines()[0] == "2 runs to upload; 1 uploaded before"
        finished.unlink()
        os.utime(training.file)
        expected = "1 runs to upload; 1 uploaded before; 1 still being written, repeat this when they have ended"
        assert sync.sync(out, dry_run=True).splitlines()[0] == expected
        os.utime(training.file, (time.time() - 3600,) * 2)  # killed
        assert sync.sync(out, dry_run=True).splitlines()[0] == "2 runs to upload; 1 uploaded before"
    finally:
        mark.unlink(missing_ok=True)
        finished.touch()


MISTAKES = {
    "no entity": (dashboard.main, ["--report"], r"--entity=null: must name the W&B user or team"),
    "a project that cannot be": (dashboard.main, ["--entity", "me", "--project", "a/b"], r"--project=a/b: must be a name of at most 128"),
    "a file that cannot be written": (dashboard.main, ["--entity", "me", "--offline", "{tmp}/no/f.json"], r"another place with --offline"),
    "nothing to upload": (sync.main, ["{tmp}"], r"no offline W&B runs in .*/wandb; give the output_dir"),
    "a report of nothing": (report, ["{tmp}", "--wandb"], r"--wandb: there is no finished run to log"),
    "a project without W&B": (report, ["{tmp}", "--project", "p"], r"add --wandb"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    main, arguments, message = MISTAKES[name]
    with pytest.raises(SystemExit, match=rf"^error: [^\n]*{message}[^\n]*$"):
        main([argument.format(tmp=tmp_path) for argument in arguments])


@pytest.mark.parametrize("command", ["sync {out}", "dashboard --entity me --project mine"])
def test_what_needs_a_login_says_so(command: str, tracked: tuple[Path, Any], tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    module, *arguments = command.format(out=tracked[0]).split()
    line = [sys.executable, "-m", f"diffmia_exp.{module}", *arguments]
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (1, "error: not logged in to W&B; run wandb login, or set WANDB_API_KEY, and repeat this\n")
