"""Modal-specific graph network: interactions -> one preference per user and modality (DPPMG stage 1).
    x_u^0 = e_u          x_i^0 = W f_i                                      ModalGNN
    x^(k+1) = D^-1/2 A D^-1/2 x^k        p = mean_k x^k                     spmm, propagate
    loss = -log sigmoid(score(u, pos) - score(u, neg))                      bpr_loss, sample_triplets
Sources: LightGCN (arXiv 2002.02126v4) for the graph; FREEDOM (arXiv 2211.06924v3) for one BPR term per modality.
Shapes: U users, I items, N = U+I nodes, E edges (interactions), D width, F features, B batch, C chunk of users."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GNNConfig:
    dim: int = 64         # D, width of the embeddings and of a preference
    layers: int = 2       # L, products with the graph (2002.02126v4: 2 to 4)
    lr: float = 0.003     # step size of Adam
    l2: float = 1e-3      # weight of the squared layer-0 embeddings of a batch (2002.02126v4, eq. 15)
    batch: int = 2048     # triplets (user, liked item, other item) a step
    steps: int = 200      # optimizer steps

    def __post_init__(self):
        for name, low in (("dim", 1), ("layers", 0), ("batch", 1), ("steps", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"GNNConfig.{name}={getattr(self, name)}: need {name} >= {low}")
        for name, low in (("lr", 0.0), ("l2", 0.0)):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= low):
                raise ValueError(f"GNNConfig.{name}={getattr(self, name)}: need a finite number >= {low:g}")


# ---------------------------------------------------------------- the graph and its product

class Graph(NamedTuple):
    """Symmetric-normalized adjacency of users 0..U-1 and items U..N-1 in CSR, and what negatives need."""
    row_ptr: Tensor     # (N+1,) int: neighbours of node n are col[row_ptr[n]:row_ptr[n+1]]
    col: Tensor         # (2E,)  int, ascending within a row; the first E entries are U + the users' items
    weight: Tensor      # (2E,)  float: 1 / sqrt(degree(n) degree(neighbour))
    skip_key: Tensor    # (E,)   int64, ascending: u (I+1) + (p_j - j) for the j-th liked item p_j of u
    active: Tensor      # (<=U,) int64: users with an item they like and an item they do not
    n_users: int
    n_items: int

    def to(self, device: torch.device | str) -> Graph:
        """The same graph with its tensors on `device`."""
        return Graph(*(t.to(device) if isinstance(t, Tensor) else t for t in self))


def symmetric_csr(matrix) -> tuple[Tensor, Tensor, Tensor]:
    """scipy sparse matrix (N, N) -> row_ptr (N+1,), col (nnz,) ascending within a row, weight (nnz,) float32.
    Indices are int32 where they fit: a product reads one per edge, and is a third faster for it.
    Raises ValueError unless the matrix equals its transpose: spmm relies on it in the backward pass."""
    csr = scipy.sparse.csr_array(matrix).astype(np.float32)
    csr.sum_duplicates()                                    # sorts the rows as well
    mirror = csr.T.tocsr()
    parts = ("indptr", "indices", "data")
    if csr.shape != mirror.shape or not all(np.array_equal(getattr(csr, p), getattr(mirror, p)) for p in parts):
        raise ValueError(f"symmetric_csr: the {csr.shape[0]} x {csr.shape[1]} matrix differs from its transpose, but "
                         "spmm's gradient is right for symmetric ones only; normalize it as D^-1/2 A D^-1/2")
    index = np.int32 if max(csr.nnz, *csr.shape) < 2**31 else np.int64
    return (torch.from_numpy(csr.indptr.astype(index)), torch.from_numpy(csr.indices.astype(index)),
            torch.from_numpy(csr.data))


def build_graph(user: Tensor, item: Tensor, n_users: int, n_items: int) -> Graph:
    """Interactions -> Graph of D^-1/2 A D^-1/2 with A = [[0, R], [R^T, 0]] (2002.02126v4, eq. 7 and 8).
    user, item (E,) integers in [0, n_users) and [0, n_items); repeated pairs count once; a node may have no edge.
    Made once, on the CPU; move it with .to(). Raises ValueError for lengths that differ and ids out of range."""
    user, item = (torch.as_tensor(ids).cpu().numpy() for ids in (user, item))
    if user.shape != item.shape or user.ndim != 1:
        raise ValueError(f"build_graph: user has shape {user.shape} but item {item.shape}; need (E,) and (E,)")
    for name, ids, n in (("user", user, n_users), ("item", item, n_items)):
        if ids.size and (ids.min() < 0 or ids.max() >= n):
            raise ValueError(f"build_graph: {name} ids are in [{ids.min()}, {ids.max()}]; need [0, n_{name}s = {n})")
    n = n_users + n_items
    likes = scipy.sparse.coo_array((np.ones(user.size, np.float32), (user, n_users + item)), shape=(n, n)).tocsr()
    likes.data[:] = 1                                       # tocsr() has summed repeated pairs
    adj = (likes + likes.T).tocoo()
    scale = 1 / np.sqrt(np.maximum(np.bincount(adj.row, minlength=n), 1))          # (N,) degree^-1/2
    adj.data = scale[adj.row] * scale[adj.col]
    row_ptr, col, weight = symmetric_csr(adj)
    degree = row_ptr[1:n_users + 1].long() - row_ptr[:n_users]                      # (U,)
    owner = torch.arange(n_users).repeat_interleave(degree)                         # (E,) user of each edge
    nth = torch.arange(len(owner)) - row_ptr[owner]                                 # (E,) j of the user's j-th item
    skip_key = owner * (n_items + 1) + (col[:len(owner)] - n_users - nth)           # (E,)
    active = torch.nonzero((degree > 0) & (degree < n_items)).squeeze(1)
    return Graph(row_ptr, col, weight, skip_key, active, n_users, n_items)


def _bag_product(graph: Graph, x: Tensor) -> Tensor:
    """Each node is a bag of its neighbours, summed by weight: no (2E, D) tensor of messages."""
    return F.embedding_bag(graph.col, x, graph.row_ptr, mode="sum", per_sample_weights=graph.weight.to(x.dtype),
                           include_last_offset=True)


def _csr_product(graph: Graph, x: Tensor) -> Tensor:
    """The vendor's sparse product (cuSPARSE on its GPUs)."""
    n = len(graph.row_ptr) - 1
    return torch.sparse_csr_tensor(graph.row_ptr, graph.col, graph.weight.to(x.dtype), (n, n)) @ x


def _index_add_product(graph: Graph, x: Tensor) -> Tensor:
    """One message per edge, added up at its node: slow, but every device can."""
    row = torch.repeat_interleave(graph.row_ptr.diff(), output_size=len(graph.col))              # (2E,)
    return torch.zeros_like(x).index_add_(0, row, graph.weight.to(x.dtype)[:, None] * x[graph.col])


_PRODUCT = {"cpu": _bag_product, "meta": _bag_product, "mps": _index_add_product}   # any other device: _csr_product


class _SymmetricProduct(torch.autograd.Function):
    """y = A~ x. As A~ = A~^T, dL/dx = A~^T dL/dy is the same product: no transposition, nothing saved but A~."""

    @staticmethod
    def forward(ctx, x, graph):
        ctx.graph, ctx.product = graph, _PRODUCT.get(x.device.type, _csr_product)
        return ctx.product(graph, x.detach())               # detached: embedding_bag then skips its own bookkeeping

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.product(ctx.graph, grad.contiguous()), None


def spmm(graph: Graph, x: Tensor) -> Tensor:
    """A~ x for the graph's normalized adjacency A~ (N, N) and x (N, D) -> (N, D), in x's dtype, differentiable once in x.
    Linear in the edges in time; in memory it needs nothing but its result (2002.02126v4, eq. 8).
    Raises ValueError where x has not one row per node."""
    if x.ndim != 2 or len(x) != len(graph.row_ptr) - 1:
        raise ValueError(f"spmm: x is {tuple(x.shape)} but the graph has {len(graph.row_ptr) - 1} nodes "
                         f"({graph.n_users} users + {graph.n_items} items); need (N, D)")
    return _SymmetricProduct.apply(x, graph)


def propagate(graph: Graph, x0: Tensor, layers: int) -> Tensor:
    """(N, D) layer-0 embeddings -> (N, D) mean of layers 0..layers, x^(k+1) = A~ x^k (2002.02126v4, eq. 3, 4 and 8;
    alpha_k = 1/(L+1)). No weights and no non-linearity: only what the nodes start with is learnt."""
    x, total = x0, x0
    for _ in range(layers):
        x = spmm(graph, x)                                  # (N, D)
        total = total + x
    return total / (layers + 1)


# ---------------------------------------------------------------- what is learnt: liked before not liked

def bpr_loss(pos_score: Tensor, neg_score: Tensor) -> Tensor:
    """mean -log sigmoid(pos - neg), in nats (BPR, arXiv 1205.2618). Scores (B,); () comes back. ln 2 = no preference."""
    return F.softplus(neg_score - pos_score).mean()


def sample_negatives(graph: Graph, user: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """user (B,) -> (B,) int64, one item each, uniform over those that the user has not; exact, without rejection.
    The r-th (from 0) such item is r + #{j : p_j - j <= r}, with p_0 < p_1 < ... the user's items; all users' p_j - j
    lie in one ascending vector, so one searchsorted counts them. A user who has every item gets n_items, which is no
    item and fails as an index; sample_triplets never draws such a user."""
    start = graph.row_ptr[user].long()                                              # (B,) edges of the users before
    n_free = graph.n_items - (graph.row_ptr[user + 1] - start)                      # (B,)
    r = torch.randint(2**62, user.shape, generator=generator, device=user.device) % n_free.clamp(min=1)
    return r + torch.searchsorted(graph.skip_key, user * (graph.n_items + 1) + r, right=True) - start


def sample_triplets(graph: Graph, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """user, pos, neg, each (batch,) int64: a user drawn uniformly (so that recall, a mean over users, is what is
    trained), one of the user's items, one of the others. Users without an item, or with all, are left out.
    Raises ValueError if that leaves nobody."""
    if not len(graph.active):
        raise ValueError(f"sample_triplets: none of {graph.n_users} users likes some but not all of {graph.n_items} "
                         "items, so no preference can be learnt; give more items or interactions")
    draw = torch.randint(2**62, (2, batch), generator=generator, device=graph.active.device)       # (2, B)
    user = graph.active[draw[0] % len(graph.active)]                                # (B,)
    start = graph.row_ptr[user].long()                                              # (B,)
    pos = graph.col[start + draw[1] % (graph.row_ptr[user + 1] - start)] - graph.n_users
    return user, pos.long(), sample_negatives(graph, user, generator)


# ---------------------------------------------------------------- the model

class ModalGNN(nn.Module):
    """One LightGCN per modality m, side by side on one graph: E_m^(0) = [e_u^m ; W_m f_i^m], W_m (D, F) without bias.
    Where a modality has no features, W_m f_i^m is a learnt table and the modality is LightGCN itself.

    features  m -> (I, F) of any scale (they are divided by their root mean square), or None
    Preference of a user = the propagated user row; score of an item = its dot product with the propagated item row;
    of new content = with W_m f (embed_content), which no graph reaches.

    DEVIATION 1: the propagated item row is what BPR trains and what recall is measured with, not W_m f. The direct
    score W_m f ranks as well by it: on stickers-like data recall@20 0.32 propagated, 0.33 direct (0.32 and 0.31 if the
    direct score is trained instead); on MovieLens 0.18 and 0.06 (0.13 and 0.07), as no content tells popularity.
    DEVIATION 2: with features, e_u starts at 0: a user starts as the history, and stays near it. So folding in loses
    next to nothing, and a linear probe finds more of the taste in the preference than from a normal start."""

    def __init__(self, n_users: int, n_items: int, features: dict[str, Tensor | None], cfg: GNNConfig,
                 generator: torch.Generator | None = None):
        super().__init__()
        self.cfg, self.modalities = cfg, tuple(features)
        if not features:
            raise ValueError("ModalGNN: features is empty; give at least one modality, e.g. {'id': None}")
        self.user, self.item = nn.ParameterDict(), nn.ParameterDict()
        for m, f in features.items():
            if f is not None and (f.ndim != 2 or len(f) != n_items):
                raise ValueError(f"ModalGNN: features[{m!r}] is {tuple(f.shape)}; need one row for each of {n_items} items")
            user = torch.zeros(n_users, cfg.dim)
            if f is None:                                   # scale 0.1 as in the LightGCN authors' code
                nn.init.normal_(user, std=0.1, generator=generator)
                item = nn.init.normal_(torch.empty(n_items, cfg.dim), std=0.1, generator=generator)
            else:
                item = nn.init.normal_(torch.empty(cfg.dim, f.shape[1]), std=0.1 / f.shape[1]**0.5, generator=generator)
                self.register_buffer(f"features_{m}", torch.empty(f.shape))
                self.register_buffer(f"gain_{m}", torch.empty(()))
                self.set_features(m, f)
            self.user[m], self.item[m] = nn.Parameter(user), nn.Parameter(item)

    @torch.no_grad()
    def set_features(self, modality: str, features: Tensor):
        """Replace the items' content features (I, F) of a modality by others of the same shape."""
        getattr(self, f"features_{modality}").copy_(features)
        rms = features.float().square().mean().sqrt()
        getattr(self, f"gain_{modality}").copy_(1 / rms.clamp(min=torch.finfo(torch.float32).tiny))

    def embed_content(self, modality: str, features: Tensor) -> Tensor:
        """W_m f for content features (B, F) as those given at construction -> (B, D). ValueError without such a W_m."""
        if not hasattr(self, f"gain_{modality}"):
            known = [m for m in self.modalities if hasattr(self, f"gain_{m}")]
            raise ValueError(f"embed_content: modality {modality!r} has no content features; those that have: {known}")
        return F.linear(features * getattr(self, f"gain_{modality}"), self.item[modality])

    def _items(self, modality: str) -> Tensor:
        """(I, D) layer-0 item embeddings."""
        features = getattr(self, f"features_{modality}", None)
        return self.item[modality] if features is None else self.embed_content(modality, features)

    def _propagate(self, graph: Graph, layers: int) -> Tensor:
        """(N, M D): the M modalities side by side, so that they share each product with the graph."""
        x0 = torch.cat([torch.cat([self.user[m], self._items(m)]) for m in self.modalities], dim=1)
        return propagate(graph, x0, layers)

    def forward(self, graph: Graph) -> dict[str, tuple[Tensor, Tensor]]:
        """m -> (preferences (U, D), propagated item rows (I, D))."""
        rows = self._propagate(graph, self.cfg.layers).split(self.cfg.dim, dim=1)
        return {m: (x[:graph.n_users], x[graph.n_users:]) for m, x in zip(self.modalities, rows)}

    def loss(self, graph: Graph, user: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        """BPR on the summed score + BPR of each modality alone, so that each learns its own taste (2211.06924v3, eq. 11)
        + l2/2 of the squared layer-0 rows of the batch per triplet (2002.02126v4, eq. 15, as its code has it).
        user, pos, neg (B,) int64 -> () nats. One modality: BPR once. Fresh from construction: about ln 2 per BPR."""
        scores, decay = [], 0.0
        for m, (users, items) in self(graph).items():
            preference = users[user]                                                # (B, D)
            scores.append(torch.stack([(preference * items[i]).sum(1) for i in (pos, neg)]))         # (2, B)
            table = self._items(m)
            decay = decay + sum(x.square().sum() for x in (self.user[m][user], table[pos], table[neg]))
        terms = [sum(scores)] + (scores if len(scores) > 1 else [])
        return sum(bpr_loss(pos, neg) for pos, neg in terms) + self.cfg.l2 / 2 * decay / len(user)

    @torch.no_grad()
    def fold_in(self, graph: Graph, user: Tensor, item: Tensor, n_new: int) -> dict[str, Tensor]:
        """Preferences of people who were not in training, from their history alone: m -> (n_new, D).
        user, item (H,): person user[h] in [0, n_new) likes item[h]; repeated pairs count once. The row that propagate
        would give them, with e_u = 0 and the items' rows as they are:
            p = 1/(L+1) sum_{i in H} (|H| (degree_i + 1))^-1/2 sum_{k<L} x_i^k
        The + 1 is the person, who is among the item's likers. A person without history gets 0 (no preference)."""
        layers = self.cfg.layers
        items = self._propagate(graph, layers - 1)[graph.n_users:] * (layers / (layers + 1))         # (I, M D)
        history = build_graph(user, item, n_new, graph.n_items).to(items.device)
        liked = history.col[:len(history.skip_key)].long() - n_new                                  # (H,)
        row_ptr = history.row_ptr[:n_new + 1].long()
        owner = torch.repeat_interleave(row_ptr.diff(), output_size=len(liked))                     # (H,)
        degree = graph.row_ptr.diff()[graph.n_users:][liked] + 1                                    # (H,)
        weight = (row_ptr.diff()[owner] * degree).to(items.dtype).rsqrt()
        p = items.new_zeros(n_new, items.shape[1]).index_add_(0, owner, weight[:, None] * items[liked])
        return dict(zip(self.modalities, p.split(self.cfg.dim, dim=1)))


# ---------------------------------------------------------------- how well it ranks

class Ranking(NamedTuple):
    user: Tensor     # (R,) int64 ascending: the users with a test item
    recall: Tensor   # (R,) share of the user's test items among the first k
    ndcg: Tensor     # (R,) discounted gain of the first k over the best possible


def top_items(user_emb: Tensor, item_emb: Tensor, k: int, seen_row: Tensor, seen_item: Tensor) -> Tensor:
    """The k items of highest score for each user, best first; equal scores in ascending order of the item's id.
    user_emb (C, D), item_emb (I, D), finite; pairs seen_row, seen_item (H,) are not recommended -> (C, k) int64, with I
    (no item) where a user has fewer than k items left. topk alone leaves the order of equal scores to the device."""
    n_items = len(item_emb)
    score = user_emb @ item_emb.T                                                   # (C, I)
    score[seen_row, seen_item] = -math.inf
    value, ids = score.topk(k)                                                      # (C, k) descending
    last = value[:, -1:]
    nth_tie = torch.arange(1, k + 1, device=ids.device) - (value > last).sum(1, keepdim=True)        # (C, k)
    ties = (score == last).cumsum(1, dtype=torch.int32)                             # (C, I) equals of the last so far
    ids = torch.where(nth_tie > 0, torch.searchsorted(ties, nth_tie.int()), ids).sort(dim=1).values
    value, order = score.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return torch.where(value > -math.inf, ids.gather(1, order), n_items)


def _pairs(graph: Graph, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Interactions of the users low..high-1: row = user - low, item."""
    ptr = graph.row_ptr[low:high + 1].long()                                        # (C+1,)
    item = graph.col[ptr[0]:ptr[-1]].long() - graph.n_users
    return torch.repeat_interleave(ptr.diff(), output_size=len(item)), item


@torch.no_grad()
def ranking_metrics(user_emb, item_emb, seen: Graph, test: Graph, k: int = 20, chunk: int = 256) -> Ranking:
    """recall@k and NDCG@k of each user with a test item, over all items that the user has not in `seen`.
    user_emb (U, D), item_emb (I, D), or dicts of them: then the score is the sum over the dict's modalities.
        recall = hits / |T_u|      NDCG = sum_{hits} 1/log2(rank + 1) / sum_{r <= min(k, |T_u|)} 1/log2(r + 1)
    (LightGCN's evaluation.) Ties: lower id first. A test item that is in `seen` counts as missed. Never holds more than
    chunk x I scores. Raises ValueError for shapes that do not fit the graphs, and for embeddings that are not finite."""
    if isinstance(user_emb, dict):
        user_emb, item_emb = (torch.cat([emb[m] for m in user_emb], dim=1) for emb in (user_emb, item_emb))
    n_users, n_items = len(user_emb), len(item_emb)
    for name, graph in (("seen", seen), ("test", test)):
        if (graph.n_users, graph.n_items) != (n_users, n_items):
            raise ValueError(f"ranking_metrics: {n_users} user and {n_items} item rows, but {name} has {graph.n_users} "
                             f"users and {graph.n_items} items; give embeddings of the same users and items")
    if not (user_emb.isfinite().all() and item_emb.isfinite().all()):
        raise ValueError("ranking_metrics: the embeddings hold NaN or infinity; the training has diverged, lower lr")
    k = min(k, n_items)
    discount = 1 / torch.arange(2, k + 2, device=user_emb.device).log2()            # (k,)
    parts = []
    for low in range(0, n_users, chunk):
        rows = user_emb[low:low + chunk]                                            # (C, D)
        row, item = _pairs(test, low, low + len(rows))
        relevant = torch.zeros(len(rows), n_items + 1, dtype=torch.bool, device=rows.device)
        relevant[row, item] = True
        hit = relevant.gather(1, top_items(rows, item_emb, k, *_pairs(seen, low, low + len(rows)))).to(discount.dtype)
        n_test = relevant.sum(1)                                                    # (C,)
        ideal = discount.cumsum(0)[(n_test - 1).clamp(0, k - 1)]
        parts.append(torch.stack([n_test, hit.sum(1) / n_test.clamp(min=1), hit @ discount / ideal]))
    n_test, recall, ndcg = torch.cat(parts, dim=1)                                  # (U,) each
    user = torch.nonzero(n_test).squeeze(1)
    return Ranking(user, recall[user], ndcg[user])
