"""The W&B workspace and the W&B report over a project, described in code: the same five sections of panels.

The panels name what `runs.py` logs. wandb-workspaces says nothing public about a view that is not saved, hence the private names.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from diffmia_exp.config import Plain
from diffmia_exp.errors import UserError
from diffmia_exp.tracking.upload import require_login

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

TITLE = "Membership inference"
COLUMNS = ("test/auc", "test/tpr_at_fpr_0.01", "test/tpr_at_fpr_0.001", "test/sound", "cost/nfe_per_image", "cost/shadow_trainings")
"""Pinned in the list of runs, which is sorted by the first: the leaderboard of single runs."""

TEXT = {
    "Leaderboard": "Every attack by its AUC (0.5 is chance), and its TPR where few false positives are allowed. The tables are of the last"
    " report, in which repetitions are averaged and only comparable runs stand together.",
    "ROC": "On logarithmic axes, every point up to an FPR of 1%.",
    "Cost": "AUC against model evaluations per image, and against the shadow models that were trained.",
    "Training": "Loss of the trained models, and AUC along training where snapshots were attacked.",
    "Samples": "Generated beside training images, near-copies, and the members that are most and least exposed.",
}


def sections() -> dict[str, list[Any]]:
    """The panels by the name of their section."""
    import wandb_workspaces.reports.v2 as wr

    def table(key: str) -> Any:
        return wr.WeavePanelSummaryTable(table_name=key, layout=wr.Layout(w=24, h=9))

    def pictures(title: str, *keys: str) -> Any:
        return wr.MediaBrowser(title=title, media_keys=list(keys), num_columns=2, layout=wr.Layout(w=12, h=10))

    def against(title: str, cost: str, log: bool) -> Any:
        auc = wr.SummaryMetric("test/auc")
        return wr.ScatterPlot(title=title, x=wr.SummaryMetric(cost), y=auc, log_x=log, layout=wr.Layout(w=12, h=8))

    wide = wr.Layout(w=12, h=8)
    axes: Plain = {"log_x": True, "log_y": True, "title_x": "false positive rate", "title_y": "true positive rate"}
    return {
        "Leaderboard": [
            table("report/leaderboard"),
            table("report/verdicts"),
            wr.BarPlot(title="AUC", metrics=["test/auc"], range_x=(0.0, 1.0), max_runs_to_show=100, max_bars_to_show=50, layout=wide),
            wr.BarPlot(title="TPR at 1% FPR", metrics=["test/tpr_at_fpr_0.01"], max_runs_to_show=100, max_bars_to_show=50, layout=wide),
            pictures("AUC with intervals", "figures/forest"),
            pictures("Do attacks find the same members?", "figures/agreement"),
            table("report/comparisons"),
            table("report/controls"),
            table("report/epsilon"),
            table("report/set_level"),
            table("report/notes"),
        ],
        "ROC": [
            wr.LinePlot(title="ROC", x="roc/fpr", y=["roc/tpr"], **axes, max_runs_to_show=30, layout=wr.Layout(w=24, h=12)),
            pictures("ROC with bands", "figures/roc"),
            pictures("ROC of each run", "roc"),
            pictures("Scores of members and non-members", "figures/histogram"),
            pictures("Scores of each run", "scores"),
            table("report/roc_points"),
        ],
        "Cost": [
            against("AUC against model evaluations per image", "cost/nfe_per_image", log=True),
            against("AUC against models that the adversary trains", "cost/shadow_trainings", log=False),
            pictures("Attacks that none beats at their cost", "figures/cost"),
            wr.BarPlot(title="Seconds of measuring", metrics=["cost/seconds"], max_runs_to_show=100, layout=wide),
        ],
        "Training": [
            wr.LinePlot(title="Training loss", x="train/epoch", y=["train/loss"], log_y=True, max_runs_to_show=30, layout=wide),
            pictures("AUC along training", "figures/training"),
            table("figures/training_table"),
        ],
        "Samples": [
            pictures("Generated beside training images", "samples"),
            pictures("Generated images and the training images closest to them", "near_copies"),
            table("report/exposed"),
            table("report/near_copies"),
        ],
    }


def workspace(entity: str, project: str) -> Workspace:
    """A workspace: the sections over all runs of the project, which are sorted by their AUC."""
    import wandb_workspaces.workspaces as ws

    runs = ws.RunsetSettings(
        order=[ws.Ordering(ws.Summary(COLUMNS[0]), ascending=False)], pinned_columns=[f"summary:{column}" for column in COLUMNS]
    )
    parts = [
        ws.Section(name=name, panels=panels, is_open=True, layout_settings=ws.SectionLayoutSettings(columns=2, rows=-(-len(panels) // 2)))
        for name, panels in sections().items()
    ]
    return ws.Workspace(entity=entity, project=project, name=TITLE, sections=parts, runset_settings=runs)


def report(entity: str, project: str) -> Report:
    """A W&B report: the same sections, with a sentence each."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for name, panels in sections().items():
        order = [wr.OrderBy(wr.SummaryMetric(COLUMNS[0]), ascending=False)]  # of the report's own project, which needs no look-up
        blocks += [wr.H1(name), wr.P(TEXT[name]), wr.PanelGrid(runsets=[wr.Runset(name="All runs", order=order)], panels=panels)]
    return wr.Report(entity=entity, project=project, title=TITLE, description="Made by diffmia_exp.", blocks=blocks, width="fluid")


def spec(view: Workspace | Report) -> Plain:
    """What would be saved, as plain values, validated by the library's own models."""
    model = view._to_model()
    content: Plain = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    type(model).model_validate(content)
    return content


def save(view: Workspace | Report) -> str:
    """Save a view. Returns its address.

    Raises:
        UserError: without a login, or if W&B refuses.
    """
    require_login()
    import wandb

    try:
        view.save()
    except (wandb.errors.Error, ValueError) as e:
        raise UserError(
            f"W&B does not save it ({' '.join(str(e).split())}); check --entity={view.entity} and --project={view.project}"
        ) from None
    return str(view.url)
