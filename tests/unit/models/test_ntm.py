"""The neural Turing machine against the paper's equations, one row, one head and one slot at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stepladder.core.errors import UserError
from stepladder.models.addressing import EPS, TINY, content, rotate, sharpen
from stepladder.models.zoo import spec

FIELDS = {"inner": 5, "slots": 6, "slot_width": 4, "read_heads": 2, "write_heads": 2, "shift": 2}


def weights(*values: float) -> Tensor:
    return torch.tensor([[values]], dtype=torch.float64)


def test_a_shift_moves_weights_around_the_circle():
    w, one_up = weights(0.5, 0.3, 0.2, 0.0), weights(1.0, 0.0, 0.0)
    assert rotate(w, one_up).flatten().tolist() == [0.0, 0.5, 0.3, 0.2]
    assert rotate(w, one_up.flip(-1)).flatten().tolist() == [0.3, 0.2, 0.0, 0.5]
    mixed = rotate(w, weights(0.25, 0.5, 0.25))
    assert mixed.flatten().tolist() == pytest.approx([0.325, 0.325, 0.175, 0.175])
    far = rotate(weights(1.0, 0, 0, 0, 0, 0), weights(0.1, 0.2, 0.3, 0.15, 0.25))
    assert far.flatten().tolist() == [0.3, 0.2, 0.1, 0.0, 0.25, 0.15]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sharpening_is_a_power_and_survives_zeros(dtype):
    w = weights(0.6, 0.3, 0.1).to(dtype)
    want = torch.tensor([0.36, 0.09, 0.01]) / 0.46
    assert torch.allclose(sharpen(w, torch.full((1, 1), 2.0, dtype=dtype)).flatten().float(), want, atol=1e-6)
    assert torch.allclose(sharpen(w, torch.ones(1, 1, dtype=dtype)), w, atol=1e-6)
    w = weights(1.0, 0.0, 1e-20).to(dtype).requires_grad_()
    sharp = torch.full((1, 1), 50.0, dtype=dtype, requires_grad=True)
    found = sharpen(w, sharp)
    assert found.flatten().tolist() == [1.0, 0.0, 0.0]
    (found * torch.tensor([1.0, 2.0, 3.0], dtype=dtype)).sum().backward()
    assert bool(w.grad.isfinite().all())
    assert bool(sharp.grad.isfinite().all())


def test_content_is_a_softmax_of_cosines_and_safe_at_zero():
    memory = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    key = torch.tensor([[[5.0, 0.0], [0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    found = content(key, torch.tensor([[2.0, 7.0]], dtype=torch.float64), memory)
    e = [math.exp(2.0), 1.0, math.exp(-2.0), 1.0]
    assert found[0, 0].tolist() == pytest.approx([each / sum(e) for each in e], abs=1e-5)
    assert found[0, 1].tolist() == [0.25] * 4  # a key of zeros prefers nothing
    found.square().sum().backward()
    assert bool(memory.grad.isfinite().all())
    assert bool(key.grad.isfinite().all())


def by_hand(part, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and all weights of one document, as the paper writes it: numbers (1) to (9), slot by slot."""
    reads, heads, size = part.reads, part.reads + part.writes, part.inner
    slots, width = part.memory_NM.shape
    memory, w = part.memory_NM, part.start_QN.softmax(-1)
    h, c, r = torch.zeros(size), torch.zeros(size), torch.zeros(reads, width)
    h, c, r = h.double(), c.double(), r.double()
    outputs, seen = [], []
    for x in x_TD:
        gates = part.project.weight @ x + part.bias + part.recur.weight @ torch.cat((h, r.flatten()))
        i, f, o, g = gates.chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        told = part.tell.weight @ h + part.tell_bias
        gate, erase, add, strength, sharp, shift, key = told.split(part.sizes)
        erase, add = torch.sigmoid(erase).view(part.writes, width), torch.tanh(add).view(part.writes, width)
        found = []
        for head in range(heads):
            k, s = key.view(heads, width)[head], torch.softmax(shift.view(heads, -1)[head], 0)
            beta, gamma = torch.log1p(strength[head].exp()), 1 + torch.log1p(sharp[head].exp())
            mix = torch.sigmoid(gate[head])
            lengths = [(v.dot(v) + EPS).sqrt() for v in memory]
            scores = [beta * k.dot(v) / ((k.dot(k) + EPS).sqrt() * n) for v, n in zip(memory, lengths, strict=True)]
            mixed = mix * torch.stack(scores).softmax(0) + (1 - mix) * w[head]
            moved = []
            for slot in range(slots):
                terms = [mixed[(slot - by) % slots] * s[part.shift - by] for by in range(-part.shift, part.shift + 1)]
                moved.append(sum(terms))
            power = (torch.stack(moved) + TINY) ** gamma
            found.append(power / power.sum())
        w, rows = torch.stack(found), []
        for slot in range(slots):
            kept = torch.ones(width).double()
            for v in range(part.writes):
                kept = kept * (1 - w[reads + v, slot] * erase[v])
            rows.append(memory[slot] * kept + sum(w[reads + v, slot] * add[v] for v in range(part.writes)))
        memory = torch.stack(rows)
        r = torch.stack([sum(w[head, slot] * memory[slot] for slot in range(slots)) for head in range(reads)])
        outputs.append(part.out.weight @ torch.cat((h, r.flatten())))
        seen.append(w)
    return torch.stack(outputs), torch.stack(seen)


@pytest.mark.parametrize("scan", ["naive", "fused"])
def test_the_machine_is_the_papers(scan):
    torch.manual_seed(0)
    model = spec("ntm", width=8, depth=1, scan=scan, **FIELDS).build(11).double()
    part, seen = model.core.core.parts[0].part, {}
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    part.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out[0], state=out[1]))
    trace = model(torch.randint(0, 11, (2, 7)), trace=True).trace
    for row in range(2):
        y, w = by_hand(part, seen["x"][row])
        torch.testing.assert_close(seen["y"][row], y, rtol=0, atol=1e-12)
        torch.testing.assert_close(trace["ntm0.read"][row], w[:, :2].detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(trace["ntm0.write"][row], w[:, 2:].detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(seen["state"].w_BQN[row], w[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scan", ["naive", "fused"])
def test_what_is_noted_are_weights_of_every_head_and_token(scan):
    torch.manual_seed(0)
    model = spec("ntm", width=8, depth=2, scan=scan, **FIELDS).build(11)
    model.core.core.parts[2].part.site = 1
    trace = model(torch.randint(0, 11, (3, 9)), trace=True).trace
    assert {name: each.shape for name, each in trace.items() if name.startswith("ntm")} == {
        f"ntm{site}.{kind}": (3, 9, 2, 6) for site in (0, 1) for kind in ("read", "write")
    }
    for kind in ("read", "write"):
        assert torch.allclose(trace[f"ntm0.{kind}"].sum(-1), torch.ones(3, 9, 2), atol=1e-5)
        assert not torch.equal(trace[f"ntm0.{kind}"], trace[f"ntm1.{kind}"])
        assert not trace[f"ntm0.{kind}"].requires_grad


def test_slots_stay_bounded_over_a_thousand_tokens():
    """What is added is at most 1 per number and head; erasing is what keeps sums small, so only a loose bound holds."""
    torch.manual_seed(0)
    model = spec("ntm", width=16, depth=1).build(11)
    with torch.no_grad():
        early = model(torch.randint(0, 11, (2, 40))).state
        late = model(torch.randint(0, 11, (2, 1000)), early).state
    assert bool(late.core[0].memory_BNM.isfinite().all())
    assert float(late.core[0].memory_BNM.abs().max()) < 5


def test_more_shifts_than_slots_are_refused():
    with pytest.raises(UserError, match="need 7 slots; there are 6"):
        spec("ntm", slots=6, shift=3).build(11)
