"""What the ranks of a process group do in tests: a module of its own, since new processes import it by name."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from distro_optim import DisTrO
from optimizer.models import EveryShape, all_same_bits, copies, plain_step


def save_and_resume(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)

    """Saves in mid-run, resumes into another model, and checks that both go on alike, here and on the other ranks."""

    def step(run: tuple[EveryShape, DisTrO], number: int) -> None:
        plain_step(*run, size * number + rank)  # every rank its own batch

    model = EveryShape()
    run = model, DisTrO(model.parameters(), lr=0.01)
    for number in range(3):
        step(run, number)
    # delta differs from rank to rank: a checkpoint for each of them.
    mine = get_optimizer_state_dict(*run)
    run[1].eval()
    dcp.save({"model": run[0].state_dict(), f"optimizer{rank}": mine}, checkpoint_id=f"{folder}/checkpoint")
    run[1].train()

    other = EveryShape(seed=1)
    resumed = other, DisTrO(other.parameters(), lr=0.01)
    state = {"model": other.state_dict(), f"optimizer{rank}": get_optimizer_state_dict(*resumed)}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(*resumed, optim_state_dict=state[f"optimizer{rank}"])
    for number in range(3, 6):
        step(run, number)
        step(resumed, number)
        assert all_same_bits(copies(run[0].parameters()), copies(other.parameters())), (rank, number)
    for optimizer in (run[1], resumed[1]):
        optimizer.flush()
    weights = torch.cat([p.detach().reshape(-1) for p in other.parameters()])
    everybody = [torch.empty_like(weights) for _ in range(size)]
    dist.all_gather(everybody, weights)
    assert all(torch.equal(weights, w) for w in everybody)
    dist.destroy_process_group()
