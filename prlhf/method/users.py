"""f_im, the implicit user model: user number u_p -> T_u vectors of the backbone's width (paper, section 4.1).

    uniform      f(u) = e                      the same for all: vanilla (T_u may be 0)
    individual   f(0) = e_0,  f(i) = e_0 + o_i           (without a shared component: f(i) = o_i)
    cluster      f(u) = V w_u,  V of shape (K, T_u, D), w_u in R^K or, with softmax, on the simplex

and two forms that the paper does not have:

    individual of rank K          f(0) = e_0,  f(i) = e_0 + B z_i,  B of shape (K, T_u, D), z_i in R^K
    cluster, shared               f(0) = e_0,  f(i) = e_0 + V w_i

Shape suffixes: B users asked for, M users known, U = T_u vectors a user, D width, K clusters or rank, R rows.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _ReadRows(torch.autograd.Function):
    """nn.functional.embedding with sparse=True, for a table of any number of dimensions."""

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
    """Rows (B, ...) of a table (rows, ...). The table's gradient is sparse: COO over dim 0."""
    return _ReadRows.apply(table, rows_B)


def read_known(table_M: Tensor, users_B: Tensor, softmax: bool = False) -> Tensor:
    """Row i - 1 of user i, (B, ...), or its softmax; zero for user 0, who has no row."""
    if len(table_M) == 0:
        return table_M.new_zeros(len(users_B), *table_M.shape[1:])
    rows = read_rows(table_M, (users_B - 1).clamp(min=0))
    known = (users_B > 0).view(-1, *[1] * (rows.dim() - 1))
    return torch.where(known, rows.softmax(dim=-1) if softmax else rows, 0.0)


class Parts(NamedTuple):
    """A user model as f(i) = shared + basis . coordinates_i, the form that the prior measures (`prior`).

    It holds copies of parameters: FSDP frees what it has gathered of a module as soon as the module's method returns.
    """

    shared_UD: Tensor  # f(0)
    basis_KUD: Tensor | None  # directions in which users differ; None: coordinates are vectors, or nobody differs
    coordinates_B: Tensor | None  # (B, K), without a basis (B, U, D); zero for user 0; None: nobody differs
    origin_K: Tensor | None = None  # coordinates of f(0), where it is itself a mixture: shared = basis . origin


class UserModel(nn.Module):
    """What the forms share. `forward` maps (B,) user numbers, 0 for unknown, to f(u) (B, U, D); `parts` to `Parts`."""

    table: str | None = None  # the parameter that has one row a user
    first_user = 1  # whose row is the table's first

    @property
    def tables(self) -> list[nn.Parameter]:
        """The parameters with one row a user. A batch reads a few rows, and the gradient has these rows alone."""
        return [getattr(self, self.table)] if self.table else []

    @property
    def vectors(self) -> list[nn.Parameter]:
        """The parameters in the space of user vectors, (..., D). The others are coordinates, (M, K)."""
        return [parameter for name, parameter in self.named_parameters() if name.endswith("D")]

    @property
    def tokens(self) -> int:
        """T_u."""
        return self.vectors[0].shape[-2]

    def rows_of(self, users: Iterable[int]) -> Tensor:
        """The rows of `tables` that these users read, (R,), ascending, each once."""
        rows = {user - self.first_user for user in users if user >= self.first_user} if self.table else set()
        return torch.tensor(sorted(rows), dtype=torch.long)


class UniformUsers(UserModel):
    """f(u) = e for every user."""

    def __init__(self, e_UD: Tensor):
        super().__init__()
        self.e_UD = nn.Parameter(e_UD)

    def forward(self, users_B: Tensor) -> Tensor:
        """e for each user, (B, U, D), in memory of its own (see `Parts`)."""
        return self.e_UD.expand(len(users_B), -1, -1).clone()

    def parts(self, users_B: Tensor) -> Parts:
        """e, and no differences."""
        return Parts(self.e_UD.clone(), None, None)


class IndividualUsers(UserModel):
    """f(0) = e_0 and f(i) = e_0 + o_i; not `shared`: f(i) = o_i."""

    table = "offsets_MUD"

    def __init__(self, e_UD: Tensor, offsets_MUD: Tensor, shared: bool = True):
        super().__init__()
        self.e_UD = nn.Parameter(e_UD)
        self.offsets_MUD = nn.Parameter(offsets_MUD)
        self.shared = shared

    def forward(self, users_B: Tensor) -> Tensor:
        """e_0 + o_u, (B, U, D)."""
        offsets_BUD = read_known(self.offsets_MUD, users_B)
        if self.shared:
            return self.e_UD + offsets_BUD
        return torch.where((users_B > 0)[:, None, None], offsets_BUD, self.e_UD)

    def parts(self, users_B: Tensor) -> Parts:
        """e_0 and f(u) - e_0."""
        offsets_BUD = read_known(self.offsets_MUD, users_B)
        if not self.shared:
            offsets_BUD = torch.where((users_B > 0)[:, None, None], offsets_BUD - self.e_UD, 0.0)
        return Parts(self.e_UD.clone(), None, offsets_BUD)


class LowRankUsers(UserModel):
    """f(0) = e_0 and f(i) = e_0 + B z_i, with softmax e_0 + B softmax(z_i).

    These are individual users of a rank, and clusters with a shared component.
    """

    table = "z_MK"

    def __init__(self, e_UD: Tensor, B_KUD: Tensor, z_MK: Tensor, softmax: bool = False):
        super().__init__()
        self.e_UD = nn.Parameter(e_UD)
        self.B_KUD = nn.Parameter(B_KUD)
        self.z_MK = nn.Parameter(z_MK)
        self.softmax = softmax

    def forward(self, users_B: Tensor) -> Tensor:
        """e_0 + B z_u, (B, U, D)."""
        z_BK = read_known(self.z_MK, users_B, self.softmax)
        return self.e_UD + torch.einsum("bk,kud->bud", z_BK, self.B_KUD)

    def parts(self, users_B: Tensor) -> Parts:
        """e_0, B and z_u."""
        return Parts(self.e_UD.clone(), self.B_KUD.clone(), read_known(self.z_MK, users_B, self.softmax))


class ClusterUsers(UserModel):
    """f(u) = V w_u: every user, the unknown one included, is a mixture of K archetypes."""

    table = "w_MK"
    first_user = 0

    def __init__(self, V_KUD: Tensor, w_MK: Tensor, softmax: bool):
        super().__init__()
        self.V_KUD = nn.Parameter(V_KUD)
        self.w_MK = nn.Parameter(w_MK)  # M + 1 rows: row 0 is the unknown user
        self.softmax = softmax

    def weights(self, users_B: Tensor) -> Tensor:
        """w_u (B, K), or its softmax."""
        w_BK = read_rows(self.w_MK, users_B)
        return w_BK.softmax(dim=-1) if self.softmax else w_BK

    def forward(self, users_B: Tensor) -> Tensor:
        """V w_u, (B, U, D)."""
        return torch.einsum("bk,kud->bud", self.weights(users_B), self.V_KUD)

    def parts(self, users_B: Tensor) -> Parts:
        """f(0) = V w_0, the archetypes V, and w_u - w_0. With softmax, V - f(0): weights that add up to 1 have no origin."""
        w_0K, w_BK = self.weights(torch.cat([users_B.new_zeros(1), users_B])).tensor_split([1])
        shared_UD = torch.einsum("k,kud->ud", w_0K[0], self.V_KUD)
        if self.softmax:
            return Parts(shared_UD, self.V_KUD - shared_UD, w_BK - w_0K)
        return Parts(shared_UD, self.V_KUD.clone(), w_BK - w_0K, w_0K[0])


def is_personal(user_model: nn.Module, alpha: float) -> bool:
    """Whether training with this alpha gives known users vectors of their own; if not, all are the generic user."""
    return alpha > 0 and not isinstance(user_model, UniformUsers)
