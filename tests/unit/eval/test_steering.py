"""A planner that is steered while it writes is the planner so configured; beliefs by chunk are those of the trace."""

import numpy as np
import pytest
import torch

from stepladder.core.errors import UserError
from stepladder.eval.decode import generate
from stepladder.eval.steering import snapshots, steered
from stepladder.models.zoo import spec

KNOBS = [
    ({"force_state": 2}, {"control": "forced", "forced": 2}),
    ({"freeze_planner": True}, {"control": "frozen"}),
    ({"lookahead_steps": 3, "lookahead_feedback_scale": 1.0}, {"lookahead": 3, "feedback": 1.0}),
    ({"planner_temperature": 0.2}, {"temperature": 0.2}),
    ({"token_filtering": False}, {"filtering": False}),
    ({}, {}),
]


@pytest.fixture
def planned(make):
    loaded = make(model="apelr_v2", fields={"executor": "gru", "plans": 3, "chunk": 4})
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=g)
    return loaded


@pytest.mark.parametrize(("knobs", "fields"), KNOBS, ids=str)
def test_steered_is_configured(planned, knobs, fields):
    model = spec("apelr_v2", **{**planned.run.model.model_dump(exclude={"kind"}), **fields}).build(259).eval()
    model.load_state_dict(planned.model.state_dict())
    x = torch.randint(3, 259, (2, 15), generator=torch.Generator().manual_seed(1))
    plain = planned.model(x).logits
    with steered(planned.model, **knobs):
        mine = planned.model(x).logits
        written = generate(planned.model, [np.arange(5, 9)], max_new=12, temperature=1.0, key=3)
    torch.testing.assert_close(mine, model(x).logits)
    assert torch.equal(mine, plain) is (not knobs)
    want = generate(model, [np.arange(5, 9)], max_new=12, temperature=1.0, key=3)
    assert written[0].tokens.tolist() == want[0].tokens.tolist()
    assert torch.equal(planned.model(x).logits, plain)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"force_state": 3}, "there are plans 0 to 2"),
        ({"force_state": -1}, "there are plans 0 to 2"),
        ({"force_state": 1, "freeze_planner": True}, "choose one"),
        ({"lookahead_steps": -1}, "at least 0"),
        ({"lookahead_feedback_scale": 1.5}, r"in 0\.\.1"),
        ({"planner_temperature": 0.0}, "above 0"),
    ],
)
def test_what_cannot_be_is_refused(planned, knobs, says):
    with pytest.raises(UserError, match=says), steered(planned.model, **knobs):
        pass


def test_a_model_without_a_planner_cannot_be_steered(make):
    loaded = make()
    with pytest.raises(UserError, match="no planner to steer"), steered(loaded.model, freeze_planner=True):
        pass
    with steered(loaded.model):
        pass
    with pytest.raises(UserError, match="no beliefs to show"):
        snapshots(loaded, np.arange(3, 9))


def test_beliefs_by_chunk_are_those_of_the_trace(planned):
    ids = np.arange(97, 110)
    trace = planned.model(torch.from_numpy(ids)[None], trace=True).trace["plan"][0]
    shown = snapshots(planned, ids)
    columns = {column.header: list(column.cells) for column in shown.columns}
    assert columns["token"] == ["0", "4", "8", "12"]
    assert "".join(columns["text"]) == planned.tokenizer.decode(ids)
    for cell, place in zip(columns["plan"], (0, 3, 7, 11), strict=True):
        plan, share = cell.split()
        assert int(plan) == int(trace[place].argmax())
        assert float(share) == pytest.approx(float(trace[place].max()), abs=0.006)
    foreseen = trace[0] @ planned.model.head.chain().moves_KK.exp().detach()
    assert columns["+1"][0].split()[0] == str(int(foreseen.argmax()))
    assert float(columns["+1"][0].split()[1]) == pytest.approx(float(foreseen.max()), abs=0.006)
