"""Training learns, can be repeated to the last digit, and resumes as if never cut off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from afterclick.serving.cli import main
from afterclick.serving.errors import ConfigError, ContractError
from afterclick.serving.manifest import ItemRow
from afterclick.training.data import I64, Sequences, build_log, split
from afterclick.training.fit import Fitted, fit, recency_weights
from afterclick.training.losses import Candidates, Drawn, Scored, next_item_loss
from afterclick.training.model import Recommender, Steps
from afterclick.training.settings import TrainingSettings, training_settings
from afterclick.training.text import content_of
from afterclick.training.warm import load_weights, save_weights
from tests.unit.training.worlds import columns, quick, ring

HEADS = ("click", "purchase")


def run(settings: TrainingSettings, **given: object) -> Fitted:
    torch.set_num_threads(1)
    log = build_log(ring(), history=50)
    train, held = split(log.sequences, 0.1, "sequences")
    return fit(train, held, len(log.item_ids), settings, **given)  # type: ignore[arg-type]


def losses(fitted: Fitted) -> list[float]:
    return [epoch.loss for epoch in fitted.curve]


@pytest.mark.parametrize(
    ("cell", "loss"),
    [
        ("lstm", "cosine"),
        ("lstm", "softmax"),
        ("lstm", "bpr-max"),
        ("lstm", "bce"),
        ("gru", "cosine"),
        ("rnn", "cosine"),
        ("attention", "cosine"),
    ],
)
def test_it_learns_what_comes_next(cell: str, loss: str) -> None:
    """Nine of ten clicks are the item after the last: 0.9 · 11/12 ≥ 0.7 can be had at rank 1."""
    fitted = run(quick(cell=cell, loss=loss, epochs=8, dropout=0.1, dropout_hidden=0.0))

    assert fitted.curve[-1].loss < 0.7 * fitted.curve[0].loss
    assert fitted.validation["hit_rate_1"] > 0.5


def test_a_masked_warm_up_is_learnt_from() -> None:
    """Before any next item was asked for, the neighbours of hidden items have told of the order."""
    warm = run(quick(epochs=4, masked_epochs=4, dropout=0.1))
    mixed = run(quick(epochs=6, masked_epochs=2, dropout=0.1))

    assert warm.curve[-1].loss < 0.9 * warm.curve[0].loss
    assert mixed.validation["hit_rate_1"] > 0.5


def test_a_masked_warm_up_of_short_sequences_does_no_harm() -> None:
    """Of four clicks little can be hidden: with batches as small as the others it ended at 0.17."""
    log = build_log(ring(num_users=500, length=4, num_items=400), history=50)
    train, held = split(log.sequences, 0.1, "sequences")
    settings = quick(epochs=4, masked_epochs=1, dropout=0.1, batch_events=32, learning_rate=0.05)
    fitted = fit(train, held, len(log.item_ids), settings)

    assert fitted.validation["hit_rate_20"] > 0.5


def test_attention_to_the_past_learns_with_the_rest() -> None:
    """Its values start at zero and must leave it; evaluation sees the same past as training."""
    fitted = run(quick(epochs=6, dropout=0.1, past=4))

    assert fitted.validation["hit_rate_1"] > 0.5
    assert fitted.model.attend is not None
    assert float(fitted.model.attend.value.weight.detach().abs().max()) > 0.01


def test_what_is_bought_next_is_a_task_of_its_own() -> None:
    """Whoever clicks around the ring buys its item 0 alone: the purchase head must say so."""
    rng = np.random.default_rng(0)
    clicks = []
    for user in range(80):
        item = int(rng.integers(1, 12))
        for step in range(10):
            name, event = ("i000", "purchase") if step in (4, 9) else (f"i{item:03d}", "click")
            clicks.append((f"u{user}", name, 1_700_000_000_000 + user * 60_000 + step, event))
            item = item % 11 + 1
    log = build_log(columns(*clicks), history=50)
    torch.set_num_threads(1)
    settings = quick(epochs=6, dropout=0.1, purchase_weight=1.0)

    model = fit(log.sequences, None, len(log.item_ids), settings).model
    item_TB = torch.from_numpy(log.sequences.item_P.reshape(-1, 10)[:, :3].T.copy())
    steps = Steps(item_TB, torch.full_like(item_TB, 2), *[torch.zeros_like(item_TB)] * 2)
    with torch.no_grad():
        h_BH = model.hidden(model.step_vectors(item_TB.reshape(-1)).view(3, -1, 16), steps)[-1]
        scores = {h: model.query(h_BH, head=h) @ model.scan_vectors()[:, :-1].T for h in HEADS}
    best = {head: (found + model.bias).argmax(1) for head, found in scores.items()}

    assert (best["purchase"] == 0).all()
    assert (best["click"] != 0).any()


def test_half_precision_learns_the_same_ring() -> None:
    """What a CPU with AMX does by itself; here it is only slow."""
    half, full = (run(quick(epochs=6, dropout=0.1, precision=p)) for p in ("bf16", "fp32"))

    assert losses(half) != losses(full)
    assert half.validation["hit_rate_1"] == pytest.approx(full.validation["hit_rate_1"], abs=0.1)


def test_two_processes_learn_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same global batch, same masks, gradients added up: torchrun changes the speed alone.

    Tolerance: sums in another order differ by 1e-7 each, some thousand times as much after some
    hundred steps; a forgotten gradient moves the first epoch's loss by percents.
    """
    clicks = tmp_path / "clicks.csv"
    world = ring(60)
    rows = zip(world.user, world.item, world.time_ms, strict=True)
    clicks.write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    arguments = ["train", f"--clicks={clicks}", "--json", "--progress=none", "--threads=1"]
    arguments += ["--units=16", "--dim=16", "--epochs=3", "--batch-events=64"]
    monkeypatch.setenv("AFTERCLICK_SERVING__RELEASES", str(tmp_path / "one"))
    assert main(arguments) == 0
    one = json.loads(capsys.readouterr().out)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    done = subprocess.run(
        [*launch, "--nproc-per-node=2", f"{Path(sys.executable).parent}/afterclick", *arguments],
        env={**os.environ, "AFTERCLICK_SERVING__RELEASES": str(tmp_path / "two")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(done.stdout)
    curves = [[epoch["loss"] for epoch in outcome["curve"]] for outcome in (one, two)]

    assert one["publication"] == two["publication"] == 1
    assert len(curves[0]) == 4
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)
    assert curves[1][0] == pytest.approx(curves[0][0], rel=1e-4)


def test_a_seed_names_the_loss_curve() -> None:
    """Same seed, same curve, bit by bit; another seed, another one."""
    first, again, other = run(quick(epochs=2)), run(quick(epochs=2)), run(quick(epochs=2, seed=1))

    assert losses(first) == losses(again)
    assert losses(first) != losses(other)


@pytest.mark.parametrize("sampled", [False, True], ids=["whole", "sampled"])
def test_four_epochs_are_two_and_a_resumed_two(tmp_path: Path, sampled: bool) -> None:
    """A crash costs the epoch it fell in and nothing else."""
    settings = quick(softmax_items=16 if sampled else 4096)
    checkpoint = tmp_path / "last.pt"

    whole = run(settings)
    run(settings, checkpoint=checkpoint, until_epoch=2)
    resumed = run(settings, checkpoint=checkpoint, resume=True)

    assert losses(resumed) == losses(whole)
    assert [e.mrr_20 for e in resumed.curve] == [e.mrr_20 for e in whole.curve]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_a_constant_rate_may_be_given_more_epochs(tmp_path: Path) -> None:
    """Its schedule does not know where it ends."""
    checkpoint = tmp_path / "last.pt"

    whole = run(quick(rate_schedule="constant"))
    run(quick(rate_schedule="constant", epochs=2), checkpoint=checkpoint)
    more = run(quick(rate_schedule="constant"), checkpoint=checkpoint, resume=True)

    assert losses(more) == losses(whole)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """Half of one run and half of another is neither."""
    checkpoint = tmp_path / "last.pt"
    run(quick(), checkpoint=checkpoint, until_epoch=1)

    with pytest.raises(ConfigError, match="other settings or other data"):
        run(quick(units=8), checkpoint=checkpoint, resume=True)
    checkpoint.write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be read"):
        run(quick(), checkpoint=checkpoint, resume=True)


def test_it_stops_when_validation_gets_no_better() -> None:
    """And keeps the best epoch's weights."""
    fitted = run(quick(epochs=30, patience=1, rate_schedule="constant", learning_rate=0.05))

    assert len(fitted.curve) == fitted.best_epoch + 1 < 30
    best = max(fitted.curve, key=lambda epoch: epoch.mrr_20 or 0)
    assert best.epoch == fitted.best_epoch


def test_the_last_passes_learn_from_everything_and_leave_the_figures_alone() -> None:
    """The newest clicks are in the release, but never in the validation figures."""
    log = build_log(ring(), history=50)
    without = run(quick(epochs=2))
    fitted = run(quick(epochs=2), everything=log.sequences)

    assert [epoch.final for epoch in fitted.curve] == [False, False, True]
    assert fitted.validation == without.validation
    assert not torch.equal(fitted.model.bias, without.model.bias)


def test_training_once_more_is_a_run_of_its_own_over_everything() -> None:
    """It repeats what led to the best epoch, schedule included, on all data; figures stay."""
    log = build_log(ring(), history=50)
    settings = quick(epochs=3, retrain="on")

    without = run(quick(epochs=3))
    again = run(settings, everything=log.sequences)
    whole = fit(log.sequences, None, len(log.item_ids), settings)

    assert (quick(epochs=3, final_epochs=0).all_epochs, settings.all_epochs) == (0, 3)
    finals = [epoch.loss for epoch in again.curve if epoch.final]
    assert len(finals) == again.best_epoch
    assert again.validation == without.validation
    # Other draws of the same first epoch.
    assert finals[0] == pytest.approx(whole.curve[0].loss, rel=0.05)
    assert finals[-1] == pytest.approx(whole.curve[len(finals) - 1].loss, rel=0.05)
    assert not torch.equal(again.model.bias, without.model.bias)
    assert torch.equal(again.validation_state["bias"], without.validation_state["bias"])


def test_nothing_to_learn_from_is_said() -> None:
    """One click per user has no next one."""
    one = np.zeros(1, np.int64)
    single = Sequences(np.array([0, 1]), one, one, one, None)

    with pytest.raises(ContractError, match="two clicks"):
        fit(single, None, 1, quick())


def scored(model: Recommender, h_XH: torch.Tensor, target_X: I64, drawn: Drawn) -> Scored:
    """Queries of hidden states against the drawn items."""
    vectors = model.vectors(model.rows(torch.from_numpy(drawn.item_C)))
    return Scored(
        model.query(h_XH),
        vectors.item_XD,
        vectors.bias_X,
        torch.from_numpy(np.searchsorted(drawn.item_C, target_X)),
        torch.from_numpy(drawn.log_inclusion_C),
        model.num_items,
    )


def test_sampled_loss_estimates_the_whole_one() -> None:
    """On average over draws, the corrected sample gives the loss of the whole catalogue.

    Tolerance: 5 %, because the logarithm of a fair estimate lies below the true one's (3 % here,
    measured); without the correction the same sample is off by more than twice that.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    settings = quick(dropout_hidden=0.0)
    model = Recommender(400, settings).eval()
    count_N = rng.integers(1, 9, 400)
    target_X = rng.choice(400, 32, p=count_N / count_N.sum())
    h_XH = torch.randn(32, 16)

    def loss(drawn: Drawn) -> float:
        with torch.no_grad():
            return next_item_loss(scored(model, h_XH, target_X, drawn), settings).item()

    exact = loss(Candidates(count_N, 4096).draw(target_X, rng))
    part = Candidates(count_N, 64)
    drawn = [part.draw(target_X, rng) for _ in range(200)]
    sampled = [loss(one) for one in drawn]

    assert max(len(one.item_C) for one in drawn) < 100
    bare = [one._replace(log_inclusion_C=np.zeros_like(one.log_inclusion_C)) for one in drawn]
    naive = [loss(one) for one in bare]
    assert np.mean(sampled) == pytest.approx(exact, rel=0.05)
    assert exact - np.mean(naive) > 2 * 0.05 * exact


def test_cross_entropy_has_the_value_and_the_gradients_of_torchs_own() -> None:
    """Its scores are overwritten by their gradient; weights, bias and correction included."""
    torch.manual_seed(0)
    leaves = [torch.randn(7, 5), torch.randn(30, 5), torch.randn(30)]
    column_X, log_C = torch.randint(0, 30, (7,)), -torch.rand(30)
    weight_X = torch.rand(7)
    found, expected = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))

    ours = next_item_loss(Scored(*found, column_X, log_C, 30, weight_X), quick())
    ours.backward()
    query_XD, item_CD, bias_C = expected
    score_XC = query_XD @ item_CD.T + bias_C - log_C
    score_XC = score_XC + log_C * torch.nn.functional.one_hot(column_X, 30)
    loss_X = torch.nn.functional.cross_entropy(score_XC, column_X, reduction="none")
    (loss_X * weight_X).sum().backward()

    assert ours.item() == pytest.approx((loss_X * weight_X).sum().item(), rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_items_that_only_speak_are_found(tmp_path: Path) -> None:
    """Ring items are named by their neighbours; a never clicked one is scored by its name alone."""
    log = build_log(ring(), history=50)
    rows = [
        ItemRow(item_id=i, title=f"stop{int(i[1:])} stop{int(i[1:]) + 1}") for i in log.item_ids
    ]
    content = content_of(rows, 1 << 18)
    cold = log.sequences.item_P == 7
    train = log.sequences.select(~cold)
    held = split(log.sequences, 0.3, "sequences")[1]
    assert held is not None
    held = held._replace(target_P=held.target_P & (held.sequences.item_P == 7))

    torch.set_num_threads(1)
    fitted = fit(
        train, held, len(rows), quick(epochs=8, id_dropout=0.5, dropout=0.1), content=content
    )

    # Chance is half of 40 items; its two neighbours share a word with it each.
    assert fitted.validation["hit_rate_5"] > 0.5


def test_settings_come_from_environment_then_file_then_flags(tmp_path: Path) -> None:
    """The later one wins, and a typing error stops the run."""
    config = tmp_path / "training.toml"
    config.write_text('units = 32\ndim = 24\ncell = "gru"\n')

    found = training_settings(
        {"AFTERCLICK_TRAINING__UNITS": "8", "AFTERCLICK_TRAINING__SEED": "5"},
        config,
        {"dim": 48, "epochs": None},
    )

    assert (found.units, found.dim, found.cell, found.seed) == (32, 48, "gru", 5)
    config.write_text("unitz = 32\n")
    with pytest.raises(ConfigError, match="unitz"):
        training_settings({}, config, {})
    with pytest.raises(ConfigError, match="NO_SUCH"):
        training_settings({"AFTERCLICK_TRAINING__NO_SUCH": "1"}, None, {})


def test_states_of_halves_need_an_even_number_of_units() -> None:
    """A record counts words of four bytes; told before hours of training, not after."""
    assert training_settings({}, None, {"units": 15}).units == 15
    with pytest.raises(ConfigError, match="even number of units, got 15"):
        training_settings({}, None, {"units": 15, "state_dtype": "fp16"})


def test_newer_clicks_weigh_more_where_a_half_life_is_set() -> None:
    """An hour older counts half; the mean stays 1, so that the learning rate keeps its meaning."""
    weight_P = recency_weights(np.array([0, 3_600_000, 7_200_000]), half_life_h=1.0)

    assert weight_P is not None
    assert weight_P[2] == pytest.approx(2 * weight_P[1]) == pytest.approx(4 * weight_P[0])
    assert weight_P.mean() == pytest.approx(1)
    assert recency_weights(np.zeros(3, np.int64), half_life_h=0.0) is None
    assert losses(run(quick(recency_half_life_h=0.5))) != losses(run(quick()))


def test_a_run_may_begin_with_another_runs_weights(tmp_path: Path) -> None:
    """By item id: rows move, new items stay as chance made them, other shapes are refused."""
    before = run(quick()).model
    ids = [f"i{row:03d}" for row in range(before.num_items)]
    save_weights(tmp_path / "a.pt", before, ids)
    torch.manual_seed(9)
    after = Recommender(before.num_items + 1, quick())
    chance = after.items.weight[0].clone()

    assert load_weights(tmp_path / "a.pt", after, ["a-new-one", *ids]) == len(ids)

    assert torch.equal(after.items.weight[1:], before.items.weight)
    assert torch.equal(after.bias[1:], before.bias)
    assert torch.equal(after.items.weight[0], chance)
    assert torch.equal(after.out.weight, before.out.weight)
    with pytest.raises(ConfigError, match="warm_start = false"):
        load_weights(tmp_path / "a.pt", Recommender(5, quick(units=8)), ids[:5])
    (tmp_path / "a.pt").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_weights(tmp_path / "a.pt", after, ids)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_a_gpu_without_one_fails() -> None:
    """Never a silent fall back to the CPU."""
    with pytest.raises(ConfigError, match="no GPU"):
        run(msgspec.structs.replace(quick(), device="cuda"))


@pytest.mark.parametrize(
    ("num_events", "share", "expected"),
    [
        (5_000, 0.0, (128, "off")),
        (90_000, 0.049, (450, "off")),
        (90_000, 0.05, (450, "on")),
        (900_000, 0.0, (1024, "off")),
    ],
)
def test_the_data_decides_what_nobody_else_did(
    num_events: int, share: float, expected: tuple[int, str]
) -> None:
    """Short logs get their steps, and new items their passes; what was said stands."""
    settled = TrainingSettings().settled(num_events, share)

    assert (settled.batch_events, settled.retrain) == expected
    said = TrainingSettings(batch_events=64, retrain="off")
    assert said.settled(num_events, share) == said


def test_training_leaves_the_thread_s_arithmetic_as_it_was() -> None:
    """A worker's lists, made in the same process afterwards, keep a worker's bits."""
    tiny = np.float32(1e-40)
    run(quick(epochs=1))

    assert float(torch.tensor([tiny]) * 1.0) > 0.0
    assert tiny * np.float32(1.0) > 0.0
