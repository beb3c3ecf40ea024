"""The planner's head against the recursion of its specification, token by token, in plain probabilities."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom

from stepladder.core.errors import UserError
from stepladder.models.base import IGNORE, Context, Sink
from stepladder.models.heads import experts, plan_losses
from stepladder.models.heads.plan_losses import NAMES, divergence, entropy, information, room, usage
from stepladder.models.zoo import spec

VOCAB = 13
QUIET = dict.fromkeys(NAMES, 0.0)


def model_of(name="apelr_v2", sharp=8.0, seed=0, **fields):
    """Float64, stirred, with experts whose logits are ``sharp`` times as large."""
    torch.manual_seed(seed)
    model = spec(name, "tiny", **{**QUIET, **fields}).build(VOCAB).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        out = model.head.experts.heads if name == "apelr_v2" else model.head.experts.out
        out.weight.mul_(sharp)
    return model


def ids(batch, tokens, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, tokens + 1), generator=g).split((tokens, 1), 1)


def batch_of(tokens, batch=2, seed=1):
    first, last = ids(batch, tokens, seed)
    return first, torch.cat((first[:, 1:], last), 1)


def hidden(model, tokens):
    seen = {}
    hook = model.head.register_forward_hook(lambda _, args, out: seen.update(h=args[0]))
    model(tokens)
    hook.remove()
    return seen["h"]


def reference(model, tokens, targets):
    """Sections 2.1 to 2.3 of the specification for one row, without its epsilon: log p(v) of all v (T, V)."""
    head, plan = model.head, model.head.plan
    h_TD = hidden(model, tokens[None])[0]
    p_TKV = torch.stack(head.experts.logits(h_TD), 1).softmax(-1)
    chain = head.chain()
    moves, b, found = chain.moves_KK.exp(), chain.prior_K.exp(), []
    for t in range(len(tokens)):
        last = t % plan.chunk == 0 and t > 0 if plan.first == 0 else (t + 1) % plan.chunk == 0
        if last:
            size = plan.chunk + (1 if plan.first == 0 and t == plan.chunk else 0)
            summary = {"mean": h_TD[t - size + 1 : t + 1].mean(0), "last": h_TD[t]}.get(plan.context)
            evidence = 0.0 if summary is None else head.context(summary)
            b = ((b @ moves).log() + evidence).softmax(-1)
        g = b
        if plan.horizon and plan.feedback:
            forecasts = [b @ torch.linalg.matrix_power(moves, s) for s in range(1, plan.horizon + 1)]
            g = (1 - plan.feedback) * b + plan.feedback * torch.stack(forecasts).mean(0)
        g = (g.log() / plan.temperature).softmax(-1)
        found.append((g[:, None] * p_TKV[t]).sum(0).log())
        if plan.filtering:
            b = b * p_TKV[t, :, targets[t]]
            b = b / b.sum()
    return torch.stack(found)


CASES = [
    *itertools.product(("apelr_v2",), (True, False), (1, 4, 16), (0.0, 0.25, 1.0), ("mean",)),
    *itertools.product(("apelr_v1",), (True, False), (1, 4, 16), (0.0, 0.25), ("last",)),
    ("apelr_v1", True, 4, 0.25, "mean"),
    ("apelr_v2", True, 4, 0.25, "last"),
    ("apelr_v2", True, 4, 0.25, "none"),
]


@pytest.mark.parametrize(("name", "filtering", "chunk", "feedback", "context"), CASES)
def test_a1_likelihood_is_the_recursion_and_the_decoding(name, filtering, chunk, feedback, context):
    fields = {"filtering": filtering, "chunk": chunk, "feedback": feedback, "context": context}
    model = model_of(name, lookahead=2, temperature=1.3, **fields)
    for tokens in (3, 21):
        x, y = batch_of(tokens)
        with torch.no_grad():
            nll, logits = model(x, targets=y).nll_BT, model(x).logits
            state, steps = None, []
            for place in range(tokens):
                out = model(x[:, place : place + 1], state)
                state = out.state
                steps.append(out.logits)
            want = torch.stack([reference(model, *each) for each in zip(x, y, strict=True)])
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-9)
        torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(nll, -want.gather(2, y[..., None])[..., 0], rtol=0, atol=1e-9)
        # A3: logits are log-probabilities of the mixture.
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, tokens).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["apelr_v1", "apelr_v2"])
def test_a1_in_float32_with_sharp_experts(name):
    model = model_of(name, chunk=4).float()
    x, y = batch_of(64)
    with torch.no_grad():
        nll, state, steps = model(x, targets=y).nll_BT, None, []
        for place in range(64):
            out = model(x[:, place : place + 1], state)
            state = out.state
            steps.append(-out.logits.gather(2, y[:, place : place + 1, None])[:, 0])
    torch.testing.assert_close(torch.cat(steps, 1), nll, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["apelr_v1", "apelr_v2"])
def test_a3_beliefs_are_finite_and_sum_to_one_in_bfloat16(name):
    model = model_of(name, sharp=30.0).float()
    x, y = batch_of(40)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, targets=y, trace=True)
    for each in ("belief", "plan", "gate"):
        assert out.trace[each].dtype == torch.float32
        torch.testing.assert_close(out.trace[each].sum(-1), torch.ones(2, 40), rtol=0, atol=1e-5)
    assert out.nll_BT.dtype == torch.float32
    assert bool(out.nll_BT.isfinite().all())


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_a6_a_forced_plan_is_its_expert(temperature):
    x, _ = batch_of(9)
    for forced in range(3):
        model = model_of(control="forced", forced=forced, temperature=temperature)
        want = model.head.experts.logits(hidden(model, x))[forced].log_softmax(-1)
        torch.testing.assert_close(model(x).logits, want, rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="there are plans 0 to 2"):
        spec("apelr_v2", "tiny", control="forced", forced=3).build(VOCAB)


def test_controls_have_the_planners_parameters_and_a_gate_that_hears_nothing():
    x, _ = batch_of(9)
    plain = model_of()
    for control in ("frozen", "uniform"):
        model = model_of(control=control)
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
        p_BTKV = torch.stack(model.head.experts.logits(hidden(model, x)), 2).softmax(-1)
        gate = torch.ones(3).double() / 3
        if control == "frozen":
            chain = model.head.chain()
            powers = chain.moves_KK.exp() + torch.linalg.matrix_power(chain.moves_KK.exp(), 2)
            gate = chain.prior_K.exp() @ (0.75 * torch.eye(3) + 0.125 * powers)
        want = (gate[:, None] * p_BTKV).sum(2).log()
        torch.testing.assert_close(model(x).logits, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("executor", "plain"), [("gru", "gru"), ("attention", "transformer"), ("mamba2", "ssm")])
def test_a14_one_plan_is_the_executor_alone(executor, plain):
    shape = {"width": 16, "depth": 2}
    extra = {"attention": {"heads": 2}, "gru": {"inner": 12}, "mamba2": {"head_width": 8, "state": 4}}[executor]
    torch.manual_seed(0)
    mine = spec("apelr_v2", **shape, **extra, plans=1, executor=executor).build(VOCAB).double()
    theirs = spec(plain, **shape, **extra).build(VOCAB).double()
    weights = theirs.state_dict()
    missing = mine.load_state_dict(
        {"head.experts.heads.weight": weights.pop("head.own.weight"), **weights}, strict=False
    )
    assert not missing.unexpected_keys
    assert all(name.startswith("head.") for name in missing.missing_keys)
    x, y = batch_of(21)
    (ours, want), grads = [model(x, targets=y).nll_BT for model in (mine, theirs)], []
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)
    for model, nll in ((mine, ours), (theirs, want)):
        nll.sum().backward()
        grads.append(model.embed.tokens.weight.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["apelr_v1", "apelr_v2"])
def test_a13_slopes_of_the_likelihood_are_those_of_all_distributions(name, monkeypatch):
    monkeypatch.setattr(experts, "BLOCK", 5 * VOCAB)
    model = model_of(name)
    x, y = batch_of(17)
    y[0, 3:6] = IGNORE
    found = []
    for dense in (False, True):
        model.zero_grad()
        if dense:
            nll = F.cross_entropy(model(x).logits.transpose(1, 2), y, ignore_index=IGNORE, reduction="none")
        else:
            nll = model(x, targets=y).nll_BT
        nll.sum().backward()
        found.append([nll.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("rows", "words"), [(1, 100), (4, 100), (100, 100), (3, 5)])
@pytest.mark.parametrize("shared", [False, True])
def test_the_written_out_score_is_the_plain_one(shared, rows, words, monkeypatch):
    """Own weights without biases, or shared ones with; a few tokens and words at a time."""
    monkeypatch.setattr(experts.kernel, "WORDS", words)
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()  # noqa: E731
    h, mine = draw(11, 6), experts.SharedHead(6, 6, VOCAB, 3) if shared else experts.OwnHeads(6, VOCAB, 3)
    mine = mine.double()
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.copy_(draw(*parameter.shape))
    picks = torch.randint(VOCAB, (11, 3), generator=g)
    picks[:, 1] = picks[:, 0]  # an id that is asked for twice
    slopes = torch.randn(11, 4, 3, generator=g, dtype=torch.float64)
    found = []
    for plain in (True, False):
        features = mine.features(h)
        if plain:
            lse, said = experts.plain(features, picks, mine.each(), rows)
        else:
            z, weight, bias = mine.stacked(features)
            lse, said = experts.kernel.score(z, picks, weight, bias, rows * min(words, VOCAB))
        total = (torch.cat((lse[:, None], said), 1) * slopes).sum()
        found.append([lse, said, *torch.autograd.grad(total, [h, *mine.parameters()])])
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


def test_logits_in_blocks_and_at_some_positions_are_the_whole(monkeypatch):
    model = model_of(**dict.fromkeys(NAMES, 0.1))
    x, _ = batch_of(17)
    mask = torch.rand(2, 17, generator=torch.Generator().manual_seed(0)) < 0.4
    whole = model(x)
    monkeypatch.setattr("stepladder.models.heads.softmax.CHUNK", 4 * 2 * 3 * VOCAB)
    torch.testing.assert_close(model(x).logits, whole.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x, logits_at=mask).logits, whole.logits[mask], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x, logits_at="last").logits, whole.logits[:, -1:], rtol=0, atol=1e-12)


def test_hard_commitment_keeps_one_plan_through_a_chunk_and_is_the_same_in_decoding():
    model = model_of(sharp=1.0, commitment="hard", leak=1e-9, chunk=5, feedback=0.0)
    x, y = batch_of(24)
    for training in (True, False):
        out = model.train(training)(x, targets=y, key=3, trace=True)
        plans = out.trace["belief"].argmax(-1)
        assert float(out.trace["belief"].amax(-1).min()) > 0.99
        chunk = (torch.arange(24) + 1) // 5
        assert all(bool((plans[:, chunk == c] == plans[:, chunk == c][:, :1]).all()) for c in range(5))
        state, parts = None, []
        for place in range(24):
            each = slice(place, place + 1)
            step = model(x[:, each], state, targets=y[:, each], **({"key": 3} if state is None else {}))
            state = step.state
            parts.append(step.nll_BT)
        torch.testing.assert_close(torch.cat(parts, 1), out.nll_BT, rtol=0, atol=1e-9)
    assert not torch.equal(model(x, targets=y, key=4).nll_BT, out.nll_BT)
    out.nll_BT.sum().backward()
    assert bool(model.head.prior.grad.any())  # the straight-through slope


def test_nothing_of_tokens_by_vocabulary_exists_in_training(monkeypatch):
    """Neither for all plans nor for one: not in the forward pass, nor kept for the backward pass, nor in it."""
    vocab, tokens = 101, 40
    monkeypatch.setattr(experts, "BLOCK", 4 * vocab)
    model = spec("apelr_v2", "tiny", **QUIET, width=8).build(vocab)
    x, y = (torch.randint(vocab, (2, tokens)) for _ in range(2))
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        model(x, targets=y).nll_BT.sum().backward()
    assert max(made) >= model.head.experts.heads.weight.numel() // 2  # the watch sees what there is
    assert max(made) < 2 * tokens * vocab


def test_a13_terms_are_those_of_the_specification():
    """Against the formulas of section 3, on whole chunks, from the trace."""
    prices = {**dict.fromkeys(NAMES, 1.0), "window": 5, "sampled": 1.0, "chunk": 4}
    model = model_of(sharp=1.0, **prices)
    x, y = batch_of(32)
    out = model(x, targets=y, trace=True)
    gate, now, plan = (out.trace[name] for name in ("gate", "belief", "plan"))
    h = hidden(model, x)
    p_BTKV = torch.stack(model.head.experts.logits(h), 2).softmax(-1)
    H = lambda p: -(p * p.log()).sum(-1)  # noqa: E731

    torch.testing.assert_close(out.losses["token_entropy"], H(now))
    torch.testing.assert_close(out.losses["boundary_entropy"], H(plan))
    mixed = (gate[..., None] * p_BTKV).sum(2)
    torch.testing.assert_close(-out.losses["plan_mi"], H(mixed) - (gate * H(p_BTKV)).sum(-1))
    pairs = [(i, j) for i in range(3) for j in range(i)]
    js = [H((p_BTKV[:, :, i] + p_BTKV[:, :, j]) / 2) - (H(p_BTKV[:, :, i]) + H(p_BTKV[:, :, j])) / 2 for i, j in pairs]
    torch.testing.assert_close(-out.losses["plan_js"], torch.stack(js).mean(0))

    losses = model.head.losses
    for row, place in itertools.product(range(2), range(32)):
        ends = (place + 1) % 4 == 0
        want = 0.0
        if ends:
            b = plan[row, place - 1] if place else plan[row, 0]
            inside = range(place - 3 if place > 3 else 1, place + 1)  # of the first token nothing was expected
            for t in inside:
                b = b * p_BTKV[row, t - 1, :, x[row, t]]
            b = b / b.sum()
            q = losses.posterior(h[row, place - 3 : place + 1].mean(0)).softmax(-1)
            want = 4 * 0.5 * ((b * (b / q).log()).sum() + (q * (q / b).log()).sum())
        torch.testing.assert_close(out.losses["posterior"][row, place], torch.as_tensor(want).double())
        window = set(x[row, max(0, place - 5) : place].tolist()) - {int(x[row, place])}
        words = range(max(1, place - 3), place + 1) if ends else []
        q_KV = torch.stack([p_BTKV[row, t - 1] for t in words]).mean(0) if ends else None
        missed = [-(plan[row, place - 1] @ q_KV[:, x[row, t]]).log() for t in words]
        want_bag = 4 * torch.stack(missed).mean() if ends else torch.zeros(()).double()
        torch.testing.assert_close(out.losses["bag_of_words"][row, place], want_bag)
        some = [-(1 - mixed[row, place - 1, u]).log() for u in window]
        want = torch.stack(some).mean() if some else torch.zeros(()).double()
        torch.testing.assert_close(out.losses["repetition"][row, place], want)


def test_a13_the_bag_of_words_has_the_first_version_s_chunks():
    """Moves behind m + 1, 2m + 1, ... tokens: m words each."""
    model = model_of("apelr_v1", sharp=1.0, bag_of_words=1.0, chunk=4)
    x, y = batch_of(18)
    out = model(x, targets=y, trace=True)
    p_BTKV = torch.stack(model.head.experts.logits(hidden(model, x)), 2).softmax(-1)
    want = torch.zeros(2, 18).double()
    for row, end in itertools.product(range(2), range(4, 18, 4)):
        q_KV = p_BTKV[row, end - 4 : end].mean(0)
        b = out.trace["plan"][row, end - 1]
        want[row, end] = -4 * (b @ q_KV[:, x[row, end - 3 : end + 1]]).log().mean()
    torch.testing.assert_close(out.losses["bag_of_words"], want)


def test_places_for_drawn_tokens_are_enough_and_not_all():
    for tokens, share in itertools.product((1, 7, 64, 1000, 65536), (0.001, 0.125, 0.5, 0.999, 1.0)):
        assert binom.sf(room(tokens, share), tokens, share) < 1e-9
    assert room(1024, 0.125) < 200
    # Where they are not, the last tokens drawn are left out and the others are what they were.
    x, y = batch_of(40)
    model = model_of(sharp=1.0, plan_mi=1.0, sampled=0.5)
    whole = model(x, targets=y).losses["plan_mi"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_losses, "room", lambda tokens, share: 9)
        some = model(x, targets=y).losses["plan_mi"]
    kept = (whole != 0).cumsum(1) <= 9
    torch.testing.assert_close(some, torch.where(kept, whole, 0.0))
    assert int((some != 0).sum()) == 18 < int((whole != 0).sum())


def test_a_position_that_holds_an_image_is_no_evidence():
    """Belief moves there by the chain alone, whatever id stands at it, and the terms leave it out."""
    names = ("repetition", "bag_of_words", "posterior")
    model = model_of(chunk=4, context="none", window=5, **dict.fromkeys(names, 1.0))
    x, y = batch_of(20)
    holds = torch.zeros(2, 20, dtype=torch.bool)
    holds[0, 5:11] = holds[1, 0] = holds[1, 18:] = True
    h_BTD = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def seen(x):
        sink = Sink(trace={})
        place = torch.arange(20).expand(2, -1)
        ctx = Context(x, place, False, None, torch.zeros(2, dtype=torch.int64), 0, False, sink, images_BT=holds)
        return model.head(h_BTD, None, ctx, y, None)[1], sink

    (nll, sink), (other, moved) = seen(x), seen(torch.where(holds, (x + 1) % VOCAB, x))
    torch.testing.assert_close(nll, other, rtol=0, atol=0)
    for name in names:
        torch.testing.assert_close(sink.losses[name], moved.losses[name], rtol=0, atol=0)
    belief, moves = sink.trace["belief"], model.head.chain().moves_KK.exp()
    torch.testing.assert_close(belief[0, 5:7], belief[0, 4:5].expand(2, -1))
    torch.testing.assert_close(belief[0, 7], belief[0, 6] @ moves)  # the chain moves behind 4, 8, ... tokens
    assert not torch.allclose(belief[0, 11], belief[0, 10] @ moves)
    assert not bool(sink.losses["repetition"][holds].any())


def test_a13_the_contrastive_term_tells_chunks_to_come_from_those_that_were():
    chunk, future, negatives = 4, 2, 3
    model = model_of(contrastive=1.0, chunk=chunk, future=future, negatives=negatives, contrast_temperature=0.3)
    x, y = batch_of(30)
    out = model(x, targets=y, trace=True)
    h, part = hidden(model, x), model.head.losses.foresight
    plan_KD = part.plan.view(3, -1)
    want = torch.zeros(2, 30).double()
    for row in range(2):
        ends = range(chunk - 1, 30, chunk)
        f = [F.normalize(part.summary(h[row, end - chunk + 1 : end + 1].mean(0)), dim=0) for end in ends]
        v = [F.normalize(out.trace["plan"][row, end - 1] @ plan_KD, dim=0) for end in ends]
        for j, end in enumerate(ends):
            some = f[max(0, j - negatives) : j + 1]
            misses = [
                -(torch.stack([v[j - d] @ each for each in some]) / 0.3).log_softmax(0)[-1]
                for d in range(1, future + 1)
                if j >= d
            ]
            want[row, end] = chunk * torch.stack(misses).mean() if misses else 0.0
    torch.testing.assert_close(out.losses["contrastive"], want)
    with pytest.raises(UserError, match="raise chunk"):
        spec("apelr_v2", "tiny", chunk=1).build(VOCAB)


def test_usage_at_the_best_marginal_is_the_divergence_from_uniform():
    g = torch.Generator().manual_seed(0)
    raw = torch.randn(50, 4, generator=g, dtype=torch.float64).requires_grad_()
    log_b = raw.log_softmax(-1)
    mean = log_b.exp().mean(0)
    want = (mean * (mean * 4).log()).sum()
    q = mean.detach().log().requires_grad_()
    got = usage(log_b, q).mean()
    torch.testing.assert_close(got, want)
    slopes = [torch.autograd.grad(each, raw, retain_graph=True)[0] for each in (got, want)]
    torch.testing.assert_close(*slopes)
    torch.testing.assert_close(torch.autograd.grad(got, q)[0], torch.zeros(4).double(), rtol=0, atol=1e-12)
    # From elsewhere, descent brings q to the mean.
    q = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        q.data -= torch.autograd.grad(usage(log_b.detach(), q).mean(), q)[0]
    torch.testing.assert_close(q.softmax(-1), mean.detach(), rtol=0, atol=1e-6)
    # Usage and boundary entropy at one price: log K less the information of the plan.
    together = got + entropy(log_b).mean()
    torch.testing.assert_close(
        together, torch.tensor(4.0).log().double() - (entropy(mean.log()) - entropy(log_b).mean())
    )


def test_experts_of_disjoint_words_diverge_by_ln_2():
    logs = [torch.tensor([[0.5, 0.5, 0, 0]]).double().clamp(min=1e-300).log() for _ in range(2)]
    logs[1] = logs[1].flip(-1)
    torch.testing.assert_close(divergence(logs), torch.tensor([2.0]).log().double())
    gate = torch.tensor([[0.5, 0.5]]).double().log()
    torch.testing.assert_close(information(logs, gate), torch.tensor([2.0]).log().double())
    assert float(divergence(logs[:1])) == 0.0


def test_sampled_terms_have_no_bias():
    fields = {**dict.fromkeys(NAMES, 0.0), "plan_js": 1.0, "plan_mi": 1.0}
    x, y = batch_of(32, batch=64)
    whole = model_of(sharp=1.0, sampled=1.0, **fields)(x, targets=y).losses
    some = model_of(sharp=1.0, sampled=0.25, **fields)(x, targets=y).losses
    for name, value in some.items():
        assert 0.2 < float((value != 0).double().mean()) < 0.3
        torch.testing.assert_close(value[value != 0] * 0.25, whole[name][value != 0])


def test_what_costs_nothing_is_not_there():
    out = model_of()(*[batch_of(8)[0]], targets=batch_of(8)[1])
    assert out.losses == {}
    assert not list(model_of().head.losses.parameters())


def test_a_tied_embedding_is_refused():
    with pytest.raises(UserError, match="cannot be the head of several experts"):
        spec("apelr_v2", "tiny", tied=True).build(VOCAB)
