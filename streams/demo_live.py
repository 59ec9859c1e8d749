"""The demo live: clicks sent when they are due, each judged by the list that stood before it.

Starts no process; is handed the connections it uses.
"""

import time
from collections import deque
from typing import Any

from afterclick.serving.errors import UnavailableError
from afterclick.serving.reader import TopK
from afterclick.streams.demo_panel import ROWS, Moment, Show
from afterclick.streams.demo_source import DemoSource
from afterclick.streams.demo_trainer import Trainer
from afterclick.streams.events import Click, Item
from afterclick.streams.probe import Probe
from afterclick.streams.replay import Sender
from afterclick.streams.score import K, Score

SWAP_GRACE_S = 120.0
"""With `--seconds`, how much longer the demo may run until a re-exported release was swapped in."""

SHOW_EVERY_S = 0.25
WATCH_S = 15.0
"""How long one user is watched before another, who is clicking, takes their place."""
RATE_WINDOW_S = 5.0


class Live:
    """Sends live events when they are due, and judges the list that stood before each click."""

    def __init__(
        self,
        source: DemoSource,
        score: Score,
        sender: Sender,
        probe: Probe,
        reader: TopK,
        show: Show,
        trainer: Trainer,
    ) -> None:
        self._source, self._score, self._sender = source, score, sender
        self._probe, self._reader, self._show, self._trainer = probe, reader, show, trainer
        self._titles = {item.item_id: item.title or item.item_id for item in source.items}
        self._num_clicks = 0
        self._num_items = 0
        self._began_s = 0.0
        self._ended_s = 0.0
        self._sent_s: deque[float] = deque()
        self._clicks_of: dict[str, deque[tuple[str, bool]]] = {}
        self._watched = ""
        self._watch_until_s = 0.0
        self._shown_s = 0.0
        self._swaps = 0

    def run(self, seconds: float | None) -> None:
        """Until the source or the time is over, or for ever; see `SWAP_GRACE_S`."""
        self._began_s = self._ended_s = time.monotonic()
        for event in self._source.live:
            wait_until_s = self._began_s + self._due_s(event)
            while not self._over(seconds):
                self._refresh()
                left_s = wait_until_s - time.monotonic()
                if left_s <= 0:
                    break
                time.sleep(min(left_s, SHOW_EVERY_S))
            else:
                break
            if isinstance(event, Item):
                self._sender.send(event)
                self._titles[event.item_id] = event.title or event.item_id
                self._num_items += 1
            else:
                self._click(event)
        self._ended_s = time.monotonic()
        self._sender.flush()

    def summary(self) -> dict[str, Any]:
        """Fields of the last line."""
        seen, rates = self._probe.seen(), self._score.rates()
        took_s = max((self._ended_s or time.monotonic()) - self._began_s, 1e-9)
        return {
            "clicks": self._num_clicks,
            "clicks_per_s": round(self._num_clicks / took_s, 1),
            "latency_ms": {
                "p50": _rounded(seen.latency_ms_p50, 2),
                "p99": _rounded(seen.latency_ms_p99, 2),
            },
            "hit_rate_20": _rounded(rates["lists"].hit_rate_20, 4),
            "mrr_20": _rounded(rates["lists"].mrr_20, 4),
            "popularity_hit_rate_20": _rounded(rates["popularity"].hit_rate_20, 4),
            "popularity_mrr_20": _rounded(rates["popularity"].mrr_20, 4),
            "markov_hit_rate_20": _rounded(rates["markov"].hit_rate_20, 4),
            "markov_mrr_20": _rounded(rates["markov"].mrr_20, 4),
            "swaps": seen.swaps,
            "lists": seen.lists,
            "lists_unseen": seen.unseen + seen.waiting,
            "failed": self._sender.failed,
            "new_items": self._num_items,
        }

    def _due_s(self, event: Click | Item) -> float:
        if isinstance(event, Item):
            if self._source.pace.rate is not None:  # with the click before which it stands
                return self._num_clicks / self._source.pace.rate
            return self._source.pace.due_s(0, event.published_ms, self._source.first_ms)
        return self._source.pace.due_s(self._num_clicks, event.timestamp_ms, self._source.first_ms)

    def _click(self, click: Click) -> None:
        rank = 0
        if click.item_id:
            standing = self._reader.get(click.user_id, K).items
            time_ms = click.timestamp_ms or time.time_ns() // 1_000_000
            rank = self._score.observe(click.user_id, click.item_id, time_ms, standing)
        sent = self._probe.sending(click.user_id)
        self._sender.send(click, sent.placed)
        self._num_clicks += 1
        self._ended_s = sent.sent_s
        self._sent_s.append(sent.sent_s)
        own = self._clicks_of.setdefault(click.user_id, deque(maxlen=ROWS))
        own.appendleft((self._title(click.item_id), 1 <= rank <= K))
        if sent.sent_s >= self._watch_until_s and len(own) > 1:
            self._watched, self._watch_until_s = click.user_id, sent.sent_s + WATCH_S

    def _over(self, seconds: float | None) -> bool:
        if seconds is None:
            return False
        over_s = time.monotonic() - self._began_s - seconds
        return over_s >= 0 and (self._swaps > 0 or over_s >= SWAP_GRACE_S)

    def _refresh(self) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s < SHOW_EVERY_S:
            return
        self._shown_s = now_s
        for line in self._trainer.poll():
            self._show.training(line)
        if not self._trainer.running:
            raise UnavailableError(f"afterclick schedule ended; it said:\n{self._trainer.tail()}")
        while self._sent_s and self._sent_s[0] < now_s - RATE_WINDOW_S:
            self._sent_s.popleft()
        seen = self._probe.seen()
        if seen.swaps > self._swaps:
            self._show.note(
                f"swapped in while clicks go on: release {seen.release}, "
                f"publication {seen.publication}"
            )
        self._swaps = seen.swaps
        listed = self._reader.get(self._watched, ROWS).items if self._watched else []
        window_s = max(min(now_s - self._began_s, RATE_WINDOW_S), SHOW_EVERY_S)
        self._show.live(
            Moment(
                clicks=self._num_clicks,
                clicks_per_s=len(self._sent_s) / window_s,
                seen=seen,
                rates=self._score.rates(),
                trainer=self._trainer.status,
                user=self._watched,
                user_clicks=list(self._clicks_of.get(self._watched, ())),
                user_list=[self._title(item) for item in listed],
            )
        )

    def _title(self, item_id: str) -> str:
        return self._titles.get(item_id, item_id)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
