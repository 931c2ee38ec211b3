"""Training over devices of which each holds a part of the weights: for networks that do not fit on one (FSDP).

"PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", Zhao et al. 2023 (arXiv 2304.11277), by `fully_shard`, torch's
second version of it. Gradients, the optimiser's state and the weight average are in parts too; a layer's weights are put together
while it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from pytorch_lightning.strategies import ModelParallelStrategy
    from torch.distributed.device_mesh import DeviceMesh


def strategy(world: int) -> ModelParallelStrategy:
    """Lightning's, over `world` processes; a checkpoint is one file of the whole."""
    from pytorch_lightning.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Leave on each device its part of `net`. The blocks of the network are put together one at a time, not all at once."""
    from torch.distributed.fsdp import fully_shard

    for child in net.children():
        for block in child if isinstance(child, nn.ModuleList) else [child]:
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def whole(net: nn.Module) -> dict[str, Tensor]:
    """The weights of a sharded `net`, on the first rank; nothing on the others, which take part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state
