"""Image encoders under the contract: every architecture takes images, and no law is broken by them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stepladder.core.errors import UserError
from stepladder.models.base import IGNORE, Images
from stepladder.models.encoders import ENCODERS, Encoder, EncoderSpec
from stepladder.models.encoders.wavelet import haar
from stepladder.models.zoo import ARCHITECTURES, spec

V, SIDE, TEXT = 11, 8, 4
SMALL = {"conv": {"hidden": 8}, "wavelet": {"grid": 3}, "siren": {"hidden": 12}}


def encoder(kind: str, side: int = SIDE, **fields) -> EncoderSpec:
    return ENCODERS.get(kind)(side=side, **{**SMALL.get(kind, {}), **fields})


def seeing(kind: str, name: str = "transformer", **fields):
    """A model in float64 with an encoder, whose parameters are all away from zero."""
    torch.manual_seed(0)
    model = spec(name, "tiny", **fields).build(V).double()
    model.vision = encoder(kind).build(model.width).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


def inputs(slots: int, rows: int = 2, seed: int = 0):
    """Rows of ``text image text image text``: tokens, and two images a row at their slots."""
    generator = torch.Generator().manual_seed(seed)
    none = torch.full((TEXT,), -1)
    places = torch.cat((none, torch.arange(slots), none, torch.arange(slots) + slots, none)).expand(rows, -1)
    tokens = torch.randint(V, places.shape, generator=generator)
    pixels = torch.randint(256, (rows, 2, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return tokens, Images(pixels, places.clone())


def blind(model, tokens, images) -> list[str]:
    """Parameters of the encoder that no gradient reaches, and "image" if another image makes no difference."""
    targets = tokens.roll(-1, 1)
    model.zero_grad()
    model(tokens, images=images, targets=targets, key=0).nll_BT.sum().backward()
    idle = [n for n, p in model.vision.named_parameters() if p.grad is None or not bool(p.grad.any())]
    other = Images(images.pixels_BICYX.flip(-1), images.slots_BT)
    with torch.no_grad():
        same = torch.equal(model(tokens, images=images, key=0).logits, model(tokens, images=other, key=0).logits)
    return idle + ["image"] * same


@pytest.mark.parametrize("kind", ENCODERS.names())
def test_an_encoder_learns_and_sees_the_image(kind):
    model = seeing(kind)
    assert blind(model, *inputs(model.vision.slots)) == []


class CoordinatesOnly(Encoder):
    """The ancestor's fault: a network of coordinates, the same for every image."""

    def __init__(self, spec, width):
        super().__init__(spec, width)
        self.map = nn.Linear(1, width, dtype=torch.float64)

    def features(self, pixels_NCYX):
        where = torch.linspace(-1, 1, self.slots, dtype=torch.float64)[:, None]
        return self.map(where).expand(len(pixels_NCYX), -1, -1)


class FrozenProjection(Encoder):
    """The ancestor's other fault: a random projection outside of the graph."""

    def __init__(self, spec, width):
        super().__init__(spec, width)
        self.map = nn.Linear(16, width, dtype=torch.float64)

    def features(self, pixels_NCYX):
        with torch.no_grad():
            return self.map(F.unfold(pixels_NCYX, 4, stride=4).transpose(1, 2) / 255)


@pytest.mark.parametrize(
    ("broken", "found"), [(CoordinatesOnly, ["image"]), (FrozenProjection, ["map.weight", "map.bias"])]
)
def test_encoders_that_do_not_see_or_do_not_learn_are_caught(broken, found):
    model = seeing("patch")
    model.vision = broken(encoder("patch"), model.width).double()
    assert blind(model, *inputs(model.vision.slots)) == found


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_every_architecture_takes_images_and_stays_causal_and_chunked(name):
    model = seeing("patch", name)
    tokens, images = inputs(model.vision.slots)
    first, length = TEXT + model.vision.slots + TEXT, tokens.shape[1]
    whole = model(tokens, images=images, key=5).logits

    later = images.pixels_BICYX.clone()
    later[:, 1] = 255 - later[:, 1]
    changed = model(tokens, images=Images(later, images.slots_BT), key=5).logits
    assert torch.equal(changed[:, :first], whole[:, :first])  # the second image is not known before its first slot
    if name != "identity":
        assert not torch.equal(changed[:, first:], whole[:, first:])
    other = tokens.clone()
    other[:, -TEXT:] = (other[:, -TEXT:] + 1) % V
    assert torch.equal(model(other, images=images, key=5).logits[:, :-TEXT], whole[:, :-TEXT])
    hidden = tokens.clone()
    hidden[images.slots_BT >= 0] = 0
    torch.testing.assert_close(model(hidden, images=images, key=5).logits, whole)  # ids at slots are not looked at

    for cuts in ([TEXT + 1, first + 1], [TEXT, first, length - 1]):  # also in the middle of an image
        state, parts = None, []
        for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
            here = slice(begin, end)
            out = model(tokens[:, here], state, images=images.at(slice(None), here), key=5 if state is None else None)
            parts.append(out.logits)
            state = out.state
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ENCODERS.names())
def test_rows_and_images_share_nothing(kind):
    model = seeing(kind)
    tokens, images = inputs(model.vision.slots, rows=3)
    whole = model(tokens, images=images).logits
    for row in range(3):
        here = slice(row, row + 1)
        alone = model(tokens[here], images=images.at(here, slice(None))).logits
        torch.testing.assert_close(alone, whole[here], rtol=1e-9, atol=1e-10)
    without = Images(images.pixels_BICYX, torch.full_like(images.slots_BT, -1))
    torch.testing.assert_close(model(tokens, images=without).logits, model(tokens).logits)


def test_the_order_of_images_is_that_of_their_slots():
    model = seeing("conv")
    tokens, images = inputs(model.vision.slots)
    count = model.vision.slots
    swapped = torch.where(images.slots_BT >= 0, (images.slots_BT + count) % (2 * count), -1)
    other = Images(images.pixels_BICYX.flip(1), swapped)
    torch.testing.assert_close(model(tokens, images=other).logits, model(tokens, images=images).logits)


@pytest.mark.parametrize("kind", ENCODERS.names())
@pytest.mark.parametrize("channels", [1, 3])
def test_costs_are_those_counted(kind, channels):
    made = encoder(kind, side=12, channels=channels).build(16)
    pixels = torch.randint(256, (5, channels, 12, 12), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        found = made(pixels)
    assert found.shape == (5, made.slots, 16)
    assert made.cost().params == sum(p.numel() for p in made.parameters())
    assert counter.get_total_flops() == pytest.approx(5 * made.cost().flops, rel=0.02)


def test_a_model_counts_its_encoder():
    model = seeing("conv")
    with_it, without = model.cost(40, images=2), model.cost(40)
    assert with_it.params == sum(p.numel() for p in model.parameters())
    assert with_it.flops - without.flops == pytest.approx(2 * model.vision.cost().flops / 40)


@pytest.mark.parametrize("kind", ENCODERS.names())
def test_embeddings_start_at_the_scale_of_tokens(kind):
    torch.manual_seed(0)
    found = encoder(kind).build(64)(torch.randint(256, (9, 1, SIDE, SIDE), dtype=torch.uint8))
    assert 0.9 < found.square().mean().sqrt() < 1.1
    assert (found[0] - found[1]).square().mean().sqrt() > 0.05  # and they differ between images


def test_the_wavelet_transform_keeps_what_there_is():
    image = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    rest, details = haar(image)
    assert details.shape == (3, 6, 4, 4)
    torch.testing.assert_close(rest.square().sum() + details.square().sum(), image.square().sum())
    flat, nothing = haar(torch.ones(1, 1, 4, 4))
    assert torch.equal(flat, torch.full((1, 1, 2, 2), 2.0))
    assert not nothing.any()


def test_learned_positions_are_told_at_slots_too():
    model = seeing("patch", positions="learned")
    tokens, images = inputs(model.vision.slots)
    before = model(tokens, images=images).logits
    with torch.no_grad():
        model.embed.positions.weight[TEXT + 1] += 1.0
    after = model(tokens, images=images).logits
    assert torch.equal(before[:, : TEXT + 1], after[:, : TEXT + 1])
    assert not torch.equal(before[:, TEXT + 1], after[:, TEXT + 1])


def test_one_graph_with_images():
    torch._dynamo.reset()
    model = seeing("conv").train()
    tokens, images = inputs(model.vision.slots)
    targets = tokens.roll(-1, 1).masked_fill(images.slots_BT >= 0, IGNORE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for call in (compiled, model):
        model.zero_grad()
        call(tokens, images=images, targets=targets, key=torch.tensor([1, 2])).nll_BT.sum().backward()
        grads = [p.grad.clone() for p in model.vision.parameters()]
        if call is compiled:
            kept = grads
    torch.testing.assert_close(kept, grads, rtol=1e-9, atol=1e-11)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ENCODERS.names())
def test_mixed_precision_gives_finite_embeddings(kind):
    made = encoder(kind).build(16)
    with torch.autocast("cpu", torch.bfloat16):
        found = made(torch.randint(256, (2, 1, SIDE, SIDE), dtype=torch.uint8))
    assert bool(found.isfinite().all())


def test_what_does_not_fit_is_refused():
    tokens, images = inputs(4)
    with pytest.raises(UserError, match="no encoder for images"):
        spec("transformer", "tiny").build(V)(tokens, images=images)
    with pytest.raises(ValueError, match="the encoder is one for"):
        encoder("conv").build(8)(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
    for kind, fields in (("patch", {"patch": 3}), ("siren", {"patch": 5}), ("wavelet", {"levels": 4})):
        with pytest.raises(ValueError, match=r"divide|divides"):
            encoder(kind, **fields)
