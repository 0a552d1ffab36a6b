"""Our AdamW against torch's, bit by bit."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from spd_fast._adamw import AdamW, adamw

SHAPES = [(5, 20), (20, 1, 16), (20,), ()]


def parameters():
    generator = torch.Generator().manual_seed(3)
    made = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    # Tied components: a transposed view of the first one, in a group of its own.
    return [made, [torch.nn.Parameter(made[0].detach().T)]]


def flat(groups):
    return [p for group in groups for p in group]


def torchs(groups, weight_decay=0.1):
    named = [{"params": group} for group in groups]
    return torch.optim.AdamW(named, lr=0.01, weight_decay=weight_decay, fused=True)


def descend(optimizer, groups, steps, missing=()):
    """Steps on gradients that are a function of the step; those of ``missing`` steps lack one."""
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(step)
        for index, p in enumerate(flat(groups)):
            grad = torch.randn(p.shape, generator=generator)
            if not (step in missing and index == 1):
                p.grad = grad
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        optimizer.step()


def assert_same(ours, theirs, groups, expected):
    for p, q in zip(flat(groups), flat(expected), strict=True):
        assert torch.equal(p, q)
    found, wanted = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert found.keys() == wanted.keys()
    for index, state in wanted.items():
        assert list(found[index]) == list(state)
        for name, value in state.items():
            other = found[index][name]
            assert torch.equal(other, value), (index, name)
            assert (other.dtype, other.stride()) == (value.dtype, value.stride())


@pytest.mark.parametrize("missing", [(), (0, 1), (2,), range(6)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_bits_and_the_state_are_torchs(missing, weight_decay):
    groups, expected = parameters(), parameters()
    ours, theirs = adamw(groups, 0.01, weight_decay), torchs(expected, weight_decay)
    assert isinstance(ours, AdamW)
    descend(ours, groups, range(6), missing)
    descend(theirs, expected, range(6), missing)
    assert_same(ours, theirs, groups, expected)


def test_it_continues_from_the_state_of_torchs():
    groups, expected = parameters(), parameters()
    missing = range(4)  # of one parameter: its moments begin later
    theirs = torchs(expected)
    descend(torchs(groups), groups, range(4), missing)
    descend(theirs, expected, range(4), missing)
    continued = adamw(groups, 0.01, 0.1)
    continued.load_state_dict(copy.deepcopy(theirs.state_dict()))
    descend(continued, groups, range(4, 7))
    descend(theirs, expected, range(4, 7))
    assert_same(continued, theirs, groups, expected)


def test_loading_forgets_what_was_there():
    groups = parameters()
    ours = adamw(groups, 0.01, 0.0)
    descend(ours, groups, range(2))
    ours.load_state_dict({"state": {}})
    assert ours.state_dict() == {"state": {}}


def test_a_learning_rate_may_be_a_tensor():
    groups, expected = parameters(), parameters()
    for lr, found in ((0.25, expected), (torch.tensor(0.25), groups)):
        optimizer = adamw(found, 0.01, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in flat(found):
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p, q in zip(flat(groups), flat(expected), strict=True):
        assert torch.equal(p, q)


def test_a_step_does_not_import_the_compiler():
    program = (
        "import sys, torch\n"
        "from spd_fast._adamw import adamw\n"
        "p = torch.nn.Parameter(torch.ones(2))\n"
        "optimizer = adamw([[p]], 0.1, 0.0)\n"
        "p.grad = torch.ones(2)\n"
        "optimizer.step(), optimizer.zero_grad()\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_small_update_takes_one_thread_and_leaves_torchs_threads_alone(monkeypatch):
    seen = []
    update = torch._fused_adamw_

    def observed(*args, **options):
        seen.append(torch.get_num_threads())
        update(*args, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", observed)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for size in (10, 2**16):
            p = torch.nn.Parameter(torch.zeros(size))
            optimizer = adamw([[p]], 0.01, 0.0)
            p.grad = torch.ones(size)
            optimizer.step()
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]
