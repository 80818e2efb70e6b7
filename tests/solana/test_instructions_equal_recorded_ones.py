"""Our builders make every instruction of Psyche's programs that was recorded, byte for byte, from its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from solders.hash import Hash
from solders.instruction import Instruction
from solders.message import MessageV0, to_bytes_versioned
from solders.pubkey import Pubkey

from distro_optim.coordinator.formats.account import ACCOUNT_SIZE
from distro_optim.coordinator.solana import arguments as args
from distro_optim.coordinator.solana.instructions import (
    AuthorizerInstructions,
    RunInstructions,
    TreasurerInstructions,
    create_run_account,
)
from distro_optim.coordinator.solana.programs import SYSTEM_PROGRAM, Programs
from distro_optim.coordinator.types import CommitteeProof
from solana.recorded import TRANSACTIONS, WALKS, instructions_of, lines_of

PROGRAMS = Programs()
TABLES = {
    PROGRAMS.coordinator: args.COORDINATOR_INSTRUCTIONS,
    PROGRAMS.authorizer: args.AUTHORIZER_INSTRUCTIONS,
    PROGRAMS.treasurer: args.TREASURER_INSTRUCTIONS,
}


class Known:
    """What the arguments of an instruction do not say, since an earlier one did."""

    def __init__(self) -> None:
        self.run_ids: dict[Pubkey, str] = {}
        self.treasuries: dict[Pubkey, int] = {}
        self.scopes: dict[Pubkey, tuple[Pubkey, Pubkey, bytes]] = {}
        self.mints: set[Pubkey] = set()


def rebuilt(recorded: Instruction, known: Known) -> Instruction:
    """The same instruction by the builder that its name and arguments call for."""
    _, arguments = args.decode_arguments(TABLES[recorded.program_id], recorded.data)
    keys = [meta.pubkey for meta in recorded.accounts]
    match arguments:
        case args.InitCoordinator(main, join, run_id, version):
            known.run_ids[keys[1]] = run_id
            run = RunInstructions(PROGRAMS, run_id, keys[2])
            return run.init(keys[0], Pubkey.from_bytes(main), Pubkey.from_bytes(join), version)
        case args.JoinRun(client):
            run = RunInstructions(PROGRAMS, known.run_ids[keys[2]], keys[3])
            return run.join(client, keys[1], user=keys[0])
        case args.FreeCoordinator():
            return RunInstructions(PROGRAMS, known.run_ids[keys[2]], keys[3]).free(keys[0], keys[1])
        case args.AuthorizationCreate(grantee, scope):
            named = keys[1], Pubkey.from_bytes(grantee), scope
            known.scopes[keys[2]] = named
            return AuthorizerInstructions(PROGRAMS, *named).create(keys[0])
        case args.AuthorizationGrantorUpdate(active):
            return AuthorizerInstructions(PROGRAMS, *known.scopes[keys[1]]).set_active(active)
        case args.AuthorizationGranteeUpdate(clear, added):
            authorization = AuthorizerInstructions(PROGRAMS, *known.scopes[keys[2]])
            return authorization.delegate(keys[0], [Pubkey.from_bytes(key) for key in added], clear=clear)
        case args.AuthorizationClose():
            return AuthorizerInstructions(PROGRAMS, *known.scopes[keys[2]]).close(keys[1])
        case args.RunCreate(index, run_id, version, main, join):
            known.run_ids[keys[4]], known.treasuries[keys[1]] = run_id, index
            treasurer = TreasurerInstructions(PROGRAMS, index, keys[3], run_id, keys[5])
            known.mints.add(keys[3])
            return treasurer.create(keys[0], Pubkey.from_bytes(main), Pubkey.from_bytes(join), version)
        case args.RunUpdate():
            treasurer = TreasurerInstructions(
                PROGRAMS, known.treasuries[keys[1]], SYSTEM_PROGRAM, known.run_ids[keys[2]], keys[3]
            )
            return treasurer.update(keys[0], arguments)
        case args.ParticipantCreate():
            treasurer = TreasurerInstructions(
                PROGRAMS, known.treasuries[keys[2]], SYSTEM_PROGRAM, "any", SYSTEM_PROGRAM
            )
            return treasurer.create_participant(keys[0], keys[1])
        case args.ParticipantClaim(points):
            index = known.treasuries[keys[2]]
            made = [TreasurerInstructions(PROGRAMS, index, mint, "any", keys[4]) for mint in known.mints]
            (fitting,) = [treasurer for treasurer in made if treasurer.collateral == keys[3]]
            return fitting.claim(keys[0], points, user_collateral=keys[1])
        case _:
            return by_user(RunInstructions(PROGRAMS, known.run_ids[keys[1]], keys[2]), keys[0], arguments)


def by_user(run: RunInstructions, user: Pubkey, arguments: Any) -> Instruction:
    match arguments:
        case args.Tick():
            return run.tick(user)
        case args.WitnessRound(metadata=metadata):
            return run.witness(user, arguments.report, metadata)
        case args.WarmupWitness():
            return run.warmup_witness(user, arguments.report)
        case args.HealthCheck(client, committee, position, index):
            return run.health_check(user, client, CommitteeProof(committee, position, index))
        case args.CheckpointUploaded(repo):
            return run.checkpoint(user, repo)
        case args.Update(metadata, config, model, progress):
            return run.update(user, metadata, config, model, progress)
        case args.UpdateClientVersion(version):
            return run.update_client_version(user, version)
        case args.SetFutureEpochRates(earning, slashing):
            return run.set_future_epoch_rates(user, earning, slashing)
        case args.SetPaused(paused):
            return run.set_paused(user, paused)
    raise AssertionError(f"no builder for {arguments}")


def message_of(line: dict[str, Any], instructions: list[Instruction]) -> bytes:
    """What is signed. Rights of one account in several places add up, in the record as in the message."""
    payer = Pubkey.from_string(line["payer"])
    return to_bytes_versioned(MessageV0.try_compile(payer, instructions, [], Hash.default()))


@pytest.mark.parametrize("file", TRANSACTIONS, ids=lambda file: file.name.split(".")[0])
def test_recorded_transactions_are_rebuilt_byte_for_byte(file: Path) -> None:
    known, compared = Known(), 0
    for line in lines_of(file):
        recorded, ours = instructions_of(line), []
        for instruction in recorded:
            if instruction.program_id in TABLES:
                compared += 1
                instruction = rebuilt(instruction, known)
            elif instruction.program_id == SYSTEM_PROGRAM and ACCOUNT_SIZE.to_bytes(8, "little") in instruction.data:
                rent = int.from_bytes(instruction.data[4:12], "little")
                payer, account = (meta.pubkey for meta in instruction.accounts)
                instruction = create_run_account(PROGRAMS, payer, account, rent)
            ours.append(instruction)
        assert message_of(line, ours) == message_of(line, recorded)
    assert compared


@pytest.mark.parametrize("file", TRANSACTIONS, ids=lambda file: file.name.split(".")[0])
def test_transactions_have_the_recorded_sizes(file: Path) -> None:
    """The first of each file, an airdrop, was of the older form, which is two bytes shorter."""
    airdrop, *lines = lines_of(file)
    assert 65 + len(message_of(airdrop, instructions_of(airdrop))) - 2 == airdrop["transaction_bytes"]
    for line in lines:
        message = message_of(line, instructions_of(line))
        assert 1 + 64 * message[1] + len(message) == line["transaction_bytes"]


@pytest.mark.parametrize("file", WALKS, ids=lambda file: file.name.split(".")[0])
def test_the_data_of_every_call_are_read_and_written_alike(file: Path) -> None:
    for call in lines_of(file)[1:]:
        data = bytes.fromhex(call["data"])
        name, arguments = args.decode_arguments(args.COORDINATOR_INSTRUCTIONS, data)
        assert name == call["op"]
        assert arguments is not None
        assert args.encode_arguments(arguments) == data
