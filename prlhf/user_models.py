"""f_im, the implicit user model: user number u_p -> T_u vectors of the backbone's width (paper, section 4.1).

    uniform      f(u) = e                      the same for all: vanilla (T_u may be 0)
    individual   f(0) = e_0,  f(i) = e_0 + o_i           (without a shared component: f(i) = o_i)
    cluster      f(u) = V w_u,  V of shape (K, T_u, D), w_u in R^K or, with softmax, on the simplex

What users do not share lies in `tables`, one row a user. A batch reads a few rows, and its gradient is one of these rows.

Shape suffixes: B users asked for, M users known, U = T_u vectors a user, D width, K clusters, V vocabulary, R rows.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prlhf.config import UserModelConfig


class _ReadRows(torch.autograd.Function):
    """As nn.functional.embedding with sparse=True, for a table of any number of dimensions."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows_B: Tensor) -> Tensor:
        ctx.save_for_backward(rows_B)
        ctx.shape = table.shape
        return table.index_select(0, rows_B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows_B,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(rows_B[None], grad, ctx.shape, check_invariants=False), None


def read_rows(table: Tensor, rows_B: Tensor) -> Tensor:
    """Rows (B, ...) of a table (rows, ...), whose gradient for the table is sparse: COO over dim 0."""
    return _ReadRows.apply(table, rows_B)


class UniformUsers(nn.Module):
    """f(u) = e for every user."""

    def __init__(self, e_UD: Tensor):
        super().__init__()
        self.e_UD = nn.Parameter(e_UD)

    @property
    def tokens(self) -> int:
        """T_u."""
        return self.e_UD.shape[0]

    @property
    def tables(self) -> list[nn.Parameter]:
        """None: nothing differs between users."""
        return []

    def rows_of(self, users: Iterable[int]) -> Tensor:
        """The rows of `tables` that these users read: none, (0,)."""
        return torch.zeros(0, dtype=torch.long)

    def forward(self, users_B: Tensor) -> Tensor:
        """(B,) user numbers -> (B, U, D)."""
        return self.e_UD.expand(len(users_B), -1, -1)


class IndividualUsers(nn.Module):
    """f(0) = e_0 and f(i) = e_0 + o_i: what users share, and how each one differs; not `shared`: f(i) = o_i."""

    def __init__(self, e_UD: Tensor, offsets_MUD: Tensor, shared: bool = True):
        super().__init__()
        self.e_UD = nn.Parameter(e_UD)
        self.offsets_MUD = nn.Parameter(offsets_MUD)
        self.shared = shared

    @property
    def tokens(self) -> int:
        """T_u."""
        return self.e_UD.shape[0]

    @property
    def tables(self) -> list[nn.Parameter]:
        """Parameters with one row a user: the offsets."""
        return [self.offsets_MUD]

    def rows_of(self, users: Iterable[int]) -> Tensor:
        """The rows of `tables` that known ones of these users read, (R,), each once: i - 1 of user i."""
        return torch.tensor(sorted({user - 1 for user in users if user}), dtype=torch.long)

    def forward(self, users_B: Tensor) -> Tensor:
        """(B,) user numbers, 0 for unknown -> (B, U, D)."""
        if len(self.offsets_MUD) == 0:
            return self.e_UD.expand(len(users_B), -1, -1)
        known_B = (users_B > 0)[:, None, None]
        offsets_BUD = read_rows(self.offsets_MUD, (users_B - 1).clamp(min=0))
        if not self.shared:
            return torch.where(known_B, offsets_BUD, self.e_UD)
        return self.e_UD + torch.where(known_B, offsets_BUD, 0.0)


class ClusterUsers(nn.Module):
    """f(u) = V w_u: every user, the unknown one included, is a mixture of K archetypes."""

    def __init__(self, V_KUD: Tensor, w_MK: Tensor, softmax: bool):
        super().__init__()
        self.V_KUD = nn.Parameter(V_KUD)
        self.w_MK = nn.Parameter(w_MK)  # M + 1 rows: row 0 is the unknown user
        self.softmax = softmax

    @property
    def tokens(self) -> int:
        """T_u."""
        return self.V_KUD.shape[1]

    @property
    def tables(self) -> list[nn.Parameter]:
        """Parameters with one row a user: the weights."""
        return [self.w_MK]

    def rows_of(self, users: Iterable[int]) -> Tensor:
        """The rows of `tables` that these users read, (R,), each once: u of user u."""
        return torch.tensor(sorted(set(users)), dtype=torch.long)

    def forward(self, users_B: Tensor) -> Tensor:
        """(B,) user numbers, 0 for unknown -> (B, U, D)."""
        w_BK = read_rows(self.w_MK, users_B)
        if self.softmax:
            w_BK = w_BK.softmax(dim=-1)
        return torch.einsum("bk,kud->bud", w_BK, self.V_KUD)


def is_personal(user_model: nn.Module, alpha: float) -> bool:
    """Whether training with this alpha gives known users vectors of their own; if not, all are the generic user."""
    return alpha > 0 and not isinstance(user_model, UniformUsers)


def build_user_model(
    config: UserModelConfig,
    users: int,
    vocabulary_VD: Tensor,
    generator: torch.Generator,
    reward_head: bool = False,
    read_as: torch.dtype | None = None,
) -> nn.Module:
    """The user model for `users` known users, in float32 at least, initialised by config.init:

    vocabulary: every vector is a word embedding drawn at random (paper, A.3); zero: the shared vectors are, and the
    differences between users start at zero; random: Gaussian noise of the embeddings' standard deviation.
    Cluster weights start at 1/K, with noise of that size unless init is zero. As a `reward_head` (e_u is what hidden
    states are multiplied with) zero is all zero, so that every reward starts at 0, and cluster weights are noisy.

    read_as: the type that the word embeddings have in the model, where the file at hand holds them in another.
    """
    V, D = vocabulary_VD.shape
    read_as = read_as or vocabulary_VD.dtype
    dtype = torch.promote_types(read_as, torch.float32)

    def vectors(*shape: int) -> Tensor:
        if config.init == "random":
            return (
                torch.randn(*shape, D, generator=generator, dtype=dtype)
                * vocabulary_VD.detach().to(read_as).std().cpu()
            )
        if config.init == "zero" and reward_head:
            return torch.zeros(*shape, D, dtype=dtype)
        drawn = torch.randint(V, shape, generator=generator)
        return vocabulary_VD.detach()[drawn.to(vocabulary_VD.device)].to("cpu", read_as).to(dtype)

    U = config.tokens
    if config.kind == "uniform":
        return UniformUsers(vectors(U))
    if config.kind == "individual":
        e_UD = vectors(U)
        offsets = torch.zeros(users, U, D, dtype=dtype) if config.init == "zero" else vectors(users, U)
        return IndividualUsers(e_UD, offsets, config.shared)
    K = config.clusters
    w_MK = torch.full((users + 1, K), 1.0 / K, dtype=dtype)
    if config.init != "zero" or reward_head:
        w_MK += torch.randn(users + 1, K, generator=generator, dtype=dtype) / K
    return ClusterUsers(vectors(K, U), w_MK, config.softmax)
