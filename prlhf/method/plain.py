"""The paper in plain code: one sequence at a time, over an unmodified Hugging Face causal LM (arXiv 2402.05133).

Data: comparisons (x, y1, y2, u). User u = (u_t, u_p) prefers response y1 to response y2 for prompt x. u_p is the user's
number, 0 for an unknown user. u_t is a text about the user and may be empty.

User model (section 4.1): f_P(u) = concat(f(u_p), f_ex(u_t)). f_ex(u_t) is the LM's own embedding of u_t, and f is one of

    uniform      f(u) = e
    individual   f(0) = e_0,  f(i) = e_0 + o_i
    cluster      f(u) = V w_u
    low rank     f(0) = e_0,  f(i) = e_0 + B z_i      (not in the paper)

Policy (section 4.2). Soft prompt: pi(y | x, u) = LM(y | BOS, f(u_p), u_t, x). Linear aggregator: the LM does not read
f(u_p); its head reads h' = W [h; f(u_p)] + b in place of each hidden state h. Not in the paper: f(u_p) stands at HERE.

P-DPO (eq. 5), with the frozen reference pi_SFT, which reads neither f(u_p) nor u_t:

    h(u) = [log pi(y1|x,u) - log pi_SFT(y1|x)] - [log pi(y2|x,u) - log pi_SFT(y2|x)]
    loss = mean over comparisons of  - alpha log sigma(beta h(u_t, u_p)) - (1 - alpha) log sigma(beta h(u_t, 0))

P-RM. With s the hidden state of y's last token, r(x,y,u) = v . s (soft prompt) or f(u_p) . s (linear head), and

    loss = mean over comparisons of  - alpha log sigma(r(x,y1,u) - r(x,y2,u)) - (1 - alpha) log sigma(r(x,y1,u_0) - r(x,y2,u_0))

Nothing here is batched, shared or cached. `models` computes the same from batches of preference trees, and the tests hold
the two equal in float64. Token ids are lists. x begins with BOS, and y ends with EOS.

Shape suffixes: U user vectors, D width, T positions, K clusters or rank, V vocabulary.
"""

import torch
from torch import Tensor, nn

from prlhf.method.losses import sigmoid_loss
from prlhf.method.users import ClusterUsers, IndividualUsers, UniformUsers

Tokens = list[int]
Preference = tuple[Tokens, Tokens, Tokens, Tokens, int]  # a comparison (x, y1, y2, u_t, u_p)
HERE = -1  # in x or y, where f(u_p) stands if not behind BOS: at the end of what the user said, or (P-RM) behind y


def user_vectors(users: nn.Module, u_p: int) -> Tensor:
    """f(u_p), (U, D)."""
    if isinstance(users, UniformUsers):
        return users.e_UD
    if isinstance(users, ClusterUsers):
        return mixture(users.w_MK[u_p], users.V_KUD, users.softmax)
    if u_p == 0:
        return users.e_UD
    if isinstance(users, IndividualUsers):
        return users.e_UD + users.offsets_MUD[u_p - 1] if users.shared else users.offsets_MUD[u_p - 1]
    return users.e_UD + mixture(users.z_MK[u_p - 1], users.B_KUD, users.softmax)  # LowRankUsers


def mixture(w_K: Tensor, V_KUD: Tensor, softmax: bool) -> Tensor:
    """V w = sum over k of w_k V_k, (U, D). With softmax the weights are exp(w_k) / sum over j of exp(w_j)."""
    if softmax:
        w_K = w_K.exp() / w_K.exp().sum()
    return sum(w * V_UD for w, V_UD in zip(w_K, V_KUD))


def embeddings(lm: nn.Module, x: Tokens, y: Tokens, u_t: Tokens, e_UD: Tensor | None) -> Tensor:
    """What the LM reads, (1, T, D): the embeddings of [BOS, f(u_p), u_t, x, y], or with f(u_p), e_UD, at HERE. None: without."""
    tokens = [*x[:1], *u_t, *x[1:], *y]
    at = tokens.index(HERE) if HERE in tokens else 1
    read_TD = lm.get_input_embeddings()(torch.tensor([t for t in tokens if t != HERE], device=lm.device))
    return read_TD[None] if e_UD is None else torch.cat([read_TD[:at], e_UD, read_TD[at:]])[None]


def hidden_states(lm: nn.Module, x: Tokens, y: Tokens, u_t: Tokens, e_UD: Tensor | None) -> Tensor:
    """The LM's last hidden states (T, D) over [BOS, f(u_p), u_t, x, y]."""
    return lm.base_model(inputs_embeds=embeddings(lm, x, y, u_t, e_UD)).last_hidden_state[0]


def log_prob(
    lm: nn.Module, x: Tokens, y: Tokens, u_t: Tokens, e_UD: Tensor | None, aggregator: nn.Linear | None = None
) -> Tensor:
    """log pi(y | x, u) = sum over y's tokens, EOS included, of log p(token | what is before it), ().

    With no u_t and no e_UD it is log pi_SFT(y | x). aggregator: W and b of the linear aggregator; None: soft prompt.
    """
    if aggregator is None:
        logits_TV = lm(inputs_embeds=embeddings(lm, x, y, u_t, e_UD)).logits[0]
    else:
        states_TD = hidden_states(lm, x, y, u_t, None)
        W, b, e_u = aggregator.weight, aggregator.bias, e_UD.flatten()
        logits_TV = lm.get_output_embeddings()(torch.stack([W @ torch.cat([h, e_u]) + b for h in states_TD]))
    log_p = torch.log_softmax(logits_TV[-len(y) - 1 : -1], dim=-1)  # each token is predicted one position before it
    return sum(log_p[t, token] for t, token in enumerate(y))


def margin(
    lm: nn.Module, sft: nn.Module, comparison: Preference, e_UD: Tensor, aggregator: nn.Linear | None = None
) -> Tensor:
    """h(u) of the policy `lm` against the reference `sft`, ()."""
    x, y1, y2, u_t, _ = comparison
    with torch.no_grad():
        ref_1, ref_2 = (log_prob(sft, x, y, [], None) for y in (y1, y2))
    log_1, log_2 = (log_prob(lm, x, y, u_t, e_UD, aggregator) for y in (y1, y2))
    return (log_1 - ref_1) - (log_2 - ref_2)


def p_dpo(
    lm: nn.Module,
    sft: nn.Module,
    users: nn.Module,
    comparisons: list[Preference],
    alpha: float,
    beta: float,
    aggregator: nn.Linear | None = None,
) -> Tensor:
    """The P-DPO loss, ()."""
    loss = torch.zeros(())
    for comparison in comparisons:
        for u, weight in ((comparison[-1], alpha), (0, 1 - alpha)):
            h = margin(lm, sft, comparison, user_vectors(users, u), aggregator)
            loss = loss + weight * sigmoid_loss(h, beta)
    return loss / len(comparisons)


def pooled(states_TD: Tensor, length: int, pooling: str) -> Tensor:
    """s of a response of `length` tokens: its last token's state, the mean over its tokens, or both side by side."""
    last, mean = states_TD[-1], states_TD[-length:].mean(dim=0)
    return {"last": last, "mean": mean, "both": torch.cat([last, mean])}[pooling]


def reward(
    lm: nn.Module, x: Tokens, y: Tokens, u_t: Tokens, e_UD: Tensor, v: Tensor | None, pooling: str = "last"
) -> Tensor:
    """r(x, y, u), (): v . s, where the LM has read f(u_p) as a soft prompt; with v=None f(u_p) . s, the linear head."""
    if v is None:
        return e_UD[0] @ pooled(hidden_states(lm, x, y, u_t, None), len(y), pooling)
    return v @ pooled(hidden_states(lm, x, y, u_t, e_UD), len(y), pooling)


def p_rm(
    lm: nn.Module,
    users: nn.Module,
    comparisons: list[Preference],
    alpha: float,
    v: Tensor | None,
    pooling: str = "last",
) -> Tensor:
    """The P-RM loss, ()."""
    loss = torch.zeros(())
    for x, y1, y2, u_t, u_p in comparisons:
        for u, weight in ((u_p, alpha), (0, 1 - alpha)):
            r1, r2 = (reward(lm, x, y, u_t, user_vectors(users, u), v, pooling) for y in (y1, y2))
            loss = loss + weight * sigmoid_loss(r1 - r2, beta=1.0)
    return loss / len(comparisons)
