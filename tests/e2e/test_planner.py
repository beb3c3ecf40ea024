"""What the planner's specification asks of the whole house, by its numbers; A1, A3 to A6, A13, A14: unit/models.

A2 causal, A7 asynchronous forecasts, A8 two processes, A9 saved and loaded, A10 resumed, A11 tokenizers, A12 disjoint
documents, A15 states of a text that a hidden Markov model wrote.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepladder as sl
from stepladder.core.errors import UserError
from stepladder.core.files import read_lines
from stepladder.data.corpora import Corpus, normalise
from stepladder.data.shards import prepare, shard_folder
from stepladder.data.tokenizers import BPETokenizer, ByteTokenizer
from stepladder.eval.decode import generate
from stepladder.models.heads import planner
from stepladder.models.noise import row_keys
from stepladder.models.weights import save_weights
from stepladder.models.zoo import ARCHITECTURES, spec
from stepladder.run import Run, load
from stepladder.train.session import train

VOCAB = 13


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("STEPLADDER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def planned(name="apelr_v2", **fields):
    torch.manual_seed(0)
    model = spec(name, "tiny", **fields).build(VOCAB).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def run_of(name, kind, **fields):
    tree = {
        "name": name,
        "model": {"kind": kind, **ARCHITECTURES.get(kind).tiny},
        "data": {"sequence": 32, "tokenizer": "alphabet", "sources": [{"kind": "task", "task": "copy"}]},
        "train": {"steps": 6, "device": "cpu", "batch": 4, "log_every": 1, **fields},
    }
    return Run.of(tree)


MODES = [
    {},
    {"filtering": False},
    {"context": "none"},
    {"lookahead": 3, "feedback": 1.0},
    {"commitment": "hard"},
    *({"control": control} for control in ("frozen", "uniform", "forced")),
]


@pytest.mark.parametrize("fields", MODES, ids=str)
@pytest.mark.parametrize("name", ["apelr_v1", "apelr_v2"])
def test_a2_no_mode_hears_what_comes_later(name, fields):
    model = planned(name, **fields)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(VOCAB, (2, 14), generator=g)
    for training in (False, True):
        whole = model.train(training)(x, targets=x.roll(-1, 1), key=3)
        for place in (1, 2, 3, 6, 7, 13):
            other = x.clone()
            other[:, place:] = torch.randint(VOCAB, (2, 14 - place), generator=g)
            seen = model(other, targets=x.roll(-1, 1), key=3)
            assert torch.equal(seen.nll_BT[:, :place], whole.nll_BT[:, :place])
            assert not torch.equal(seen.nll_BT[:, place:], whole.nll_BT[:, place:])


class Worker:
    """The ancestor's asynchronous planner: one thread, a result counts for its own belief only."""

    def __init__(self, pool, gate):
        self.pool, self.gate = pool, gate
        self.used = self.late = 0

    def __call__(self, *given):
        job = self.pool.submit(self.gate, *(each.clone() if isinstance(each, torch.Tensor) else each for each in given))
        if self.used <= self.late:  # half of the time the thread is waited for
            job.result()
        if job.done():
            self.used += 1
            return job.result()
        self.late += 1
        return self.gate(*given)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a7_an_asynchronous_forecast_changes_no_token(temperature, monkeypatch):
    """Nor can it pay: what there is to compute is one product with a matrix (benchmarks/lookahead.py)."""
    model = planned(lookahead=2, feedback=0.5)
    prompts = [np.arange(3, 9), np.array([4])]

    def write():
        found = generate(model, prompts, max_new=24, eos=None, temperature=temperature, key=5)
        return [one.tokens.tolist() for one in found]

    want, gate = write(), planner.gate
    with ThreadPoolExecutor(1) as pool:
        worker = Worker(pool, gate)
        monkeypatch.setattr(planner, "gate", worker)
        assert write() == want
        assert worker.used > 5
    monkeypatch.setattr(planner, "gate", lambda *given: gate(*given).flip(-1))
    assert write() != want  # another forecast would show


REPLICA = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from stepladder.models.noise import row_keys
from stepladder.models.zoo import spec
rank, out = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
given = torch.load(out + "/given.pt")
for name, weights in given["weights"].items():
    for wrapped in (True, False):
        model = spec(name, "tiny").build(given["vocab"]).double()
        model.load_state_dict(weights)
        call, mine = DistributedDataParallel(model), slice(2 * rank, 2 * rank + 2)
        found = (call if wrapped else model)(given["x"][mine], targets=given["y"][mine], key=given["keys"][mine])
        (found.nll_BT + sum(found.losses.values())).mean().backward()
        torch.save({n: p.grad for n, p in model.named_parameters()}, f"{out}/{name}-{wrapped}-{rank}.pt")
dist.destroy_process_group()
"""


def test_a8_two_processes_have_the_gradient_of_one(tmp_path):
    """The loss is made in ``forward``, so that the reducer sees it; called around the wrapper, replicas drift apart."""
    models, g = {name: planned(name) for name in ("apelr_v1", "apelr_v2")}, torch.Generator().manual_seed(0)
    x, y = (torch.randint(VOCAB, (4, 17), generator=g) for _ in range(2))
    keys = row_keys(7, 4, x.device)
    weights = {name: model.state_dict() for name, model in models.items()}
    torch.save({"vocab": VOCAB, "weights": weights, "x": x, "y": y, "keys": keys}, tmp_path / "given.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", REPLICA, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [each.wait(120) for each in ranks] == [0, 0]
    for name, model in models.items():
        out = model(x, targets=y, key=keys)
        (out.nll_BT + sum(out.losses.values())).mean().backward()
        for rank, wrapped in itertools.product(range(2), (True, False)):
            found = torch.load(tmp_path / f"{name}-{wrapped}-{rank}.pt")
            close = [torch.allclose(found[n], p.grad, rtol=1e-9, atol=1e-12) for n, p in model.named_parameters()]
            assert all(close) is wrapped


@pytest.mark.parametrize("name", ["apelr_v1", "apelr_v2"])
def test_a9_what_is_loaded_computes_what_was_saved(name, tmp_path):
    home = train(run_of("run", name), tmp_path, quiet=True)
    first, again = load(home, device="cpu"), sl.load(home)
    x = torch.randint(3, first.model.vocab, (2, 20))
    assert torch.equal(first.model(x).logits, again.model(x).logits)
    weights = first.path / "model.safetensors"
    compiled = torch.compile(first.model, backend="eager")
    torch.testing.assert_close(compiled(x).logits, first.model(x).logits)
    save_weights(compiled._orig_mod, tmp_path / "compiled.safetensors")
    assert (tmp_path / "compiled.safetensors").read_bytes() == weights.read_bytes()
    # Another tokenizer, other weights, damage: each is refused.
    kept = (home / "tokenizer.json").read_text()
    letters = json.loads(kept)
    letters["alphabet"] = letters["alphabet"][::-1]
    (home / "tokenizer.json").write_text(json.dumps(letters))
    with pytest.raises(UserError, match="not the tokenizer that this run was trained with"):
        load(home, device="cpu")
    (home / "tokenizer.json").write_text(kept)
    config = (home / "config.json").read_text()
    (home / "config.json").write_text(config.replace('"plans": 3', '"plans": 4'))
    with pytest.raises(UserError, match=r"other weights than this model: .*head\.moves"):
        load(home, device="cpu")
    (home / "config.json").write_text(config)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="SHA-256 differs"):
        load(home, first.path, device="cpu")


@pytest.mark.parametrize("commitment", ["soft", "hard"])
def test_a10_a_resumed_run_is_the_uninterrupted_one(commitment, tmp_path, monkeypatch):
    tree = run_of("run", "apelr_v2", save_every=3, losses_warmup={"usage": 5}).model_dump(mode="json")
    tree["model"]["commitment"] = commitment
    run = Run.of(tree)
    whole = train(run, tmp_path / "whole", quiet=True)
    real = planner.PlannerHead.forward
    calls = []

    def stops(self, *args):
        calls.append(None)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(planner.PlannerHead, "forward", stops)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "cut", quiet=True)
    monkeypatch.undo()
    cut = train(run, tmp_path / "cut", quiet=True)
    assert load(cut, device="cpu").step == 6
    for home in (whole, cut):
        steps = [line["step"] for line in read_lines(home / "metrics.jsonl") if line.get("loss")]
        assert steps == sorted(set(steps))
    files = [load(home, device="cpu").path / "model.safetensors" for home in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()


PIECES = BPETokenizer.train(["the planner keeps a belief over plans, and a plan is kept for a chunk"] * 20, 300)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_a11_any_text_comes_back_from_its_ids(text):
    for tokenizer in (ByteTokenizer(), PIECES):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert PIECES.decode(PIECES.encode("<bos><eos>" + text)) == "<bos><eos>" + text


def test_a11_another_tokenizer_never_meets_the_cached_tokens_of_the_first(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"text number {n}, of a plan"}) + "\n" for n in range(40)))
    corpus = Corpus(str(path))
    tokenizers = ByteTokenizer(), PIECES, BPETokenizer.train(["of a plan"] * 9, 280)
    folders = {shard_folder(corpus, each, tmp_path / "cache") for each in tokenizers}
    assert len(folders) == 3
    for tokenizer in tokenizers:
        shard = prepare(corpus, tokenizer, tmp_path / "cache").train
        text = tokenizer.decode(shard.tokens[: shard.starts[1]])
        assert text == next(iter(corpus.documents("train")))


def test_a12_no_document_is_trained_on_and_validated_with(tmp_path):
    path = tmp_path / "corpus.jsonl"
    texts = [f"Document {n % 200}: a  plan" if n % 3 else f"document {n % 200}: A plan" for n in range(600)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = Corpus(str(path))
    parts = [{normalise(text) for text in corpus.documents(split)} for split in ("train", "valid")]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 200


STATES, STAY, CHUNK, LETTERS = 3, 0.8, 4, 12


def switching(rows, tokens, seed):
    """Text of a hidden Markov model that may switch every CHUNK tokens: ids and states, (rows, tokens)."""
    rng = np.random.default_rng(seed)
    chunks = -(-tokens // CHUNK)
    hops = np.where(rng.random((rows, chunks)) < STAY, 0, rng.integers(1, STATES, (rows, chunks)))
    states = hops.cumsum(1).repeat(CHUNK, 1)[:, :tokens] % STATES
    # Three in five letters are of the state's own quarter, the others are any.
    own = 4 * states + rng.integers(4, size=states.shape)
    ids = np.where(rng.random(states.shape) < 0.6, own, rng.integers(LETTERS, size=states.shape))
    return torch.from_numpy(ids), states


def entropy(counts):
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def shared(found, states):
    """Normalised mutual information of two labellings."""
    table = np.zeros((STATES, STATES))
    np.add.at(table, (found.ravel(), states.ravel()), 1)
    parts = entropy(table.sum(0)) + entropy(table.sum(1))
    return 2 * (parts - entropy(table.ravel())) / parts


def exact(ids):
    """The filter of the process itself: its states, likeliest after each token, and nats a token but the first."""
    emit = np.full((STATES, LETTERS), 0.4 / LETTERS)
    for state in range(STATES):
        emit[state, 4 * state : 4 * state + 4] += 0.15
    moves = np.full((STATES, STATES), (1 - STAY) / (STATES - 1)) + (STAY - (1 - STAY) / (STATES - 1)) * np.eye(STATES)
    b, best, nats = np.full((len(ids), STATES), 1 / STATES), [], []
    for place, column in enumerate(ids.numpy().T):
        if place:
            nats.append(-np.log((b * emit[:, column].T).sum(1)))
        b = b * emit[:, column].T
        b /= b.sum(1, keepdims=True)
        best.append(b.argmax(1))
        if (place + 1) % CHUNK == 0:
            b = b @ moves
    return np.stack(best, 1), float(np.mean(nats))


def fitted(steps, **fields):
    torch.manual_seed(0)
    model = spec("apelr_v2", executor="gru", depth=1, chunk=CHUNK, context="none", lookahead=0, **fields).build(LETTERS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        ids, _ = switching(16, 65, step)
        optimizer.zero_grad()
        model(ids[:, :-1], targets=ids[:, 1:]).nll_BT.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def test_a15_the_planner_finds_the_states_that_wrote_a_text():
    """States, their dwell, and a likelihood that one plan of no fewer parameters misses; by likelihood alone."""
    model, alone = fitted(100, width=8, plans=STATES), fitted(100, width=10, plans=1)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (model, alone)]
    assert sizes[0] < sizes[1] < 1.05 * sizes[0]
    ids, states = switching(64, 129, 10**6)
    with torch.no_grad():
        ours, theirs = (each(ids[:, :-1], targets=ids[:, 1:], trace=True) for each in (model, alone))
    known, best = exact(ids)
    # "plan" and "belief" behind a move are about the token to come: states are compared inside chunks.
    inside = (np.arange(128) + 1) % CHUNK != 0
    found = ours.trace["belief"].argmax(-1).numpy()[:, inside]
    states, known = states[:, :-1][:, inside], known[:, :-1][:, inside]
    assert shared(found, states) > 0.9 * shared(known, states) > 0.3
    stay = model.head.chain().moves_KK.exp().diag()
    dwell = 1 / (1 - stay)
    assert bool((dwell > 0.7 / (1 - STAY)).all())
    assert bool((dwell < 1.4 / (1 - STAY)).all())
    ours, theirs = (float(each.nll_BT[:, 1:].mean()) for each in (ours, theirs))
    assert best - 0.01 < ours < theirs - 0.005
    assert ours - best < 0.03
    assert math.log(LETTERS) > theirs
