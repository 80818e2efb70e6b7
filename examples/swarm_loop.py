"""A plain PyTorch loop in a swarm: trains a byte-level transformer together with whoever joins.

    python examples/swarm_loop.py                      # hosts a run and prints the line for the others
    python examples/swarm_loop.py --run psyche1...     # joins it, from anywhere

    python examples/swarm_loop.py --checkpoints out    # saves; --resume goes on from there

Everybody needs the same Python version, since its standard library's sources are what it trains on. Ctrl-C leaves.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import torch
from byte_data import SourceBytes
from byte_model import ByteTransformer, next_byte_loss
from torch.optim.lr_scheduler import OneCycleLR

from distro_optim import DisTrO
from distro_optim.errors import DistroError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.session import SwarmSession

GLOBAL_BATCH, MICRO_BATCH = 32, 8  # windows of 128 bytes, in a round and in a forward pass
SHOWN_EVERY = 10


def train(args: argparse.Namespace) -> None:
    data = SourceBytes()
    model = ByteTransformer(width=args.width, layers=args.layers)
    optimizer = DisTrO(model.parameters(), lr=1e-3, compression_decay=0.99)
    session = SwarmSession(
        model,
        optimizer,
        run=args.run,
        config=None
        if args.run
        else RunConfig(total_steps=args.steps, global_batch_size=GLOBAL_BATCH, min_peers=args.peers),
        dataset_size=len(data),
        relay=args.relay,
        checkpoint_dir=args.checkpoints,
        resume=args.resume,
        on_event=print,
    )
    # The schedule is everybody's, and stands where the run stands, also for those who come later.
    session.follow(OneCycleLR(optimizer, max_lr=1e-3, total_steps=args.steps, cycle_momentum=False))
    with session:
        if args.run is None:
            print(f"others join with: python {sys.argv[0]} --run {session.ticket}", flush=True)
        for round in session.rounds():
            total = 0.0
            for indices in round.micro_batches(MICRO_BATCH):
                share = len(indices) / len(round.indices)
                loss = share * next_byte_loss(model, *data.windows(indices))
                loss.backward()
                total += loss.item()
            round.finish(loss=total)
            if round.step % SHOWN_EVERY == 0:
                view = session.view()
                megabytes = (view.bytes_sent + view.bytes_received) / 1e6
                print(f"step {round.step}: loss {total:.3f}, {session.num_peers} peers, {megabytes:.2f} MB", flush=True)
    print(f"validation loss {validate(model, data):.3f} after step {session.step}; weights {weights_hash(model)}")


@torch.no_grad()
def validate(model: ByteTransformer, data: SourceBytes) -> float:
    """Mean loss on files not trained on, nats per byte."""
    return next_byte_loss(model, *data.held_out(64)).item()


def weights_hash(model: ByteTransformer) -> str:
    """Equal weights have equal hashes."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="ticket of the run to join, or host:port/run-id")
    parser.add_argument("--steps", type=int, default=300, help="of the whole run; the same for everybody")
    parser.add_argument("--peers", type=int, default=1, help="how many the run waits for before it begins")
    parser.add_argument("--relay", default="default", help='"none" stays on this machine and network')
    parser.add_argument("--checkpoints", type=Path, help="folder to save in; one for each peer")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    try:
        train(args)
    except DistroError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
