"""APEL-R: a language model whose next token is a mixture over plans, under a belief filtered along the text."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from stepladder.core.config import Field
from stepladder.core.errors import UserError
from stepladder.models.base import Part
from stepladder.models.heads.experts import Experts, OwnHeads, SharedHead
from stepladder.models.heads.foresight import Foresight
from stepladder.models.heads.plan_losses import NAMES, PlanLosses
from stepladder.models.heads.planner import Plan, PlannerHead
from stepladder.models.layers import residual_gain
from stepladder.models.lm import LanguageModel
from stepladder.models.mixers.attention import Attention
from stepladder.models.mixers.gru import GRU, units_like_attention
from stepladder.models.mixers.mamba2 import Mamba2
from stepladder.models.recurrences.once import Once
from stepladder.models.spec import AttentionMacro, architecture
from stepladder.models.stack import Stack

TINY = {
    "width": 16,
    "depth": 2,
    "plans": 3,
    "chunk": 3,
    "usage": 0.05,
    "boundary_entropy": 0.02,
    "plan_mi": 0.1,
    "repetition": 0.02,
    "bag_of_words": 0.02,
    "window": 4,
    "contrastive": 0.1,
    "negatives": 3,
    "sampled": 0.5,
}


class Planned(AttentionMacro):
    """What both versions share: an executor of this house under a planner's head. See apelr_v2."""

    executor: Literal["attention", "gru", "mamba2"] = Field("attention", description="the mixer of the blocks")
    inner: int | None = Field(None, ge=1, description="gru: units; default: the parameters of attention")
    head_width: int = Field(64, ge=1, description="mamba2: channels of a head; divides 2 x width")
    state: int = Field(64, ge=1, description="mamba2: state size of a channel")

    plans: int = Field(8, ge=1, description="plans K; 1 = the executor with a softmax head")
    chunk: int = Field(16, ge=1, description="tokens of a document from one move of the plan to the next")
    filtering: bool = Field(True, description="whether tokens are evidence; else the belief stays through a chunk")
    context: Literal["mean", "last", "none"] = Field("mean", description="hidden states that are evidence at a move")
    self_bias: float = Field(1.8, description="logit of staying with a plan, at the start; of all others: 0")
    lookahead: int = Field(2, ge=0, description="chunks ahead that the gate's forecast averages; 0 = none")
    feedback: float = Field(0.25, ge=0, le=1, description="share of the forecast in the gate")
    temperature: float = Field(1.0, gt=0, description="of the gate; the belief itself has none")
    commitment: Literal["soft", "hard"] = Field("soft", description="hard: a plan is sampled at every move")
    commit_temperature: float = Field(1.0, gt=0, description="hard: of the softmax that lends a sample its slope")
    leak: float = Field(1e-4, gt=0, lt=1, description="hard: belief that stays with all plans")
    control: Literal["filtered", "frozen", "uniform", "forced"] = Field(
        "filtered",
        description="filtered: the planner; else a fixed gate of the same parameters: prior, uniform, one plan",
    )
    forced: int = Field(0, ge=0, description="forced: which plan")
    scan: Literal["parallel", "naive"] = Field("parallel", description="one scan over chunks, or the loop over tokens")

    usage: float = Field(0.0, ge=0, description="price of unequal use of plans, in nats, in the objective")
    boundary_entropy: float = Field(0.0, ge=0, description="price of an unsure belief at a chunk's start")
    token_entropy: float = Field(0.0, ge=0, description="price of an unsure belief at a token")
    posterior: float = Field(0.0, ge=0, description="price of a belief that a chunk's mean state does not tell")
    plan_mi: float = Field(0.0, ge=0, description="worth of information of the plan about the next token")
    plan_js: float = Field(0.0, ge=0, description="worth of divergence between experts")
    repetition: float = Field(0.0, ge=0, description="price of probability of what the window holds")
    bag_of_words: float = Field(0.0, ge=0, description="price of a chunk's words that its first belief does not expect")
    contrastive: float = Field(0.0, ge=0, description="price of plans that do not foresee their document's chunks")
    future: int = Field(2, ge=1, description="contrastive: chunks ahead")
    negatives: int = Field(16, ge=1, description="contrastive: earlier chunks that the one to come is told from")
    contrast_temperature: float = Field(1.0, gt=0, description="contrastive: divides the cosines")
    window: int = Field(32, ge=1, description="repetition: tokens that the window holds")
    sampled: float = Field(0.125, gt=0, le=1, description="share of tokens for terms over the whole vocabulary")

    twins: ClassVar[tuple[dict[str, Any], ...]] = ({"scan": "naive"},)
    first: ClassVar[int] = 1
    """Tokens of a document before the first that counts for chunks: with 1, moves lie behind m, 2m, ... tokens."""

    def mixer(self) -> Part:
        """One mixer of the executor."""
        gain = residual_gain(self.depth)
        if self.executor == "gru":
            return GRU(self.width, self.inner or units_like_attention(self.width), "fused", gain)
        if self.executor == "mamba2":
            return Mamba2(self.width, 2 * self.width, self.head_width, 1, self.state, 4, "chunked", 64, gain)
        base = self.rope_base if self.positions == "rope" else None
        return Attention(self.width, self.heads, self.kv_heads or self.heads, base, gain)

    def experts(self, vocab: int) -> Experts:
        """The distributions that are mixed."""
        raise NotImplementedError

    def build(self, vocab: int) -> LanguageModel:
        if self.tied:
            raise UserError("tied=true: an embedding cannot be the head of several experts; leave tied out")
        parts = [part for _ in range(self.depth) for part in self.block(self.mixer(), self.depth)]
        plan = Plan(
            self.plans,
            self.chunk,
            self.first,
            self.filtering,
            self.context,
            self.self_bias,
            self.lookahead,
            self.feedback,
            self.temperature,
            self.commitment,
            self.commit_temperature,
            self.leak,
            self.control,
            self.forced,
            self.scan,
        )
        prices = {name: getattr(self, name) for name in NAMES}
        foresight = Foresight(
            self.width, self.plans, self.chunk, self.future, self.negatives, self.contrast_temperature
        )
        shape = self.width, self.plans, self.chunk, self.first
        losses = PlanLosses(prices, *shape, self.window, self.sampled, foresight)
        head = PlannerHead(self.width, self.experts(vocab), plan, losses)
        core = Once(Stack(parts))
        return LanguageModel(vocab, self.width, core, learned_positions=self.learned_positions, head=head)


@architecture("apelr_v2", tiny={**TINY, "heads": 2}, aliases=("apelr",))
class PlannerRequired(Planned):
    """Every plan has a head of its own: without the planner's gate there is no way to the vocabulary.

    Source: version 2 of the APEL-R prototype (spec "apelr", 2.2 and 2.3), which has no results at equal parameters;
    filtering is the forward pass of a hidden Markov model (Rabiner, 1989), the head a mixture of softmaxes (Yang et
    al., 2018) whose gate is the planner. Against ``transformer``, ``gru`` or ``ssm`` (by ``executor``) the head is the
    one thing that differs, and with ``plans: 1`` it is that control. Differs from the prototype in, and why:

    - Logarithms without epsilon, in float32 or wider: there 1e-9 was added once a chunk in training and once a token in
      generation, which with sharp experts is another model; in half precision it was 0.
    - One definition: lookahead, filtering, temperature and commitment are the configuration's and hold in training,
      scoring and decoding, prompts included. Plans sampled in training (``commitment: hard``) are sampled in decoding.
    - A forced plan is its expert, at any temperature; controls have all the planner's parameters.
    - One map of the context (there two of the same vector, added), and no separate scale for it.
    - Documents, not windows: state, belief and chunks begin at a document's first token, and go on from call to call.
    - Terms of the loss are made token by token from the past of the document (heads.plan_losses): nothing is
      taken over the batch.
    - Blocks of this house as executor (there a stack of GRUs without residuals), no dropout in front of the experts
      (there it entered the likelihoods that were filtered), no biases of experts.

    K heads cost K heads: at large vocabularies they are most of the parameters, so match by parameters.
    """

    def experts(self, vocab: int) -> Experts:
        return OwnHeads(self.width, vocab, self.plans)


@architecture(
    "apelr_v1",
    tiny={
        **TINY,
        "executor": "gru",
        "inner": 12,
        "fusion": 12,
        "posterior": 0.1,
        "token_entropy": 0.01,
        "plan_js": 0.1,
    },
)
class FilteredMixture(Planned):
    """One head that is told the plan; the belief is filtered, and gates the mixture as it is.

    Source: version 1 of the APEL-R prototype (spec "apelr", 1.1 and 2.1). Moves lie behind m + 1, 2m + 1, ... tokens of
    a document and hear the last hidden state, as there. Differs from it as apelr_v2 does, and in heads.experts.
    """

    context: Literal["mean", "last", "none"] = Field("last", description="hidden states that are evidence at a move")
    self_bias: float = Field(1.5, description="logit of staying with a plan, at the start; of all others: 0")
    lookahead: int = Field(0, ge=0, description="chunks ahead that the gate's forecast averages; 0 = none")
    feedback: float = Field(0.0, ge=0, le=1, description="share of the forecast in the gate")
    fusion: int | None = Field(None, ge=1, description="width in front of the vocabulary; default: width")

    first: ClassVar[int] = 0

    def experts(self, vocab: int) -> Experts:
        return SharedHead(self.width, self.fusion or self.width, vocab, self.plans)
