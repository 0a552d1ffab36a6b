"""Recorded training steps: what a replay reads, what may be recorded, and the same training.

On a CPU a double stands for the graph: its replay computes the recorded function again, from the
same tensors, and writes over the same results.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pydantic")

from spd_fast.ops import make_key
from spd_fast.train import step_graph
from spd_fast.train.step_graph import StepGraph
from tests.train.test_trainer import assert_same, batches, state, trainer

# Exact in float32, as a recorded step's learning rate is.
CONSTANT = {"lr": 2.0**-7, "lr_schedule": "constant", "minimality": {"p_final": None}}


class Recorder:
    """Counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function):
        self.recorded += 1
        losses, step = {}, SimpleNamespace()

        def replay() -> None:
            self.replayed += 1
            new_losses, new_step = function()
            losses.clear()
            losses.update(new_losses)
            step.__dict__.update(new_step.__dict__)

        return (losses, step), replay


def captured(recorder=None, **options):
    built = trainer(**{**CONSTANT, **options})
    built.capture(record=recorder or Recorder())
    return built


def test_a_recorded_training_is_the_same_training():
    recorder = Recorder()
    plain, ours = trainer(**CONSTANT), captured(recorder)
    plain.fit()
    ours.fit()
    assert_same(state(ours), state(plain))
    assert (recorder.recorded, recorder.replayed) == (1, 12 - 3)


def test_a_schedule_reaches_the_recorded_steps():
    changed = {**CONSTANT, "lr_schedule": "cosine"}
    plain, ours = trainer(**changed), captured(**changed)
    plain.fit()
    ours.fit()
    rates = [float(group["lr"]) for t in (plain, ours) for group in t.optimizer.param_groups]
    assert rates[0] == pytest.approx(rates[-1], rel=1e-6)
    for name, value in state(plain).items():
        torch.testing.assert_close(state(ours)[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_annealed_steps_run_unrecorded_and_the_others_do_not():
    # Of 24 steps those from 8 to 16 differ from each other in p and in a coefficient.
    annealed = {
        **CONSTANT, "steps": 24,
        "minimality": {"coeff": 1e-2, "coeff_final": 1e-3, "coeff_anneal_start": 1 / 3,
                       "coeff_anneal_end": 2 / 3, "p": 2.0, "p_final": 1.0,
                       "p_anneal_start": 1 / 3, "p_anneal_end": 2 / 3},
    }  # fmt: skip
    recorder = Recorder()
    plain, ours = trainer(**annealed), captured(recorder, **annealed)
    plain.fit()
    ours.fit()
    assert_same(state(ours), state(plain))
    # Steps 0-8 and 16-23 are alike, the first three of each as they are.
    assert (recorder.recorded, recorder.replayed) == (2, 6 + 5)


def test_a_recorded_step_reads_batch_key_and_rate_where_they_were(tmp_path):
    seen = []
    plain = trainer(**CONSTANT)
    update = plain.update

    def spy(batch, index=0):
        rates = [g["lr"] for g in plain.optimizer.param_groups]
        seen.append((batch, plain.graph.key, plain.graph.key.clone(), rates))
        return update(batch, index)

    plain.update = spy
    plain.capture(record=Recorder())
    plain.fit()
    replays = seen[3:]
    assert len({(b.data_ptr(), k.data_ptr(), r[0].data_ptr()) for b, k, _, r in replays}) == 1
    for step, (_, _, key, _) in enumerate(seen):
        assert torch.equal(key, make_key(plain.config.seed, step))
    assert torch.equal(replays[0][0], batches(11))


def test_a_resumed_recorded_training_is_the_uninterrupted_one(tmp_path):
    whole, half = captured(), captured(out=tmp_path, steps=12)
    whole.fit()
    half.config = half.config.model_copy(update={"steps": 6})
    half.fit()
    # The checkpoint is of a training of 12 steps.
    half.config = half.config.model_copy(update={"steps": 12})
    half.save()
    again = captured(out=tmp_path)
    assert again.resume()
    assert again.step == 6
    again.fit()
    assert_same(state(again), state(whole))


def test_a_checkpoint_belongs_to_the_same_run_recorded_or_not(tmp_path):
    recorded = captured(out=tmp_path)
    recorded.fit()
    assert trainer(out=tmp_path, **CONSTANT, cuda_graph=False).resume()


def assert_goes_on(ours, reason):
    """Without a graph, for that reason, and as if none had been tried."""
    plain = trainer(**CONSTANT)
    plain.fit()
    with pytest.warns(UserWarning, match=f"without a CUDA graph: {reason}"):
        ours.fit()
    assert_same(state(ours), state(plain))


def test_a_step_that_cannot_be_recorded_goes_on_as_it_is():
    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    assert_goes_on(captured(refuse), "operation not permitted")


def test_a_target_that_cannot_be_recorded_goes_on_as_it_is(monkeypatch):
    def recording(function):
        def refuse(*_):
            raise RuntimeError("cannot copy to the device")

        with monkeypatch.context() as patch:
            patch.setattr(type(ours.model.caller), "__call__", refuse)
            return function()

    ours = captured(recording)
    assert_goes_on(ours, ".*cannot copy to the device")


def test_what_kernels_find_by_trying_is_tried_before_a_recording(monkeypatch):
    order = []

    @contextmanager
    def recording(graph):
        order.append("recording")
        yield

    monkeypatch.setattr(step_graph, "before_recording", lambda: order.append("tried"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", recording)
    step_graph.record_cuda_graph(lambda: order.append("step"))
    assert order == ["tried", "recording", "step"]


def test_another_batch_size_is_recorded_anew():
    recorder = Recorder()
    ours = captured(recorder, batches=lambda step: batches(step)[: 9 if step < 8 else 6])
    ours.fit()
    assert recorder.recorded == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"batch_size": 8, "accumulation": 2}, "the forwards of one step"),
        ({"activation_checkpointing": True}, "the forwards of one step"),
        ({"losses": {"pgd_recon": {"coeff": 1, "pgd_steps": 3, "step_size": 0.1}}},
         "adversarial sources or routing"),
    ],
)  # fmt: skip
def test_what_differs_between_steps_is_found(changes, reason):
    assert trainer(**{**CONSTANT, **changes}).varies() == reason


def test_on_a_cpu_nothing_is_recorded():
    assert trainer(**CONSTANT).graph is None


def test_learning_rates_become_tensors_of_their_own():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [w]} for w in weights], lr=0.5)
    StepGraph(lambda batch, step: batch, optimizer, 0, torch.device("cpu"))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [float(r) for r in rates] == [0.5, 0.5]
    assert rates[0] is not rates[1]


# resid_mlp2-robust anneals from 0.6 to 0.7 of its steps: it is recorded before and after.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("experiment", "batch", "steps"), [("tms_5-2", 512, 12), ("resid_mlp2-robust", 64, 40)]
)
def test_a_replayed_training_is_bit_equal_to_the_launched_one(experiment, batch, steps):
    from bench.problems import step_trainer

    states = []
    for recorded in (True, False):
        built = step_trainer(experiment, "triton", device="cuda", batch=batch)
        built.config = built.config.model_copy(update={"steps": steps})
        assert built.graph is not None
        built.graph.usable = recorded
        for step in range(steps):
            built.train_step(step)
        # One that could not be recorded goes on launched, and would be compared with itself.
        assert built.graph.usable == recorded
        states.append(state(built))
    assert_same(*states)
