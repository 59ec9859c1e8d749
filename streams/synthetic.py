"""A click world with known structure, for demos, load and tests of what a model can learn.

What can be learnt, and by whom:
- popularity is Zipf, over topics and within each: any counter sees it;
- a topic's items stand on a ring, and a reader often goes on to one of the next six: a
  first-order Markov chain sees it, for items it has seen often enough;
- each user walks the ring in one direction and returns to a few topics of theirs: only who
  remembers more than the last click sees that;
- topics of a user drift, and new items appear and are liked while they are fresh: what was learnt
  grows old.

The world runs in real time, so that its clicks and one's own stand in the same minutes. Same seed,
same world: only `random.Random.random` is drawn from, which Python keeps stable.
Knows no Kafka.
"""

import bisect
import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence

from afterclick.streams.events import Click, Item
from afterclick.streams.titles import TOPICS, title

TOPIC_EXPONENT = 0.7
ITEM_EXPONENT = 0.9
"""Zipf exponents: clicks of rank r go like r ** -exponent."""

FOLLOW, SAME_TOPIC, OWN_TOPIC, FRESH = 0.55, 0.10, 0.26, 0.04
"""How a reader comes to the next item: along the ring, by popularity within the topic, by
popularity in another topic of theirs, a fresh item of the topic; the rest by popularity anywhere.
"""

STEPS_MAX, STEP_EXPONENT = 6, 0.6
"""How far along the ring: 1 to 6 items, Zipf."""

USER_TOPICS = 3
DRIFT = 0.15
"""Chance that a session begins with one of the user's topics replaced."""
TURN = 0.03
"""Chance that a session begins with the other direction."""

SESSION_CLICKS = 8.0
CLICK_GAP_S = 5.0
SESSION_GAP_S = 150.0
"""Means of one session's clicks, of the pause between two, and of the pause between sessions."""

NEW_ITEM_EVERY_S = 6.0
FRESH_ITEMS = 4
"""A topic's newest items that count as fresh."""


class World:
    """Readers and a catalogue; every click moves it on, and it cannot go back.

    Args:
        seed: same seed, same world.
        num_users: at least 1; each clicks about every 23 s.
        num_items: items at the beginning, at least 4 per topic (160).
    """

    def __init__(self, seed: int, num_users: int, num_items: int) -> None:
        if num_users < 1 or num_items < 4 * len(TOPICS):
            raise ValueError(
                f"World: expected at least 1 user and {4 * len(TOPICS)} items, "
                f"got {num_users} and {num_items}"
            )
        self._random = random.Random(seed)
        self._now_s = 0.0
        self._origin_ms = 0
        """Unix milliseconds of the world's second 0."""
        self._topics = [_Topic() for _ in TOPICS]
        self._topic_of: list[int] = []
        self._published_s: list[float | None] = []
        self._titles: list[str] = []
        self._topic_pick = _Zipf(len(TOPICS), TOPIC_EXPONENT)
        self._steps = _Zipf(STEPS_MAX, STEP_EXPONENT)
        for number in range(num_items):
            self._add_item(number % len(TOPICS), None)
        for topic in self._topics:
            topic.settle(self._random)
        self._users = [self._new_user() for _ in range(num_users)]
        # (second, kind and number): kinds 0 and 1 make the order of equal seconds definite.
        cycle_s = SESSION_GAP_S + SESSION_CLICKS * CLICK_GAP_S
        self._due = [(self._random.random() * cycle_s, 0, user) for user in range(num_users)]
        self._due.append((NEW_ITEM_EVERY_S, 1, 0))
        heapq.heapify(self._due)

    @property
    def clicks_per_s(self) -> float:
        """Clicks per second of the world's time, about."""
        return (
            len(self._users) * SESSION_CLICKS / (SESSION_GAP_S + (SESSION_CLICKS - 1) * CLICK_GAP_S)
        )

    def items(self) -> list[Item]:
        """The catalogue as it stands now; new items join it as the world moves on."""
        return [self._item(number) for number in range(len(self._titles))]

    def ring(self, topic: int) -> list[str]:
        """Ids of a topic's items in the order in which readers walk along them."""
        return [_item_id(number) for number in self._topics[topic].ring]

    def past(self, num_events: int, end_ms: int) -> Iterator[Click]:
        """The first clicks of the world, oldest first; the last one happens at `end_ms`.

        Must be the first thing asked of a world but `items`; what is published meanwhile is found
        in `items` afterwards.
        """
        events: list[tuple[float, int, int]] = []
        while len(events) < num_events:
            at_s, user, item = self._step()
            if user >= 0:
                events.append((at_s, user, item))
        self._origin_ms = end_ms - round(self._now_s * 1000)
        return itertools.starmap(self._click, events)

    def live(self) -> Iterator[Click | Item]:
        """What happens from now on, without end: clicks, and new items as they are published."""
        while True:
            at_s, user, item = self._step()
            yield self._item(item) if user < 0 else self._click(at_s, user, item)

    def _step(self) -> tuple[float, int, int]:
        """Let one thing happen: (second, user, item); user -1 stands for a new item."""
        at_s, kind, user_number = heapq.heappop(self._due)
        self._now_s = at_s
        if kind == 1:
            topic = self._topic_pick.draw(self._random)
            number = self._add_item(topic, at_s)
            heapq.heappush(self._due, (at_s + self._exponential(NEW_ITEM_EVERY_S), 1, 0))
            return at_s, -1, number
        user = self._users[user_number]
        item = self._next_item(user)
        user.last = item
        user.topic = self._topic_of[item]
        user.left -= 1
        pause_s = self._exponential(CLICK_GAP_S)
        if user.left <= 0:
            pause_s = self._exponential(SESSION_GAP_S)
            self._begin_session(user)
        heapq.heappush(self._due, (at_s + pause_s, 0, user_number))
        return at_s, user_number, item

    def _next_item(self, user: "_User") -> int:
        topic = self._topics[user.topic]
        chance = self._random.random()
        if user.last < 0:
            return topic.popular(self._random)
        way = bisect.bisect_right(_WAYS, chance)
        if way == 0:
            step = 1 + self._steps.draw(self._random)
            return topic.along(user.last, user.direction * step)
        if way == 2:
            topic = self._topics[user.topics[int(self._random.random() * USER_TOPICS)]]
        elif way == 3 and topic.fresh:
            found = topic.fresh[int(self._random.random() * len(topic.fresh))]
            return found if found != user.last else topic.along(found, user.direction)
        elif way == 4:
            topic = self._topics[self._topic_pick.draw(self._random)]
        item = topic.popular(self._random)
        return item if item != user.last else topic.along(item, user.direction)

    def _new_user(self) -> "_User":
        user = _User([self._topic_pick.draw(self._random) for _ in range(USER_TOPICS)])
        user.direction = 1 if self._random.random() < 0.5 else -1
        self._begin_session(user)
        return user

    def _begin_session(self, user: "_User") -> None:
        if self._random.random() < DRIFT:
            slot = int(self._random.random() * USER_TOPICS)
            user.topics[slot] = self._topic_pick.draw(self._random)
        if self._random.random() < TURN:
            user.direction = -user.direction
        user.topic = user.topics[int(self._random.random() * USER_TOPICS)]
        user.last = -1
        # Geometric: as likely to end after every click.
        user.left = 1 + int(
            math.log(1.0 - self._random.random()) / math.log(1 - 1 / SESSION_CLICKS)
        )

    def _add_item(self, topic: int, at_s: float | None) -> int:
        number = len(self._titles)
        chinese = self._random.random() < 0.5
        self._titles.append(title(topic, len(self._topics[topic].ring), chinese=chinese))
        self._topic_of.append(topic)
        self._published_s.append(at_s)
        self._topics[topic].add(number, fresh=at_s is not None)
        return number

    def _item(self, number: int) -> Item:
        topic = TOPICS[self._topic_of[number]]
        at_s = self._published_s[number]
        return Item(
            item_id=_item_id(number),
            title=self._titles[number],
            categories=[topic[1]],
            published_ms=None if at_s is None else self._time_ms(at_s),
        )

    def _click(self, at_s: float, user: int, item: int) -> Click:
        return Click(
            user_id=f"u{user:05d}", item_id=_item_id(item), timestamp_ms=self._time_ms(at_s)
        )

    def _time_ms(self, at_s: float) -> int:
        return self._origin_ms + round(at_s * 1000)

    def _exponential(self, mean: float) -> float:
        return -mean * math.log(1.0 - self._random.random())


class _User:
    """One reader: where they are and where they like to be."""

    __slots__ = ("direction", "last", "left", "topic", "topics")

    def __init__(self, topics: list[int]) -> None:
        self.topics = topics
        self.topic = topics[0]
        self.direction = 1
        self.last = -1
        self.left = 1


class _Zipf:
    """Draws 0 … num-1, the lower the likelier."""

    def __init__(self, num: int, exponent: float) -> None:
        self._cumulated = list(itertools.accumulate((rank + 1) ** -exponent for rank in range(num)))

    def draw(self, rng: random.Random) -> int:
        return _pick(self._cumulated, rng)


class _Topic:
    """A topic's items: in order of popularity, on the ring, and the fresh ones."""

    def __init__(self) -> None:
        self.ring: list[int] = []
        self.fresh: list[int] = []
        self._by_rank: list[int] = []
        self._place: dict[int, int] = {}
        self._zipf = _Zipf(1, ITEM_EXPONENT)

    def settle(self, rng: random.Random) -> None:
        """Shuffle, so that neither ids nor neighbours on the ring tell how popular an item is."""
        for at in range(len(self.ring) - 1, 0, -1):
            other = int(rng.random() * (at + 1))
            self.ring[at], self.ring[other] = self.ring[other], self.ring[at]
        self._place = {item: at for at, item in enumerate(self.ring)}
        self._zipf = _Zipf(len(self._by_rank), ITEM_EXPONENT)

    def add(self, item: int, *, fresh: bool) -> None:
        """A new item joins the end of the ring and the tail of popularity."""
        self._place[item] = len(self.ring)
        self.ring.append(item)
        self._by_rank.append(item)
        if fresh:
            self.fresh = [*self.fresh, item][-FRESH_ITEMS:]

    def popular(self, rng: random.Random) -> int:
        """Draw by popularity among the items of the beginning."""
        return self._by_rank[self._zipf.draw(rng)]

    def along(self, item: int, steps: int) -> int:
        """Item so many steps further along the ring, backward if negative."""
        return self.ring[(self._place[item] + steps) % len(self.ring)]


def _item_id(number: int) -> str:
    return f"i{number:05d}"


def _pick(cumulated: Sequence[float], rng: random.Random) -> int:
    return bisect.bisect_right(cumulated, rng.random() * cumulated[-1], hi=len(cumulated) - 1)


_WAYS = tuple(itertools.accumulate((FOLLOW, SAME_TOPIC, OWN_TOPIC, FRESH)))
