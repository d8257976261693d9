"""The coursework as a table: what is asked, of which function of the project, and which mistakes must be caught.

The code of the handout is the project's own: an exercise names functions, and `plant` says how each is handed out: with
an empty body; with parts of its text replaced (what is old must occur exactly once); or with another body. If the code
changes so that a text is not found, CI says so. A wrong answer is made from the reference in the same way."""
from typing import NamedTuple


class Also(NamedTuple):
    """One of the project's own tests that grades, too: tests/FILE.py, its name and arguments."""
    test: str
    points: int
    expected: str
    args: tuple = ()


class Wrong(NamedTuple):
    """A mistake that students make: `old` is replaced by `new` (no old: `new` is the body), and `caught` by."""
    caught: str
    old: str
    new: str


class Exercise(NamedTuple):
    """tier: core (the smallest set), full or challenge; kind: write, bug, predict or race (make it faster)."""
    name: str
    tier: str
    kind: str
    function: str               # FILE.FUNCTION or FILE.CLASS.METHOD; of a prediction its case in cases.py
    minutes: int
    concept: str
    equation: str
    hint: str
    plant: tuple | str = ()     # () an empty body; ((old, new), ...) replacements; a string: another body
    doc: str = ""               # instead of the docstring, where that would tell the answer
    also: tuple = ()
    wrong: tuple = ()
    extends: str = ""           # the exercise on the same function, which this one goes on with
    after: str = ""             # exercises whose functions the tests that students have need, too


BLANK = "raise NotImplementedError"
PARTIAL = 'raise NotImplementedError("{}")'.format


def write(*args, **more):
    """An exercise whose function's body is to be written."""
    name, tier, *rest = args
    return Exercise(name, tier, "write", *rest, **more)


def bug(name, tier, function, minutes, concept, symptom, hint, **more):
    """An exercise whose function runs and is subtly wrong."""
    return Exercise(name, tier, "bug", function, minutes, concept, symptom, hint, **more)


def predict(name, tier, concept, question, hint):
    """A question whose right answer is what a small case gives: predict_NAME in cases.py."""
    return Exercise(name, tier, "predict", f"cases.{name}", 10, concept, question, hint)


WRITE = (
    write("normalization", "core", "gnn.build_graph", 15, "symmetric normalization", "S = D^-1/2 A D^-1/2",
          "An entry of S belongs to one edge; each of its two ends has a degree.",
          plant=(("weight = (degree[row] * degree[col]).rsqrt()                    # (2E,)",
                  PARTIAL("weight (2E,): the entries of S, one for each of the edges (row, col)")),),
          wrong=(Wrong("test_normalization_by_hand", "(degree[row] * degree[col]).rsqrt()", "1 / degree[row]"),
                 Wrong("test_normalization_neither_grows_nor_shrinks", "(degree[row] * degree[col]).rsqrt()",
                       "degree[row].float().rsqrt()"),
                 Wrong("test_normalization_by_hand", "(degree[row] * degree[col]).rsqrt()",
                       "(degree[row] + degree[col]).rsqrt()"),
                 Wrong("test_normalization_by_hand", ".rsqrt()", ".float().sqrt()"))),
    write("propagation", "core", "gnn.propagate", 20, "smoothing over the graph", "x^(k+1) = S x^k, mean over k",
          "Three lines: one product per layer, a running total, one division.",
          after="normalization",
          wrong=(Wrong("test_propagation_by_hand", "x, total = x0, x0", "x, total = x0, torch.zeros_like(x0)"),
                 Wrong("test_propagation_by_hand", "total / (layers + 1)", "x"),
                 Wrong("test_propagation_is_the_mean_of_powers", "total / (layers + 1)", "total / max(layers, 1)"),
                 Wrong("test_propagation_is_the_mean_of_powers", "x = spmm(graph, x)", "x = spmm(graph, x0)"),
                 Wrong("test_propagation_has_the_gradient_of_its_matrix", "total = total + x",
                       "total = total + x.detach()"))),
    write("bpr", "core", "gnn.bpr_loss", 15, "ranking by pairs", "-log sigmoid(s_pos - s_neg)",
          "log sigmoid overflows for large scores: which function of torch.nn.functional does not?",
          also=(Also("test_gnn.test_bpr_loss_is_minus_log_sigmoid_without_overflow", 1,
                     "finite for scores that are 10,000 apart, with the right gradient"),),
          wrong=(Wrong("test_bpr_by_hand", "neg_score - pos_score", "pos_score - neg_score"),
                 Wrong("test_bpr_by_hand", ".mean()", ".sum()"),
                 Wrong("test_bpr_loss_is_minus_log_sigmoid_without_overflow", "",
                       "return -(pos_score - neg_score).sigmoid().log().mean()"),
                 Wrong("test_bpr_by_hand", "", "return (neg_score - pos_score).clamp(min=0).mean()"))),
    write("negatives", "full", "gnn.sample_negatives", 45, "exact negatives, without rejection",
          "item = r + #{j : p_j - j <= r}",
          "Do the docstring's example with pencil and paper first; torch.searchsorted counts.",
          after="normalization",
          wrong=(Wrong("test_negatives_by_hand", "return r + before - start", "return r"),
                 Wrong("test_negatives_by_hand", "right=True", "right=False"),
                 Wrong("test_negatives_are_uniform_over_what_each_user_lacks", "return r + before - start",
                       "return (r + before) % graph.n_items"),
                 Wrong("test_negatives_by_hand", "graph.n_items - (end - start)",
                       "torch.full_like(user, graph.n_items)"),
                 Wrong("test_negatives_come_from_their_generator", ", generator)", ")"))),
    write("ranking", "core", "gnn.ranking_metrics", 40, "recall@k and NDCG@k",
          "DCG = sum over hits of 1/log2(1 + rank)",
          "`hit` says at which of the k places a test item stands; `ideal` what the best ranking of n items is worth.",
          plant=(("    ideal = discount.cumsum(0)                              # (k,) for 1, ..., k hits\n", ""),
                 ("        best = ideal[n_test.long().clamp(max=k) - 1]\n", ""),
                 ("parts.append(torch.stack([hit.sum(1) / n_test, hit @ discount / best]))",
                  PARTIAL("append recall and NDCG (2, C) to parts"))),
          also=(Also("test_gnn.test_ranking_matches_brute_force_ties_and_missing_users_included", 1,
                     "both as by sorting every user's items, for many users, seen items and ties", (3, 5, 7)),),
          after="normalization",
          wrong=(Wrong("test_ranking_recall_by_hand", "hit.sum(1) / n_test", "hit.sum(1) / k"),
                 Wrong("test_ranking_matches_brute_force_ties_and_missing_users_included",
                       "ideal[n_test.long().clamp(max=k) - 1]", "ideal[hit.sum(1).long().clamp(min=1) - 1]"),
                 Wrong("test_ranking_ndcg_by_hand", "ideal[n_test.long().clamp(max=k) - 1]", "ideal[-1]"),
                 Wrong("test_ranking_ndcg_by_hand", "hit @ discount", "hit.sum(1)"),
                 Wrong("test_ranking_recall_by_hand", "hit.sum(1) / n_test", "(hit.sum(1) > 0).to(hit.dtype)"))),
    write("fold_in", "full", "gnn.ModalGNN.fold_in", 45, "new users without retraining",
          "p = 1/(L+1) sum_i (|history| (degree_i + 1))^-1/2 sum_{k<L} x_i^k",
          "propagate(..., L - 1) gives a mean over k < L of all nodes; index_add_ sums by person.",
          plant=(("        n_liked = history.row_ptr.diff()[person]\n", ""),
                 ("        n_likers = 1 + graph.row_ptr.diff()[graph.n_users + liked]\n", ""),
                 ("        layers = self.cfg.layers\n", ""),
                 ("        items = propagate(graph, self.layer0(), layers - 1)[self.n_users:]  # a mean over k < L\n",
                  ""),
                 ("        weight = layers / (layers + 1) * (n_liked * n_likers).to(items.dtype).rsqrt()[:, None]\n",
                  ""),
                 ("        p = items.new_zeros(n_new, items.shape[1]).index_add_(0, person, weight * items[liked])\n",
                  ""),
                 ("return dict(zip(self.modalities, p.split(self.cfg.dim, dim=1)))", BLANK)),
          after="normalization propagation",
          wrong=(Wrong("test_fold_in_is_what_a_user_in_the_graph_has", "1 + graph.row_ptr", "graph.row_ptr"),
                 Wrong("test_fold_in_is_what_a_user_in_the_graph_has", "layers / (layers + 1) * ", ""),
                 Wrong("test_fold_in_of_two_layers", "self.layer0(), layers - 1", "self.layer0(), layers"),
                 Wrong("test_fold_in_of_two_layers", "n_liked * n_likers", "n_likers"),
                 Wrong("test_fold_in_of_no_history_is_zero", "items.new_zeros(n_new", "items.new_ones(n_new"))),
    write("nearest_code", "core", "vq.nearest_code", 25, "vector quantization", "argmin_k |x - e_k|^2",
          "|x - e|^2 = |x|^2 - 2 x . e + |e|^2: which of the three matter to the argmin?",
          wrong=(Wrong("test_nearest_code_measures_every_distance", "",
                       "return (x @ codebook.T).argmax(1)"),
                 Wrong("test_nearest_code_measures_every_distance", "codebook.square().sum(1) / 2",
                       "codebook.square().sum(1)"),
                 Wrong("test_nearest_code_by_hand", ".argmin(1)", ".argmax(1)"),
                 Wrong("test_nearest_code_measures_every_distance", "codebook.square().sum(1) / 2",
                       "codebook.square().mean(1) / 2"),
                 Wrong("test_nearest_code_measures_every_distance", "",
                       "return torch.cdist(x, codebook, p=1).argmin(1)"))),
    write("straight_through", "core", "vq.straight_through", 20, "a gradient through a choice", "z_e + sg(e - z_e)",
          "detach() is sg. Read the docstring's last sentence: in which order does nothing round?",
          also=(Also("test_vq.test_straight_through_passes_the_gradient_unchanged", 1,
                     "the value of e to the bit, the identity as the Jacobian, no gradient to e"),),
          wrong=(Wrong("test_straight_through_by_hand", "", "return e.detach() + 0 * z_e"),
                 Wrong("test_straight_through_by_hand", "", "return z_e + (z_e - e).detach()"),
                 Wrong("test_straight_through_passes_the_gradient_unchanged", "", "return z_e + (e - z_e).detach()"),
                 Wrong("test_straight_through_passes_the_gradient_unchanged", "e.detach() +", "e +"))),
    write("ema_codebook", "full", "vq.EMACodebook.update", 45, "a codebook of moving averages, with revival",
          "total <- decay total + (1 - decay) sum / B",
          "index_add_ sums rows by code; lerp averages. `nth` numbers the dead codes: cumsum.",
          plant=(("        share = torch.full_like(x[:, 0], 1 / len(x))  # (B,)  of one row\n", ""),
                 ("        count = torch.zeros_like(self.count).index_add_(0, codes, share)  # (K,)\n", ""),
                 ("        total = torch.zeros_like(self.total).index_add_(0, codes, x / len(x))  # (K, D)\n", ""),
                 ("        count, total = count.lerp(self.count, decay), total.lerp(self.total, decay)\n", ""),
                 ("        dead = count < self.config.revive_below / n_codes  # (K,)\n", ""),
                 ("        error = (x - self.codebook[codes]).square().sum(1)  # (B,)\n", ""),
                 ("        rows = draw_rows(error, n_codes, generator)  # (min(K, B),)\n", ""),
                 ("        nth = (dead.cumsum(0) - 1) % len(rows)  # (K,)  the nth dead code gets the nth row "
                  "drawn\n", ""),
                 ("        count = torch.where(dead, 1 / n_codes, count)\n", ""),
                 ("        total = torch.where(dead[:, None], x[rows[nth]] / n_codes, total)\n",
                  "        " + PARTIAL("count (K,) and total (K, D), moved, and with dead codes revived") + "\n")),
          also=(Also("test_vq.test_update_equals_a_loop_over_the_rows", 1,
                     "four updates with revival as by a loop: rows drawn by draw_rows, by their error as it was",
                     (0.8,)),),
          wrong=(Wrong("test_ema_codebook_by_hand", "count.lerp(self.count, decay), total.lerp(self.total, decay)",
                       "self.count.lerp(count, decay), self.total.lerp(total, decay)"),
                 Wrong("test_ema_codebook_by_hand", "1 / len(x))", "1.0)"),
                 Wrong("test_ema_codebook_revives_dead_codes", "torch.where(dead, 1 / n_codes, count)", "count"),
                 Wrong("test_ema_codebook_revives_dead_codes", "x[rows[nth]]", "x[rows[:1]]"),
                 Wrong("test_ema_codebook_revives_dead_codes", "x[rows[nth]] / n_codes", "x[rows[nth]]"),
                 Wrong("test_update_equals_a_loop_over_the_rows", "draw_rows(error, ",
                       "draw_rows(torch.ones_like(error), "))),
    write("residual_quantization", "core", "vq.ResidualVQVAE.quantize", 40, "a few codes, each for what is left over",
          "r_(l+1) = r_l - e_l,code_l;  z_q = sum_l e_l,code_l",
          "Keep two running tensors: what is left over, and what has been said. straight_through joins them.",
          after="nearest_code straight_through",
          wrong=(Wrong("test_residual_quantization_by_hand", "nearest_code(residual,", "nearest_code(z_e,"),
                 Wrong("test_residual_quantization_commits_every_level", "torch.stack(errors).mean()", "errors[-1]"),
                 Wrong("test_residual_quantization_commits_every_level", "torch.stack(errors).mean()",
                       "torch.stack(errors).sum()"),
                 Wrong("test_residual_quantization_has_two_gradients", "straight_through(z_e, e)", "e + 0 * z_e"),
                 Wrong("test_residual_quantization_has_two_gradients", "mean_square(residual))",
                       "mean_square(residual.detach() + 0 * z_e))"))),
    write("codebook_health", "full", "vq.codebook_health", 25, "are the codes used?", "perplexity = exp(entropy)",
          "bincount per level; torch.special.entr is -p log p, 0 at 0; unique(dim=0) counts whole tuples.",
          also=(Also("test_vq.test_codebook_health_of_known_codes", 1, "known codes, unused ones, a single user"),),
          wrong=(Wrong("test_codebook_health_by_hand", ".sum(1).exp()", ".sum(1)"),
                 Wrong("test_codebook_health_by_hand", "(size[tuple_of] > 1)", "(size > 1)"),
                 Wrong("test_codebook_health_by_hand", "(count > 0).double().mean(1)", "(count > 0).double().sum(1)"),
                 Wrong("test_codebook_health_by_hand", ".sum(1).exp()", ".sum(1).div(0.6931471805599453).exp()"))),
    write("prefix_mask", "core", "generators.TextDecoder.forward", 30, "who sees whom: a prefix language model",
          "the prefix sees all of itself; text sees the prefix and the text before it",
          "Start from a lower triangle, open the prefix's columns, close those of padding.",
          plant=(("        visible = present.new_ones(x.shape[1], x.shape[1]).tril()\n", ""),
                 ("        visible[:, :n_prefix] = True\n", ""),
                 ("visible = visible & F.pad(present, (0, length), value=True)[:, None]  # (B, S, S)",
                  PARTIAL("visible (B, S, S) bool: row s says which positions s sees; nobody sees padding"))),
          also=(Also("test_text.test_a_later_token_moves_no_earlier_logit_but_later_ones", 1,
                     "no logit changes before a changed token, each after it does"),),
          wrong=(Wrong("test_prefix_mask_lets_the_prefix_see_itself", "        visible[:, :n_prefix] = True\n", ""),
                 Wrong("test_prefix_mask_hides_the_future", ".tril()", ""),
                 Wrong("test_prefix_mask_hides_padding", "visible & F.pad(present, (0, length), value=True)[:, None]",
                       "visible.expand(len(x), -1, -1)"),
                 Wrong("test_prefix_mask_lets_the_prefix_see_itself", "visible[:, :n_prefix] = True",
                       "visible[n_prefix:, :n_prefix] = False"),
                 Wrong("test_prefix_mask_hides_the_future", ".tril()", ".tril(1)"))),
    write("nucleus", "full", "generators.nucleus", 35, "sampling from the likely tokens",
          "the smallest set whose probability reaches top_p",
          "Sort, sum from the front; the token that crosses top_p is in. What is the least probability inside?",
          also=(Also("test_text.test_nucleus_takes_ties_together_and_keeps_what_it_is_told", 1,
                     "tokens of equal probability are in or out together"),),
          wrong=(Wrong("test_nucleus_by_hand", "falling.cumsum(-1) - falling", "falling.cumsum(-1)"),
                 Wrong("test_nucleus_by_hand", "", "p = logits.softmax(-1)\nreturn p >= 1 - top_p"),
                 Wrong("test_nucleus_is_the_smallest_set", "falling = rising.flip(-1)", "falling = rising"),
                 Wrong("test_nucleus_by_hand", "logits.detach().softmax(-1)", "logits.detach().exp() * 2"),
                 Wrong("test_nucleus_takes_ties_together_and_keeps_what_it_is_told", "",
                       "p, i = logits.detach().softmax(-1).sort(-1, descending=True, stable=True)\n"
                       "inside = p.cumsum(-1) - p < top_p\n"
                       "return torch.zeros_like(inside).scatter(-1, i, inside)"))),
    write("guidance", "core", "generators.guided_v", 30, "classifier-free guidance", "v(null) + w (v(k) - v(null))",
          "w = 0 is unpersonalized, w = 1 as trained. Null tokens are -1. torch.no_grad for the null branch.",
          also=(Also("test_image.test_guided_v_is_two_forwards_one_by_one_with_and_without_gradient", 1,
                     "with a denoiser in float64: as by two passes, with and without gradient", (2.5,)),),
          wrong=(Wrong("test_guidance_by_hand", "_at_least_fp32(v), guidance)", "_at_least_fp32(v), 1 + guidance)"),
                 Wrong("test_guidance_by_hand", "torch.lerp(_at_least_fp32(v_null), _at_least_fp32(v), guidance)",
                       "v_null + guidance * v"),
                 Wrong("test_guidance_of_1_skips_the_null_branch", "if guidance == 1:", "if guidance == 99:"),
                 Wrong("test_guidance_learns_in_the_conditional_branch_alone", "with torch.no_grad():", "if True:"),
                 Wrong("test_guidance_by_hand", "null, times = torch.full_like(prefs, -1)",
                       "null, times = torch.zeros_like(prefs)"))),
    write("ddim_step", "core", "generators.ddim_step", 40, "one step back towards the picture",
          "mean = alpha_s z_0 + sqrt(sigma_s^2 - std^2) eps",
          "From z and v come z_0 and eps, by a rotation. clamp(min=0) what rounding may make negative.",
          also=(Also("test_image.test_ancestral_step_is_the_posterior_of_the_forward_process", 1,
                     "for eta = 1 the exact posterior q(z_s | z_t, z_0)", (0.5, 0.2)),),
          wrong=(Wrong("test_ddim_step_parts_the_noise", "(sigma_s.square() - std.square())", "(sigma_s.square())"),
                 Wrong("test_ddim_step_knows_the_way", "alpha * z - sigma * v", "alpha * z + sigma * v"),
                 Wrong("test_ddim_step_parts_the_noise", "eta * sigma_s / sigma",
                       "eta * sigma / sigma_s.clamp(min=1e-6)"),
                 Wrong("test_ddim_step_parts_the_noise", "eta * sigma_s", "sigma_s"),
                 Wrong("test_ddim_step_ends_without_noise", "eta * sigma_s / sigma",
                       "eta * sigma_s.clamp(min=0.2) / sigma"))),
    write("v_loss", "core", "generators.Denoiser.loss", 20, "what the denoiser learns to say",
          "v = alpha eps - sigma z",
          "Noise z to z_t, ask the network, compare with v.",
          plant=(("        v = self(alpha * z + sigma * eps, t, prompt, prefs)\n", ""),
                 ("return F.mse_loss(v, alpha * eps - sigma * z)", BLANK)),
          also=(Also("test_image.test_loss_is_the_loop_over_pictures_for_the_same_draws_in_value_and_gradient", 1,
                     "the mean squared error, by value and gradient, as by a loop over pictures"),),
          wrong=(Wrong("test_v_loss_of_the_truth_is_0", "alpha * eps - sigma * z)", "alpha * eps + sigma * z)"),
                 Wrong("test_v_loss_of_the_truth_is_0", "F.mse_loss(v, alpha * eps - sigma * z)", "F.mse_loss(v, eps)"),
                 Wrong("test_v_loss_of_the_truth_is_0", "self(alpha * z + sigma * eps", "self(sigma * z + alpha * eps"),
                 Wrong("test_loss_is_the_loop_over_pictures_for_the_same_draws_in_value_and_gradient",
                       "F.mse_loss(v,", "F.l1_loss(v,"))),
    write("info_nce", "core", "reward.info_nce", 35, "do this picture and this text belong together?",
          "cross-entropy of softmax(scale a . b), both ways",
          "One (B, B) matrix; log_softmax over its rows, then over its columns. Targets sum to 1.",
          also=(Also("test_reward.test_info_nce_is_the_double_loop", 1,
                     "as by a loop over all rows of both sides, by value and gradient", ([0, 1, 2, 0, 1],)),),
          wrong=(Wrong("test_info_nce_is_the_double_loop", "logits.T.log_softmax(1)", "logits.log_softmax(1)"),
                 Wrong("test_info_nce_shares_the_target", "target = same.to(logits.dtype)",
                       "target = torch.eye(len(a), dtype=logits.dtype)"),
                 Wrong("test_info_nce_by_hand", "scale * (a @ b.T)", "(a @ b.T) / scale"),
                 Wrong("test_info_nce_shares_the_target", "target = target / target.sum(1, keepdim=True)  # (B, B)",
                       "target = target  # (B, B)"),
                 Wrong("test_info_nce_by_hand", ".mean() / 2", ".sum() / 2"))),
    write("leave_one_out", "core", "reward.leave_one_out", 15, "a baseline from the group",
          "A_s = R_s - mean of the others", "The mean of all S samples holds R_s itself: what factor mends that?",
          also=(Also("test_reward.test_leave_one_out_is_the_loop_and_its_gradient_stops", 1,
                     "as by a loop over the others, without gradient"),),
          wrong=(Wrong("test_leave_one_out_by_hand", " * (S / (S - 1))", ""),
                 Wrong("test_leave_one_out_is_the_loop_and_its_gradient_stops", "reward.detach()", "reward"),
                 Wrong("test_leave_one_out_by_hand", "reward.mean(1, keepdim=True)", "reward.mean()"),
                 Wrong("test_leave_one_out_by_hand", "(S / (S - 1))", "((S - 1) / S)"))),
    write("reinforce", "core", "reward.reinforce_loss", 15, "the score-function gradient", "E[A grad log pi]",
          "A loss is minimized, a reward is not. Which of the two factors must carry no gradient?",
          also=(Also("test_reward.test_reinforce_gives_the_gradient_to_the_log_probability_only", 1,
                     "the gradient goes to log_prob alone: minus the advantage over the number of samples"),
                Also("test_reward.test_leave_one_out_reinforce_averages_to_the_exact_gradient", 1,
                     "over all outcomes of a small policy: the exact gradient of the expected reward")),
          wrong=(Wrong("test_reinforce_by_hand", "return -(", "return ("),
                 Wrong("test_reinforce_gives_the_gradient_to_the_log_probability_only", "advantage.detach()",
                       "advantage"),
                 Wrong("test_reinforce_by_hand", ".mean()", ".sum()"),
                 Wrong("test_reinforce_by_hand", "_full(log_prob)", "_full(log_prob).exp()"))),
    write("log_prob", "core", "reward.gaussian_log_prob", 20, "how likely was this step?",
          "log N(x; mean, std^2), summed",
          "Three terms per number; sum over all but the batch. bf16 is too coarse to sum in.",
          also=(Also("test_reward.test_gaussian_log_prob_and_kl_are_those_of_torch_distributions", 1,
                     "as torch.distributions has it, by value and gradient; of bf16 numbers in fp32"),),
          wrong=(Wrong("test_log_prob_by_hand", ".sum(1)", ".mean(1)"),
                 Wrong("test_gaussian_log_prob_and_kl_are_those_of_torch_distributions", " - std.log()", ""),
                 Wrong("test_log_prob_by_hand", ".square() / 2", ".square()"),
                 Wrong("test_log_prob_by_hand", "math.log(2 * math.pi) / 2", "math.log(2 * math.pi)"))),
    write("pair_reward", "full", "reward.pair_reward", 25, "a reward that is consistent and personalized",
          "lambda_c cos(x, y) + lambda_p (s_image + s_text)",
          "consistency and normalize_group do the work; a text cannot change its partners' s_image.",
          also=(Also("test_reward.test_pair_reward_is_the_loop", 1,
                     "as by loops over groups and samples, and its parts"),),
          wrong=(Wrong("test_pair_reward_is_the_loop", "cfg.lambda_p * normalize_group(s_image)",
                       "cfg.lambda_p * normalize_group(s_text)[:, :1].expand_as(s_image)"),
                 Wrong("test_pair_reward_of_consistency_alone", "cfg.lambda_c * normalize_group(c_image)",
                       "cfg.lambda_c * c_image"),
                 Wrong("test_pair_reward_of_consistency_alone", "cfg.lambda_c * normalize_group(c_text)",
                       "cfg.lambda_p * normalize_group(c_text)"),
                 Wrong("test_pair_reward_is_the_loop", "cfg.lambda_p * normalize_group(s_text)",
                       "cfg.lambda_p * s_text"))),
    write("cluster_interval", "full", "reward._mean_and_error", 30, "how sure is a mean, when a user has many values?",
          "Var(mean) = C/(C-1) sum_c [sum_(i in c) (v_i - mean)]^2 / n^2",
          "Sum the deviations within each cluster first, square then: `index` says which cluster a value is of.",
          plant=(("    residual = values.new_zeros(C).index_add_(0, index, values - mean)\n", ""),
                 ("error = math.sqrt(C / (C - 1) * float(residual.square().sum())) / len(values)",
                  PARTIAL("error, a float: the cluster-robust standard error of the mean, see `interval`"))),
          also=(Also("test_reward.test_interval_without_clusters_is_students", 1,
                     "where each value is its own cluster: Student's interval"),),
          wrong=(Wrong("test_cluster_interval_counts_copies_once", "float(residual.square().sum())",
                       "float((values - mean).square().sum())"),
                 Wrong("test_interval_without_clusters_is_students", "C / (C - 1) * ", ""),
                 Wrong("test_cluster_interval_by_hand", "/ len(values)\n", "/ C\n"),
                 Wrong("test_interval_without_clusters_is_students", "values - mean)", "values)"))),
    write("split_by_time", "full", "dppmg.split_by_time", 30, "judge by what came later", "8 : 1 : 1 by time, per user",
          "np.lexsort orders by several keys, the last counts most; a cumulative count tells where a user ends.",
          wrong=(Wrong("test_split_by_time_by_hand", "(chance, time, user)", "(chance, -time, user)"),
                 Wrong("test_split_by_time_is_each_users_own", "(count + 5) // 10", "count // 10"),
                 Wrong("test_split_by_time_by_hand", "torch.where(count < 3, 0, ((count + 5) // 10).clamp(min=1))",
                       "((count + 5) // 10).clamp(min=1)"),
                 Wrong("test_split_by_time_by_hand", "return part[order.argsort()]", "return part"))),
    write("ema_weights", "full", "train.ema_update", 15, "the running mean of the weights",
          "average <- decay average + (1 - decay) model",
          "zip the parameters of both; lerp_ moves one towards the other.",
          wrong=(Wrong("test_ema_weights_by_hand", "1 - min(", "min("),
                 Wrong("test_ema_weights_forget_the_start", "min(decay, (1 + step) / (10 + step))", "decay"),
                 Wrong("test_ema_weights_by_hand", "min(decay,", "max(decay,"))),
)

BUGS = (
    bug("bug_user_embedding", "core", "gnn.ModalGNN.__init__", 20, "what an optimizer knows",
        "the graph network trains, and ranks less well than it could",
        "Which tensors does model.parameters() hold?",
        plant=(("self.user, self.item = nn.ParameterDict(), nn.ParameterDict()   # e^m, W_m",
                "self.user, self.item = {}, nn.ParameterDict()   # e^m, W_m"),)),
    bug("bug_seen_items", "core", "gnn.top_items", 20, "ranking what is new to a user",
        "recall falls the longer the network trains", "What does the list of recommendations hold?",
        plant=(("score[seen] = -torch.inf", "score[seen] = -1"),),
        doc="The k items that score highest for each user, best first; equal scores by ascending item id.\n"
            "user_emb (C, D), item_emb (I, D); seen: (row of user_emb, item), (H,) each -> (C, k) int64; I (no item)\n"
            "where fewer than k are left."),
    bug("bug_ideal_dcg", "full", "gnn.ranking_metrics", 20, "what NDCG is normalized by",
        "NDCG looks better than recall lets one hope", "What is the NDCG of a user with one hit of many?",
        plant=(("best = ideal[n_test.long().clamp(max=k) - 1]",
                "best = ideal[hit.sum(1).long().clamp(min=1) - 1]"),),
        doc="recall@k and NDCG@k of every user with test items, over all items but the user's in `seen`.\n"
            "rows: users (U, D), items (I, D) -> (R,) each, of the R users with a test item, in order. Holds the\n"
            "scores of `chunk` users at a time. Raises ValueError for sizes unlike the graphs', and for NaN."),
    bug("bug_commitment", "full", "vq.ResidualVQVAE.forward", 30, "who moves towards whom",
        "beta can be set to anything: the training stays the same", "Print the gradient of the commitment alone.",
        plant=(("loss = reconstruction_loss + self.config.beta * quantized.commit",
                "commit = mean_square(z_e - quantized.z_q)\n"
                "        loss = reconstruction_loss + self.config.beta * commit"),),
        also=(Also("test_vq.test_forward_equals_a_slow_one_by_value_and_gradient", 3,
                   "the commitment pulls the encoder to its codes: it is taken before the straight-through"),)),
    bug("bug_dead_codes", "full", "vq.EMACodebook.update", 30, "codes that nobody uses",
        "many codes are unused, though dead ones are revived at each step", "Follow one revived code for two steps.",
        plant=(("        count = torch.where(dead, 1 / n_codes, count)\n", ""),
               ("        total = torch.where(dead[:, None], x[rows[nth]] / n_codes, total)\n", ""),
               ("self.codebook.copy_(total / smooth[:, None])",
                "self.codebook.copy_(torch.where(dead[:, None], x[rows[nth]], total / smooth[:, None]))")),
        doc="One EMA step with the batch x (B, D) and its codes (B,) int64; a code with count < revive_below / K\n"
            "restarts at a row of x, drawn in proportion to its squared error. An empty batch changes nothing."),
    bug("bug_last_noise", "core", "generators.denoise", 20, "the end of sampling",
        "pictures are grainy, however many steps are taken", "How much noise is left at time 0?",
        plant=(("z = mean + std * noise", "z = mean + std.clamp(min=0.1) * noise"),)),
    bug("bug_averaged_log_prob", "core", "generators.text_log_prob", 20, "how likely is a text",
        "REINFORCE learns, but too fast for long texts", "Probabilities of all texts sum to ...?",
        plant=(("return taken.masked_fill(tokens == PAD, 0.0).sum(-1)",
                "return taken.masked_fill(tokens == PAD, 0.0).sum(-1) / (tokens != PAD).sum(-1)"),)),
    bug("bug_dropped_tokens", "full", "generators.drop_preferences", 20, "training the unconditional branch",
        "guidance does odd things: the unpersonalized branch seems untrained", "How many rows are wholly null?",
        plant=(("torch.rand(len(prefs), 1,", "torch.rand(prefs.shape,"),),
        doc="prefs (B, M) with null (-1) tokens at probability `rate`, so that one generator learns both branches\n"
            "of guidance (Ho & Salimans 2207.12598v1, Algorithm 1)."),
    bug("bug_advantage_gradient", "full", "reward.reinforce_loss", 25, "what a surrogate differentiates",
        "with a penalty on log-probability inside the reward the policy settles at the wrong place",
        "Which tensors of the loss require a gradient?",
        plant=(("advantage.detach() * _full(log_prob)", "advantage * _full(log_prob)"),),
        doc="Score-function surrogate (Williams 1992): its gradient is -E[A grad log pi]; its value means nothing.\n"
            "log_prob (...) nats, summed over a sample's tokens or steps; advantage of the same shape -> (), the mean\n"
            "over samples.  Raises ValueError rather than broadcast."),
    bug("bug_frozen_rows", "full", "reward.token_optimizer", 20, "what moves although nobody touches it",
        "tokens of users who were in no round speak differently afterwards",
        "Compare the table's rows before and after.",
        plant=(("-> torch.optim.Adam:", "-> torch.optim.Optimizer:"),
               ("torch.optim.Adam(groups, betas=(0.9, 0.99))",
                "torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1)")),
        doc='Optimizer of the tables of preference tokens, {"image": ..., "text": ...}, each with its learning rate.\n'
            "A code is in few groups of a round, so the second moment forgets with 0.99 (DEVIATION 22)."),
    bug("bug_token_mean", "full", "reward._masked_mean", 20, "a mean for each text",
        "the scorer is worse for texts of unlike lengths", "Embed a text alone, then in company.",
        plant=(("keep.sum(1).clamp(min=1)", "(keep.sum((0, 1)) / len(x)).clamp(min=1)"),),
        doc="Mean over the places (B, T) that count.  x (B, T, D) -> (B, D)."),
    bug("bug_own_taste", "full", "reward.taste_without", 25, "a judge must not know the answer",
        "the judge is delighted, even where tastes are noise", "Judge users who like at random: what must come out?",
        plant=(("total = mean[who] * count[who, None] - centred[judged] * is_like",
                "total = mean[who] * count[who, None]"),
               ("left = count[who, None] - is_like.float()", "left = count[who, None].float()"),
               ("    # Is (who, judged) one of the likes?  Each pair as one number.\n", ""),
               ("    is_like = torch.isin(who * len(embedding) + judged, user * len(embedding) + item)[:, None]\n",
                "")),
        doc="What a user likes more than others do, in the judge's eyes: the mean embedding of the user's likes,\n"
            "less that of everybody's.  What is made for the user is scored by its cosine with the row.\n"
            "embedding (I, D); likes user, item (R,) int64, each pair once; who, judged (B,) int64: the item that\n"
            "will be judged, and for whom -> (B, D), 0 for a user who likes nothing else.",
        also=(Also("test_reward.test_taste_without_is_the_loop", 3, "the judged item is not part of the user's taste",
                   ("float64",)),)),
)

PREDICT = (
    predict("bpr_at_the_start", "core", "loss at the start",
            "About which loss (nats, one decimal) has a fresh ModalGNN with two modalities, before any "
            "step, without l2?",
            "Users start at 0, and propagation gives them little: all scores are nearly equal."),
    predict("guidance_1", "core", "guidance",
            "Guidance w = 1 instead of 3, with taste: does the entropy of the sampled tokens go up, down or "
            "stay the same?",
            "What does w > 1 do to what taste favours?"),
    predict("one_code_level", "full", "codebooks",
            "One level of 8 codes instead of four: how many different token tuples do 500 users have at most?",
            "Each user is one code."),
    predict("one_level_explains", "full", "codebooks",
            "One level instead of four: does the explained share of the preferences' variance go up, down or "
            "stay the same?",
            "What do the later levels code?"),
    predict("no_kl", "core", "drift",
            "REINFORCE without the KL to the starting tokens: does the policy's entropy at the end go up, "
            "down or stay the same?",
            "What holds a policy back from its favourite?"),
    predict("group_of_two", "core", "advantages",
            "A group of two with the rewards 1 and 4: the advantage of the second?",
            "The baseline is the other one."),
    predict("group_offset", "full", "advantages",
            "Every reward of a group is raised by 10: do its advantages' squares go up, down or stay the "
            "same?",
            "What does a baseline do?"),
    predict("lambda_c_0", "full", "the reward's terms",
            "lambda_c = 0: does the mean cosine of the chosen best pairs go up, down or stay the same?",
            "What is then left to choose by?"),
    predict("quarter_history", "full", "folding in",
            "All items alike: with a quarter of the history, by which factor does the length of the folded-in "
            "preference change?",
            "Each item weighs 1 / sqrt(|history|)."),
    predict("half_history", "full", "folding in",
            "Items of random features: does a preference folded in from half the history have a cosine with "
            "the whole one of 1 (same), less (down) or more (up)?",
            "Half the evidence."),
    predict("many_layers", "full", "smoothing",
            "64 layers instead of 2: does the mean cosine between users' preferences go up, down or stay the "
            "same?",
            "What does S^k x tend to for large k?"),
    predict("eta_0", "full", "sampling",
            "eta = 0, twice from the same starting noise with other seeds for the steps: by how much do the "
            "two samples differ at most?",
            "What does eta multiply?"),
    predict("nucleus_size", "core", "sampling",
            "Tokens with probabilities 0.4, 0.3, 0.2, 0.1 and top_p = 0.75: how many are in the nucleus?",
            "The one that crosses is in."),
    predict("scorer_at_chance", "full", "contrast",
            "The InfoNCE (nats, two decimals) of 64 pairs for a scorer that gives all the same embedding?",
            "A guess among 64."),
    predict("copied_values", "full", "certainty",
            "Each user's value is written down four times. By which factor is the interval too narrow if one "
            "forgets that, for 400 users?",
            "1 / sqrt of what?"),
)

RACES = (
    Exercise("faster_product", "challenge", "race", "gnn._bag_product", 60, "a sparse product without messages",
             "y = S x without a (2E, D) tensor", "Which function of torch.nn.functional sums weighted rows in bags?",
             plant="return _index_add_product(graph, x)"),
    Exercise("faster_decoding", "challenge", "race", "generators.sample_text", 90, "cached decoding",
             "each step computes one position, not all", "TextDecoder.start and TextDecoder.step keep what was "
             "computed.",
             plant='''
cfg, max_len = decoder.cfg, max_len or decoder.cfg.context
uniform = torch.rand(max_len, len(prompt), 1, generator=generator, device=prompt.device)
tokens = prompt.new_full((len(prompt), max_len), PAD)
for t in range(max_len):
    cond = decoder(tokens[:, :t + 1], prompt, prefs)[:, t]
    null = decoder(tokens[:, :t + 1], prompt, torch.full_like(prefs, -1))[:, t]
    cdf = sampling_logits(cond, null, cfg).exp().cumsum(-1)  # (B, V)
    choice = torch.searchsorted(cdf, uniform[t] * cdf[:, -1:], right=True)[:, 0]
    ended = (tokens == EOS).any(1)
    tokens[:, t] = torch.where(ended, PAD, choice.clamp(max=cfg.vocab_size - 1))
return tokens
'''),
    Exercise("faster_quantizer", "challenge", "race", "vq.nearest_code", 45, "distances by one product",
             "|x - e|^2 without an (N, K, D) tensor", "One matrix product gives all x . e_k.",
             plant="return (x[:, None] - codebook).square().sum(2).argmin(1)", extends="nearest_code"),
)

EXERCISES = WRITE + BUGS + PREDICT + RACES

# editions of the coursework, the newest first
CHANGES = (("1", "the first edition: 24 functions to write, 12 bugs, 15 predictions, 3 races"),)
