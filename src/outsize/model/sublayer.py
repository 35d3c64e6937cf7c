"""The sub-layers of a layer: attention, and a feed-forward (dense, or a mixture of experts).

Shapes: T rows, D model width, H query heads, J key heads, E numbers a head.
"""

from __future__ import annotations

import torch

from outsize.kernels.norm import RMSNorm
from outsize.model.attention import vector
from outsize.model.dropped import SummedAttention, SummedFfn
from outsize.model.ffn.dense import Dense, Ungated
from outsize.model.ffn.experts import (
    Beside,
    Mixture,
    Norms,
    Owned,
    OwnRouting,
    Router,
    SharedExpert,
)
from outsize.model.half import Runnable, SubLayer
from outsize.model.joint import ALONE, Ends, joint
from outsize.model.layers import Linear
from outsize.model.mixer import mixer
from outsize.model.norms import post_norm, pre_norm, shown
from outsize.model_config import Description
from outsize.model_config import Mixture as MixtureConfig
from outsize.pack.specs import OUT_SCALE
from outsize.parallel.collective import Collective
from outsize.storage.table import Weights, activation_type
from outsize.weights.experts import ExpertBank


def attention_sublayer(
    d: Description, index: int, w: Weights, ranks: Collective | None = None
) -> Runnable:
    body = shown(mixer(d, index, w)) if d.parallel else mixer(d, index, w)
    bias_D = vector(w["o_bias"]) if d.o_bias else None
    norm = pre_norm(d, w, "attn_norm", activation_type(w["o"]))
    ends = Ends(d.residual_scale, joint(d, index, "attention", ranks))
    made = SubLayer(norm, body, post_norm(d, w, "attn_post_norm"), bias_D, ends)
    return made if ranks is None or ends.joint is ALONE else SummedAttention(made, index, ranks)


def ffn_sublayer(
    d: Description, index: int, w: Weights, ranks: Collective | None = None
) -> Runnable:
    norm = None if d.parallel else pre_norm(d, w, "ffn_norm", activation_type(w["gate_up"]))
    inner_bias, bias_D = (
        (vector(w["gate_up_bias"]), vector(w["down_bias"])) if d.mlp_bias else (None, None)
    )
    whole = joint(d, index, "ffn", ranks)
    maps = Linear(w["gate_up"]), Linear(w["down"])
    dense = (Ungated if d.two_matrix else Dense)(maps, d.activation, index, inner_bias, whole)
    ends = Ends(d.residual_scale, whole)
    made = SubLayer(norm, dense, post_norm(d, w, "ffn_post_norm"), bias_D, ends)
    return made if ranks is None or whole is ALONE else SummedFfn(made, index, ranks)


def mixture_sublayer(
    d: Description, bank: ExpertBank, w: Weights, ranks: Collective | None = None
) -> Mixture:
    norm = RMSNorm(vector(w["ffn_norm"]), d.norm_eps, bank.activation_type)
    (router,) = w["router"]
    bias = vector(w["router_bias"]) if "router_bias" in w else None
    choice = vector(w["choice_bias"]) if "choice_bias" in w else None
    made = mixture_of(d)
    shared = shared_expert(d, w) if made.shared else None
    numbers = router.encoding.decode(router.fields)
    owned = None if ranks is None else Owned(ranks, bank.layer)
    return Mixture(d, Router(norm, numbers, made, bias, choice), bank, shared, owned)


def beside_sublayer(d: Description, bank: ExpertBank, w: Weights) -> Beside:
    """Experts with a dense feed-forward beside them."""

    def norm(name: str, dtype: torch.dtype = torch.float32) -> RMSNorm:
        return RMSNorm(vector(w[name]), d.norm_eps, dtype)

    (router,), kind = w["router"], bank.activation_type
    own = RMSNorm(vector(w["router_scale"]) * d.width**-0.5, d.norm_eps, torch.float32)
    routing = OwnRouting(own, vector(w["expert_scale"]))
    numbers = router.encoding.decode(router.fields)
    chosen = Router(norm("experts_norm", kind), numbers, mixture_of(d), own=routing)
    posts = norm("dense_post_norm"), norm("experts_post_norm"), norm("ffn_post_norm")
    ends = Norms(norm("ffn_norm", kind), *posts), scale_of(d, w)
    return Beside(d, chosen, bank, shared_expert(d, w), ends)


def scale_of(d: Description, w: Weights) -> float:
    """What the residual stream is multiplied by at a layer's end."""
    return float(vector(w[OUT_SCALE])) if d.out_scale else 1.0


def mixture_of(d: Description) -> MixtureConfig:
    assert d.mixture is not None
    return d.mixture


def shared_expert(d: Description, w: Weights) -> SharedExpert:
    """The expert that all tokens use."""
    gate_D = vector(w["shared_router"]) if "shared_router" in w else None
    dense = Dense((Linear(w["shared_gate_up"]), Linear(w["shared_down"])), d.activation)
    return SharedExpert(dense, gate_D)
