"""The tests that grade the coursework. Each says for which exercise, how many points, and what it expects, in words.

They also run here, on the reference. A handout holds those that are `shown`; the teacher's coursework.py grades with
all of them, and with the project's own tests that exercises.py names. Each test calls one function of the student's."""
import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.testing import assert_close


def grades(exercise, points, expected, shown=False):
    """Marks a test: what it grades, for how many points, and what is right, in words."""
    return lambda test: test


def seeded(seed=0):
    return Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def close(found, expected, **tolerance):
    """Whether `found` is a plain tensor of these values: something that merely calls itself equal does not pass."""
    assert type(found) is Tensor, f"need a tensor, not {type(found).__name__}"
    assert found.dtype in (torch.float32, torch.float64), f"need float32 or float64, not {found.dtype}"
    assert_close(found, torch.as_tensor(expected, dtype=found.dtype), **tolerance)


def likes(*pairs, users, items):
    """The graph of pairs (user, item)."""
    import gnn
    return gnn.build_graph(*torch.tensor(pairs).T, users, items)


PAIRS = [(0, 0), (0, 1), (1, 1), (1, 2), (1, 5), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (3, 5)]


def small_graph():
    """Four users, six items."""
    return likes(*PAIRS, users=4, items=6)


def dense(graph):
    """S (N, N), entry by entry."""
    n = graph.n_users + graph.n_items
    return torch.zeros(n, n, dtype=torch.float64).index_put((graph.row, graph.col), graph.weight.double())


# ---- gnn.py

@grades("normalization", 1, "the entry of user u and item i is 1 / sqrt(degree(u) degree(i))", shown=True)
def test_normalization_by_hand():
    graph = likes((0, 0), (0, 1), (1, 0), users=2, items=2)       # degrees: users 2, 1; items 2, 1
    close(dense(graph)[:2, 2:], [[1 / 2, 1 / math.sqrt(2)], [1 / math.sqrt(2), 0]])


@grades("normalization", 1, "S is symmetric and its largest eigenvalue is 1")
def test_normalization_neither_grows_nor_shrinks():
    s = dense(small_graph())
    close(s, s.T)
    close(torch.linalg.eigvalsh(s).max(), 1.0, rtol=0, atol=1e-6)


@grades("propagation", 1, "the mean of layer 0, layer 1 and layer 2", shown=True)
def test_propagation_by_hand():
    import gnn
    graph = likes((0, 0), users=1, items=1)                        # S swaps the two nodes
    close(gnn.propagate(graph, torch.tensor([[3.0], [0.0]]), 2), [[2.0], [1.0]])


@grades("propagation", 1, "the mean of S^k x^0 over k = 0, ..., L, for every L; L = 0 gives x^0")
def test_propagation_is_the_mean_of_powers():
    import gnn
    graph, x = small_graph(), normal(10, 3)
    for layers in range(4):
        powers = [torch.linalg.matrix_power(dense(graph), k) @ x for k in range(layers + 1)]
        close(gnn.propagate(graph, x.clone(), layers), sum(powers) / len(powers))


@grades("propagation", 1, "the gradient reaches x^0, through every layer")
def test_propagation_has_the_gradient_of_its_matrix():
    import gnn
    graph, up = small_graph(), normal(10, 3, seed=1)
    x = normal(10, 3).requires_grad_()
    (gnn.propagate(graph, x, 2) * up).sum().backward()
    s = dense(graph)
    close(x.grad, (torch.eye(10, dtype=s.dtype) + s + s @ s) @ up / 3)


@grades("bpr", 1, "the mean over the pairs of -log sigmoid(pos - neg); ln 2 for equal scores", shown=True)
def test_bpr_by_hand():
    import gnn
    close(gnn.bpr_loss(torch.ones(3), torch.ones(3)), math.log(2))
    close(gnn.bpr_loss(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])), 0.720095, rtol=0, atol=1e-5)


@grades("negatives", 1, "a user who has the items 1 and 3 of 5 is given 0, 2 and 4", shown=True)
def test_negatives_by_hand():
    import gnn
    graph = likes((0, 1), (0, 3), users=1, items=5)
    drawn = gnn.sample_negatives(graph, torch.zeros(300, dtype=torch.int64), seeded())
    assert drawn.dtype == torch.int64 and set(drawn.tolist()) == {0, 2, 4}


@grades("negatives", 1, "every item that the user lacks, each as often; of any shape of users")
def test_negatives_are_uniform_over_what_each_user_lacks():
    import gnn
    drawn = gnn.sample_negatives(small_graph(), torch.arange(4).expand(3000, 4), seeded())
    assert drawn.shape == (3000, 4)
    for user, column in enumerate(drawn.T.tolist()):
        lacks = set(range(6)) - {i for u, i in PAIRS if u == user}
        count, share = Counter(column), 3000 / len(lacks)
        assert set(count) == lacks
        assert all(abs(n - share) < 5 * math.sqrt(share) for n in count.values())


@grades("negatives", 1, "the generator alone decides what is drawn")
def test_negatives_come_from_their_generator():
    import gnn
    graph, users = small_graph(), torch.arange(4).repeat(50)
    first, again, other = (gnn.sample_negatives(graph, users, seeded(s)).tolist() for s in (1, 1, 2))
    assert first == again != other
    assert first != [0] * len(first)


def ranked(test_items, k=3):
    """recall@k and NDCG@k of one user whose ranking of five items is 0, 1, 2, 3, 4."""
    import gnn
    rows = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[5.0], [4], [3], [2], [1]], dtype=torch.float64)
    none = gnn.build_graph(*torch.empty(2, 0, dtype=torch.int64), 1, 5)
    recall, ndcg = gnn.ranking_metrics(rows, none, likes(*((0, i) for i in test_items), users=1, items=5), k)
    return recall.item(), ndcg.item()


@grades("ranking", 1, "recall: the test items among the first k, over the number of test items", shown=True)
def test_ranking_recall_by_hand():
    assert math.isclose(ranked([1])[0], 1) and math.isclose(ranked([0, 4])[0], 1 / 2)
    assert ranked([3, 4])[0] == 0


@grades("ranking", 1, "NDCG of a hit at rank 2 is 1 / log2(3), of hits at the ranks 1 to 3 is 1", shown=True)
def test_ranking_ndcg_by_hand():
    assert math.isclose(ranked([1])[1], 1 / math.log2(3)) and math.isclose(ranked([0, 1, 2, 3])[1], 1)


@grades("fold_in", 1, "one layer gives what a user in the graph with these likes and e_u = 0 would have")
def test_fold_in_is_what_a_user_in_the_graph_has():
    import gnn
    features = {"image": normal(6, 5), "text": normal(6, 4, seed=1)}
    net = gnn.ModalGNN(4, 6, features, gnn.GNNConfig(dim=3, layers=1), seeded()).double()
    without = likes(*(p for p in PAIRS if p[0] != 1), users=4, items=6)
    folded = net.fold_in(without, torch.tensor([0, 0, 0, 0]), torch.tensor([1, 2, 5, 5]), 1)
    for m in features:
        close(folded[m], net(small_graph())[m][0][1:2], rtol=1e-6, atol=1e-6)


@grades("fold_in", 1, "for two layers: the sum over the history of the items' layers 0 and 1, by the formula")
def test_fold_in_of_two_layers():
    import gnn
    graph, f = small_graph(), normal(6, 5)
    net = gnn.ModalGNN(4, 6, {"image": f}, gnn.GNNConfig(dim=3, layers=2), seeded()).double()
    net.user["image"].data = normal(4, 3, seed=2)
    x0 = torch.cat([net.user["image"], f @ net.item["image"].T])
    layers = x0 + dense(graph) @ x0
    degree = [sum(i == item for _, i in PAIRS) for item in range(6)]
    want = sum(layers[4 + i] / math.sqrt(2 * (degree[i] + 1)) for i in (1, 3)) / 3
    folded = net.fold_in(graph, torch.tensor([1, 1]), torch.tensor([3, 1]), 2)["image"]
    close(folded[1], want.detach(), rtol=1e-6, atol=1e-6)


@grades("fold_in", 1, "a row for each person, {m: (n, D)}; zero for someone without a history", shown=True)
def test_fold_in_of_no_history_is_zero():
    import gnn
    net = gnn.ModalGNN(4, 6, {"image": normal(6, 5)}, gnn.GNNConfig(dim=3), seeded()).double()
    folded = net.fold_in(small_graph(), torch.tensor([0, 2]), torch.tensor([1, 1]), 3)["image"]
    assert folded.shape == (3, 3) and folded[0].abs().sum() > 0
    close(folded[1], torch.zeros(3))
    close(folded[2], folded[0])


@grades("bug_user_embedding", 3, "the optimizer and the checkpoint hold a user embedding of each modality")
def test_bug_user_embedding_is_learnt():
    import gnn
    net = gnn.ModalGNN(4, 6, {"image": normal(6, 5), "text": normal(6, 5)}, gnn.GNNConfig(dim=3), seeded()).double()
    sizes = Counter(tuple(p.shape) for p in net.parameters())
    assert sizes == {(4, 3): 2, (3, 5): 2}
    assert sum(tuple(x.shape) == (4, 3) for x in net.state_dict().values()) == 2
    users = [p for p in net.parameters() if len(p) == 4]
    net.loss(small_graph(), torch.tensor([0]), torch.tensor([1]), torch.tensor([3])).backward()
    assert all(not p.any() and p.grad.any() for p in users)


@grades("bug_seen_items", 3, "an item that the user has is never recommended, however low the others score")
def test_bug_seen_items_are_never_recommended():
    import gnn
    score = torch.tensor([[-900.0], [-3e38], [-7.0]])
    seen = torch.tensor([0, 0]), torch.tensor([0, 2])
    assert gnn.top_items(torch.ones(1, 1), score, 3, seen).tolist() == [[1, 3, 3]]
    nothing = (torch.empty(0, dtype=torch.int64),) * 2
    assert gnn.top_items(torch.ones(1, 1), score, 3, nothing).tolist() == [[2, 0, 1]]


@grades("bug_ideal_dcg", 3, "NDCG compares with the best that all test items could give, not only those found")
def test_bug_ideal_dcg_knows_all_test_items():
    recall, ndcg = ranked([0, 3, 4])
    assert math.isclose(recall, 1 / 3) and math.isclose(ndcg, 1 / (1 + 1 / math.log2(3) + 1 / 2))
    assert math.isclose(ranked([0, 1, 2, 3])[1], 1) and ranked([4])[1] == 0


# ---- vq.py

@grades("nearest_code", 1, "the row of the codebook at the least distance; of equals the lowest index", shown=True)
def test_nearest_code_by_hand():
    import vq
    book = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    found = vq.nearest_code(torch.tensor([[1.0, 1.0], [6.0, 1.0], [0.5, 2.5]]), book)
    assert found.dtype == torch.int64 and found.tolist() == [0, 1, 2]


@grades("nearest_code", 2, "the same as measuring every distance, for codes of all lengths")
def test_nearest_code_measures_every_distance():
    import vq
    for n, k, d in ((1, 1, 1), (50, 7, 3), (200, 64, 16)):
        x, book = normal(n, d), normal(k, d, seed=1) * (1 + torch.arange(k) % 4)[:, None]
        distance = (x[:, None] - book).square().sum(2)
        assert vq.nearest_code(x.clone(), book.clone()).tolist() == distance.argmin(1).tolist()


@grades("straight_through", 1, "the value of e, and z_e's gradient as it comes", shown=True)
def test_straight_through_by_hand():
    import vq
    z_e = torch.tensor([[1.0, 2.0]], requires_grad=True)
    z_q = vq.straight_through(z_e, torch.tensor([[5.0, -1.0]]))
    close(z_q.detach(), [[5.0, -1.0]])
    (z_q * torch.tensor([[3.0, 7.0]])).sum().backward()
    close(z_e.grad, [[3.0, 7.0]])


def book_of(codes, **settings):
    """A codebook of numbers (width 1), each with its fair share as count."""
    import vq
    k = len(codes)
    book = vq.EMACodebook(vq.VQConfig(codes=k, dim=1, **settings)).double()
    book.codebook.copy_(torch.tensor(codes, dtype=torch.float64)[:, None])
    book.total.copy_(book.codebook / k)
    return book


@grades("ema_codebook", 1, "counts and totals move by 1 - decay towards the batch's shares and sums", shown=True)
def test_ema_codebook_by_hand():
    book = book_of([0.0, 10.0], revive_below=0.0)
    x = torch.tensor([[2.0], [8.0], [12.0], [10.0]], dtype=torch.float64)
    book.update(x, torch.tensor([0, 1, 1, 1]), 0.8, None)
    close(book.count, [0.8 / 2 + 0.2 / 4, 0.8 / 2 + 0.2 * 3 / 4])
    close(book.total, [[0.2 * 2 / 4], [0.8 * 5 + 0.2 * 30 / 4]])


@grades("ema_codebook", 1, "the codebook is total / count: for decay 0 each code is the mean of its rows", shown=True)
def test_ema_codebook_without_memory_is_a_mean():
    book = book_of([0.0, 10.0], revive_below=0.0)
    x = torch.tensor([[2.0], [8.0], [12.0], [4.0]], dtype=torch.float64)
    book.update(x, torch.tensor([0, 1, 1, 0]), 0.0, None)
    close(book.codebook, [[3.0], [10.0]], rtol=1e-4, atol=0)


@grades("ema_codebook", 1, "a code that hardly any row has restarts at a row of the batch, each at another, with 1 / K")
def test_ema_codebook_revives_dead_codes():
    book = book_of([0.0, 50.0, 60.0, 70.0], revive_below=0.5)
    x = torch.arange(1.0, 9.0, dtype=torch.float64)[:, None]
    book.update(x, torch.zeros(8, dtype=torch.int64), 0.1, seeded())
    close(book.count[1:], [1 / 4] * 3)
    close(book.total, book.codebook * book.count[:, None], rtol=1e-3, atol=0)
    revived = book.codebook[1:, 0].round().tolist()
    assert len(set(revived)) == 3 and set(revived) <= set(range(1, 9))


def two_levels():
    """Codes (0, 10) and (0, 1, 2), of width 1."""
    import vq
    net = vq.ResidualVQVAE(1, vq.VQConfig(levels=2, codes=3, dim=1)).double()
    for book, codes in zip(net.codebooks, ((0.0, 10.0, 99.0), (0.0, 1.0, 2.0))):
        book.codebook.copy_(torch.tensor(codes)[:, None])
    return net


@grades("residual_quantization", 1, "11.2 is coded as 10, and what is left over, 1.2, as 1: 11 in all", shown=True)
def test_residual_quantization_by_hand():
    found = two_levels().quantize(torch.tensor([[11.2], [1.9]], dtype=torch.float64))
    assert found.codes.tolist() == [[1, 1], [0, 2]]
    close(found.z_q, [[11.0], [2.0]])


@grades("residual_quantization", 1, "commit: the mean over rows and levels of what is left over, squared", shown=True)
def test_residual_quantization_commits_every_level():
    found = two_levels().quantize(torch.tensor([[11.2]], dtype=torch.float64))
    close(found.commit, (1.2 ** 2 + 0.2 ** 2) / 2)


@grades("residual_quantization", 1, "z_q passes its gradient to z_e unchanged; commit pulls z_e to its codes")
def test_residual_quantization_has_two_gradients():
    z_e = torch.tensor([[11.2], [1.9]], dtype=torch.float64, requires_grad=True)
    found = two_levels().quantize(z_e)
    through, = torch.autograd.grad(found.z_q.sum(), z_e)
    pull, = torch.autograd.grad(found.commit, z_e)
    close(through, [[1.0], [1.0]])
    close(pull, [[(1.2 + 0.2) / 2], [(1.9 - 0.1) / 2]])


@grades("codebook_health", 1, "usage, perplexity and collisions of six users by hand", shown=True)
def test_codebook_health_by_hand():
    import vq
    codes = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [2, 2]])
    found = vq.codebook_health(codes, 4)
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found["usage"], [0.75, 0.75]))
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found["perplexity"], [3, 3]))
    assert math.isclose(found["collision_rate"], 1 / 3)


@grades("bug_dead_codes", 3, "a revived code stays where it was put until it has rows of its own")
def test_bug_dead_codes_stay_revived():
    book = book_of([0.0, 500.0], revive_below=0.5)
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    nobody = torch.zeros(4, dtype=torch.int64)
    book.update(x, nobody, 0.1, seeded())
    placed = book.codebook[1].item()
    assert min(abs(placed - v) for v in (1, 2, 3, 4)) < 1e-3
    close(book.count[1], 1 / 2)
    book.update(x, nobody, 0.9, seeded())                 # not dead any more
    assert abs(book.codebook[1].item() - placed) < 1e-2
    still = book_of([0.0, 10.0], revive_below=0.0)
    still.update(x, torch.tensor([0, 0, 1, 1]), 0.0, None)
    close(still.codebook, [[1.5], [3.5]], rtol=1e-4, atol=0)


# ---- generators.py

def decoder():
    """A small text decoder of random weights."""
    import generators
    torch.manual_seed(0)
    cfg = generators.TextConfig(vocab_size=11, layers=2, width=8, heads=2, context=6)
    net = generators.TextDecoder(cfg, 5, 2, 3).double()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.7 + (parameter.ndim == 1)
    return net


TEXT = torch.tensor([[3, 4, 5, 6, 7, 8], [8, 3, 3, 9, 10, 4]])
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 0]])
PREFS = torch.tensor([[0, 2], [1, 1]])


@grades("prefix_mask", 1, "a later token moves no earlier logit, and moves the later ones", shown=True)
def test_prefix_mask_hides_the_future():
    net, other = decoder(), TEXT.clone()
    other[:, 3] = torch.tensor([10, 5])
    moved = (net(TEXT, PROMPT, PREFS) - net(other, PROMPT, PREFS)).abs().amax((0, 2))
    assert moved[:4].max() < 1e-9 and moved[4:].min() > 1e-6


@grades("prefix_mask", 1, "the prompt is a set: the order of its words moves nothing, so each word sees all others")
def test_prefix_mask_lets_the_prefix_see_itself():
    net = decoder()
    close(net(TEXT, PROMPT[:, [1, 0, 2]], PREFS), net(TEXT, PROMPT, PREFS).detach())
    for changed in ((TEXT, PROMPT * 0 + 1, PREFS), (TEXT, PROMPT, (PREFS + 1) % 3)):
        assert (net(*changed) - net(TEXT, PROMPT, PREFS)).abs().amax(2).min() > 1e-6


@grades("prefix_mask", 1, "padding of the prompt (0) is seen by nobody: more of it moves nothing")
def test_prefix_mask_hides_padding():
    net = decoder()
    close(net(TEXT, F.pad(PROMPT, (0, 2)), PREFS), net(TEXT, PROMPT, PREFS).detach())


@grades("nucleus", 1, "of 0.5, 0.3, 0.15, 0.05 the first two reach 0.75; the one that crosses is in", shown=True)
def test_nucleus_by_hand():
    import generators
    logits = torch.tensor([[0.3, 0.05, 0.5, 0.15]]).log()
    for top_p, wanted in ((0.75, [1, 0, 1, 0]), (0.1, [0, 0, 1, 0]), (0.96, [1, 1, 1, 1]), (0.9, [1, 0, 1, 1])):
        assert generators.nucleus(logits, top_p)[0].tolist() == [bool(x) for x in wanted]


@grades("nucleus", 1, "as few tokens as reach top_p, row by row, for logits of any shape and offset")
def test_nucleus_is_the_smallest_set():
    import generators
    logits = normal(3, 4, 9) * 2 + 5
    inside = generators.nucleus(logits, 0.7)
    assert inside.shape == (3, 4, 9) and inside.dtype == torch.bool
    p = logits.softmax(2)
    mass, least = (p * inside).sum(2), p.masked_fill(~inside, 2).amin(2)
    assert (mass >= 0.7).all() and (mass - least < 0.7).all()
    assert (p.masked_fill(inside, 0).amax(2) < least).all() and inside.sum(2).unique().numel() > 1


class Told:
    """A denoiser that says what it was told: 5 + prefs; it counts the rows that it was asked about."""

    def __init__(self):
        self.weight, self.rows = torch.ones((), dtype=torch.float64, requires_grad=True), 0

    def __call__(self, z, times, prompt, prefs):
        self.rows += len(z)
        assert len(z) == len(times) == len(prompt) == len(prefs)
        return (5 + prefs.double())[:, :1, None, None] * self.weight + 0 * z


def ask(guidance):
    import generators
    told, prefs = Told(), torch.tensor([[0, 0], [2, 2]])
    v = generators.guided_v(told, torch.zeros(2, 1, 1, 1, dtype=torch.float64), 0.5, prefs * 0 + 1, prefs, guidance)
    return v, told


@grades("guidance", 1, "v(null) + w (v(prefs) - v(null)): for w = 3 three times as far from null", shown=True)
def test_guidance_by_hand():
    close(ask(3.0)[0].flatten().detach(), [7.0, 13.0])          # null: 4; with tokens: 5 and 7
    close(ask(0.0)[0].flatten().detach(), [4.0, 4.0])


@grades("guidance", 1, "w = 1 asks about no null row")
def test_guidance_of_1_skips_the_null_branch():
    v, told = ask(1.0)
    close(v.flatten().detach(), [5.0, 7.0])
    assert told.rows == 2


@grades("guidance", 1, "with gradient on, none flows through the null branch")
def test_guidance_learns_in_the_conditional_branch_alone():
    v, told = ask(3.0)
    close(v.flatten().detach(), [7.0, 13.0])
    close(torch.autograd.grad(v.sum(), told.weight)[0], 3.0 * (5 + 7))


def turn(t):
    return math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)


@grades("ddim_step", 1, "for eta = 0 and the true v: alpha_s z_0 + sigma_s eps, without noise", shown=True)
def test_ddim_step_knows_the_way():
    import generators
    (a, b), (a_s, b_s), clean, eps = turn(0.8), turn(0.3), normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1)
    mean, std = generators.ddim_step(a * clean + b * eps, a * eps - b * clean, 0.8, 0.3, 0.0)
    close(mean, a_s * clean + b_s * eps)
    close(std, 0.0)


@grades("ddim_step", 1, "std = eta sigma_s / sigma_t sqrt(1 - alpha_t^2 / alpha_s^2), and less of eps in the mean")
def test_ddim_step_parts_the_noise():
    import generators
    (a, b), (a_s, b_s) = turn(0.8), turn(0.3)
    for eta in (0.5, 1.0):
        want = eta * b_s / b * math.sqrt(1 - a * a / a_s / a_s)
        z, v = (torch.full((1, 1, 1, 1), x, dtype=torch.float64) for x in (b, a))      # z_0 = 0, eps = 1
        mean, std = generators.ddim_step(z, v, 0.8, 0.3, eta)
        close(std, want)
        close(mean.flatten(), [math.sqrt(b_s * b_s - want * want)])


@grades("ddim_step", 1, "the last step, to s = 0, gives z_0 and adds no noise")
def test_ddim_step_ends_without_noise():
    import generators
    (a, b), clean, eps = turn(0.25), normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1)
    mean, std = generators.ddim_step(a * clean + b * eps, a * eps - b * clean, 0.25, 0.0, 1.0)
    close(mean, clean)
    close(std, 0.0)


def ideal_loss(v_of):
    """Denoiser.loss, for pictures that are all 1, of a network that answers v_of(z, alpha, sigma)."""
    import generators
    net = generators.Denoiser(generators.ImageConfig(size=16, latent=2, width=8, heads=2), 5, 2, 3).double()
    net.forward = lambda z, t, prompt, prefs: v_of(z, *(x[:, None, None, None] for x in generators.alpha_sigma(t)))
    return net.loss(torch.ones(64, 2, 4, 4, dtype=torch.float64), PROMPT[:1].expand(64, 3), PREFS[:1].expand(64, 2),
                    seeded())


@grades("v_loss", 1, "a network that says alpha eps - sigma z has loss 0", shown=True)
def test_v_loss_of_the_truth_is_0():
    found = ideal_loss(lambda z, alpha, sigma: alpha * (z - alpha) / sigma - sigma)
    assert found.shape == () and found.item() < 1e-12


@grades("bug_last_noise", 3, "the last denoising step adds no noise, the earlier ones do")
def test_bug_last_noise_is_none():
    import generators
    net = generators.Denoiser(generators.ImageConfig(size=16, latent=2, width=8, heads=2), 5, 2, 3).double()
    z = normal(2, 2, 4, 4)
    draw = lambda times, seed: generators.denoise(net, z, times, PROMPT, PREFS, seeded(seed))
    close(draw([0.3, 0.0], 1), draw([0.3, 0.0], 2))
    close(draw([0.3, 0.0], 1), z * math.cos(0.3 * math.pi / 2))        # a fresh network says v = 0
    spread = (draw([0.9, 0.6], 1) - draw([0.9, 0.6], 2)).std().item()
    want = math.sqrt(2) * turn(0.6)[1] / turn(0.9)[1] * math.sqrt(1 - (turn(0.9)[0] / turn(0.6)[0]) ** 2)
    assert abs(spread / want - 1) < 0.3


@grades("bug_averaged_log_prob", 3, "the log-probability of a text is the sum over its tokens, however long it is")
def test_bug_averaged_log_prob_is_a_sum():
    import generators
    cfg = generators.TextConfig(guidance=1.0, top_p=1.0)
    logits, tokens = normal(2, 4, 6), torch.tensor([[3, 5, 2, 0], [4, 2, 0, 0]])
    log_p = logits[..., 2:].log_softmax(2)
    want = [sum(log_p[row, t, tokens[row, t] - 2] for t in range(n)) for row, n in ((0, 3), (1, 2))]
    close(generators.text_log_prob(logits, None, tokens, cfg), torch.stack(want))


@grades("bug_dropped_tokens", 3, "the tokens of a row are dropped together, at the rate that is asked for")
def test_bug_dropped_tokens_go_together():
    import generators
    prefs = torch.arange(4000)[:, None].expand(4000, 4) % 7
    found = generators.drop_preferences(prefs, 0.3, seeded())
    null = found == -1
    assert torch.equal(null.all(1), null.any(1)) and torch.equal(found[~null], prefs[~null])
    assert abs(null.all(1).double().mean() - 0.3) < 5 * math.sqrt(0.21 / 4000)


# ---- reward.py

def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


@grades("info_nce", 1, "two rows at right angles: log(1 + exp(-scale)); no knowledge: ln B", shown=True)
def test_info_nce_by_hand():
    import reward
    eye, scale = torch.eye(2, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    close(reward.info_nce(eye, eye, eye.bool(), scale), math.log(1 + math.exp(-3)))
    alike = unit(1, 4).expand(8, 4)
    close(reward.info_nce(alike, alike, torch.eye(8).bool(), scale), math.log(8))


@grades("info_nce", 1, "rows that `same` calls equal share the target evenly: no false negatives")
def test_info_nce_shares_the_target():
    import reward
    eye, scale = torch.eye(2, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    close(reward.info_nce(eye, eye, torch.ones(2, 2).bool(), scale), math.log(1 + math.exp(-3)) + 1.5)


@grades("leave_one_out", 1, "each reward less the mean of the others of its group", shown=True)
def test_leave_one_out_by_hand():
    import reward
    close(reward.leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])), [[-3.0, -1.5, 4.5], [0.0, 0, 0]])


@grades("reinforce", 1, "minus the mean of advantage times log-probability", shown=True)
def test_reinforce_by_hand():
    import reward
    close(reward.reinforce_loss(torch.tensor([-1.0, -2.0]), torch.tensor([3.0, -1.0])), 0.5)


@grades("log_prob", 1, "of two standard normal numbers at 0 and 2: -ln(2 pi) - 2, one number per row", shown=True)
def test_log_prob_by_hand():
    import reward
    x = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    close(reward.gaussian_log_prob(x, torch.zeros(2, 2), 1.0), [-math.log(2 * math.pi) - 2, -math.log(2 * math.pi)])


@grades("pair_reward", 1, "an image of cosine 1 gets lambda_c more, one of cosine 0 as much less", shown=True)
def test_pair_reward_by_hand():
    import reward
    image, text, zero = torch.eye(2)[None], torch.eye(2)[None, :1], torch.zeros(1, 2)
    cfg = reward.RewardConfig(lambda_c=2.0, lambda_p=0.0)
    for_image, for_text, parts = reward.pair_reward(image, text, zero, zero[:, :1] + 3, cfg)
    close(for_image, [[2.0, -2.0]], rtol=0, atol=1e-2)
    close(for_text, [[0.0]])
    close(parts.consistency, [0.5])
    close(parts.s_text, 3.0)


@grades("pair_reward", 1, "with lambda_p = 0 it is lambda_c times the normalized mean cosine with the group's partners")
def test_pair_reward_of_consistency_alone():
    import reward
    image, text, s = unit(2, 3, 4), unit(2, 5, 4, seed=1), normal(2, 3, seed=2)
    found = reward.pair_reward(image, text, s, normal(2, 5), reward.RewardConfig(lambda_c=0.5, lambda_p=0.0))
    cosine = torch.einsum("gid,gtd->git", image, text)
    for got, mean in zip(found[:2], (cosine.mean(2), cosine.mean(1))):
        centred = mean - mean.mean(1, keepdim=True)
        close(got, 0.5 * centred / (centred.square().mean().sqrt() + 1e-4))


@grades("cluster_interval", 1, "each value three times for one user says no more than once", shown=True)
def test_cluster_interval_counts_copies_once():
    import reward
    once, user = normal(12), torch.arange(12)
    apart, thrice = reward.interval(once, user), reward.interval(once.repeat(3), user.repeat(3))
    assert all(math.isclose(apart[k], thrice[k], abs_tol=1e-12) for k in ("mean", "low", "high"))


@grades("cluster_interval", 1, "the half width of the numbers 1, 3 | 5 | 7 of three users by the formula")
def test_cluster_interval_by_hand():
    import reward
    found = reward.interval(torch.tensor([1.0, 3, 5, 7]), torch.tensor([8, 8, 1, 4]))
    error = math.sqrt(3 / 2 * ((1 + 3 - 8) ** 2 + 1 + 9)) / 4
    assert math.isclose(found["high"] - found["low"], 2 * 4.302652730 * error, rel_tol=1e-6)


def gradient_of_both(kl):
    """A policy over three actions whose reward is penalized by its own log-probability: all outcomes, by weight."""
    import reward
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    gain = torch.tensor([1.0, 0.0, 5.0], dtype=torch.float64) - kl * log_p
    parts = [log_p[a].detach().exp() * reward.reinforce_loss(log_p[a:a + 1], gain[a:a + 1]) for a in range(3)]
    return torch.autograd.grad(sum(parts), logits)[0], logits, gain.detach()


@grades("bug_advantage_gradient", 3, "no gradient passes through the advantage: the loss moves log-probabilities alone")
def test_bug_advantage_gradient_stops():
    import reward
    found, logits, gain = gradient_of_both(kl=2.0)
    close(found, -torch.autograd.grad((logits.softmax(0) * gain).sum(), logits)[0])
    log_prob, advantage = normal(4).requires_grad_(), normal(4, seed=1).requires_grad_()
    reward.reinforce_loss(log_prob, advantage).backward()
    close(log_prob.grad, -advantage.detach() / 4)
    assert advantage.grad is None


@grades("bug_frozen_rows", 3, "a row of the table that no sample used stays as it is, to the bit; a used one moves")
def test_bug_frozen_rows_stay():
    import reward
    start = normal(4, 3)
    table = nn.Parameter(start.clone())
    optimizer = reward.token_optimizer({"image": table}, reward.RewardConfig(lr_image=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        table[[0, 2]].square().sum().backward()
        optimizer.step()
    assert torch.equal(table[[1, 3]], start[[1, 3]])
    assert ((table - start)[[0, 2]].abs() > 0.1).all()
    assert optimizer.param_groups[0]["lr"] == 0.1


@grades("bug_token_mean", 3, "a text's embedding does not depend on the other texts of the batch")
def test_bug_token_mean_is_each_texts_own():
    import reward
    x, keep = normal(3, 4, 2), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    found = reward._masked_mean(x, keep)
    close(found, torch.stack([x[0].mean(0), x[1, 0], torch.zeros(2, dtype=x.dtype)]))
    close(reward._masked_mean(x[1:2], keep[1:2]), found[1:2])


# ---- dppmg.py, train.py

@grades("split_by_time", 1, "of ten likes the last is test, the one before it validation; of two none", shown=True)
def test_split_by_time_by_hand():
    import dppmg
    user = torch.tensor([0] * 10 + [1] * 2)
    time = torch.tensor([3.0, 9, 1, 7, 2, 8, 0, 6, 4, 5, 1, 2])
    parts = dppmg.split_by_time(user, time, 0)
    wanted = [dppmg.TRAIN] * 12
    wanted[1], wanted[5] = dppmg.TEST, dppmg.VALID
    assert parts.dtype == torch.int8 and parts.tolist() == wanted


@grades("split_by_time", 1, "each user by the user's own times, a tenth to test, half rounds up")
def test_split_by_time_is_each_users_own():
    import dppmg
    count = {0: 3, 1: 15, 2: 25, 3: 2, 4: 44}
    user = torch.cat([torch.full((n,), u) for u, n in count.items()])[torch.randperm(89, generator=seeded())]
    time = torch.rand(89, generator=seeded(1)) + 10.0 * user
    parts = dppmg.split_by_time(user, time, 0)
    for u, n in count.items():
        tested = 0 if n < 3 else max(1, (n + 5) // 10)
        ordered = parts[user == u][time[user == u].argsort()].tolist()
        assert ordered == [dppmg.TRAIN] * (n - 2 * tested) + [dppmg.VALID] * tested + [dppmg.TEST] * tested


def linear(value):
    net = nn.Linear(1, 1, bias=False).double()
    net.weight.data.fill_(value)
    return net


@grades("ema_weights", 1, "late in training: decay times the average plus 1 - decay times the model", shown=True)
def test_ema_weights_by_hand():
    import train
    average, model = linear(10.0), linear(20.0)
    train.ema_update(average, model, 0.75, 10_000)
    close(average.weight.detach(), [[12.5]])
    close(model.weight.detach(), [[20.0]])


@grades("ema_weights", 1, "at step 0 the decay is at most 1 / 10: the start is forgotten")
def test_ema_weights_forget_the_start():
    import train
    average, model = linear(10.0), linear(20.0)
    train.ema_update(average, model, 0.998, 0)
    close(average.weight.detach(), [[19.0]])
