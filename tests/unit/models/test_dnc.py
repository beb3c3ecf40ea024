"""The differentiable neural computer against the paper's equations, and its parts against cases worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepladder.models.addressing import EPS, TINY
from stepladder.models.kernels.dnc_forms import Allot
from stepladder.models.mixers.dnc import allocation, link
from stepladder.models.zoo import spec

FIELDS = {"inner": 5, "slots": 6, "slot_width": 4, "read_heads": 2}


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_free_slots_are_given_out_by_usage():
    found = allocation(row(0.3, 0.1, 0.9))[0].tolist()
    assert found == pytest.approx([0.7 * 0.1, 0.9, 0.1 * 0.1 * 0.3])
    assert allocation(row(1.0, 1.0, 1.0))[0].tolist() == [0.0, 0.0, 0.0]  # nothing is free
    assert float(allocation(row(0.2, 0.5, 0.99, 0.7)).sum()) <= 1


def test_of_slots_used_equally_the_first_one_is_given():
    assert allocation(row(0.0, 0.0, 0.0))[0].tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert allocation(row(0.5, 0.2, 0.5, 0.2))[0].tolist() == pytest.approx([0.5 * 0.04, 0.8, 0.5 * 0.02, 0.8 * 0.2])


def test_allocation_has_the_slope_of_its_value():
    """Away from ties, where the order is constant; and at usages of 0, where a quotient of products would be 0 / 0."""
    usage = torch.tensor([[0.31, 0.12, 0.9, 0.55], [0.7, 0.2, 1e-9, 0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(allocation, usage, eps=1e-10, atol=1e-5)
    zeros = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((allocation(zeros) * row(5.0, 7.0, 11.0, 13.0)).sum(), zeros)
    assert slope[0].tolist() == pytest.approx([7.0 - 5.0, 0.0, 0.0, 0.0])


def test_the_written_out_slope_of_the_allocation_is_that_of_autograd():
    usage = torch.rand(5, 9, dtype=torch.float64)
    usage[0], usage[1, :4] = 0.0, 0.25
    usage.requires_grad_()
    weights = torch.randn(5, 9, dtype=torch.float64)
    (want,) = torch.autograd.grad((allocation(usage) * weights).sum(), usage)
    allot = Allot(usage.detach())
    torch.testing.assert_close(allot.forward(usage.detach()), allocation(usage.detach()), rtol=0, atol=1e-14)
    ready = [each[0] for each in allot.ready(usage.detach()[None])]
    torch.testing.assert_close(allot.back(weights, ready), want, rtol=1e-12, atol=1e-12)


def test_links_lead_from_slot_to_slot_in_the_order_of_writing():
    links, recent = torch.zeros(1, 4, 4, dtype=torch.float64), row(0, 0, 0, 0)
    for slot in (0, 2, 1):
        write = row(*(float(slot == each) for each in range(4)))
        links = link(links, write, recent)
        recent = (1 - write.sum(-1, keepdim=True)) * recent + write
    at = {slot: row(*(float(slot == each) for each in range(4)))[:, None] for slot in range(4)}
    assert torch.equal(at[0] @ links.mT, at[2])  # what came after slot 0
    assert torch.equal(at[2] @ links.mT, at[1])
    assert torch.equal(at[1] @ links, at[2])  # what came before slot 1
    assert not bool((at[3] @ links.mT).any())  # never written
    assert recent.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    links = link(links, row(1, 0, 0, 0), recent)  # written again: what it led to is forgotten
    assert torch.equal(at[1] @ links.mT, at[0])
    assert not bool((at[0] @ links.mT).any())
    assert not bool(links.diagonal(dim1=1, dim2=2).any())


def by_hand(part, x_TD: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Outputs, and weights and usage, of one document as the paper's Methods write it, slot by slot."""
    reads, (slots, width) = part.reads, part.memory_NM.shape

    def cosine(u: Tensor, v: Tensor) -> Tensor:
        return u.dot(v) / ((u.dot(u) + EPS).sqrt() * (v.dot(v) + EPS).sqrt())

    def by_content(memory: Tensor, key: Tensor, strength: Tensor) -> Tensor:
        return torch.stack([cosine(key, slot) * strength for slot in memory]).softmax(0)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    memory, usage, write, recent, links = part.memory_NM, zeros(slots), zeros(slots), zeros(slots), zeros(slots, slots)
    h, c, r, read = zeros(part.inner), zeros(part.inner), zeros(reads, width), zeros(reads, slots)
    outputs, seen = [], []
    for x in x_TD:
        gates = part.project.weight @ x + part.bias + part.recur.weight @ torch.cat((h, r.flatten()))
        i, f, o, g = gates.chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        told = (part.tell.weight @ h + part.tell_bias).split(part.sizes)
        free, allocate, gate, erase = (torch.sigmoid(each) for each in told[:4])
        strengths, modes = 1 + torch.log1p(told[4].exp()), told[5].view(reads, 3).softmax(-1)
        keys, vector = told[6].view(1 + reads, width), told[7]

        kept = torch.stack([torch.prod(1 - free * read[:, slot]) for slot in range(slots)])
        usage = (usage + write - usage * write) * kept
        free_slots, product = zeros(slots).clone(), torch.ones((), dtype=torch.float64)
        order = sorted(range(slots), key=lambda slot: float(usage[slot].detach()))
        parts = {}
        for slot in order:
            parts[slot] = (1 - usage[slot]) * product
            product = product * (usage[slot] + TINY)
        free_slots = torch.stack([parts[slot] for slot in range(slots)])
        write = gate * (allocate * free_slots + (1 - allocate) * by_content(memory, keys[0], strengths[0]))
        memory = torch.stack([memory[n] * (1 - write[n] * erase) + write[n] * vector for n in range(slots)])
        links = torch.stack(
            [
                torch.stack(
                    [
                        (1 - write[a] - write[b]) * links[a, b] + write[a] * recent[b] if a != b else 0 * write[a]
                        for b in range(slots)
                    ]
                )
                for a in range(slots)
            ]
        )
        recent = (1 - write.sum()) * recent + write
        ways = [
            (links.T @ read[n], by_content(memory, keys[1 + n], strengths[1 + n]), links @ read[n])
            for n in range(reads)
        ]
        read = torch.stack([sum(modes[n, k] * ways[n][k] for k in range(3)) for n in range(reads)])
        r = read @ memory
        outputs.append(part.out.weight @ torch.cat((h, r.flatten())))
        seen.append((read, write, usage))
    return torch.stack(outputs), seen


@pytest.mark.parametrize("scan", ["naive", "fused"])
def test_the_machine_is_the_papers(scan):
    torch.manual_seed(0)
    model = spec("dnc", width=8, depth=1, scan=scan, **FIELDS).build(11).double()
    part, found = model.core.core.parts[0].part, {}
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    part.register_forward_hook(lambda _, args, out: found.update(x=args[0], y=out[0]))
    trace = model(torch.randint(0, 11, (2, 9)), trace=True).trace
    for each in range(2):
        y, seen = by_hand(part, found["x"][each])
        torch.testing.assert_close(found["y"][each], y, rtol=0, atol=1e-12)
        for place, name in enumerate(("read", "write", "usage")):
            want = torch.stack([token[place] for token in seen]).detach()
            torch.testing.assert_close(trace[f"dnc0.{name}"][each].squeeze(1), want, rtol=0, atol=1e-12)


def test_weights_and_usage_stay_in_their_ranges():
    torch.manual_seed(0)
    model = spec("dnc", width=16, depth=1).build(11)
    with torch.no_grad():
        out = model(torch.randint(0, 11, (2, 300)), trace=True)
    shapes = {"read": (2, 300, 2, 64), "write": (2, 300, 1, 64), "usage": (2, 300, 64)}
    assert {name: out.trace[f"dnc0.{name}"].shape for name in shapes} == shapes
    for name in shapes:
        assert float(out.trace[f"dnc0.{name}"].min()) >= 0
        assert float(out.trace[f"dnc0.{name}"].max()) <= 1
    for name in ("read", "write"):
        assert float(out.trace[f"dnc0.{name}"].sum(-1).max()) <= 1 + 1e-5
    links = out.state.core[0].links_BIN
    assert float(torch.stack((links.sum(1), links.sum(2))).max()) <= 1 + 1e-5
    assert float(out.trace["dnc0.usage"][:, -1].max()) > 0.5  # slots do get used


def test_a_slot_that_is_read_and_freed_can_be_used_again():
    """Usage of what read heads freed falls to 0, all other usage stays."""
    torch.manual_seed(0)
    for free, falls in ((-60.0, False), (60.0, True)):
        model = spec("dnc", width=8, depth=1, **FIELDS).build(11).double()
        part = model.core.core.parts[0].part
        with torch.no_grad():
            part.tell_bias[:2] = free
        ids = torch.randint(0, 11, (1, 1))
        before = model(ids).state
        state = before.core[0]
        for leaf, value in ((state.usage_BN, 0.8), (state.write_BN, 0.0), (state.read_BRN, 0.0)):
            leaf.data.fill_(value)
        state.read_BRN.data[:, :, 3] = 1.0
        usage = model(ids, before, trace=True).trace["dnc0.usage"][0, 0]
        assert usage[[0, 1, 2, 4, 5]].tolist() == pytest.approx([0.8] * 5)
        assert float(usage[3]) == pytest.approx(0.0 if falls else 0.8)
