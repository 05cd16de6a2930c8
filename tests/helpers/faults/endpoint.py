"""`llm2clip serve` under a campaign: right requests, and wrong, endless, slow and very many ones.

A process serves a tiny model with an index on loopback, within small limits. Its clients ask all at
once, each with a seeded generator of its own. Every answer to a right request, and to a wrong one
that is accepted, is compared with what the model gives in this process. The first server gets
SIGTERM while it works; the second one's memory and open files are compared at two quiet moments.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from indexes import build, save_model
from tiny import draw_noise

from faults.counts import Counts
from faults.endpoint_clients import Campaign
from faults.endpoint_process import TIMEOUT_S, Server
from faults.endpoint_requests import Oracle

# Arenas of threads, and caches of the allocator, keep what was once needed at the same time.
MOST_GROWTH_MB, MOST_NEW_FILES = 64, 8
MOST_CONNECTIONS, FEW_CONNECTIONS, LONG_S = 10_000, 1500, 300
FEWEST_RIGHT = 5


def run(folder: Path, seconds: float, seed: int) -> Counts:
    """Attack two servers, one after the other.

    Args:
        folder: for the model, the index, and the logs of the servers.
        seconds: how long; starts and waits come on top of it.
        seed: of all clients. The same seed gives the same requests, in the same order per client.
    """
    counts = Counts()
    if not (folder / "index").exists():
        save_model(folder / "model")
        (folder / "images").mkdir()
        for number in range(9):
            draw_noise(seed=number).save(folder / "images" / f"{number}.png")
        build(folder / "model", folder / "images", folder / "index")
    asyncio.run(attack(folder, seconds, seed, counts))
    for log in folder.glob("*.log"):
        _, *traces = log.read_text(encoding="utf-8", errors="replace").split("Traceback")
        # uvloop raises where a client resets its connection just before an answer is written.
        for trace in (trace for trace in traces if "the handler is closed" not in trace):
            counts.add("unnamed", f"seed {seed}, {log.name}", trace)
    return counts


async def attack(folder: Path, seconds: float, seed: int, counts: Counts) -> None:
    """Attack one server until it gets SIGTERM, and another one for longer."""
    oracle = Oracle(folder / "model", folder / "index")
    most = MOST_CONNECTIONS if seconds >= LONG_S else FEW_CONNECTIONS
    with Server(folder, "first server") as server:
        campaign = Campaign(server, oracle, counts, seed, most)
        clients = asyncio.ensure_future(campaign.run(seconds, "before SIGTERM"))
        await asyncio.sleep(0.15 * seconds)
        await campaign.stop()
        campaign.is_stopping = True
        await clients
    with Server(folder, "second server") as server:
        campaign = Campaign(server, oracle, counts, seed, most)
        measured = []
        for phase, share in (("warming up", 0.25), ("warm", 0.4)):
            await campaign.run(share * seconds, phase)
            await asyncio.sleep(2 * TIMEOUT_S)  # until what was left behind is ended
            measured.append(server.measure())
        (before_mb, before_files), (after_mb, after_files) = measured
        grown = f"{before_mb:.0f} to {after_mb:.0f} MB, {before_files} to {after_files} open files"
        grown += f", {campaign.num_right} right answers"
        (folder / "memory.txt").write_text(grown, encoding="utf-8")
        is_flat = after_mb - before_mb < MOST_GROWTH_MB
        is_flat &= after_files - before_files < MOST_NEW_FILES
        counts.add("harmless" if is_flat else "lost", f"seed {seed}, memory", grown)
        if campaign.num_right < FEWEST_RIGHT:
            counts.add("lost", f"seed {seed}: {campaign.num_right} right answers")
