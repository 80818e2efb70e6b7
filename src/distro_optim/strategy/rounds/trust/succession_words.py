"""Why nobody hosts at the moment, and what to do, in the words that people are told. No I/O."""

from __future__ import annotations

__all__ = ["others_are_gone", "too_few_in_reach", "without_a_vote", "without_the_estate"]


def _silent(seconds: float) -> str:
    return f"the host has not been heard of for {seconds:.0f} s"


def others_are_gone(seconds: float, voters: int, reached: int) -> str:
    """To a host that may end no round."""
    return (
        f"most others have not been heard of for {seconds:.0f} s, and of {voters} voters only {reached} can be "
        "reached: they may have another host by now, so this one waits for them; if they are gone for good, close this "
        "session, and host again from its checkpoint (resume=True)"
    )


def too_few_in_reach(seconds: float, voters: int, reached: int) -> str:
    """To a voter that reaches no majority."""
    if voters == 2:
        return (
            f"{_silent(seconds)}. In a run of two the other peer cannot take over: one of two is no majority, and it "
            "may be the network that is cut. Start the host again, with the same command: this peer waits for it, and "
            "goes on where it is; or close this session, and host the run from its checkpoint (resume=True)"
        )
    return (
        f"{_silent(seconds)}, and of {voters} voters only {reached} can be reached: a new host takes more than half, "
        "so this peer waits for them"
    )


def without_the_estate(seconds: float) -> str:
    """To a voter that could host, but does not know who may be in the run."""
    return (
        f"{_silent(seconds)}, and has not told this peer who may be in the run, so it cannot host: another one may, or "
        "the host when it is back"
    )


def without_a_vote(seconds: float, *, is_followed: bool) -> str:
    """To a peer that does not vote; ``is_followed`` if the host has ever said who does."""
    if is_followed:
        return (
            f"{_silent(seconds)}. The peers that have trained for longer choose another one; this peer has no vote on "
            "it, waits, and follows"
        )
    return (
        f"{_silent(seconds)}, and this peer has not heard of another one that can host this run: distro-optim serve "
        "hosts it, its host forbids it (succession=False), or this peer has only just joined. It waits, and follows a "
        "new host; started again from its folder (--save-dir with --resume, checkpoint_dir with resume=True) the old "
        "one has the ticket of before, and the run goes on"
    )
