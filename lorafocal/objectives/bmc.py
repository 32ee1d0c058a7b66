"""DPO-BMC: tokens that the pair's other answer does not have weigh more, the more the less likely they are."""

from __future__ import annotations

from torch import Tensor


def weights(policy_tokens: Tensor, *, differs: Tensor, delta: float) -> Tensor:
    """1 + min(1 / pi, `delta`) where a token `differs` and 1 where not, (N,): 0 is DPO.

    pi is the policy's probability of the token, and the weight of its log-ratio: the same for policy and reference. The
    authors' code weighs the reference's log-probs by the reference's own probabilities, and never counts English stop
    words as differing, where their tokenizer makes one token of them.

    Source: Jiang et al. 2024, arXiv:2408.07471; YJiangcm/BMC.
    """
    return 1 + differs * (-policy_tokens).exp().clamp(max=delta)
