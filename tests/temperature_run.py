"""A learned temperature that FSDP2 shards: see `test_distributed.py`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main(path: str) -> None:
    dist.init_process_group("gloo")
    model = tiny_model(learn_temperature=True, temperature=0.5)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    output = model(torch.tensor([[1, 5, 6, 2]]), prompt_lengths=torch.tensor([2]))
    (output.embeddings.sum() / output.temperature).backward()
    gradient = model.learned_temperature.log_temperature.grad.full_tensor().item()
    Path(path, f"{dist.get_rank()}").write_text(f"{output.temperature.item()} {model.temperature.item()} {gradient}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
