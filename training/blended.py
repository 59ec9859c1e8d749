"""The blend of a training run: which questions it is fitted on, frozen or walked, and who answers.

Fits by `blending`, publishes nothing.
"""

import copy
import logging
from collections.abc import Iterator

import numpy as np

from afterclick.serving.errors import ConfigError, ContractError
from afterclick.serving.memory import Memory, memory_of
from afterclick.serving.settings import ServingSettings
from afterclick.training.blending import PREDICTIONS_MIN, Stage, fit_blend
from afterclick.training.blending import Fitted as FittedBlend
from afterclick.training.data import Held, Sequences
from afterclick.training.fit import Fitted
from afterclick.training.metrics import headlines
from afterclick.training.prepare import Data, clicked
from afterclick.training.progress import Teller
from afterclick.training.settings import TrainingSettings
from afterclick.training.sources import Source
from afterclick.training.walk import STAGES, World, knowledge_of, questions_of, walk

log = logging.getLogger(__name__)


def blend_of(
    source: Source,
    data: Data,
    fitted: Fitted,
    settings: TrainingSettings,
    serving: ServingSettings,
    teller: Teller,
) -> FittedBlend | None:
    """A blend fitted on what the model had not met; None where that is too little, or no wish.

    Raises:
        ConfigError: it was asked for and there are too few predictions.
    """
    held, asked = data.held, data.asked
    if settings.blend == "off":
        return None
    if held is None or asked is None or held.target_P.sum() < PREDICTIONS_MIN:
        if settings.blend == "on":
            raise ConfigError(
                f"blend: 'on' needs {PREDICTIONS_MIN} validation predictions, and there are "
                f"{0 if held is None else held.target_P.sum()}; raise `validation`, or set 'auto'"
            )
        log.info("no blend: fewer than %d validation predictions", PREDICTIONS_MIN)
        return None
    live = settings.blend_memory == "live" or (
        settings.blend_memory == "auto" and source.snapshot.source.startswith("kafka:")
    )
    # Of tails, what comes later in one sequence comes before the tail of another.
    live = live and data.train.time_P is not None and settings.split != "tails"
    world = World(data.everything, data.item_ids, source.items, data.content)
    if live:
        world = _begun(world, data, fitted)
        steps = walk(world, settings, history=serving.history, filter_seen=serving.filter_seen)
        try:
            stages = _told(steps.stages, teller)
            blend = fit_blend(stages, steps.num, settings, arrivals=steps.arrivals)
        except ContractError as error:
            if error.reason != "no-transitions" or settings.blend == "on":
                raise
            log.info("no blend: before its predictions no user has two clicks")
            return None
    else:
        question = _validation_question(world, data, asked, fitted, settings, serving)
        timed = question.asked.time_X is not None
        blend = fit_blend([question], len(question.asked.target_X), settings, timed=timed)
    teller.stage("blend", helps=blend.helps, without=blend.without, **headlines(blend.judged))
    return blend


def _told(stages: Iterator[Stage], teller: Teller) -> Iterator[Stage]:
    for number, stage in enumerate(stages, 1):
        teller.stage("walk", number=number, stages=STAGES, predictions=len(stage.asked.target_X))
        yield stage


def _begun(world: World, data: Data, fitted: Fitted) -> World:
    """With the best epoch's model, where the training part is all that came before the rest."""
    time_P, oldest_P = data.everything.time_P, data.train.time_P
    assert time_P is not None
    assert oldest_P is not None
    if not np.array_equal(np.sort(time_P)[: len(oldest_P)], np.sort(oldest_P)):
        return world
    learnt = copy.deepcopy(fitted.model)
    learnt.load_state_dict(fitted.validation_state)
    return world._replace(learnt=learnt, num_learnt=len(oldest_P))


def _validation_question(
    world: World,
    data: Data,
    asked: Held,
    fitted: Fitted,
    settings: TrainingSettings,
    serving: ServingSettings,
) -> Stage:
    """What was held out, asked of the best epoch's model and the memory of the training part."""
    model = fitted.model
    final = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(fitted.validation_state)
    memory = memory_for(data.train, data, settings)
    known_N = clicked(data.train, data)
    question, tables = questions_of(
        model, asked, known_N, world, memory, serving.history, serving.filter_seen
    )
    model.load_state_dict(final)
    return Stage(question, knowledge_of(memory, tables))


def memory_for(part: Sequences, data: Data, settings: TrainingSettings) -> Memory:
    """What a worker would remember of a part."""
    return memory_of(
        data.item_ids, part.start_S1, part.item_P, part.time_P, per_item=settings.blend_sessions
    )
