"""The router: which experts each token visits, with which weights, and what keeps their load even. Always in fp32.

Auxiliary losses and statistics ride on autograd. The routing weights pass through `_Attach`, whose backward pass adds
the gradient of the auxiliary losses, and gives the leaf `probe` the statistics of this pass as its gradient. So every
microbatch counts once, also if a block is recomputed, compiled, or in a pipeline, and nothing else has to be returned.

Shape suffixes: B rows, S tokens of a row on this rank, R of a full row, T = B*S, K experts of a token, E experts,
G groups, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model.moe.capacity import drop_overflow
from pretrain.model.moe.rows import FullRows, RowRanks, hash_int64, uniform

N_SUMS = 4
"""After the E counts, a layer's statistics have these sums over tokens: weighted auxiliary loss, weighted z-loss,
entropy of the scores in nats, dropped assignments."""


class Routing(NamedTuple):
    """Where the tokens of a pass go."""

    expert_TK: Tensor
    """Experts, int64, best first. `n_experts` stands for a dropped assignment."""
    weight_TK: Tensor
    """Factors of the experts' outputs, fp32."""
    key_TK: Tensor | None
    """Random keys for expert dropout, int64; None without it."""


class Router(nn.Module):
    """Scores all experts for each token and chooses the `top_k` best. Hugging Face's module `mlp.gate`."""

    e_score_correction_bias: Tensor
    """[E], added to the scores when experts are chosen (arXiv:2408.15664). Only with `expert_bias`."""
    expert_load: Tensor
    """[E], fraction of the assignments of the last global batch."""
    probe: Tensor
    """[E + N_SUMS], zeros: its gradient is the statistics of the training passes of a step."""
    evaluation_sums: Tensor
    """[E + N_SUMS], the statistics of passes without gradients."""
    token_scale: Tensor
    """1 / tokens of the global batch."""
    layer_key: Tensor
    """Number of the layer, for random keys: the compiler would make a graph for each number."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config.moe, layer
        E = config.moe.n_experts
        self.weight = nn.Parameter(torch.empty(E, config.d_model))
        # The load is kept even if no auxiliary loss reads it: checkpoints then fit whatever the balancing settings are.
        self.saved = ["expert_load", *(["e_score_correction_bias"] if config.moe.expert_bias else [])]
        for name in self.saved:  # in transformers only the bias has a name
            self.register_buffer(name, torch.empty(E), persistent=name == "e_score_correction_bias")
        self.register_buffer("probe", torch.empty(E + N_SUMS, dtype=torch.float64), persistent=False)
        self.register_buffer("evaluation_sums", torch.empty(E + N_SUMS, dtype=torch.float64), persistent=False)
        self.register_buffer("token_scale", torch.empty(()), persistent=False)
        self.register_buffer("layer_key", torch.empty((), dtype=torch.int64), persistent=False)
        self.row_ranks: RowRanks = FullRows()
        self.reset_buffers()

    def reset_buffers(self, device: torch.device | None = None) -> None:
        """Make new buffers with the values of the start of training: no bias, even load.

        They lie on `device`, or where they were. New, because moving a module makes `probe` the result of an operator,
        and autograd gives gradients to leaves only.
        """
        start = {"expert_load": 1 / self.config.n_experts, "layer_key": self.layer}
        for name, buffer in list(self.named_buffers()):
            setattr(self, name, torch.full_like(buffer, start.get(name, 0), device=device or buffer.device))
        self.probe.requires_grad_()

    def forward(self, x_BSD: Tensor, row_keys_B: Tensor | None) -> Routing:
        """Route the tokens.

        Args:
            x_BSD: of any dtype.
            row_keys_B: see `rows.row_keys`; None if all rows count and nothing is random.

        Raises:
            ValueError: something is random, and there are no keys.
        """
        token_keys_BS = None
        if self._is_random and torch.is_grad_enabled():
            if row_keys_B is None:
                raise ValueError("model.moe.input_jitter and expert_dropout need the Microbatch.row_ids of the rows")
            token_keys_BS = self._token_keys(x_BSD, row_keys_B)
        x_BSD = x_BSD.float()
        if token_keys_BS is not None and self.config.input_jitter:
            x_BSD = x_BSD * _jitter(token_keys_BS, x_BSD.shape[-1], self.config.input_jitter)
        logits_BSE = F.linear(x_BSD, self.weight.float())
        scores_BSE = logits_BSE.softmax(-1) if self.config.score_function == "softmax" else logits_BSE.sigmoid()
        expert_BSK = self._choose(scores_BSE.detach())
        weight_BSK = self._weights(logits_BSE, scores_BSE, expert_BSK)
        kept_BSK = self._drop(expert_BSK, weight_BSK.detach())
        weight_BSK = self._attach(weight_BSK, logits_BSE, scores_BSE, expert_BSK, kept_BSK, row_keys_B)
        key_TK = None
        if token_keys_BS is not None and self.config.expert_dropout:
            key_TK = hash_int64(token_keys_BS.flatten()[:, None] + expert_BSK.flatten(0, 1))
        return Routing(kept_BSK.flatten(0, 1), weight_BSK.flatten(0, 1), key_TK)

    @property
    def _is_random(self) -> bool:
        return self.config.input_jitter > 0 or self.config.expert_dropout > 0

    def _token_keys(self, x_BSD: Tensor, row_keys_B: Tensor) -> Tensor:
        """A key for each token, from its row, its position in it and the layer."""
        positions_R = torch.arange(x_BSD.shape[1] * self.row_ranks.size, device=x_BSD.device)
        positions_BS = self.row_ranks.local(positions_R.expand(len(x_BSD), -1))
        return hash_int64(hash_int64(row_keys_B + self.layer_key)[:, None] + positions_BS)

    def _choose(self, scores_BSE: Tensor) -> Tensor:
        """The K best experts of each token, best first: [B, S, K]. The bias has a say in this only."""
        moe = self.config
        if moe.expert_bias:
            scores_BSE = scores_BSE + self.e_score_correction_bias
        if moe.n_groups > 1:
            scores_BSGE = torch.unflatten(scores_BSE, -1, (moe.n_groups, -1))
            n_best = 1 if moe.score_function == "softmax" else 2
            groups_BSG = scores_BSGE.topk(n_best, dim=-1).values.sum(-1).topk(moe.top_k_groups, dim=-1).indices
            allowed_BSG = torch.zeros_like(scores_BSGE[..., 0], dtype=torch.bool).scatter(-1, groups_BSG, True)
            scores_BSE = scores_BSGE.masked_fill(~allowed_BSG[..., None], float("-inf")).flatten(-2)
        return scores_BSE.topk(moe.top_k, dim=-1).indices

    def _weights(self, logits_BSE: Tensor, scores_BSE: Tensor, expert_BSK: Tensor) -> Tensor:
        """The factors of the chosen experts' outputs: [B, S, K]."""
        moe = self.config
        if moe.softmax_after_top_k:
            weight_BSK = logits_BSE.gather(-1, expert_BSK).softmax(-1)
        else:
            weight_BSK = scores_BSE.gather(-1, expert_BSK)
            if moe.normalize_top_k and moe.top_k > 1:
                weight_BSK = weight_BSK / (weight_BSK.sum(-1, keepdim=True) + 1e-20)
        return weight_BSK * moe.routed_scaling_factor

    def _drop(self, expert_BSK: Tensor, weight_BSK: Tensor) -> Tensor:
        """The experts, with `n_experts` in place of those that have no room left."""
        if self.config.capacity_factor is None:
            return expert_BSK
        expert_BRK, weight_BRK = self.row_ranks.gather(expert_BSK), self.row_ranks.gather(weight_BSK)
        return self.row_ranks.local(drop_overflow(expert_BRK, weight_BRK, self.config))

    def _attach(
        self,
        weight_BSK: Tensor,
        logits_BSE: Tensor,
        scores_BSE: Tensor,
        expert_BSK: Tensor,
        kept_BSK: Tensor,
        row_keys_B: Tensor | None,
    ) -> Tensor:
        """The weights. Their backward pass adds the gradient of the auxiliary losses and counts the statistics."""
        moe, E = self.config, self.config.n_experts
        counted_B = torch.ones(len(weight_BSK), device=weight_BSK.device)
        if row_keys_B is not None:
            counted_B = (row_keys_B >= 0).float()
        log_sum_BS = logits_BSE.logsumexp(-1)
        if moe.score_function == "softmax":
            share_BSE = scores_BSE
            entropy_BS = log_sum_BS - (scores_BSE * logits_BSE).sum(-1)
        else:
            share_BSE = scores_BSE / scores_BSE.sum(-1, keepdim=True)
            entropy_BS = -torch.xlogy(share_BSE, share_BSE).sum(-1)
        counts_BE = torch.zeros_like(logits_BSE[:, 0]).scatter_add_(
            1, expert_BSK.flatten(1), torch.ones_like(weight_BSK).flatten(1)
        )
        counts_BE = counts_BE.detach() * counted_B[:, None]
        aux = (self._load(counts_BE, weight_BSK.shape[1]) * share_BSE.sum(1) * counted_B[:, None]).sum()
        aux = moe.aux_loss * E * aux
        z_loss = moe.router_z_loss * (log_sum_BS.square().sum(1) * counted_B).sum()
        dropped = ((kept_BSK == E).sum((1, 2)) * counted_B).sum()
        sums = torch.stack((aux, z_loss, (entropy_BS.sum(1) * counted_B).sum(), dropped)).detach()
        values = torch.cat((counts_BE.sum(0), sums)).double()
        if not torch.is_grad_enabled():
            self.evaluation_sums.add_(values)
            return weight_BSK
        inputs = weight_BSK, (aux + z_loss) * self.token_scale, self.probe, values
        attached: Tensor = _Attach.apply(*inputs)  # type: ignore[no-untyped-call]  # untyped in torch
        return attached

    def _load(self, counts_BE: Tensor, S: int) -> Tensor:
        """f, the fraction of the assignments that each expert has: [1, E], or [B, E] for each row."""
        moe = self.config
        if not moe.aux_loss:
            return torch.zeros_like(counts_BE)
        if moe.aux_loss_scope == "global_batch":
            return self.expert_load[None]
        counts_BE = self.row_ranks.sum(counts_BE)
        if moe.aux_loss_scope == "microbatch":
            counts_BE = counts_BE.sum(0, keepdim=True)
        return counts_BE / counts_BE.sum(1, keepdim=True).clamp(min=1)

    # The rest is what `parallel.engine.RoutedLayer` asks for.

    @property
    def saved_buffers(self) -> dict[str, Tensor]:
        """{name: buffer} of what a checkpoint holds."""
        return {name: getattr(self, name) for name in self.saved}

    @torch.no_grad()
    def begin_step(self, token_scale: Tensor) -> None:
        """Prepare the passes of a step over 1 / `token_scale` tokens. What was counted before is forgotten."""
        self.token_scale.copy_(token_scale)
        self.evaluation_sums.zero_()
        self.probe.grad = None

    @torch.no_grad()
    def take_sums(self) -> Tensor:
        """Return the statistics since the last call, or since `begin_step`: fp64 [E + N_SUMS]."""
        sums = self.evaluation_sums.clone() if self.probe.grad is None else self.evaluation_sums + self.probe.grad
        self.evaluation_sums.zero_()
        self.probe.grad = None
        return sums

    @torch.no_grad()
    def end_step(self, sums: Tensor) -> None:
        """Balance the load by the statistics of the global batch, the same on all ranks."""
        counts_E = sums[: self.config.n_experts]
        if self.config.expert_bias:  # arXiv:2408.15664, algorithm 1
            error_E = counts_E.mean() - counts_E
            self.e_score_correction_bias.add_(error_E.sign().float(), alpha=self.config.bias_update_rate)
        self.expert_load.copy_(counts_E / counts_E.sum().clamp(min=1))


class _Attach(torch.autograd.Function):
    """The weights. Backward also sends a gradient of 1 to `loss`, and `values` to `probe`."""

    # Any: torch's context takes any attribute.
    @staticmethod
    def forward(ctx: Any, weight: Tensor, loss: Tensor, probe: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # Any: as above
        (values,) = ctx.saved_tensors
        return grad, torch.ones((), device=grad.device), values, None


def _jitter(token_keys_BS: Tensor, D: int, size: float) -> Tensor:
    """Uniform noise in [1 - size, 1 + size], [B, S, D]."""
    features_D = torch.arange(D, device=token_keys_BS.device)
    return 1 - size + 2 * size * uniform(token_keys_BS[..., None] + features_D)
