"""Volunteers that come and go while they add up batches and average: an event-driven simulation. Nothing is measured.

After DeDLOC (Diskin et al. 2021, arXiv 2106.10207), as milkglass runs it. An epoch here is one step of the optimizer:

1. All who have the state compute, each at its own speed, until what they added up since the last step is the target.
2. The group meets for `matchmaking_seconds`, computing on: what comes in beyond the target goes into the step too.
3. The group averages, and nobody in it computes. Equal shares of N: `bytes (1 + (N - 2) / N) 8 / slowest rate`, as the
   linear program of DeDLOC has it, two messages one after the other, and something for each connection. The program's
   best shares take max(1 / slowest, 2 (N - 1) / sum of rates) times the bits: at least half as long.
4. The step. Then all begin at 0.

Who leaves or is killed loses what it computed since the last step. Killed while its group averages: the group waits for
the time-out, then meets and averages again with those who are there, at whatever they have. Who wants to leave in that
time stays until the averaging is over. Who comes downloads the state at its own rate before it counts. One alone steps
without meeting. Sessions are exponential and begin as a Poisson process: how many are online is Poisson, and may be 0.

Not in it: claims that outlive a killed volunteer by some seconds, donors of state that slow down, states that are old
when they have arrived, more than one group, rates that change. All are in one group, however many.

A run costs a few operations for each coming, each leaving and each step, none for records.
Legend: V sessions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_JOIN, _LEAVE, _MARK = range(3)


@final
@dataclass(frozen=True)
class Costs:
    """What meeting, averaging and joining take. latency_seconds: of a message. rounds: messages one after the other."""

    matchmaking_seconds: float = 5.0
    timeout_seconds: float = 30.0
    gradient_bytes: float = 0.0
    state_bytes: float = 0.0
    latency_seconds: float = 0.0
    rounds: int = 2
    seconds_per_connection: float = 0.0

    def averaging_seconds(self, count: int, slowest: float) -> float:
        """With equal shares, for a group of `count` >= 1 whose slowest link has `slowest` bit/s; 0 for one alone."""
        if count < 2:
            return 0.0
        bits = 8 * self.gradient_bytes * (1 + (count - 2) / count)
        return self.rounds * self.latency_seconds + (count - 1) * self.seconds_per_connection + bits / slowest


@final
@dataclass(frozen=True)
class Population:
    """Who volunteers. online: how many, in the mean. killed_share: of sessions, those that end without a goodbye.

    Speeds are lognormal: `speed` records/s in the mean, `speed_spread` the deviation of the logarithm. rates: bit/s,
    each as frequent as the others.
    """

    online: float
    session_seconds: float
    killed_share: float
    speed: float
    speed_spread: float
    rates: tuple[float, ...]

    @property
    def total_speed(self) -> float:
        """Of all online, in the mean: records/s."""
        return self.online * self.speed


@final
@dataclass(frozen=True)
class Sessions:
    """All sessions of a run, (V,) each. arrives, counts, leaves: seconds; from `counts` on it has the state.

    speeds: records/s. rates: bit/s. An endless session leaves at infinity.
    """

    arrives: Array
    counts: Array
    leaves: Array
    killed: NDArray[np.bool_]
    speeds: Array
    rates: Array

    def capacity(self, begin: float, end: float) -> float:
        """Records that all online between two times (seconds) could compute, did they nothing else."""
        online = np.clip(np.minimum(self.leaves, end) - np.maximum(self.arrives, begin), 0, None)
        return float(online @ self.speeds)


@final
@dataclass(frozen=True)
class Outcome:
    """What was counted in a window of `seconds`, in records where nothing else is said.

    in_flight: computed and not yet stepped with, at the end less at the beginning; so computed = useful + wasted +
    in_flight. beyond_target: of the useful ones. members: the groups' sizes, summed over epochs. averagings: tries.
    """

    seconds: float
    capacity: float
    computed: float
    useful: float
    beyond_target: float
    wasted: float
    in_flight: float
    epochs: int
    members: int
    averagings: int
    failed: int

    @classmethod
    def pooled(cls, outcomes: Sequence[Outcome]) -> Outcome:
        """Several runs as one."""
        return cls(**{each.name: sum(getattr(outcome, each.name) for outcome in outcomes) for each in fields(cls)})

    @property
    def efficiency(self) -> float:
        """Records that went into a step, of those that all online could compute."""
        return self.useful / self.capacity

    @property
    def wasted_share(self) -> float:
        """Of the records that were stepped with or lost, those lost."""
        ended = self.useful + self.wasted
        return self.wasted / ended if ended else 0.0

    @property
    def seconds_per_epoch(self) -> float:
        """Infinite where no step came about."""
        return self.seconds / self.epochs if self.epochs else math.inf

    @property
    def group(self) -> float:
        """Volunteers in a step, in the mean."""
        return self.members / self.epochs if self.epochs else math.nan

    @property
    def failed_share(self) -> float:
        """Of the tries to average, those given up."""
        return self.failed / self.averagings if self.averagings else 0.0

    @property
    def batch(self) -> float:
        """Records in a step, in the mean."""
        return self.useful / self.epochs if self.epochs else math.nan


def draw_sessions(population: Population, costs: Costs, seconds: float, generator: np.random.Generator) -> Sessions:
    """The sessions of a run of so many seconds. Those online at 0 have the state; the run begins right after a step."""
    there = int(generator.poisson(population.online))
    later = int(generator.poisson(population.online * seconds / population.session_seconds))
    total = there + later
    arrives = np.concatenate([np.zeros(there), generator.uniform(0, seconds, later)])
    rates = generator.choice(np.array(population.rates), total)
    drift = -(population.speed_spread**2) / 2  # so that the mean is what it should be
    speeds = population.speed * generator.lognormal(drift, population.speed_spread, total)
    return Sessions(
        arrives=arrives,
        counts=arrives + np.where(np.arange(total) < there, 0.0, 8 * costs.state_bytes / rates),
        leaves=arrives + generator.exponential(population.session_seconds, total),  # what is left is exponential too
        killed=generator.random(total) < population.killed_share,
        speeds=speeds,
        rates=rates,
    )


def simulate(
    sessions: Sessions, costs: Costs, target_batch: float, seconds: float, warm_up_seconds: float = 0.0
) -> Outcome:
    """Play the sessions for so many seconds after the warm-up, which is not counted."""
    run = _Run(sessions, costs, target_batch, (warm_up_seconds, warm_up_seconds + seconds))
    run.play()
    begin, end = run.marks
    counted = {each.name: getattr(end, each.name) - getattr(begin, each.name) for each in fields(_Tally)}
    capacity = sessions.capacity(warm_up_seconds, warm_up_seconds + seconds)
    return Outcome(seconds=seconds, capacity=capacity, **counted)


def epoch_seconds(population: Population, costs: Costs, target_batch: float) -> float:
    """About how long an epoch takes with very many volunteers and no averaging lost; infinite if never reached.

    Computing: of what was computed t seconds ago exp(-t / session) is still there, so the target is reached after
    -session log(1 - target / (speed session)).
    """
    reached = target_batch / (population.total_speed * population.session_seconds)
    if reached >= 1:
        return math.inf
    averaging = costs.averaging_seconds(max(1, round(population.online)), min(population.rates))
    return -population.session_seconds * math.log1p(-reached) + costs.matchmaking_seconds + averaging


@final
class _Adding:
    """What the volunteers have added up since the last step: each counts `speed * (now - begun)`."""

    def __init__(self, speeds: list[float]) -> None:
        self._speeds = speeds
        self.begun: dict[int, float] = {}
        self.speed = self._offset = 0.0

    def total(self, now: float) -> float:
        return self.speed * now - self._offset

    def join(self, who: int, now: float) -> None:
        self.begun[who] = now
        self.speed += self._speeds[who]
        self._offset += self._speeds[who] * now

    def leave(self, who: int, now: float) -> float:
        """What it takes with it."""
        begun, speed = self.begun.pop(who), self._speeds[who]
        self.speed -= speed
        self._offset -= speed * begun
        if not self.begun:
            self.speed = self._offset = 0.0  # what rounding left
        return speed * (now - begun)

    def begin(self, now: float) -> None:
        """All from 0."""
        self.begun = dict.fromkeys(self.begun, now)
        self.speed = math.fsum(self._speeds[who] for who in self.begun)
        self._offset = self.speed * now

    def pause(self, seconds: float) -> None:
        """What all have is what it was so long ago."""
        self.begun = {who: begun + seconds for who, begun in self.begun.items()}
        self._offset += self.speed * seconds


@dataclass
class _Tally:
    """What a run has counted so far: see Outcome."""

    computed: float = 0.0
    useful: float = 0.0
    beyond_target: float = 0.0
    wasted: float = 0.0
    in_flight: float = 0.0
    epochs: int = 0
    members: int = 0
    averagings: int = 0
    failed: int = 0


@final
class _Run:
    """One run, from 0 to the end of its window. marks: what was counted at the window's begin and end."""

    def __init__(self, sessions: Sessions, costs: Costs, target_batch: float, window: tuple[float, float]) -> None:
        self.marks: list[_Tally] = []
        self._costs, self._target = costs, target_batch
        self._rates: list[float] = sessions.rates.tolist()
        self._killed: list[bool] = sessions.killed.tolist()
        self._adding, self._tally = _Adding(sessions.speeds.tolist()), _Tally()
        self._events, self._next, self._now = _events(sessions, window), 0, 0.0

    def play(self) -> None:
        while self._accumulate():
            while self._adding.begun and not self._over and not self._average():
                pass

    @property
    def _over(self) -> bool:
        return len(self.marks) == 2

    def _accumulate(self) -> bool:
        """Compute until the target is there; False: the run is over before."""
        adding = self._adding
        while not self._over:
            lacking = max(0.0, self._target - adding.total(self._now))
            reached = self._now + lacking / adding.speed if adding.begun else math.inf
            if reached < self._events[self._next][0]:
                self._compute(reached)
                return True
            self._compute_through_next()
        return False

    def _average(self) -> bool:
        """Meet and try once; True: all have stepped. The run may be over in between."""
        adding, tally = self._adding, self._tally
        if len(adding.begun) > 1:
            met = self._now + self._costs.matchmaking_seconds
            while self._events[self._next][0] <= met and not self._over:
                self._compute_through_next()
            self._compute(met)
        count = len(adding.begun)
        if not count:
            return False
        needed = self._costs.averaging_seconds(count, min(self._rates[who] for who in adding.begun))
        pause = _Pause(self._now)
        self._wait(pause, min(needed, self._costs.timeout_seconds))
        failed = pause.killed > 0 or needed > self._costs.timeout_seconds
        if failed:
            self._wait(pause, self._costs.timeout_seconds)
            adding.pause(self._now - pause.began)
        else:
            added = adding.total(pause.began)
            tally.useful += added
            tally.beyond_target += max(0.0, added - self._target)
            tally.epochs += 1
            tally.members += count
            adding.begin(self._now)
        tally.averagings += count > 1
        tally.failed += failed
        for who in pause.leaving:
            tally.wasted += adding.leave(who, self._now)  # nothing after a step
        for who in pause.joining:
            adding.join(who, self._now)
        return not failed

    def _compute(self, until: float) -> None:
        self._tally.computed += self._adding.speed * (until - self._now)
        self._now = until

    def _compute_through_next(self) -> None:
        time, kind, who = self._events[self._next]
        self._next += 1
        self._compute(time)
        if kind == _JOIN:
            self._adding.join(who, time)
        elif kind == _LEAVE:
            self._tally.wasted += self._adding.leave(who, time)
        else:
            self._mark(time)

    def _wait(self, pause: _Pause, seconds: float) -> None:
        """Until so long after the averaging began: nobody computes, and who is killed loses what it had then."""
        until = pause.began + seconds
        while self._events[self._next][0] <= until and not self._over:
            _, kind, who = self._events[self._next]
            self._next += 1
            if kind == _JOIN:
                pause.joining[who] = None
            elif kind == _MARK:
                self._mark(pause.began)
            elif who in pause.joining:
                del pause.joining[who]
            elif self._killed[who]:
                self._tally.wasted += self._adding.leave(who, pause.began)
                pause.killed += 1
            else:
                pause.leaving.append(who)
        self._now = until

    def _mark(self, computed_until: float) -> None:
        self.marks.append(replace(self._tally, in_flight=self._adding.total(computed_until)))


@final
class _Pause:
    """An averaging: who came, who wants to leave when it is over, how many were killed."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.joining: dict[int, None] = {}
        self.leaving: list[int] = []
        self.killed = 0


def _events(sessions: Sessions, window: tuple[float, float]) -> list[tuple[float, int, int]]:
    """(seconds, kind, who) in order; the last never comes. Who leaves before it has the state is never there."""
    there = np.flatnonzero(sessions.counts < sessions.leaves)
    times = np.concatenate([sessions.counts[there], sessions.leaves[there], window, [math.inf]])
    kinds = np.repeat([_JOIN, _LEAVE, _MARK], [len(there), len(there), 3])
    whose = np.concatenate([there, there, [-1, -1, -1]])
    order = np.argsort(times, kind="stable")
    return list(zip(times[order].tolist(), kinds[order].tolist(), whose[order].tolist(), strict=True))
