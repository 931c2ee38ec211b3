"""python run.py [group=name ...] [key=value ...] [-m]: train a target, attack it, report. See --help."""

import hydra
from omegaconf import DictConfig

from diffmia_exp import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    return cli.cell(cfg)


if __name__ == "__main__":
    cli.guard(main)
