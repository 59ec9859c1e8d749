"""Thousands of bad records through a real broker and a running worker."""

import random
from contextlib import closing

import kafka
import pytest

from afterclick.serving.errors import ContractError
from afterclick.streams.admin import client_config
from afterclick.streams.events import decode_click
from afterclick.streams.local import readiness
from tests.fuzz.poison import Sent, stream
from tests.service.stage import Stage

pytestmark = [pytest.mark.service, pytest.mark.anybroker]

NUM = 3000


def reason_of(sent: Sent) -> str:
    """Why a record becomes a letter; empty for one that is folded."""
    try:
        decode_click(sent.record.key, sent.record.value, offset=0, record_ms=0)
    except ContractError as error:
        return error.reason
    return ""


def test_a_worker_lives_through_poison_and_every_bad_record_is_a_letter(stage: Stage) -> None:
    """What the fold promises on its own must hold with a broker's record format, Faust, and a
    dead-letter producer in between: no letter missing, none too many, good clicks as in a replay.
    """
    stage.publish("r1", seed=1)
    # kafka-python sends no record without key and value.
    sent = [
        one
        for one in stream(random.Random(11), NUM)
        if (one.record.key, one.record.value) != (None, None)
    ]
    with stage.worker() as worker:
        with closing(kafka.KafkaProducer(**client_config(stage.streams), acks="all")) as producer:
            for one in sent:
                record = one.record
                producer.send(
                    stage.streams.clicks_topic,
                    key=record.key,
                    value=record.value,
                    headers=list(record.headers),
                    timestamp_ms=max(record.timestamp_ms, 0),
                )
            producer.flush(timeout=60)
        stage.wait_folded()
        assert worker.process.running
        assert readiness(worker.port)[0]
    bad = sorted((reason_of(one), one.record.value or b"") for one in sent if reason_of(one))
    letters = [
        (letter["afterclick.reason"].decode(), letter["value"]) for letter in stage.dead_letters()
    ]
    assert sorted(letters) == bad
    assert len(bad) > NUM / 3
    report = stage.verify()
    assert report.first_difference is None
    assert report.clicks > NUM / 4
