import math

import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.models.base import Context, Sink, leaves
from stepladder.models.layers import rotate
from stepladder.models.mixers.attention import Attention, Cache, FixedCache

B, T, D = 2, 9, 24


def context(positions_BT, packed=True):
    return Context(
        tokens_BT=torch.zeros_like(positions_BT),
        positions_BT=positions_BT,
        packed=packed,
        ticks=None,
        key_B=torch.zeros(len(positions_BT), dtype=torch.int64),
        tick=0,
        recompute=False,
        sink=Sink(),
    )


def positions(*starts, length=T):
    """(B, T) positions of rows that begin a new document at each of their starts."""
    rows = []
    for begins in starts:
        at, row = 0, []
        for place in range(length):
            at = 0 if place in begins else at
            row.append(at)
            at += 1
        rows.append(row)
    return torch.tensor(rows)


@pytest.fixture
def part():
    torch.manual_seed(0)
    return Attention(D, heads=4, kv_heads=2, rope_base=100.0, gain=1.0).double()


def by_hand(part, x_BTD, positions_BT):
    """One query at a time, one head at a time, looking at the keys of its own document up to itself."""
    heads, groups, width = part.heads, part.kv_heads, part.head_width
    y_BTD = torch.zeros_like(x_BTD)
    for b in range(len(x_BTD)):
        qkv = (x_BTD[b] @ part.project.weight.T).view(x_BTD.shape[1], heads + 2 * groups, width)
        for h in range(heads):
            g = h // (heads // groups)
            q, k, v = qkv[:, h], qkv[:, heads + g], qkv[:, heads + groups + g]
            if part.rope_base is not None:
                q, k = (rotate(z[None, None], positions_BT[b : b + 1], part.rope_base)[0, 0] for z in (q, k))
            for t in range(x_BTD.shape[1]):
                first = t - int(positions_BT[b, t])
                weights = ((k[first : t + 1] @ q[t]) / math.sqrt(width)).softmax(0)
                y_BTD[b, t, h * width : (h + 1) * width] = weights @ v[first : t + 1]
    return y_BTD @ part.out.weight.T


@pytest.mark.parametrize("rope", [100.0, None])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
def test_attention_is_softmax_over_the_documents_past(heads, kv_heads, rope):
    torch.manual_seed(1)
    part = Attention(D, heads, kv_heads, rope, gain=1.0).double()
    x_BTD, where = torch.randn(B, T, D).double(), positions([0], [0, 3, 4])
    y_BTD, _ = part(x_BTD, None, context(where))
    torch.testing.assert_close(y_BTD, by_hand(part, x_BTD, where), rtol=0, atol=1e-12)


def test_unpacked_rows_use_the_plain_causal_mask_and_agree(part):
    x_BTD, where = torch.randn(B, T, D).double(), positions([0], [0])
    fast, _ = part(x_BTD, None, context(where, packed=False))
    masked, _ = part(x_BTD, None, context(where, packed=True))
    torch.testing.assert_close(fast, masked, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cuts", [[1], [4], [1, 2, 3, 4, 5, 6, 7, 8], [3, 4, 8]])
@pytest.mark.parametrize("fixed", [False, True])
def test_cached_chunks_are_the_whole(part, cuts, fixed):
    x_BTD, where = torch.randn(B, T, D).double(), positions([0, 5], [0, 2, 3])
    whole, state = part(x_BTD, None, context(where))
    carried = part.init_state(B, T + 2, torch.device("cpu"), torch.float64, None) if fixed else None
    parts = []
    for first, last in zip([0, *cuts], [*cuts, T], strict=True):
        y, carried = part(x_BTD[:, first:last], carried, context(where[:, first:last]))
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(carried.k_BSGK[:, :T], state.k_BSGK, rtol=0, atol=1e-13)
    if fixed:
        assert carried.length_B.tolist() == [T, T]


def test_unfilled_cache_entries_are_masked_whatever_they_hold(part):
    x_BTD, where = torch.randn(B, T, D).double(), positions([0], [0])
    clean = part.init_state(B, 2 * T, torch.device("cpu"), torch.float64, None)
    dirty = FixedCache(clean.k_BSGK + 1e6, clean.v_BSGK - 1e6, clean.length_B)
    want, got = (part(x_BTD, state, context(where))[0] for state in (clean, dirty))
    assert torch.equal(want, got)


def test_rows_of_a_cache_may_have_different_lengths(part):
    """A row that is three tokens ahead, beside one at its start."""
    x_BTD, where = torch.randn(B, T, D).double(), positions([0], [0])
    empty = part.init_state(B, T, torch.device("cpu"), torch.float64, None)
    _, ahead = part(x_BTD[:, :3], empty, context(where[:, :3]))
    ragged = FixedCache(
        torch.stack((ahead.k_BSGK[0], empty.k_BSGK[1])),
        torch.stack((ahead.v_BSGK[0], empty.v_BSGK[1])),
        torch.tensor([3, 0]),
    )
    chunk = torch.stack((x_BTD[0, 3:5], x_BTD[1, :2]))
    got, after = part(chunk, ragged, context(torch.tensor([[3, 4], [0, 1]])))
    whole, _ = part(x_BTD, None, context(where))
    torch.testing.assert_close(got[0], whole[0, 3:5], rtol=0, atol=1e-13)
    torch.testing.assert_close(got[1], whole[1, :2], rtol=0, atol=1e-13)
    assert after.length_B.tolist() == [5, 2]


def test_g3_a_full_cache_refuses_and_never_wraps(part):
    x_BTD, where = torch.randn(B, T, D).double(), positions([0], [0])
    state = part.init_state(B, T - 1, torch.device("cpu"), torch.float64, None)
    with pytest.raises(UserError, match="9 tokens exceed the state's capacity of 8"):
        part(x_BTD, state, context(where))
    _, state = part(x_BTD[:, : T - 1], state, context(where[:, : T - 1]))
    with pytest.raises(UserError, match="capacity of 8"):
        part(x_BTD[:, T - 1 :], state, context(where[:, T - 1 :]))


@pytest.mark.parametrize("fixed", [False, True])
def test_g7_the_state_passed_in_is_not_written_to(part, fixed):
    x_BTD, where = torch.randn(B, T, D).double(), positions([0], [0])
    state = part.init_state(B, T, torch.device("cpu"), torch.float64, None) if fixed else None
    _, state = part(x_BTD[:, :4], state, context(where[:, :4]))
    before = [leaf.clone() for leaf in leaves(state)]
    part(x_BTD[:, 4:], state, context(where[:, 4:]))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(state), strict=True))


def test_rotary_scores_depend_on_distance_only(part):
    """All positions of a document moved by a constant: the mask needs real positions, so scores are compared alone."""
    x_BTD, where = torch.randn(1, T, D).double(), positions([0])
    q = torch.randn(1, 1, T, 6).double()
    for shift in (1, 17, 4000):
        near = rotate(q, where, 100.0) @ rotate(q, where, 100.0).mT
        far = rotate(q, where + shift, 100.0) @ rotate(q, where + shift, 100.0).mT
        torch.testing.assert_close(near, far, rtol=0, atol=1e-10)
    assert part(x_BTD, None, context(where))[0].isfinite().all()


def test_without_positions_order_is_heard_through_the_mask_only():
    torch.manual_seed(0)
    part = Attention(D, 2, 2, None, 1.0).double()
    x_BTD, order = torch.randn(1, T, D).double(), torch.tensor([3, 1, 0, 2, 4, 5, 6, 7])
    where = positions([0])
    plain, _ = part(x_BTD, None, context(where))
    mixed, _ = part(torch.cat((x_BTD[:, order], x_BTD[:, 8:]), 1), None, context(where))
    torch.testing.assert_close(plain[:, -1], mixed[:, -1], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "rope"), [(24, 5, 5, None), (24, 4, 3, None), (12, 4, 4, 10000.0)]
)
def test_impossible_head_counts_are_user_errors(width, heads, kv_heads, rope):
    with pytest.raises(UserError, match=r"divide|even"):
        Attention(width, heads, kv_heads, rope, 1.0)


def test_odd_head_width_is_fine_without_rotation():
    part = Attention(12, 4, 2, None, 1.0).double()
    assert part(torch.randn(1, 3, 12).double(), None, context(positions([0], length=3)))[0].shape == (1, 3, 12)


def test_grouped_heads_shrink_parameters_and_cache():
    full, grouped = Attention(D, 4, 4, None, 1.0), Attention(D, 4, 1, None, 1.0)
    assert full.cost(10).params == full.own_params() == 4 * D * D
    assert grouped.own_params() == 2 * D * D + 2 * D * D // 4
    assert grouped.cost(10).state_bytes == full.cost(10).state_bytes / 4 == 2 * 10 * 6 * 4
    _, state = grouped(torch.randn(1, 10, D), None, context(positions([0], length=10)))
    assert isinstance(state, Cache)
    assert sum(leaf.numel() * 4 for leaf in leaves(state)) == grouped.cost(10).state_bytes
