"""Modal-specific graph network: interactions -> one preference per user and modality (DPPMG stage 1).
    x_u^0 = e_u        x_i^0 = W f_i                                   ModalGNN
    x^(k+1) = D^-1/2 A D^-1/2 x^k        p = mean_k x^k                build_graph, spmm, propagate
    loss = -log sigmoid(score(u, pos) - score(u, neg))                 sample_triplets, bpr_loss
Sources: LightGCN (arXiv 2002.02126v4) for the graph; FREEDOM (arXiv 2211.06924) for one BPR term a modality.
Shapes: U users, I items, N = U+I nodes, E edges (interactions), D width, F features, M modalities, B batch,
C candidates (sampling) or chunk of users (ranking)."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class GNNConfig:
    dim: int = 64         # D, width of an embedding and of a preference
    layers: int = 2       # L, products with the graph (2002.02126v4 has 1 to 4)
    lr: float = 0.003     # step size of Adam
    l2: float = 1e-3      # weight of a triplet's squared layer-0 embeddings (2002.02126v4, eq. 15: 1e-4)
    batch: int = 2048     # triplets (user, liked item, other item) a step
    steps: int = 200      # optimizer steps


# -------------------------------------------------------------------------- the graph and its product

class Graph(NamedTuple):
    """Symmetric-normalized adjacency of users 0..U-1 and items U..N-1 in CSR, and what sampling needs."""
    row_ptr: Tensor     # (N+1,) int: the neighbours of node n are col[row_ptr[n]:row_ptr[n+1]]
    col: Tensor         # (2E,)  int, ascending within a row; the first E are U + the users' items
    weight: Tensor      # (2E,)  float: (degree(n) degree(neighbour))^-1/2
    skip_key: Tensor    # (E,)   int64 ascending: u (I+1) + (p_j - j) for the j-th (from 0) item p_j of user u
    active: Tensor      # (<=U,) int64: users with an item they like and an item they do not
    n_users: int
    n_items: int

    def to(self, device: torch.device | str) -> Graph:
        """The same graph, its tensors on `device`."""
        return Graph(*(part.to(device) if isinstance(part, Tensor) else part for part in self))


def symmetric_csr(matrix) -> tuple[Tensor, Tensor, Tensor]:
    """scipy sparse (N, N) -> row_ptr (N+1,), col (nnz,) ascending within a row, weight (nnz,) float32.
    Indices are int32 where they fit: a product reads one per edge, and is a third faster for it.
    Raises ValueError unless the matrix equals its transpose, which the backward pass of spmm relies on."""
    csr = scipy.sparse.csr_array(matrix).astype(np.float32)
    csr.sum_duplicates()                                    # sorts the rows as well
    mirror, parts = csr.T.tocsr(), ("indptr", "indices", "data")
    if csr.shape != mirror.shape or any((getattr(csr, p) != getattr(mirror, p)).any() for p in parts):
        raise ValueError(f"symmetric_csr: this {csr.shape[0]} x {csr.shape[1]} matrix differs from its "
                         "transpose, so spmm's gradient would be wrong; normalize as D^-1/2 A D^-1/2")
    index = np.int32 if max(csr.nnz, *csr.shape) < 2**31 else np.int64
    return (torch.from_numpy(csr.indptr.astype(index)), torch.from_numpy(csr.indices.astype(index)),
            torch.from_numpy(csr.data))


def build_graph(user: Tensor, item: Tensor, n_users: int, n_items: int) -> Graph:
    """Interactions -> Graph of D^-1/2 A D^-1/2 with A = [[0, R], [R^T, 0]] (2002.02126v4, eq. 6 and 7).
    user, item (E,) integers in [0, n_users) and [0, n_items); repeated pairs count once; a node may have no
    edge. Made once, on the CPU; move it with .to(). Raises ValueError for unequal lengths and unknown ids."""
    user, item = (torch.as_tensor(ids).long().cpu().numpy() for ids in (user, item))
    if user.shape != item.shape or user.ndim != 1:
        raise ValueError(f"build_graph: user is {user.shape} but item is {item.shape}; need (E,) and (E,)")
    for name, ids, n in (("user", user, n_users), ("item", item, n_items)):
        if ids.size and (ids.min() < 0 or ids.max() >= n):
            raise ValueError(f"build_graph: {name} ids lie in [{ids.min()}, {ids.max()}]; need 0 <= id < {n}")
    n = n_users + n_items
    ones = np.ones(user.size, np.float32)
    likes = scipy.sparse.coo_array((ones, (user, n_users + item)), shape=(n, n)).tocsr()
    adj = (likes + likes.T).tocoo()                         # tocsr() has merged repeated pairs
    scale = 1 / np.sqrt(np.maximum(np.bincount(adj.row, minlength=n), 1))       # (N,) degree^-1/2
    adj.data = scale[adj.row] * scale[adj.col]
    row_ptr, col, weight = symmetric_csr(adj)
    degree = row_ptr[:n_users + 1].long().diff()                                # (U,)
    owner = torch.arange(n_users).repeat_interleave(degree)                     # (E,) user of each edge
    nth = torch.arange(len(owner)) - row_ptr[owner]                             # (E,) j of a user's j-th item
    skip_key = owner * (n_items + 1) + (col[:len(owner)] - n_users - nth)       # (E,)
    active = torch.nonzero((degree > 0) & (degree < n_items)).squeeze(1)
    return Graph(row_ptr, col, weight, skip_key, active, n_users, n_items)


def _bag_product(graph: Graph, x: Tensor) -> Tensor:
    """A node is a bag of its neighbours, summed by weight: no (2E, D) tensor of messages."""
    return F.embedding_bag(graph.col, x, graph.row_ptr, mode="sum", include_last_offset=True,
                           per_sample_weights=graph.weight.to(x.dtype))


def _csr_product(graph: Graph, x: Tensor) -> Tensor:
    """The vendor's sparse product (cuSPARSE on its GPUs)."""
    n = len(graph.row_ptr) - 1
    weight = graph.weight.to(x.dtype)
    return torch.sparse_csr_tensor(graph.row_ptr, graph.col, weight, (n, n), check_invariants=False) @ x


def _index_add_product(graph: Graph, x: Tensor) -> Tensor:
    """One message per edge, added up at its node: slow, but every device can."""
    row = torch.repeat_interleave(graph.row_ptr.diff(), output_size=len(graph.col))              # (2E,)
    return torch.zeros_like(x).index_add_(0, row, graph.weight.to(x.dtype)[:, None] * x[graph.col])


_PRODUCT = {"cpu": _bag_product, "meta": _bag_product, "mps": _index_add_product}   # else _csr_product


class _SymmetricMap(torch.autograd.Function):
    """y = S x with S = S^T, so dL/dx = S^T dL/dy is the same map: no transposition, nothing to save."""

    @staticmethod
    def forward(ctx, x, apply_map):
        """x (N, D), apply_map: x -> S x."""
        ctx.apply_map = apply_map
        return apply_map(x.detach())                # detached: embedding_bag then keeps no books of its own

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """dL/dy (N, D) -> dL/dx (N, D), by the same map."""
        return ctx.apply_map(grad.contiguous()), None


def _check_rows(graph: Graph, x: Tensor) -> None:
    """ValueError unless x has one row per node."""
    if x.ndim != 2 or len(x) != len(graph.row_ptr) - 1:
        raise ValueError(f"spmm: x is {tuple(x.shape)} but the graph has {len(graph.row_ptr) - 1} nodes "
                         f"({graph.n_users} users + {graph.n_items} items); give one row per node")


def spmm(graph: Graph, x: Tensor) -> Tensor:
    """D^-1/2 A D^-1/2 x: x (N, D) -> (N, D) of x's dtype, differentiable (once) in x (2002.02126v4, eq. 7).
    Time grows with edges x D, memory with nodes x D. Raises ValueError unless x has one row per node."""
    _check_rows(graph, x)
    product = _PRODUCT.get(x.device.type, _csr_product)
    return _SymmetricMap.apply(x, lambda x: product(graph, x))


def _mean_of_layers(graph: Graph, x: Tensor, layers: int) -> Tensor:
    """1/(layers+1) sum_k S^k x in x's dtype: (N, D) -> (N, D)."""
    total = x.clone()
    for _ in range(layers):
        x = spmm(graph, x)                          # (N, D)
        total += x
    return total.div_(layers + 1)


def propagate(graph: Graph, x0: Tensor, layers: int) -> Tensor:
    """Layer-0 embeddings (N, D) -> (N, D), the mean of layers 0..layers, x^(k+1) = spmm(x^k) (2002.02126v4,
    eq. 3, 4 and 8, alpha_k = 1/(layers+1)). Neither weights nor non-linearity: only x0 is learnt.
    A mean of powers of a symmetric matrix is symmetric: the whole propagation is its own backward pass.
    Raises ValueError as spmm does."""
    return _SymmetricMap.apply(x0, lambda x: _mean_of_layers(graph, x, layers))


# -------------------------------------------------------------------- what is learnt: liked above other

def bpr_loss(pos_score: Tensor, neg_score: Tensor) -> Tensor:
    """Mean of -log sigmoid(pos - neg), any shape -> () nats (BPR, arXiv 1205.2618); ln 2 is no preference."""
    return F.softplus(neg_score - pos_score).mean()


def sample_negatives(graph: Graph, user: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One item for each entry of user (any shape, int64) -> the same shape, int64: uniform over the items the
    user has not; exact, without rejection. Of those, the r-th (from 0) is r + #{j : p_j - j <= r}, where
    p_0 < p_1 < ... are the user's items; all users' p_j - j lie in one ascending vector, so one searchsorted
    counts them. A user who has every item gets n_items, which is no item and an error as an index;
    sample_triplets draws no such user."""
    start = graph.row_ptr[user].long()                                          # (B,) edges of earlier users
    n_free = graph.n_items - (graph.row_ptr[user + 1] - start)                  # (B,)
    r = torch.randint(2**62, user.shape, generator=generator, device=user.device) % n_free.clamp(min=1)
    return r + torch.searchsorted(graph.skip_key, user * (graph.n_items + 1) + r, right=True) - start


def sample_positives(graph: Graph, user: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One of each user's items, uniform: user (B,) int64, users who have an item -> (B,) int64."""
    start = graph.row_ptr[user].long()                                          # (B,)
    r = torch.randint(2**62, user.shape, generator=generator, device=user.device)
    return graph.col[start + r % (graph.row_ptr[user + 1] - start)].long() - graph.n_users


def sample_triplets(graph: Graph, n: int, generator: torch.Generator | None = None):
    """n triplets (user, pos, neg), (n,) int64 each. The user is uniform (recall is a mean over users, so each
    counts the same), pos uniform over the user's items, neg over the others. Users without an item, or with
    all of them, are left out. Ascending by user: neighbouring look-ups then share cache lines, which makes
    them three times faster. Raises ValueError if nobody is left."""
    if not len(graph.active):
        raise ValueError(f"sample_triplets: none of {graph.n_users} users likes some but not all of the "
                         f"{graph.n_items} items: there is nothing to rank; give more items or interactions")
    draw = torch.randint(2**62, (n,), generator=generator, device=graph.active.device)
    user = graph.active[(draw % len(graph.active)).sort().values]               # (n,)
    return user, sample_positives(graph, user, generator), sample_negatives(graph, user, generator)


# ---- features: functions of content, so that they exist for what is generated, too

BATCH = 1024        # rows that are worked on at once: bounds the memory
ROUNDING = 1e-10    # a variance below this share of the mean square is an error of rounding
N_SPECIAL = 3       # token ids 0, 1, 2 (padding, begin and end of a text) are no words


def top_directions(gram: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest eigenvalues (n,) of a symmetric matrix (W, W), descending, and their unit
    eigenvectors (W, n); all W of them, if n > W."""
    value, direction = torch.linalg.eigh(gram)          # ascending
    return value.flip(0)[:n], direction.flip(1)[:, :n]


class Whitening(nn.Module):
    """Principal components, scaled to variance 1: (B, W) -> (B, F). Directions in which nothing
    varied when it was fitted give 0, as do those beyond W."""

    def __init__(self, width: int, n_features: int):
        super().__init__()
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("basis", torch.zeros(width, n_features))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.center) @ self.basis

    @torch.no_grad()
    def fit(self, x: Tensor):
        """Set center and basis from x (I, W)."""
        x = x.double()
        self.center.copy_(x.mean(0))
        variance, direction = top_directions(x.T.cov(correction=0), self.basis.shape[1])
        floor = ROUNDING * x.square().sum(1).mean()
        scale = torch.where(variance > floor, variance.rsqrt(), 0)
        self.basis[:, :len(scale)] = direction * scale


class LatentPCA(nn.Module):
    """f^image: whitened principal components of an image's latent (B, C, h, h) -> (B, F). One half
    are of the latent as it is (what is where?), the other of local features pooled over the picture
    (what is there at all?). DEVIATION 14: the pooled half, means over the picture of the relu of
    fixed random 2 x 2 filters, because no linear map of the latent finds the colour of a thing that
    may be anywhere."""

    def __init__(self, channels: int, side: int, n_features: int, n_filters: int = 512):
        super().__init__()
        fixed = torch.Generator().manual_seed(0)
        filters = torch.randn(n_filters, channels, 2, 2, generator=fixed)
        self.register_buffer("filters", filters / (4 * channels) ** 0.5)
        self.register_buffer("bias", torch.randn(n_filters, generator=fixed))
        self.layout = Whitening(channels * side * side, n_features // 2)
        self.local = Whitening(n_filters, n_features - n_features // 2)

    def pool(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, h) -> local features (B, n_filters), wherever in the picture."""
        maps = (F.conv2d(x, self.filters, self.bias) for x in latents.split(BATCH))
        return torch.cat([x.relu().mean((2, 3)) for x in maps])

    def forward(self, latents: Tensor) -> Tensor:
        return torch.cat([self.layout(latents.flatten(1)), self.local(self.pool(latents))], dim=1)

    def fit(self, latents: Tensor):
        """Fit both halves to the items' latents (I, C, h, h)."""
        self.layout.fit(latents.flatten(1))
        self.local.fit(self.pool(latents))


class TfidfSVD(nn.Module):
    """f^text: a truncated SVD of TF-IDF vectors of BPE tokens (B, T) int64 -> (B, F).
    DEVIATION 6: the words of TF-IDF are the decoder's own tokens (a frequent word is one token), so
    that the feature of a generated text is a function of its tokens: REINFORCE needs no string."""

    def __init__(self, vocab_size: int, n_features: int):
        super().__init__()
        self.register_buffer("idf", torch.zeros(vocab_size))
        self.register_buffer("basis", torch.zeros(vocab_size, n_features))

    def counts(self, tokens: Tensor) -> Tensor:
        """How often each text has each token: (B, T) -> (B, V)."""
        zero = self.idf.new_zeros(len(tokens), len(self.idf))
        return zero.scatter_add(1, tokens, zero.new_ones(tokens.shape))

    def tfidf(self, tokens: Tensor) -> Tensor:
        """(1 + log count) idf of a text's tokens, as a unit vector: (B, T) -> (B, V)."""
        # what is absent: 1 + log 0 = -inf becomes 0
        return F.normalize((1 + self.counts(tokens).log()).clamp(min=0) * self.idf, dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.tfidf(x) @ self.basis for x in tokens.split(BATCH)])

    @torch.no_grad()
    def fit(self, tokens: Tensor):
        """Set idf = 1 + log((1 + I) / (1 + df)) and the basis from the items' texts (I, T), over
        which the features get mean square 1. By the Gram matrix, which gives the same bits each
        time; scipy's svds does not."""
        batches = tokens.split(BATCH)
        df = sum((self.counts(x) > 0).sum(0) for x in batches)      # (V,) texts with the token
        self.idf.copy_(1 + ((1 + len(tokens)) / (1 + df)).log())
        self.idf[:N_SPECIAL] = 0
        unit = (self.tfidf(x).double() for x in batches)
        gram = sum(x.T @ x for x in unit)                           # (V, V)
        square, direction = top_directions(gram, self.basis.shape[1])
        self.basis[:, :len(square)] = direction * (square > ROUNDING * len(tokens))
        self.basis /= self(tokens).square().mean().sqrt()


# ---- the model

class ModalGNN(nn.Module):
    """One LightGCN per modality m, side by side on one graph: x_u^0 = e_u^m and x_i^0 = W_m f_i^m,
    with W_m (D, F) and no bias. features: m -> (I, F) of mean square about 1.
    A user's preference is the propagated user row. A known item's score is its product with the
    propagated item row; that of new content, which no graph reaches, its product with W_m f.
    DEVIATION 1: BPR trains the score with the propagated item row, not with W_m f.
    DEVIATION 2: e_u starts at 0: a user starts as the history alone, like someone folded in."""

    def __init__(self, n_users: int, n_items: int, features: dict[str, Tensor], cfg: GNNConfig,
                 generator: Generator | None = None):
        super().__init__()
        self.cfg, self.n_users, self.modalities = cfg, n_users, tuple(features)
        self.user, self.item = nn.ParameterDict(), nn.ParameterDict()   # e^m, W_m
        for m, f in features.items():
            width = f.shape[-1]
            weight = torch.randn(cfg.dim, width, generator=generator)
            self.user[m] = nn.Parameter(torch.zeros(n_users, cfg.dim))
            self.item[m] = nn.Parameter(0.1 * weight / width**0.5)      # W f: 0.1, as LightGCN
            self.register_buffer(f"features_{m}", torch.empty(n_items, width))
            self.set_features(m, f)

    def set_features(self, modality: str, features: Tensor):
        """Replace a modality's features by others (I, F). Raises ValueError for another shape."""
        kept = getattr(self, f"features_{modality}")
        if features.shape != kept.shape:
            shapes = f"{tuple(features.shape)}, need {tuple(kept.shape)}"
            raise ValueError(f"ModalGNN: features of {modality!r} are {shapes}")
        kept.copy_(features)

    def embed_content(self, modality: str, features: Tensor) -> Tensor:
        """W_m f of content features: (B, F) -> (B, D)."""
        return F.linear(features, self.item[modality])

    def layer0(self) -> Tensor:
        """x^0 (N, M D): the modalities side by side, so that they share products with the graph."""
        parts = []
        for m in self.modalities:
            items = self.embed_content(m, getattr(self, f"features_{m}"))
            parts.append(torch.cat([self.user[m], items]))              # (N, D)
        return torch.cat(parts, dim=1)

    def forward(self, graph: Graph) -> dict[str, tuple[Tensor, Tensor]]:
        """m -> (preferences (U, D), propagated item rows (I, D))."""
        x = propagate(graph, self.layer0(), self.cfg.layers).split(self.cfg.dim, dim=1)
        return {m: rows.tensor_split([self.n_users]) for m, rows in zip(self.modalities, x)}

    def loss(self, graph: Graph, user: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        """BPR on the summed score + BPR on each modality's own, so that each learns its own taste
        (FREEDOM) + l2/2 of a triplet's squared layer-0 rows (2002.02126v4, eq. 15).
        user, pos, neg (B,) int64 -> () nats: about (1 + M) ln 2 from fresh weights."""
        x0 = self.layer0()
        x = propagate(graph, x0, self.cfg.layers)                       # (N, M D)
        nodes = torch.stack([user, self.n_users + pos, self.n_users + neg])
        rows, own = x[nodes], x0[nodes]                                 # (3, B, M D)
        u, p, n = rows.unflatten(2, (-1, self.cfg.dim))                 # (B, M, D)
        pos_score, neg_score = (u * p).sum(2), (u * n).sum(2)           # (B, M)
        summed = bpr_loss(pos_score.sum(1), neg_score.sum(1))
        each = len(self.modalities) * bpr_loss(pos_score, neg_score)    # M means over B
        return summed + each + self.cfg.l2 / 2 * own.square().sum() / len(user)

    @torch.no_grad()
    def fold_in(self, graph: Graph, user: Tensor, item: Tensor, n_new: int) -> dict[str, Tensor]:
        """Preferences of people who were not in training, from their history: m -> (n_new, D).
        user, item (H,): person user[h] in [0, n_new) likes item[h]; repeated pairs count once. It
        is the row that propagate would give, with e_u = 0 and the items' rows as they are,
            p = 1/(L+1) sum_{i in history} (|history| (degree_i + 1))^-1/2 sum_{k<L} x_i^k,
        where the + 1 is the person, who likes i, too. Without a history p = 0."""
        history = build_graph(user, item, n_new, graph.n_items).to(graph.col.device)
        person, liked = _pairs(history, torch.arange(n_new, device=graph.col.device))   # (H,)
        n_liked = history.row_ptr.diff()[person]
        n_likers = 1 + graph.row_ptr.diff()[graph.n_users + liked]
        layers = self.cfg.layers
        items = propagate(graph, self.layer0(), layers - 1)[self.n_users:]  # a mean over k < L
        weight = layers / (layers + 1) * (n_liked * n_likers).to(items.dtype).rsqrt()[:, None]
        p = items.new_zeros(n_new, items.shape[1]).index_add_(0, person, weight * items[liked])
        return dict(zip(self.modalities, p.split(self.cfg.dim, dim=1)))


# --------------------------------------------------------------------------------- how well it ranks

def _pairs(graph: Graph, user: Tensor) -> tuple[Tensor, Tensor]:
    """Interactions of the users (C,) int64: (place in user, item), int64 each."""
    start, end = graph.row_ptr[user].long(), graph.row_ptr[user + 1].long()     # (C,)
    row = torch.repeat_interleave(end - start)                                  # (H,)
    nth = torch.arange(len(row), device=row.device) - ((end - start).cumsum(0) - (end - start))[row]
    return row, graph.col[start[row] + nth].long() - graph.n_users


def top_items(user_emb: Tensor, item_emb: Tensor, k: int, seen_row: Tensor, seen_item: Tensor) -> Tensor:
    """The k items that score highest for each user, best first; equal scores by ascending item id.
    user_emb (C, D), item_emb (I, D), finite; seen_row, seen_item (H,): pairs that are not recommended ->
    (C, k) int64, I (no item) where fewer than k are left."""
    score = user_emb @ item_emb.T                                               # (C, I)
    score[seen_row, seen_item] = -math.inf
    score, item = score.sort(dim=1, descending=True, stable=True)
    return item.masked_fill(score == -math.inf, len(item_emb))[:, :k]


class Ranking(NamedTuple):
    """Metrics user by user; the R users are those who have a test item."""
    user: Tensor     # (R,) int64 ascending
    recall: Tensor   # (R,) in [0, 1]
    ndcg: Tensor     # (R,) in [0, 1]


@torch.no_grad()
def ranking_metrics(user_emb, item_emb, seen: Graph, test: Graph, k: int = 20, chunk: int = 256) -> Ranking:
    """recall@k and NDCG@k of every user u with test items T_u, over all items but those u has in `seen`:
        recall = hits / |T_u|        NDCG = sum over hits of 1/log2(1 + rank) / its largest value for |T_u|
    user_emb (U, D), item_emb (I, D), or a dict of each: then scores are summed over user_emb's modalities.
    Equal scores rank by ascending item id; a test item that is also in `seen` is missed. Holds chunk x I
    scores, never U x I. Raises ValueError for sizes unlike the graphs', and for NaN or infinity."""
    if isinstance(user_emb, dict):
        user_emb, item_emb = (torch.cat([emb[m] for m in user_emb], dim=1) for emb in (user_emb, item_emb))
    size = (len(user_emb), len(item_emb))
    for name, graph in (("seen", seen), ("test", test)):
        if (graph.n_users, graph.n_items) != size:
            raise ValueError(f"ranking_metrics: embeddings of {size[0]} users and {size[1]} items, but "
                             f"`{name}` has {graph.n_users} and {graph.n_items}; build it with the same")
    if not (user_emb.isfinite().all() and item_emb.isfinite().all()):
        raise ValueError("ranking_metrics: the embeddings hold NaN or infinity; training diverged, lower lr")
    k, parts = min(k, size[1]), []
    discount = 1 / torch.arange(2, k + 2, dtype=user_emb.dtype, device=user_emb.device).log2()      # (k,)
    user = torch.nonzero(test.row_ptr[:size[0] + 1].diff()).squeeze(1)          # (R,)
    for rows in user.split(chunk):                                              # (C,)
        top = top_items(user_emb[rows], item_emb, k, *_pairs(seen, rows))       # (C, k)
        wanted = torch.zeros(len(rows), size[1] + 1, dtype=torch.bool, device=rows.device)
        wanted[_pairs(test, rows)] = True                                       # (C, I+1)
        hit, n_test = wanted.gather(1, top).to(discount.dtype), wanted.sum(1)   # (C, k), (C,)
        best = discount.cumsum(0)[n_test.clamp(max=k) - 1]                      # (C,)
        parts.append(torch.stack([hit.sum(1) / n_test, hit @ discount / best]))
    return Ranking(user, *torch.cat(parts, dim=1))


def ranking_summary(rows: dict[str, tuple[Tensor, Tensor]], seen: Graph, test: Graph, k: int = 20) -> dict[str, float]:
    """{"recall@k", "ndcg@k"} of the scores summed over the modalities and {"recall@k_m"} of each alone, means over users.
    rows: m -> (users (U, D), items (I, D)), as ModalGNN.forward gives them; the graphs, errors as of ranking_metrics."""
    both = ranking_metrics(*({m: pair[side] for m, pair in rows.items()} for side in (0, 1)), seen, test, k)
    alone = {f"recall@{k}_{m}": ranking_metrics(*pair, seen, test, k).recall.mean().item() for m, pair in rows.items()}
    return {f"recall@{k}": both.recall.mean().item(), f"ndcg@{k}": both.ndcg.mean().item()} | alone
