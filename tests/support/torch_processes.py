"""The twin of ``support.processes``: the same steps in PyTorch, in processes joined by ``torch.distributed``.

As a program (``python -m support.torch_processes FOLDER``) this is one of the processes. Gradients are summed
by an all-reduce of gloo; loss, clipping and optimizer are PyTorch's.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from support.processes import CLIP, STEPS, Job, batch_at, start

from parity.twins import bridge
from tinyllm.optim import warmup_cosine


def trained(job: Job, rank: int, size: int) -> dict[str, np.ndarray]:
    """Losses, gradient norms and the last weights."""
    twin = bridge.to_torch(start(job)).train()
    parameters = dict(twin.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    lr_at, found = warmup_cosine(1e-2, 1e-4, 1e-3, 5, STEPS), {"losses": [], "norms": []}
    for step in range(job.steps):
        ids, targets = map(torch.from_numpy, batch_at(step))
        number = int((targets != -100).sum())
        mine = slice(len(ids) * rank // size, len(ids) * (rank + 1) // size)
        logits = twin(ids[mine]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets[mine].flatten(), reduction="sum") / number
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach().clone()
        for array in (total, *(p.grad for p in parameters.values())):
            torch.distributed.all_reduce(array)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        found["norms"].append(torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP).item())
        optimizer.step()
        found["losses"].append(total.item())
    weights = {f"weight {name}": p.detach().numpy() for name, p in parameters.items()}
    return {name: np.array(value) for name, value in found.items()} | weights


def main(folder: Path) -> None:
    rank, size = int(os.environ["PMI_RANK"]), int(os.environ["PMI_SIZE"])
    torch.set_num_threads(1)
    where = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    for model in ("gpt2", "llama"):
        found = trained(Job(model, dropout=False), rank, size)
        if rank == 0:
            np.savez(folder / f"{model}.npz", **found)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort a process whose peer has left before


if __name__ == "__main__":
    main(Path(sys.argv[1]))
