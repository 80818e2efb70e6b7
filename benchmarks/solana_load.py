"""What a run on Solana costs its clients: 32 of them over 200 rounds on a simulated cluster, without models.

    python benchmarks/solana_load.py                            # 30 to 70 minutes
    python benchmarks/solana_load.py --clients 4 --rounds 10    # a look at it, one minute

The cluster runs in this process and the clients in another, each a real ``SolanaCoordinator`` with a wallet of its own:
it joins every epoch, reports in every round that it is elected for, and ticks by Psyche's rule. The cluster's clock is
this machine's; what happens within a slot of 0.4 s is confirmed and told together, as at a real node. A machine that is
too slow for so many clients makes them see things late, and then they tick more often, never less.

What is counted are the transactions that the cluster has taken, by what they do, and the lamports that they cost. The
exit status is 1 if the wallets have paid anything else, or a round ended without all reports.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from solders.keypair import Keypair
from solders.pubkey import Pubkey

from distro_optim.coordinator.rules.committee import CommitteeSelection
from distro_optim.coordinator.solana.arguments import COORDINATOR_INSTRUCTIONS, decode_arguments
from distro_optim.coordinator.solana.client import SolanaCoordinator
from distro_optim.coordinator.types import Coordinator, RunState, Witness, WitnessProof
from distro_optim.errors import DistroError
from distro_optim.testing import Validator
from distro_optim.testing.coordinator import DUMMY_CONFIG, dummy_run, metadata, report
from distro_optim.testing.solana.server import ValidatorServer
from distro_optim.testing.solana.transactions import Outcome, transaction_of

RUN_ID = "load"
SOL = 1_000_000_000
SLOT_SECONDS = 0.4
EPOCHS = 4
FEE = 5000

NAMES = {
    "join_run": "join",
    "warmup_witness": "report of the warm-up",
    "witness": "report of a round",
    "tick": "tick",
    "health_check": "health check",
}


def keys(number: int) -> Keypair:
    """The wallet of a client; always the same, so that both processes know it."""
    return Keypair.from_seed((number + 1).to_bytes(32, "little"))


# -- the clients, in a process of their own ----------------------------------------------------------------------------


async def train(client: SolanaCoordinator, seconds: float) -> None:
    """Takes part until the run is finished. What a round trains takes so many seconds."""
    done: set[object] = set()
    working: set[asyncio.Task[None]] = set()

    async def report_on(state: Coordinator, index: int) -> None:
        await asyncio.sleep(seconds)
        proof = CommitteeSelection.for_round(state, state.current_round).get_witness(index)
        if proof.witness:
            everybody = [listed.id for listed in state.epoch_state.clients]
            await client.witness(report(proof, everybody), metadata(state.progress.step))

    await client.join()
    async for state in client.states():
        if state.run_state is RunState.FINISHED:
            return
        members = [listed.id for listed in state.epoch_state.clients]
        if client.identity not in members:
            continue
        index = members.index(client.identity)
        now = (state.run_state, state.progress.epoch, state.progress.step)
        if now in done:
            continue
        done.add(now)
        if state.run_state is RunState.WARMUP:
            await client.warmup_witness(Witness(WitnessProof(index, index, False)))
        elif state.run_state is RunState.ROUND_TRAIN:
            task = asyncio.create_task(report_on(state, index))
            working.add(task)
            task.add_done_callback(working.discard)


async def all_clients(url: str, count: int, seconds: float) -> None:
    """The clients; prints what each believes to have paid."""
    clients = [
        SolanaCoordinator([url], [url.replace("http", "ws", 1)], keys(number), RUN_ID) for number in range(count)
    ]
    try:
        await asyncio.gather(*(train(client, seconds) for client in clients))
        await asyncio.sleep(2.0)  # confirmations of the last transactions
        print(*(client.fees.spent for client in clients), flush=True)
    finally:
        await asyncio.gather(*(client.close() for client in clients))


# -- the cluster -------------------------------------------------------------------------------------------------------


@dataclass
class Taken:
    """What the cluster has taken, and what has become of the rounds.

    Attributes:
        kinds: transactions by instruction.
        late: those of them that changed nothing but the counter, which is what a needless tick does.
        refused: tried, and found to fail before they were sent; they cost nothing.
        fees: lamports.
        reports: how many of each round had come when it ended.
        epochs: that have ended.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    needless: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    fees: int = 0
    reports: list[int] = field(default_factory=list)
    epochs: int = 0


def watched(validator: Validator, taken: Taken) -> None:
    """Counts what ``validator`` processes from now on."""
    process = validator.process

    def counted(transaction: Any, *, preflight: bool = True) -> Outcome:
        before = validator.run(RUN_ID).state.coordinator
        outcome = process(transaction, preflight=preflight)
        instruction = transaction_of(transaction).instructions[0]
        name, _ = decode_arguments(COORDINATOR_INSTRUCTIONS, bytes(instruction.data))
        if outcome.error is not None:
            taken.refused[f"{name}: {outcome.error}"] += 1
            return outcome
        after = validator.run(RUN_ID).state.coordinator
        taken.kinds[name] += 1
        taken.fees += outcome.fee
        taken.needless += name == "tick" and before.run_state is after.run_state
        if before.run_state is RunState.ROUND_WITNESS and after.run_state is not RunState.ROUND_WITNESS:
            taken.reports.append(len(before.current_round.witnesses))
        taken.epochs += before.run_state is RunState.COOLDOWN and after.run_state is not RunState.COOLDOWN
        return outcome

    validator.process = counted  # type: ignore[method-assign]


async def load(count: int, rounds: int, train_seconds: float) -> int:
    """The whole benchmark; returns the exit status."""
    seconds_a_round = train_seconds + 2.0 + 4 * SLOT_SECONDS  # as far as the length of an epoch needs it
    config = replace(
        DUMMY_CONFIG,
        init_min_clients=count,
        min_clients=count,
        global_batch_size_start=max(count, 8),
        global_batch_size_end=max(count, 8),
        total_steps=rounds + 1,  # the first step has the number 1
        epoch_time=max(20, int(rounds * seconds_a_round / EPOCHS)),
        round_witness_time=1,
        cooldown_time=2,
        max_round_train_time=60,
        warmup_time=60,
        waiting_for_members_extra_time=2,
    )
    validator = Validator(unix_timestamp=int(time.time()))
    operator = keys(10_000).pubkey()
    run = replace(dummy_run(RUN_ID, config), run_state_start_unix_timestamp=int(time.time()))
    validator.host(run, keys(10_001).pubkey(), main_authority=operator, join_authority=operator)
    wallets = [keys(number).pubkey() for number in range(count)]
    for wallet in wallets:
        validator.fund(wallet, SOL)
    taken = Taken()
    watched(validator, taken)
    began = time.monotonic()
    async with ValidatorServer(validator, real_time=True, slot_seconds=SLOT_SECONDS) as server:
        command = [sys.executable, __file__, "--at", server.url, "--clients", str(count)]
        command += ["--train-seconds", str(train_seconds)]
        clients = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        try:
            while clients.returncode is None:
                try:
                    async with asyncio.timeout(60):
                        said, _ = await clients.communicate()
                except TimeoutError:
                    state = validator.run(RUN_ID).state.coordinator
                    told = f"{time.monotonic() - began:.0f} s: {state.run_state.value}, step {state.progress.step}"
                    print(told, file=sys.stderr, flush=True)
        finally:
            if clients.returncode is None:
                clients.kill()
                await clients.wait()
    if clients.returncode:
        return 1
    believed = [int(word) for word in said.split()]
    return show(validator, wallets, taken, believed, rounds, time.monotonic() - began)


def show(
    validator: Validator, wallets: Sequence[Pubkey], taken: Taken, believed: Sequence[int], rounds: int, seconds: float
) -> int:
    """Prints the tables; returns the exit status."""
    count = len(wallets)
    paid = [SOL - validator.balance(wallet) for wallet in wallets]
    print(f"{count} clients, {len(taken.reports)} rounds in {taken.epochs} epochs, {seconds:.0f} s")
    print()
    print("| transaction | all | a client and round | lamports a client and round |")
    print("|---|---|---|---|")
    each = count * len(taken.reports)
    for name, number in sorted(taken.kinds.items(), key=lambda item: -item[1]):
        print(f"| {NAMES.get(name, name)} | {number:,} | {number / each:.3f} | {number * FEE / each:,.0f} |")
    total = sum(taken.kinds.values())
    print(f"| together | {total:,} | {total / each:.3f} | {taken.fees / each:,.0f} |")
    print()
    print(f"ticks that changed nothing: {taken.needless} of {taken.kinds['tick']}")
    print(f"a wallet has paid {min(paid):,} to {max(paid):,} lamports, {sum(paid) / count:,.0f} on average")
    unknown = [(there - here) // FEE for here, there in zip(believed, paid, strict=True)]
    print(f"transactions that a client does not know to be taken: {sum(unknown)}")
    print(f"refused before they were sent, and free: {dict(taken.refused) or 'none'}")
    full = sum(reports == count for reports in taken.reports)
    print(f"rounds with the reports of all {count} clients: {full} of {len(taken.reports)}")
    right = {
        "every wallet has paid what its transactions cost, and nothing else": sum(paid) == taken.fees,
        "every client knows what it has paid": list(believed) == paid,
        f"{rounds} rounds were trained": len(taken.reports) >= rounds,
        "every round had the reports of all": full == len(taken.reports),
    }
    for what, holds in right.items():
        print(f"{'yes' if holds else 'NO'}: {what}")
    return 0 if all(right.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--train-seconds", type=float, default=1.0, help="that training takes (%(default)s)")
    parser.add_argument("--at", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.at is not None:
        try:
            asyncio.run(all_clients(options.at, options.clients, options.train_seconds))
        except DistroError as error:
            print(f"a client failed: {error}", file=sys.stderr)
            return 1
        return 0
    return asyncio.run(load(options.clients, options.rounds, options.train_seconds))


if __name__ == "__main__":
    raise SystemExit(main())
