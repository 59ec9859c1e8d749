"""One run: plan in, what went wrong and what happened out."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from afterclick.serving.records import Head
from afterclick.streams.assignment import State
from tests.simulation.clock import StuckError, VirtualLoop
from tests.simulation.judge import judge
from tests.simulation.kafka_double import Broker
from tests.simulation.plan import LOAD_S, PARTITIONS, RULES, Fault, Plan
from tests.simulation.redis_double import JOURNAL_MAX, Network
from tests.simulation.releases import Releases
from tests.simulation.telling import told
from tests.simulation.worker import NAMESPACE, SimulatedWorker, Surroundings

REBALANCE_TIMEOUT_S = 2.0
SESSION_TIMEOUT_S = 1.0
STRUCK_S = LOAD_S + 1.1
"""By then the log is written and every fault has struck."""
IDLE_S = 1.3
"""In this time every idle worker looks at the head once more (assignment.IDLE_CHECK_S)."""
END_S = STRUCK_S + 90.0
"""Whoever has not folded everything by then never will."""


class Outcome(NamedTuple):
    """What a run came to."""

    wrong: list[str]
    faults: int
    trace: list[str]


def simulate(plan: Plan, releases: Releases, *, tracing: bool = False) -> Outcome:
    """Run a plan to its end and judge what stands in Redis."""
    logger = logging.getLogger("afterclick")
    level, loop = logger.level, VirtualLoop()
    logger.setLevel(logging.CRITICAL + 1)
    try:
        world = World(plan, releases, loop, tracing=tracing)
        return loop.run_until_complete(world.run())
    finally:
        loop.close()
        logger.setLevel(level)


class World:
    """Servers, group and workers of one run."""

    def __init__(self, plan: Plan, releases: Releases, loop: VirtualLoop, *, tracing: bool) -> None:
        self.plan, self.loop = plan, loop
        self.trace: list[str] = []
        self.faults = 0
        self.network = Network(loop)
        self.broker = Broker(loop, plan)
        note = self._note if tracing else lambda *_: None
        self.around = Surroundings(loop, self.broker, self.network, releases, note)
        self.around.storms = plan.storms
        self.workers: list[SimulatedWorker] = []
        self._born = self._unborn = 0
        self._rebalance = asyncio.Event()
        self._turn = 0
        self._regrouping = False

    async def run(self) -> Outcome:
        """The whole run."""
        for change in self.plan.changes:
            if change.at_s == 0:
                self._change(change.kind, change.number)
            else:
                self.loop.call_at(change.at_s, self._change, change.kind, change.number)
        for _ in range(self.plan.num_workers):
            self._start_worker()
        for fault in self.plan.faults:
            self.loop.call_at(fault.at_s, self._strike, fault)
        group = self.loop.create_task(self._group())
        wrong: list[str] = []
        try:
            await asyncio.sleep(STRUCK_S)
            for worker in self.workers:  # what waited for a call that never came
                worker.client.faults.clear()
                worker.drops = 0
            calm = 0
            while calm < 2 and self.loop.now_s < END_S:
                await asyncio.sleep(IDLE_S)
                calm = calm + 1 if self._settled() else 0
        except StuckError as stuck:
            wrong.append(str(stuck))
        if not wrong and not self._settled():
            wrong.append(f"never finished: {self._where()}")
        wrong += [f"{w.name} broke: {error!r}" for w in self.workers for error in w.broken]
        group.cancel()
        for worker in self.workers:
            worker.process.kill()
        await asyncio.sleep(0.01)
        wrong += self.loop.problems
        if not wrong:
            wrong += judge(
                self.plan,
                self.network.current,
                self.around.releases,
                self.around.letters,
                self.broker.signals,
            )
        return Outcome(wrong, self.faults, self.trace)

    # Workers and their group ----------------------------------------------------------------------

    def _start_worker(self) -> None:
        self._born += 1
        worker = SimulatedWorker(f"w{self._born}", self.around, self.plan.seed)
        self.workers.append(worker)
        self._note("{}: starts", worker.name)
        self._rebalance.set()

    def _replace_worker(self) -> None:
        self._unborn -= 1
        self._start_worker()

    def _alive(self) -> list[SimulatedWorker]:
        return [worker for worker in self.workers if worker.process.alive]

    async def _group(self) -> None:
        """Rebalance whenever somebody asks; who does not leave in time is left out."""
        while True:
            await self._rebalance.wait()
            self._rebalance.clear()
            self._regrouping = True
            self._note("group: rebalances")
            leaving = {w: self.loop.create_task(self._leave(w)) for w in self._alive()}
            if leaving:
                await asyncio.wait(leaving.values(), timeout=REBALANCE_TIMEOUT_S)
            here = [w for w, task in leaving.items() if task.done() and w.process.alive]
            for worker, task in leaving.items():
                if worker not in here and worker.process.alive:
                    self._note("group: {} is left out", worker.name)
                    task.add_done_callback(lambda _: self._rebalance.set())
            self._turn += 1
            for at, worker in enumerate(here):
                partitions = [p for p in range(PARTITIONS) if (p + self._turn) % len(here) == at]
                worker.process.start(worker.join(partitions))
            await asyncio.sleep(0.1)
            self._regrouping = len(here) < len(self._alive())

    async def _leave(self, worker: SimulatedWorker) -> None:
        try:
            await worker.leave()
        except asyncio.CancelledError:
            if worker.process.alive:
                raise

    # The end -------------------------------------------------------------------------------------

    def _settled(self) -> bool:
        """Whether every consequence of a fault is over, and everything folded and made."""
        now_s, alive = self.loop.now_s, self._alive()
        over = not self._regrouping and not self._rebalance.is_set() and not self.network.underway
        over = over and not self._unborn
        over = over and all(
            now_s > worker.process.frozen_until_s and worker.client.has_moved for worker in alive
        )
        # A slow look at the head may be under way, and find marks that a failover brought back.
        over = over and not any(
            key.endswith((b":due", b":signals")) for key in self.network.current.data
        )
        held = [one for worker in alive for one in worker.held.values()]
        done = [
            one.state == State.READY
            and self._folded_to(one.partition) >= self.broker.end(one.partition)
            and one.fold.position >= self.broker.end(one.partition)
            and not one.fold.has_due
            for one in held
        ]
        return over and all(done) and {one.partition for one in held} == set(range(PARTITIONS))

    def _folded_to(self, partition: int) -> int:
        """Where the head in Redis stands, whatever workers believe."""
        stored: Any = self.network.current.data.get(f"{{{NAMESPACE}:{partition}}}:head".encode())
        return (
            msgspec.json.decode(stored, type=Head).next if stored else self.broker.starts[partition]
        )

    def _where(self) -> str:
        return "; ".join(
            f"{worker.name} partition {p}: {held.state.value} at {held.fold.position} of "
            f"{self.broker.end(p)}, due {held.fold.has_due} ({held.why})"
            for worker in self._alive()
            for p, held in sorted(worker.held.items())
        )

    # What comes and what goes wrong --------------------------------------------------------------

    def _change(self, kind: str, number: int) -> None:
        self._note("{} {}", kind, number)
        if kind == "publish":
            self.around.published = max(self.around.published, number)
        elif kind == "item":
            self.around.items += 1
        else:
            self.around.rules = RULES[number]

    def _strike(self, fault: Fault) -> None:
        alive = self._alive()
        worker = alive[fault.who % len(alive)] if alive else None
        if worker is None:
            return
        self._note("FAULT {} on {}", fault, worker.name)
        self.faults += 1
        strike: Callable[[SimulatedWorker, Fault], None]
        strike = getattr(self, f"_strike_{fault.kind.replace('-', '_')}")
        strike(worker, fault)

    def _strike_crash(self, worker: SimulatedWorker, fault: Fault) -> None:
        worker.process.kill()
        self._unborn += 1
        self.loop.call_later(0.05 + 2 * fault.size, self._replace_worker)
        self.loop.call_later(SESSION_TIMEOUT_S, self._rebalance.set)

    def _strike_freeze(self, worker: SimulatedWorker, fault: Fault) -> None:
        for_s = 0.2 + 6 * fault.size**2
        worker.process.frozen_until_s = self.loop.now_s + for_s
        if for_s > SESSION_TIMEOUT_S:
            self.loop.call_later(SESSION_TIMEOUT_S, self._rebalance.set)

    def _strike_rebalance(self, worker: SimulatedWorker, fault: Fault) -> None:
        self._rebalance.set()

    def _strike_zombie(self, worker: SimulatedWorker, fault: Fault) -> None:
        worker.deaf_until_s = self.loop.now_s + 8 * fault.size
        self._rebalance.set()

    def _strike_join(self, worker: SimulatedWorker, fault: Fault) -> None:
        self._start_worker()

    def _strike_failover(self, worker: SimulatedWorker, fault: Fault) -> None:
        lost = JOURNAL_MAX + 1 if fault.size > 0.97 else 1 + int(11 * fault.size**3)
        old = self.network.current
        self.network.fail_over(lost)
        old.read_only = fault.size < 0.2  # demoted at once; else it goes on beside the new one
        self._note("failover loses {} writes", lost)
        for one in self._alive():
            stays = (fault.who, one) == (3, worker) or fault.who == 4
            one.client.moves_at_s = self.loop.now_s + (3 * fault.size if stays else 0.0)

    def _strike_resend(self, worker: SimulatedWorker, fault: Fault) -> None:
        worker.client.faults["resend"] = 0.001 + 1.5 * fault.size**3

    def _strike_lost(self, worker: SimulatedWorker, fault: Fault) -> None:
        worker.client.faults["lost"] = 0.0

    def _strike_late(self, worker: SimulatedWorker, fault: Fault) -> None:
        worker.client.faults["late"] = 0.001 + 3 * fault.size**2

    def _strike_slow(self, worker: SimulatedWorker, fault: Fault) -> None:
        worker.client.faults["slow"] = 0.2 + 5 * fault.size

    def _strike_redis_away(self, worker: SimulatedWorker, fault: Fault) -> None:
        self.network.away_until_s = self.loop.now_s + 0.05 + 2 * fault.size

    def _strike_broker_away(self, worker: SimulatedWorker, fault: Fault) -> None:
        self.broker.away_until_s = self.loop.now_s + 0.05 + 2 * fault.size

    def _strike_jump(self, worker: SimulatedWorker, fault: Fault) -> None:
        worker.jump(fault.who % PARTITIONS, 1 + round(8 * fault.size))

    def _strike_drop(self, worker: SimulatedWorker, fault: Fault) -> None:
        worker.drops += 1

    def _strike_hint(self, worker: SimulatedWorker, fault: Fault) -> None:
        partition = fault.who % PARTITIONS
        start, end = self.broker.starts[partition], self.broker.end(partition)
        self.broker.committed[partition] = start + round((end - start) * fault.size)

    def _note(self, words: str, *values: object) -> None:
        shown = [f"{value:.3f}" if isinstance(value, float) else told(value) for value in values]
        self.trace.append(f"{self.loop.now_s:8.3f}  " + words.format(*shown))
