"""f_im, the implicit user model: user number u_p -> T_u vectors of the backbone's width (paper, section 4.1).

    uniform      f(u) = e                      the same for all: vanilla (T_u may be 0)
    individual   f(0) = e_0,  f(i) = e_0 + o_i           (without a shared component: f(i) = o_i)
    cluster      f(u) = V w_u,  V of shape (K, T_u, D), w_u in R^K or, with softmax, on the simplex

and two forms that the paper does not have:

    individual of rank K          f(0) = e_0,  f(i) = e_0 + B z_i,  B of shape (K, T_u, D), z_i in R^K
    cluster, shared               f(0) = e_0,  f(i) = e_0 + V w_i

What users do not share lies in `tables`, one row a user. A batch reads a few rows, and its gradient is one of these rows.
What the prior (`prior`) needs of each form is `parts`: the shared vectors, the directions in which users differ, and how far
each user lies along them.

Shape suffixes: B users asked for, M users known, U = T_u vectors a user, D width, K clusters or rank, V vocabulary, R rows.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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


class Parts(NamedTuple):
    """A user model as f(i) = shared + basis . coordinates_i: what all share, and how each of some users differs from it.

    Parameters are in it as copies: FSDP frees what it has gathered of a module as soon as its method returns.
    """

    shared_UD: Tensor
    basis_KUD: Tensor | None  # directions in which users differ; None: coordinates are vectors, or nobody differs
    coordinates_B: Tensor | None  # (B, K), without a basis (B, U, D); zero for user 0; None: nobody differs
    origin_K: Tensor | None = None  # shared_UD = basis . origin, where that is what it is made of


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

    @property
    def vectors(self) -> list[nn.Parameter]:
        """Parameters in the space of user vectors (..., D); others are coordinates."""
        return [self.e_UD]

    def rows_of(self, users: Iterable[int]) -> Tensor:
        """The rows of `tables` that these users read: none, (0,)."""
        return torch.zeros(0, dtype=torch.long)

    def forward(self, users_B: Tensor) -> Tensor:
        """(B,) user numbers -> (B, U, D), in memory of its own (see `Parts`)."""
        return self.e_UD.expand(len(users_B), -1, -1).clone()

    def parts(self, users_B: Tensor) -> Parts:
        """e, and no differences."""
        return Parts(self.e_UD.clone(), None, None)


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

    @property
    def vectors(self) -> list[nn.Parameter]:
        """Parameters in the space of user vectors (..., D): all."""
        return [self.e_UD, self.offsets_MUD]

    def rows_of(self, users: Iterable[int]) -> Tensor:
        """The rows of `tables` that known ones of these users read, (R,), each once: i - 1 of user i."""
        return torch.tensor(sorted({user - 1 for user in users if user}), dtype=torch.long)

    def stored(self, users_B: Tensor) -> Tensor:
        """o_u (B, U, D); zero for user 0."""
        if len(self.offsets_MUD) == 0:
            return self.offsets_MUD.new_zeros(len(users_B), *self.e_UD.shape)
        offsets_BUD = read_rows(self.offsets_MUD, (users_B - 1).clamp(min=0))
        return torch.where((users_B > 0)[:, None, None], offsets_BUD, 0.0)

    def forward(self, users_B: Tensor) -> Tensor:
        """(B,) user numbers, 0 for unknown -> (B, U, D)."""
        if not self.shared:
            return torch.where((users_B > 0)[:, None, None], self.stored(users_B), self.e_UD)
        return self.e_UD + self.stored(users_B)

    def parts(self, users_B: Tensor) -> Parts:
        """e_0 and the offsets f(u) - e_0."""
        offsets_BUD = self.stored(users_B)
        if not self.shared:
            offsets_BUD = torch.where((users_B > 0)[:, None, None], offsets_BUD - self.e_UD, 0.0)
        return Parts(self.e_UD.clone(), None, offsets_BUD)


class LowRankUsers(nn.Module):
    """f(0) = e_0 and f(i) = e_0 + B z_i: what users share, and how far each one goes in each of K common directions.

    With softmax f(i) = e_0 + B softmax(z_i). Individual users of a rank, and clusters with a shared component.
    """

    def __init__(self, e_UD: Tensor, B_KUD: Tensor, z_MK: Tensor, softmax: bool = False):
        super().__init__()
        self.e_UD = nn.Parameter(e_UD)
        self.B_KUD = nn.Parameter(B_KUD)
        self.z_MK = nn.Parameter(z_MK)
        self.softmax = softmax

    @property
    def tokens(self) -> int:
        """T_u."""
        return self.e_UD.shape[0]

    @property
    def tables(self) -> list[nn.Parameter]:
        """Parameters with one row a user: the coordinates."""
        return [self.z_MK]

    @property
    def vectors(self) -> list[nn.Parameter]:
        """Parameters in the space of user vectors (..., D): all but the coordinates."""
        return [self.e_UD, self.B_KUD]

    def rows_of(self, users: Iterable[int]) -> Tensor:
        """The rows of `tables` that known ones of these users read, (R,), each once: i - 1 of user i."""
        return torch.tensor(sorted({user - 1 for user in users if user}), dtype=torch.long)

    def coordinates(self, users_B: Tensor) -> Tensor:
        """z_u (B, K), or softmax(z_u); zero for user 0."""
        if len(self.z_MK) == 0:
            return self.z_MK.new_zeros(len(users_B), self.z_MK.shape[1])
        z_BK = read_rows(self.z_MK, (users_B - 1).clamp(min=0))
        return torch.where((users_B > 0)[:, None], z_BK.softmax(dim=-1) if self.softmax else z_BK, 0.0)

    def forward(self, users_B: Tensor) -> Tensor:
        """(B,) user numbers, 0 for unknown -> (B, U, D)."""
        return self.e_UD + torch.einsum("bk,kud->bud", self.coordinates(users_B), self.B_KUD)

    def parts(self, users_B: Tensor) -> Parts:
        """e_0, B and z_u."""
        return Parts(self.e_UD.clone(), self.B_KUD.clone(), self.coordinates(users_B))


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

    @property
    def vectors(self) -> list[nn.Parameter]:
        """Parameters in the space of user vectors (..., D): the archetypes."""
        return [self.V_KUD]

    def rows_of(self, users: Iterable[int]) -> Tensor:
        """The rows of `tables` that these users read, (R,), each once: u of user u."""
        return torch.tensor(sorted(set(users)), dtype=torch.long)

    def forward(self, users_B: Tensor) -> Tensor:
        """(B,) user numbers, 0 for unknown -> (B, U, D)."""
        w_BK = read_rows(self.w_MK, users_B)
        if self.softmax:
            w_BK = w_BK.softmax(dim=-1)
        return torch.einsum("bk,kud->bud", w_BK, self.V_KUD)

    def parts(self, users_B: Tensor) -> Parts:
        """f(0) = V w_0, V (with softmax as it differs from f(0)), and w_u - w_0: a user like user 0 does not differ."""
        everyone = torch.cat([users_B.new_zeros(1), users_B])
        w_BK = read_rows(self.w_MK, everyone)
        if self.softmax:
            w_BK = w_BK.softmax(dim=-1)
        shared_UD = torch.einsum("k,kud->ud", w_BK[0], self.V_KUD)
        if self.softmax:
            return Parts(shared_UD, self.V_KUD - shared_UD, w_BK[1:] - w_BK[0])
        return Parts(shared_UD, self.V_KUD.clone(), w_BK[1:] - w_BK[0], w_BK[0])


def is_personal(user_model: nn.Module, alpha: float) -> bool:
    """Whether training with this alpha gives known users vectors of their own; if not, all are the generic user."""
    return alpha > 0 and not isinstance(user_model, UniformUsers)
