"""The mixture of experts as a module: what a layer has as `mlp`, with the names that transformers uses.

Shape suffixes: B rows, S tokens of a row, T = B*S, X rows of expert input, E experts, D model width, F hidden width of
an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model.attention import DocumentMask
from pretrain.model.mlp import MLP
from pretrain.model.moe.dispatch import Dispatcher, ExpertRows, LocalDispatcher
from pretrain.model.moe.grouped import grouped_swiglu
from pretrain.model.moe.loop import loop_swiglu
from pretrain.model.moe.router import Router
from pretrain.model.moe.rows import uniform


class Experts(nn.Module):
    """The SwiGLU MLPs of all experts of a rank, stacked."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, F = config.moe.n_experts, config.d_model, config.moe.d_ff
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, D))
        """Of each expert the gate's rows, then those of up."""
        self.down_proj = nn.Parameter(torch.empty(E, D, F))
        self.dropout = config.moe.expert_dropout
        self.first_feature = 0
        """Index of this rank's first hidden feature, if ranks share out the hidden width."""

    def forward(self, rows: ExpertRows) -> Tensor:
        """Return [X, D]: weight * down(silu(gate(x)) * up(x)) of each row by its expert."""
        arguments = rows.x_XD, self.gate_up_proj, self.down_proj, rows.weight_X, rows.offsets_E
        if rows.key_X is None:
            return grouped_swiglu(*arguments)
        features_F = torch.arange(self.down_proj.shape[2], device=rows.x_XD.device) + self.first_feature
        kept_XF = uniform(rows.key_X[:, None] + features_F) >= self.dropout
        return loop_swiglu(*arguments, scale_XF=kept_XF / (1 - self.dropout))


class MoE(nn.Module):
    """The sum of a token's chosen experts, weighted by the router, and of the shared experts."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        moe = config.moe
        self.gate = Router(config, layer)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.d_model, moe.shared_d_ff) if moe.n_shared_experts else None
        self.shared_expert_gate = nn.Linear(config.d_model, 1, bias=False) if moe.shared_expert_gate else None
        self.dispatcher: Dispatcher = LocalDispatcher(moe.n_experts, drops=moe.capacity_factor is not None)

    def forward(self, x_BSD: Tensor, mask: DocumentMask) -> Tensor:
        """[B, S, D] -> [B, S, D]. The shared experts compute while tokens travel to other ranks."""
        routing = self.gate(x_BSD, mask.row_keys_B)
        in_flight = self.dispatcher.send(x_BSD.flatten(0, 1), routing.expert_TK, routing.weight_TK, routing.key_TK)
        shared_BSD = self._shared(x_BSD)
        y_XD = self.experts(self.dispatcher.receive(in_flight))
        out_BSD = self.dispatcher.combine(y_XD, in_flight).view_as(x_BSD)
        return out_BSD if shared_BSD is None else out_BSD + shared_BSD

    def _shared(self, x_BSD: Tensor) -> Tensor | None:
        if self.shared_experts is None:
            return None
        out_BSD: Tensor = self.shared_experts(x_BSD)
        return out_BSD if self.shared_expert_gate is None else self.shared_expert_gate(x_BSD).sigmoid() * out_BSD
