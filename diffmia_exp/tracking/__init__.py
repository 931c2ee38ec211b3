"""Every Weights & Biases call of the project.

`runs.py` logs trainings, attacks and reports, `tables.py` says what of a run folder is logged, `views.py` describes the workspace and
the W&B report, `upload.py` sends what was logged offline.
"""

from diffmia_exp.tracking.runs import Wandb

__all__ = ["Wandb"]
