from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.exit("tests/gpu needs a CUDA GPU and a torch that sees it", returncode=1)
