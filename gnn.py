"""Modal-specific graph network: interactions -> a preference per user and modality (stage 1).

    x_u^0 = e_u        x_i^0 = W f_i                        ModalGNN
    x^(k+1) = S x^k    S = D^-1/2 A D^-1/2                  build_graph, spmm
    p = mean of x^0, ..., x^L                               propagate
    loss = -log sigmoid(score(u, pos) - score(u, neg))      sample_triplets, bpr_loss

Sources: LightGCN (arXiv 2002.02126v4) for the graph, FREEDOM (arXiv 2211.06924) for one BPR term a
modality. Shapes: U users, I items, N = U + I nodes, E edges (interactions), D width, F features,
M modalities, L layers, V words, B batch, C users ranked at once, H interactions of some users."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class GNNConfig:
    dim: int = 64         # D, width of an embedding and of a preference
    layers: int = 2       # L, products with the graph (2002.02126v4 has 1 to 4)
    lr: float = 0.003     # step size of Adam
    l2: float = 1e-3      # weight of a triplet's squared layer-0 embeddings (2002.02126v4: 1e-4)
    batch: int = 2048     # triplets (user, liked item, other item) a step
    steps: int = 200      # optimizer steps


# ---- the graph and its product

class Graph(NamedTuple):
    """Nodes 0..U-1 are users, U..N-1 items; A joins a user with each item that the user likes, D
    holds the degrees. S = D^-1/2 A D^-1/2 has two entries for each interaction, kept sorted by row,
    then by column, so that the users' rows come first."""
    row_ptr: Tensor   # (N+1,) node n has the entries row_ptr[n], ..., row_ptr[n+1] - 1
    row: Tensor       # (2E,) a node
    col: Tensor       # (2E,) its neighbour
    weight: Tensor    # (2E,) (degree(row) degree(col))^-1/2
    skip_key: Tensor  # (E,) ascending, see sample_negatives
    active: Tensor    # (at most U,) users with an item they like and an item they do not
    n_users: int
    n_items: int
    matrix: Tensor | None = None    # on CUDA: S again, as a sparse CSR matrix of torch

    def to(self, device: torch.device | str) -> "Graph":
        """The same graph on `device`; on CUDA with the matrix that every product there takes."""
        graph = Graph(*(x.to(device) if isinstance(x, Tensor) else x for x in self[:-1]))
        return graph._replace(matrix=graph.csr()) if graph.col.is_cuda else graph

    def csr(self) -> Tensor:
        """S as a sparse CSR matrix (N, N) of torch, in the same memory."""
        parts, n = (self.row_ptr, self.col, self.weight), len(self.row_ptr) - 1
        return torch.sparse_csr_tensor(*parts, (n, n), check_invariants=False)

    def pairs(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Interactions of the users low, ..., high - 1: (user - low, item), (H,) each."""
        entries = slice(self.row_ptr[low], self.row_ptr[high])
        return self.row[entries] - low, self.col[entries] - self.n_users


def build_graph(user: Tensor, item: Tensor, n_users: int, n_items: int) -> Graph:
    """Interactions -> graph: S = D^-1/2 A D^-1/2, A = [[0, R], [R^T, 0]] (2002.02126v4, eq. 6, 7).
    user, item (E,) integers in [0, n_users) and [0, n_items); repeated pairs count once, and a node
    may have no edge. The graph lies on the CPU; move it with .to().
    Raises ValueError for unequal lengths and for ids out of range."""
    if user.shape != item.shape or user.ndim != 1:
        raise ValueError(f"build_graph: need (E,), not {tuple(user.shape)}, {tuple(item.shape)}")
    for name, ids, n in (("user", user, n_users), ("item", item, n_items)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < n:
            raise ValueError(f"build_graph: {name}s {ids.min()} to {ids.max()}, need 0 to {n - 1}")
    n_nodes = n_users + n_items
    user, item = user.long().cpu(), n_users + item.long().cpu()     # as nodes
    # each edge in both directions, as one number; sorted and each once
    edges = torch.cat([user * n_nodes + item, item * n_nodes + user]).unique()
    row, col = edges // n_nodes, edges % n_nodes                    # (2E,)
    degree = row.bincount(minlength=n_nodes)                        # (N,)
    weight = (degree[row] * degree[col]).rsqrt()                    # (2E,)
    row_ptr = F.pad(degree.cumsum(0), (1, 0))                       # (N+1,)
    nth = torch.arange(len(row)) - row_ptr[row]                     # col is row's nth neighbour
    skip_key = (row * n_items + col - n_users - nth).chunk(2)[0]    # (E,) of the users' rows
    active = ((degree > 0) & (degree < n_items))[:n_users].nonzero()[:, 0]
    return Graph(row_ptr, row, col, weight, skip_key, active, n_users, n_items)


def _bag_product(graph: Graph, x: Tensor) -> Tensor:
    """A node is a bag of its neighbours, summed by weight: no (2E, D) tensor of messages."""
    return F.embedding_bag(graph.col, x, graph.row_ptr, mode="sum", include_last_offset=True,
                           per_sample_weights=graph.weight.to(x.dtype))


def _csr_product(graph: Graph, x: Tensor) -> Tensor:
    """The vendor's sparse product."""
    return graph.matrix.to(x.dtype) @ x


def _index_add_product(graph: Graph, x: Tensor) -> Tensor:
    """One message per edge, added up at its node: slow, but every device can."""
    message = graph.weight.to(x.dtype)[:, None] * x[graph.col]          # (2E, D)
    return torch.zeros_like(x).index_add_(0, graph.row, message)


# other devices: _index_add_product
_PRODUCT = {"cpu": _bag_product, "meta": _bag_product, "cuda": _csr_product}


class _SymmetricMap(torch.autograd.Function):
    """y = S x with S = S^T, so dL/dx = S^T dL/dy is the same map: no transpose, nothing to save."""

    @staticmethod
    def forward(ctx, x, apply_map):
        """x (N, D), apply_map: x -> S x."""
        ctx.apply_map = apply_map
        return apply_map(x)

    @staticmethod
    def backward(ctx, grad):
        """dL/dy (N, D) -> dL/dx (N, D); apply_map has no gradient."""
        return ctx.apply_map(grad), None


def spmm(graph: Graph, x: Tensor) -> Tensor:
    """S x: x (N, D) -> (N, D) of x's dtype, differentiable in x (2002.02126v4, eq. 7).
    Raises ValueError unless x has one row per node."""
    n_nodes = graph.n_users + graph.n_items
    if x.ndim != 2 or len(x) != n_nodes:
        raise ValueError(f"spmm: x is {tuple(x.shape)}; give each of the {n_nodes} nodes a row")
    product = _PRODUCT.get(x.device.type, _index_add_product)
    return _SymmetricMap.apply(x, lambda x: product(graph, x))


def propagate(graph: Graph, x0: Tensor, layers: int) -> Tensor:
    """Layer-0 embeddings (N, D) -> the mean (N, D) of layers 0, ..., `layers`, x^(k+1) = S x^k
    (2002.02126v4, eq. 3, 4 and 8, alpha_k = 1/(layers+1)). Neither weights nor non-linearity: only
    x0 is learnt. Raises ValueError as spmm does."""
    x, total = x0, x0
    for _ in range(layers):
        x = spmm(graph, x)
        total = total + x
    return total / (layers + 1)


# ---- what is learnt: liked above other

def bpr_loss(pos_score: Tensor, neg_score: Tensor) -> Tensor:
    """Mean of -log sigmoid(pos - neg) (BPR, arXiv 1205.2618): scores of any shape -> () nats.
    Equal scores give ln 2."""
    return F.softplus(neg_score - pos_score).mean()


def draw_below(bound: Tensor, generator: Generator | None = None) -> Tensor:
    """A uniform random integer in [0, bound) for each entry of bound (any shape, > 0): int64."""
    # as good as uniform, because 2^62 dwarfs every bound
    return torch.randint(2**62, bound.shape, generator=generator, device=bound.device) % bound


def sample_positives(graph: Graph, user: Tensor, generator: Generator | None = None) -> Tensor:
    """One of the items that each user has, uniform.
    user: any shape, int64, users who have an item -> items, the same shape, int64."""
    start, end = graph.row_ptr[user], graph.row_ptr[user + 1]
    return graph.col[start + draw_below(end - start, generator)] - graph.n_users


def sample_negatives(graph: Graph, user: Tensor, generator: Generator | None = None) -> Tensor:
    """One of the items that each user lacks, uniform: exact, and without drawing twice.
    user: any shape, int64, users who lack an item -> items, the same shape, int64.

    Let p_0 < p_1 < ... be the items that a user has. Before p_j lie p_j - j items that the user
    lacks, so the r-th of these (from 0) is the item r + #{j : p_j - j <= r}. For example, of the
    items 0, ..., 4 a user has 1 and 3. Then p_j - j is 1 and 2, and r = 0, 1, 2 gives the items
    0, 1 + 1 = 2 and 2 + 2 = 4. The graph's skip_key holds u I + p_j - j of all users u, ascending,
    so that one binary search counts for all."""
    start, end = graph.row_ptr[user], graph.row_ptr[user + 1]
    r = draw_below(graph.n_items - (end - start), generator)
    before = torch.searchsorted(graph.skip_key, user * graph.n_items + r, right=True)
    return r + before - start       # `start` keys are earlier users'


def sample_triplets(graph: Graph, n: int, generator: Generator | None = None):
    """n triplets (user, pos, neg), (n,) int64 each: a uniform user (recall is a mean over users, so
    each counts the same), one of the items that the user has, and one of those that the user lacks.
    Users without an item or with all of them are left out. Raises ValueError if nobody is left."""
    if not len(graph.active):
        raise ValueError(f"sample_triplets: no user of {graph.n_users} likes some items, not all")
    bound = graph.active.new_full((n,), len(graph.active))
    user = graph.active[draw_below(bound, generator)]
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
        x = x.cpu().double()    # not every device has float64
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
        fixed = Generator().manual_seed(0)
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
        unit = (self.tfidf(x).cpu().double() for x in batches)
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
            weight = torch.randn(cfg.dim, f.shape[-1], generator=generator)
            self.user[m] = nn.Parameter(torch.zeros(n_users, cfg.dim))
            self.item[m] = nn.Parameter(0.1 * weight / f.shape[-1]**0.5)    # so W f has std 0.1
            self.register_buffer(f"features_{m}", torch.empty(n_items, f.shape[-1]))
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
        person, liked = history.pairs(0, n_new)                         # (H,)
        n_liked = history.row_ptr.diff()[person]
        n_likers = 1 + graph.row_ptr.diff()[graph.n_users + liked]
        layers = self.cfg.layers
        items = propagate(graph, self.layer0(), layers - 1)[self.n_users:]  # a mean over k < L
        weight = layers / (layers + 1) * (n_liked * n_likers).to(items.dtype).rsqrt()[:, None]
        p = items.new_zeros(n_new, items.shape[1]).index_add_(0, person, weight * items[liked])
        return dict(zip(self.modalities, p.split(self.cfg.dim, dim=1)))


# ---- how well it ranks

def top_items(user_emb: Tensor, item_emb: Tensor, k: int, seen: tuple[Tensor, Tensor]) -> Tensor:
    """The k items that score highest for each user, best first; equal scores by ascending item id.
    user_emb (C, D), item_emb (I, D), finite; seen: (row of user_emb, item), (H,) each, pairs that
    are not recommended -> (C, k) int64; I (no item) where fewer than k are left."""
    score = user_emb @ item_emb.T                           # (C, I)
    score[seen] = -torch.inf
    score, item = score.sort(dim=1, descending=True, stable=True)
    return item.masked_fill(score == -torch.inf, len(item_emb))[:, :k]


@torch.no_grad()
def ranking_metrics(rows: tuple[Tensor, Tensor], seen: Graph, test: Graph, k: int = 20,
                    chunk: int = 256) -> tuple[Tensor, Tensor]:
    """recall@k and NDCG@k of every user u with test items T_u, over all items but u's in `seen`:
        recall = hits / |T_u|
        NDCG = sum over hits of 1/log2(1 + rank) / the largest that this can be for |T_u|
    rows: users (U, D), items (I, D) -> (R,) each, of the R users with a test item, in order. A test
    item that is also in `seen` is missed. Holds the scores of `chunk` users at a time.
    Raises ValueError for sizes unlike the graphs', and for NaN or infinity."""
    users, items = rows
    for name, graph in (("seen", seen), ("test", test)):
        sizes, known = (len(users), len(items)), (graph.n_users, graph.n_items)
        if sizes != known:
            raise ValueError(f"ranking_metrics: {sizes} users and items, but {known} in `{name}`")
    if not (users.isfinite().all() and items.isfinite().all()):
        raise ValueError("ranking_metrics: NaN or infinity in rows; training diverged, lower lr")
    k = min(k, len(items))
    discount = 1 / torch.arange(2, k + 2, dtype=users.dtype, device=users.device).log2()    # (k,)
    ideal = discount.cumsum(0)                              # (k,) for 1, ..., k hits
    parts = []
    for low in range(0, len(users), chunk):
        high = min(low + chunk, len(users))
        top = top_items(users[low:high], items, k, seen.pairs(low, high))       # (C, k)
        wanted = users.new_zeros(high - low, len(items) + 1)    # (C, I+1), the last: no item
        wanted[test.pairs(low, high)] = 1
        hit, n_test = wanted.gather(1, top), wanted.sum(1)      # (C, k), (C,)
        best = ideal[n_test.long().clamp(max=k) - 1]
        parts.append(torch.stack([hit.sum(1) / n_test, hit @ discount / best]))
    has_test = test.row_ptr[:len(users) + 1].diff() > 0
    return tuple(torch.cat(parts, dim=1)[:, has_test])


def ranking_summary(rows: dict[str, tuple[Tensor, Tensor]], seen: Graph, test: Graph, k: int = 20):
    """{"recall@k", "ndcg@k"} of the scores summed over the modalities and {"recall@k_m"} of each
    alone: means over users. rows: m -> (users (U, D), items (I, D)), as ModalGNN.forward gives
    them. Raises as ranking_metrics does."""
    summed = [torch.cat(side, dim=1) for side in zip(*rows.values())]
    recall, ndcg = ranking_metrics(summed, seen, test, k)
    found = {f"recall@{k}": recall, f"ndcg@{k}": ndcg}
    for m, pair in rows.items():
        found[f"recall@{k}_{m}"], _ = ranking_metrics(pair, seen, test, k)
    return {name: values.mean().item() for name, values in found.items()}


if __name__ == "__main__":
    from tests.demo import gnn; gnn()
