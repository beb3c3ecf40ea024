"""Memory as context and self-modifying memories against their pages, token by token, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepladder.models.base import Context, Sink
from stepladder.models.fast.fast_weights import recall, token_by_token
from stepladder.models.layers import rotate
from stepladder.models.mixers.context import MemoryAsContext
from stepladder.models.mixers.neural_memory import FastMemory
from stepladder.models.mixers.selfmod import KINDS, Memories, SelfModifying
from stepladder.models.noise import row_keys

WIDTH, HEADS, K, CHUNK, TOKENS = 8, 2, 4, 3, 11


def context(positions_BT: Tensor) -> Context:
    keys = row_keys(0, len(positions_BT), positions_BT.device)
    return Context(torch.zeros_like(positions_BT), positions_BT, True, None, keys, 0, False, Sink())


def stirred(part: torch.nn.Module) -> None:
    part.double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def convolved(conv: torch.nn.Module, x_TU: Tensor) -> Tensor:
    taps = conv.weight
    rows = [sum(taps[lag] * x_TU[t - lag] for lag in range(len(taps)) if lag <= t) for t in range(len(x_TU))]
    return F.silu(torch.stack(rows))


def both(part: torch.nn.Module, reference) -> None:
    """Row 0 is one document, row 1 is two."""
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    places = torch.arange(TOKENS).repeat(2, 1)
    places[1, 4:] -= 4
    got = part(x, None, context(places))[0]
    torch.testing.assert_close(got[0], reference(x[0]))
    torch.testing.assert_close(got[1, :4], reference(x[1, :4]))
    torch.testing.assert_close(got[1, 4:], reference(x[1, 4:]))


def test_self_modifying_memories_are_their_definition():
    torch.manual_seed(0)
    memories = Memories(HEADS, K, expand=2, rate=0.3, bound=1e9, horizon=0, chunk=CHUNK)
    part = SelfModifying(WIDTH, K, memories, 2, 1.0)
    stirred(part)

    def reference(x_TD: Tensor) -> Tensor:
        u, q, gate = (x_TD @ part.project.weight.mT).chunk(3, -1)
        u, found = convolved(part.conv, u), []
        now = [[w[m].detach().clone() for w in memories.first] for m in range(KINDS * HEADS)]
        for t in range(len(x_TD)):
            if t % CHUNK == 0:
                base = [[w.clone().requires_grad_() for w in ws] for ws in now]

            def at(kind: int, head: int, value: Tensor) -> Tensor:
                first, second = base[kind * HEADS + head]
                return value + second @ F.silu(first @ value)

            read = []
            for h in range(HEADS):
                own = u[t, h * K : (h + 1) * K]
                k, v, eta, alpha = (at(kind, h, own) for kind in range(4))
                k = k / k.norm()
                eta = 0.3 * (memories.told[0, h] @ eta + memories.bias[h]).sigmoid()
                alpha = (memories.told[1, h] @ alpha + memories.bias[HEADS + h]).sigmoid()
                asked = q[t, h * K : (h + 1) * K]
                read.append(at(4, h, asked / asked.norm()))
                for kind in range(KINDS):
                    loss = 0.5 * (at(kind, h, k.detach()) - at(kind, h, v).detach()).square().sum()
                    first, second = torch.autograd.grad(loss, base[kind * HEADS + h])
                    own_base = base[kind * HEADS + h][0].detach()
                    first = first + torch.outer(own_base @ k, k).detach()
                    weights = now[kind * HEADS + h]
                    for i, gradient in enumerate((first, second)):
                        weights[i] = (alpha * weights[i] - eta * gradient).detach()
            found.append(torch.cat([normed(each, part.norm.weight) for each in read]))
        return (torch.stack(found) * F.silu(gate)) @ part.out.weight.mT

    both(part, reference)


def test_memory_as_context_is_its_definition():
    torch.manual_seed(0)
    memory = FastMemory(
        WIDTH, HEADS, K, layers=2, expand=2, rate=0.5, momentum=True, forget=True, bound=4.0, horizon=0,
        scan="chunked", chunk=CHUNK,
    )  # fmt: skip
    part = MemoryAsContext(WIDTH, memory, conv=2, persistent=2, rope_base=100.0, gain=1.0)
    stirred(part)

    def heads(x_TD: Tensor) -> Tensor:
        return x_TD.unflatten(-1, (HEADS, K)).transpose(0, 1)[None]  # (1, H, T, K)

    def reference(x_TD: Tensor) -> Tensor:
        places = torch.arange(len(x_TD))[None]
        asked = F.normalize(heads(convolved(part.conv, x_TD @ part.query.weight.mT)), dim=-1)
        q, k, v = (heads(each) for each in (x_TD @ part.project.weight.mT).chunk(3, -1))
        q, k = rotate(q, places, 100.0), rotate(k, places, 100.0)
        state, found = memory.start(1, x_TD.device, torch.float64), []
        first = tuple(memory.first)
        for begin in range(0, len(x_TD), CHUNK):
            segment = slice(begin, begin + CHUNK)
            size = len(x_TD[segment])
            base = tuple(w[None] for w in first) if begin == 0 else state.base
            h = normed(recall(base, asked[:, :, segment]), part.heard_norm.weight)[0].transpose(0, 1).flatten(1)
            k_h, v_h = (heads(each) for each in (h @ part.project.weight[WIDTH:].mT).chunk(2, -1))
            k_h = rotate(k_h, places[:, segment], 100.0)
            keys = torch.cat((part.persistent[0][None], k_h, k[:, :, segment]), 2)
            values = torch.cat((part.persistent[1][None], v_h, v[:, :, segment]), 2)
            causal = torch.ones(size, size).tril()
            seen = torch.cat((torch.ones(size, 2), causal, causal), 1).bool()
            scores = (q[:, :, segment] @ keys.mT / K**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
            y = (scores @ values)[0].transpose(0, 1).flatten(1) @ part.mix.weight.mT
            u, told = (normed(y, part.norm.weight) @ memory.project.weight.mT).split(memory.sizes, -1)
            tokens = memory.told(F.silu(u)[None], told[None])
            read, state = token_by_token(first, state, tokens, places[:, segment], CHUNK, 4.0, 0)
            gate = normed(read, part.gate_norm.weight)[0].transpose(0, 1).flatten(1)
            found.append((normed(y, part.norm.weight) * F.silu(gate)) @ part.out.weight.mT)
        return torch.cat(found)

    both(part, reference)
