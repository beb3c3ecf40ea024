import pytest
import torch
import torch.nn.functional as F

from stepladder.core.errors import UserError
from stepladder.models.base import IGNORE, detach_state, leaves, map_state, take_rows
from stepladder.models.lm import LanguageModel
from stepladder.models.recurrences.once import Once
from stepladder.models.stack import Stack
from stepladder.models.zoo import spec

B, T, V = 3, 10, 17


@pytest.fixture
def model():
    torch.manual_seed(0)
    return spec("transformer", "tiny").build(V).double().eval()


@pytest.fixture
def tokens():
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))


def test_logits_or_likelihood_never_both(model, tokens):
    plain, scored = model(tokens), model(tokens, targets=tokens)
    assert plain.logits.shape == (B, T, V)
    assert plain.nll_BT is None
    assert scored.logits is None
    assert scored.nll_BT.shape == (B, T)
    want = F.cross_entropy(plain.logits.transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(scored.nll_BT, want, rtol=0, atol=1e-12)


def test_logits_only_where_asked(model, tokens):
    every = model(tokens).logits
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 3] = mask[2, 9] = True
    last, some = model(tokens, logits_at="last").logits, model(tokens, logits_at=mask).logits
    assert last.shape == (B, 1, V)
    assert some.shape == (2, V)
    torch.testing.assert_close(last[:, 0], every[:, -1], rtol=0, atol=1e-13)
    torch.testing.assert_close(some, torch.stack((every[0, 3], every[2, 9])), rtol=0, atol=1e-13)
    with pytest.raises(UserError, match="logits_at='first'"):
        model(tokens, logits_at="first")


def test_positions_restart_at_documents_and_go_on_over_calls(model, tokens):
    documents = torch.tensor([[4, 4, 4, 9, 9, 9, 9, 2, 2, 2]]).expand(B, -1)
    state = model(tokens, documents=documents).state
    assert state.position_B.tolist() == [3] * B
    assert state.document_B.tolist() == [2] * B
    same = model(tokens[:, :2], state, documents=torch.full((B, 2), 2)).state
    assert same.position_B.tolist() == [5] * B
    silent = model(tokens[:, :2], state).state
    assert silent.position_B.tolist() == [5] * B
    other = model(tokens[:, :2], state, documents=torch.tensor([[2, 7]] * B)).state
    assert other.position_B.tolist() == [1] * B


def test_two_documents_are_two_sequences(model, tokens):
    documents = (torch.arange(T) >= 4).long().expand(B, -1)
    packed = model(tokens, documents=documents).logits
    alone = torch.cat((model(tokens[:, :4]).logits, model(tokens[:, 4:]).logits), 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


def test_documents_of_equal_id_that_do_not_touch_are_two(model, tokens):
    documents = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1]]).expand(B, -1)
    other = torch.tensor([[1, 1, 1, 0, 0, 5, 5, 5, 5, 5]]).expand(B, -1)
    assert torch.equal(model(tokens, documents=documents).logits, model(tokens, documents=other).logits)


@pytest.mark.parametrize("shape", [(3,), (3, 0), (1, 2, 3)])
def test_tokens_of_another_shape_are_refused(model, shape):
    with pytest.raises(UserError, match="tokens have shape"):
        model(torch.zeros(shape, dtype=torch.int64))


def test_documents_of_another_shape_are_refused(model, tokens):
    with pytest.raises(UserError, match=r"documents have shape \(3, 9\), tokens \(3, 10\)"):
        model(tokens, documents=torch.zeros(B, T - 1, dtype=torch.int64))


def test_the_key_belongs_to_the_start_of_a_sequence(model, tokens):
    state = model(tokens, key=3).state
    with pytest.raises(UserError, match="the random key is part of the state"):
        model(tokens, state, key=3)
    assert torch.equal(model(tokens, state).state.key_B, state.key_B)
    assert torch.equal(model.init_state(B, 5, key=3).key_B, state.key_B)


def test_a_trace_is_left_only_when_asked(model, tokens):
    assert model(tokens).trace == {}
    trace = model(tokens, trace=True).trace
    assert trace["ticks"].shape == (B, T)
    assert not any(value.requires_grad for value in trace.values())


def test_states_regroup_detach_and_map(model, tokens):
    state = model(tokens).state
    assert all(leaf.shape[0] == B for leaf in leaves(state))
    assert any(leaf.requires_grad for leaf in leaves(state))
    assert not any(leaf.requires_grad for leaf in leaves(detach_state(state)))
    picked = take_rows(state, torch.tensor([2, 0]))
    torch.testing.assert_close(
        model(tokens[[2, 0]], picked).logits, model(tokens, state).logits[[2, 0]], rtol=0, atol=1e-12
    )
    doubled = map_state(lambda a, b: a + b, state, state)
    assert doubled.position_B.tolist() == [2 * T] * B
    with pytest.raises(TypeError, match="a state holds tensors only, not int"):
        map_state(lambda leaf: leaf, {"count": 3})


def test_map_state_keeps_every_kind_of_tree():
    tree = {"a": (torch.ones(1), None), "b": [torch.zeros(2)]}
    got = map_state(lambda leaf: leaf + 1, tree)
    assert isinstance(got["a"], tuple)
    assert isinstance(got["b"], list)
    assert got["a"][1] is None
    assert [leaf.tolist() for leaf in leaves(got)] == [[2.0], [1.0, 1.0]]


def test_output_cannot_be_unpacked_by_accident(model, tokens):
    with pytest.raises(TypeError, match="named fields"):
        _logits, _state = model(tokens)


@pytest.mark.parametrize("tied", [False, True])
def test_cost_is_what_is_there(tied):
    model = spec("shared_loop", "tiny", tied=tied, positions="learned", max_positions=32).build(V)
    assert model.cost(8).params == sum(p.numel() for p in model.parameters())
    state = model(torch.zeros(1, 8, dtype=torch.int64)).state
    assert model.cost(8).state_bytes == sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))
    assert model.cost(8, ticks=6).flops > 1.8 * model.cost(8, ticks=3).flops - model.cost(8, ticks=1).flops


def test_a_tied_model_has_one_matrix_less():
    free, tied = (spec("transformer", "tiny", tied=flag).build(V) for flag in (False, True))
    assert free.cost(1).params - tied.cost(1).params == V * tied.width
    assert [name for name in tied.state_dict() if "head" in name] == []


def test_prelude_and_coda_run_outside_the_core(tokens):
    torch.manual_seed(0)
    blocks = [spec("transformer", "tiny").attention_block(3) for _ in range(3)]
    parts = [Stack(block) for block in blocks]
    model = LanguageModel(V, 32, Once(parts[1]), prelude=parts[0], coda=parts[2]).double()
    joined = LanguageModel(V, 32, Once(Stack([part for block in blocks for part in block]))).double()
    joined.embed, joined.norm, joined.head = model.embed, model.norm, model.head
    torch.testing.assert_close(model(tokens).logits, joined(tokens).logits, rtol=0, atol=1e-13)
    assert model.cost(T) == joined.cost(T)
    whole = model(tokens).logits
    state = model.init_state(B, T)
    halves = []
    for piece in tokens.split(5, 1):
        out = model(piece, state)
        state = out.state
        halves.append(out.logits)
    torch.testing.assert_close(torch.cat(halves, 1), whole, rtol=0, atol=1e-12)


def test_unscored_targets_count_nothing(model, tokens):
    targets = tokens.clone()
    targets[1] = IGNORE
    nll_BT = model(tokens, targets=targets).nll_BT
    assert nll_BT[1].tolist() == [0.0] * T
    torch.testing.assert_close(nll_BT[0], model(tokens, targets=tokens).nll_BT[0], rtol=0, atol=1e-12)


def test_a_preallocated_state_follows_the_models_type_and_size():
    model = spec("transformer", "tiny").build(V)
    caches = [leaf for leaf in leaves(model.init_state(2, 7)) if leaf.dtype == torch.float32]
    assert {leaf.shape[:2] for leaf in caches} == {(2, 7)}
    assert any(leaf.dtype == torch.bfloat16 for leaf in leaves(model.init_state(2, 7, dtype=torch.bfloat16)))


@pytest.mark.parametrize("name", ["transformer", "shared_loop", "recursive_halting"])
def test_a_spent_state_is_written_in_place_and_changes_nothing(name, tokens):
    torch.manual_seed(0)
    model = spec(name, "tiny").build(V).double().eval()

    def fed(**call):
        """Logits of one token after the other, and whether the caches stayed where they were, and as they were."""
        state, found, kept, good = model.init_state(B, T), [], [], []
        for token in tokens.split(1, 1):
            before = [(leaf, leaf.clone()) for leaf in leaves(state) if leaf.is_floating_point()]
            out = model(token, state, **call)
            after = [leaf for leaf in leaves(out.state) if leaf.is_floating_point()]
            kept += [old.data_ptr() == new.data_ptr() for (old, _), new in zip(before, after, strict=True)]
            good += [torch.equal(leaf, copy) for leaf, copy in before]
            state = out.state
            found.append(out.logits)
        assert kept
        return torch.cat(found, 1), any(kept), all(good)

    graded, moved, good = fed(spend_state=True)
    assert (moved, good) == (False, True)  # gradients may need what was there
    with torch.no_grad():
        fresh, moved, good = fed()
        assert (moved, good) == (False, True)
        spent, _, good = fed(spend_state=True)
        assert not good
        out = model(tokens[:, :3], state := model.init_state(B, T), spend_state=True)
    assert {leaf.data_ptr() for leaf in leaves(out.state) if leaf.is_floating_point()} == {
        leaf.data_ptr() for leaf in leaves(state) if leaf.is_floating_point()
    }
    torch.testing.assert_close(spent, fresh, rtol=0, atol=0)
    torch.testing.assert_close(graded, fresh, rtol=0, atol=1e-12)
