"""`ScoreTable`: sample_id, is_member, score. The only thing that metrics and reports are made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray


@dataclass(frozen=True)
class ScoreTable:
    """One score per audited image, higher = member.

    Args:
        sample_id: int64 [n], unique.
        is_member: bool [n].
        score: float64 [n].
    """

    sample_id: NDArray[np.int64]
    is_member: NDArray[np.bool_]
    score: NDArray[np.float64]

    def save(self, path: Path) -> None:
        """Write as parquet."""
        columns = {"sample_id": self.sample_id, "is_member": self.is_member, "score": self.score}
        pq.write_table(pa.table(columns), path)

    @classmethod
    def load(cls, path: Path) -> ScoreTable:
        """Read what `save` wrote."""
        table = pq.read_table(path)
        return cls(*(table[name].to_numpy() for name in ("sample_id", "is_member", "score")))
