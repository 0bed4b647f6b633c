"""Hold the fourth list of faults of tools/mutants.py: slips of a refactoring, in what changed last and in what no list touched.

Scalings of rotary frequencies, families with norms behind branches, vocabularies whose logits come in pieces, gradients that
pile up, losses of pairs, budgets, packing, blocks of bfloat16, prompts together, exports, choices, figures of reports. The list
was closed before any of it was planted, and before a gate was read.
"""

# ruff: noqa: E501

from __future__ import annotations

from mutant_faults import Mutant, fault

ATTENTION16, LOW, BLOCKED, SOFTMAX, CPU, KERNELS = (
    f"apr/backends/cpu/{name}.py" for name in ("attention", "low", "blocked", "softmax", "ops", "kernels")
)
ADAPTERS, DROPOUT, EIGHT, LORA, MODEL, PAIRS, PARAMS, SCHEDULE, BLOCK, ROPE, SCALING = (
    f"apr/model/{name}.py"
    for name in (
        "adapters", "lora_dropout", "eight_bits", "lora", "transformer", "preferences", "params", "schedule", "block", "rope",
        "rope_scaling",
    )
)  # fmt: skip
EVALUATE, LOOP, PROGRESS, RUNDIR, BY_SOURCE = (
    f"apr/training/{name}.py" for name in ("evaluate", "loop", "progress", "rundir", "by_source")
)
BATCHES, MIXTURE, TURNS, MIXED, WRITER, MANIFEST, DOCUMENTS = (
    f"apr/data/{name}.py"
    for name in ("batches", "mixture", "turns", "mixed", "shard_writer", "manifest", "documents")
)
PACK, RENDER, PAIRING = (f"apr/data/conversations/{name}.py" for name in ("pack", "render", "pairs"))
STATE, GGUF, GGUF_SCALING, PEFT, PEFT_WRITE, TENSORS, CHECKPOINT = (
    f"apr/checkpoints/{name}.py"
    for name in ("state", "gguf", "gguf_scaling", "peft", "peft_write", "tensors", "checkpoint")
)
SAMPLING, STREAMING, GENERATE = (f"apr/inference/{name}.py" for name in ("sampling", "streaming", "generate"))
SCORES, CHOICES, SECTIONS = "apr/evaluation/loss.py", "apr/evaluation/choices.py", "apr/report/sections.py"

# fmt: off
FOURTH: tuple[Mutant, ...] = (
    # Scalings of rotary frequencies
    fault("yarn_without_amplitude", "cos and sin of YaRN lack its amplitude", ROPE,
          "c.rope_scaling.amplitude if c.rope_scaling else 1.0", "1.0", "yarn"),
    fault("amplitude_of_sin_alone", "the amplitude of YaRN multiplies sin alone", ROPE,
          "return np.cos(angle) * amplitude,", "return np.cos(angle),", "yarn"),
    fault("amplitude_of_log10", "the amplitude of YaRN takes the decimal logarithm of the factor", SCALING,
          "mscale * math.log(factor) + 1 if", "mscale * math.log10(factor) + 1 if", "yarn"),
    fault("bounds_not_whole", "the bounds of YaRN's ramp are not made whole pairs", SCALING,
          "        if self.truncate:\n", "        if not self.truncate:\n", "yarn"),
    fault("half_turns", "YaRN counts half turns as turns", SCALING,
          "(beta * 2 * math.pi)", "(beta * math.pi)", "yarn"),
    fault("linear_factor_ignored", "positions of linear scaling are not divided", SCALING,
          "        return freq / self.factor\n", "        return freq\n", "linear"),
    # Families with norms behind branches, and layers without rotary embedding
    fault("second_norm_reads_attention", "the gradient of the norm behind the MLP is taken at what attention gave", BLOCK,
          "g.mlp_post_norm, a.mlp_out, a.post_rstd2,", "g.mlp_post_norm, a.att_out, a.post_rstd2,", "olmo2"),
    fault("key_norm_by_the_queries", "keys that are normalised over all heads share the rstd of queries", BLOCK,
          "(u, y[:, :, p], x[:, :, p], rstd[:, i : i + 1])", "(u, y[:, :, p], x[:, :, p], rstd[:, :1])", "olmo2"),
    fault("layers_turned_back", "backward turns gradients of layers without rotary embedding too", BLOCK,
          "        if layer.rope:\n            self._rope(s.dqk", "        if layer is not None:\n            self._rope(s.dqk", "smollm3"),
    # The model's passes
    fault("head_of_the_last_rows", "where logits come in pieces, the head learns from the last piece alone", MODEL,
          "adds = first > 0 or not (begins or self._micro)", "adds = not (begins or self._micro)", "wide"),
    fault("untied_embedding_piles_up", "the gradient of an untied embedding keeps those of earlier micro-batches", MODEL,
          "        if not self.cfg.tie_word_embeddings:\n            self.be.fill(self.d.embed, 0)",
          "        if not self.cfg.tie_word_embeddings and not self._micro:\n            self.be.fill(self.d.embed, 0)", "window"),
    fault("vectors_pile_up", "gradients of norms and biases keep those of earlier micro-batches", MODEL,
          "self.be.fill(self._micro.vectors if self._micro else", "self.be.fill(self._micro.vectors[:64] if self._micro else"),
    fault("head_does_not_decay", "an untied head takes no weight decay", PARAMS,
          'Param("head", "V C", "in", True,', 'Param("head", "V C", "in", False,', "window"),
    # Kernels
    fault("borders_not_moved", "backward of attention counts borders from the first key of all, not of the block", KERNELS,
          "                        start = max(start, doc_start[b, i0 + i] - lo)\n                    log_sum",
          "                        start = max(start, min(doc_start[b, i0 + i], end - 1))\n                    log_sum", "windowed32"),
    fault("rows_behind_whole_blocks", "gradients of norms leave out rows behind the last 32", KERNELS,
          "    blocks = (n + _ROWS - 1) // _ROWS\n    partial = np.zeros((blocks, c), np.float32)",
          "    blocks = max(1, n // _ROWS)\n    partial = np.zeros((blocks, c), np.float32)", "bf16"),
    fault("z_loss_of_shifted_logits", "the gradient of the z-loss takes the logarithm without the largest logit", KERNELS,
          "scale * (1 + 2 * z_loss * lse) / total)", "scale * (1 + 2 * z_loss * (lse - top)) / total)", "masked"),
    fault("last_ids_of_a_vocabulary", "a loss that is not differentiated leaves out the last ids of a vocabulary", KERNELS,
          "                    for j in range(terms.size):\n                        part += _exp(terms[j] - top)",
          "                    for j in range(terms.size // 16 * 16):\n                        part += _exp(terms[j] - top)", "plain"),
    fault("stream_not_rounded_in_norms", "in bfloat16, norms are of the stream before it is rounded", KERNELS,
          "x = kept(res, res_in[i, j] + delta[i, j])", "x = res_in[i, j] + delta[i, j]", "bf16"),
    fault("target_rounded_twice", "in bfloat16, the gradient of the target's logit is made of a rounded one", LOW,
          "                    of_target = room[t] * factor - scale\n                    _scaled(row, room, factor)\n",
          "                    _scaled(row, room, factor)\n                    of_target = np.float32(row[t]) - scale\n", "bf16"),
    fault("inner_blocks_by_the_first_query", "in bfloat16, blocks that the first query of 32 sees whole are seen whole by all", ATTENTION16,
          "inner_from = (starts[rows - 1] + EDGE - 1)", "inner_from = (starts[0] + EDGE - 1)", "odd"),
    fault("exponentials_of_four_terms", "in bfloat16, exponentials of attention have a polynomial of two terms less", SOFTMAX,
          "_EXP2 = (1.0, 0.693147, 0.24022242, 0.055507336, 0.009671513, 0.0013264727)",
          "_EXP2 = (1.0, 0.693147, 0.24022242, 0.055507336)", "odd"),
    fault("first_terms_lost", "in bfloat16, sums of more than 512 terms lose those before", BLOCKED,
          "goes_on, ends = pbias + j * bias_step, piece > 0,", "goes_on, ends = pbias + j * bias_step, False,", "many"),
    # Schedules
    fault("line_is_a_parabola", "the linear schedule falls with the square", SCHEDULE, "else 1 - done\n", "else (1 - done) ** 2\n", "line"),
    fault("decay_of_a_tenth", "wsd decays over a tenth of the steps, as another trainer has it", SCHEDULE,
          "WSD_DECAY_SHARE = 0.2", "WSD_DECAY_SHARE = 0.1", "masked"),
    fault("warm_up_from_the_floor", "warm-up begins at the lowest learning rate", SCHEDULE,
          "            return self.lr * step / self.warmup_steps\n",
          "            return self.lr_min + (self.lr - self.lr_min) * step / self.warmup_steps\n"),
    fault("decay_a_step_late", "the decay of the learning rate begins a step late", SCHEDULE,
          "(step - start) / max(1, self.num_steps - start)", "(step - 1 - start) / max(1, self.num_steps - start)"),
    # Losses of pairs
    fault("ipo_margin_doubled", "ipo wants a margin of 1 / beta", PAIRS, "1 / (2 * k.beta)", "1 / k.beta", "ipo"),
    fault("gamma_times_beta", "simpo multiplies its margin by beta", PAIRS,
          "k.beta * (c.mean - r.mean) - k.gamma", "k.beta * (c.mean - r.mean - k.gamma)", "simpo"),
    fault("odds_without_slope", "the odds of orpo have the slope of log-probabilities", PAIRS,
          "return mean - math.log(other), 1 / other", "return mean - math.log(other), 1.0", "orpo"),
    fault("orpo_learns_the_rejected", "orpo reports and learns the likelihood of the rejected answer", PAIRS,
          "        k.beta * loss - c.mean,\n        (k.beta * slope * da - 1) / c.tokens,\n        -k.beta * slope * db / r.tokens,",
          "        k.beta * loss - r.mean,\n        k.beta * slope * da / c.tokens,\n        (-k.beta * slope * db - 1) / r.tokens,", "orpo"),
    fault("gain_by_the_other_length", "the gain of chosen answers is divided by tokens of rejected ones", PAIRS,
          '"chosen_gain": c.gain / c.tokens', '"chosen_gain": c.gain / r.tokens', "dpo"),
    fault("rewards_without_beta", "rewards in the log lack beta", PAIRS,
          '"chosen_reward": beta * loss.chosen', '"chosen_reward": loss.chosen', "dpo"),
    # Adapters
    fault("adapters_pile_up", "gradients of adapters keep those of earlier micro-batches", ADAPTERS,
          "        if self.folds:\n            self.be.fill(self.part, 0)\n", "", "lora"),
    fault("one_mask_for_all_matrices", "all matrices have the dropout mask of the first", DROPOUT,
          "        number = self._number[pair.base.layer, pair.base.param.name]\n        counters", "        number = 0\n        counters", "dropout"),
    fault("fewer_are_dropped", "half as many inputs of adapters are dropped as asked", CPU,
          "least_kept(p), factor", "least_kept(p / 2), factor", "dropout"),
    fault("rows_by_the_largest_positive", "rows of 8-bit integers are scaled by the largest element, not its size", EIGHT,
          "row = np.abs(wide).max(1) / np.float32(MAX_INT8)", "row = np.maximum(wide.max(1), 1e-9) / np.float32(MAX_INT8)", "int8"),
    fault("scale_of_the_common_alpha", "a pattern of alpha does not reach the scale", LORA,
          "for pattern, a in self.alpha_pattern if matches", "for pattern, a in self.alpha_pattern[:0] if matches", "patterns"),
    fault("rslora_not_said", "the folder of an adapter does not say that its scale is that of rslora", PEFT_WRITE,
          '"use_rslora": c.rslora', '"use_rslora": False', "adapters"),
    # Data: documents, order, mixtures
    fault("three_rounds", "the order of the data has three rounds", BATCHES, "[:FEISTEL_ROUNDS]", "[: FEISTEL_ROUNDS - 1]"),
    fault("a_byte_for_each_end", "bytes of a text count a line end behind each document", WRITER,
          "        self.total_bytes += size\n", "        self.total_bytes += size + 1\n"),
    fault("held_out_from_the_other_end", "documents with the highest hashes are held out", DOCUMENTS,
          "int(sha256[:16], 16) < fraction * 2.0**64", "int(sha256[:16], 16) >= (1 - fraction) * 2.0**64"),
    fault("windows_of_the_first_part", "windows that are evaluated do not reach the end of the held-out text", BATCHES,
          "yield places * windows.count // stop", "yield places * (windows.count // stop)"),
    fault("entropy_in_bits", "the entropy of token frequencies is in bits", MANIFEST, "-(p * np.log(p)).sum()", "-(p * np.log2(p)).sum()"),
    fault("budgets_rounded_down", "budgets of sources are rounded down to whole windows", MIXTURE,
          "    return -(-tokens // seq_length)\n", "    return tokens // seq_length\n", "budget"),
    fault("turns_at_the_ends", "sources take their turns late", TURNS, "(np.arange(n) + 0.5) / n", "(np.arange(n) + 1) / n", "mixture"),
    fault("text_beside_chats_counts_one_more", "windows of text beside conversations count a target more", MIXED,
          "of_window = max(x.row_tokens or 0 for x in packed) - 1", "of_window = max(x.row_tokens or 0 for x in packed)", "beside"),
    fault("standard_error_of_all_windows", "the standard error of a source is divided by all its targets", BY_SOURCE,
          "/ len(means) ** 0.5 if", "/ sum(counts) ** 0.5 if", "mixture"),
    # Data: conversations and pairs
    fault("cut_answers_are_trained", "an answer whose beginning is cut off is trained on", PACK,
          "    if start and kept.trained[0]:\n", "    if start < 0 and kept.trained[0]:\n", "short"),
    fault("ends_of_examples_cut", "examples that are too long lose their end", PACK,
          "    start = max(0, end - room)\n", "    start, end = 0, min(end, room)\n", "short"),
    fault("bytes_of_cut_answers", "answers that were cut count all their bytes", RENDER,
          "x[start:end].copy() for x in (self.ids, self.trained, self.byte_runs)",
          "x[start:end].copy() if x is not self.byte_runs else x.copy() for x in (self.ids, self.trained, self.byte_runs)",
          "short"),
    fault("bytes_of_special_tokens", "bytes of answers count the text of special tokens", RENDER,
          'len(self._special.sub("", text[a:b]).encode())', "len(text[a:b].encode())", "instruct"),
    fault("tokens_across_the_start", "a token that lies across the beginning of an answer is not trained", RENDER,
          "covers = (start < b) & (end > a)", "covers = (start < b) & (start >= a)", "instruct"),
    fault("earlier_answers_untrained", "only the last answer of a conversation is trained", RENDER,
          "        for k in reversed(answers):\n", "        for k in reversed(answers[-1:]):\n", "instruct"),
    fault("seams_of_pairs_lost", "the first token of an answer that holds the prompt's end is not trained", PAIRING,
          "        e.trained[common:first] = True\n", "        e.trained[common + 1 : first] = True\n", "dpo"),
    # States, checkpoints and their figures
    fault("largest_norm_forgotten", "a run that goes on forgets the largest gradient norm of its epoch", PROGRESS,
          "            return cls(**saved)\n", "            return cls(**{**saved, 'grad_norm_max': 0.0})\n", "resumed-passes"),
    fault("patience_begins_again", "a run that goes on forgets evaluations without a better one", PROGRESS,
          "            return cls(**saved)\n", "            return cls(**{**saved, 'evals_without_best': 0})\n", "resumed-worse"),
    fault("largest_norm_of_all_epochs", "the largest gradient norm of an epoch is that of all epochs so far", LOOP,
          "p.epoch_losses, p.grad_norm_max = [], 0.0", "p.epoch_losses = []"),
    fault("perplexity_of_training", "metadata have the perplexity of training as that of validation", EVALUATE,
          "val_ppl=perplexity(val)", "val_ppl=perplexity(mean)"),
    fault("last_losses_from_the_front", "the last training losses of an epoch are its first", EVALUATE,
          "np.mean(losses[-LAST_STEPS:])", "np.mean(losses[:LAST_STEPS])", "long"),
    fault("hash_of_first_moments", "the hash of the optimizer's state is that of the first moments", STATE,
          "for prefix, flat in self.flats.items() if prefix)", 'for prefix, flat in self.flats.items() if prefix.endswith("m."))'),
    fault("the_worst_is_kept", "of older checkpoints the worst is kept", RUNDIR,
          "kept = {*found[-keep:], min(found,", "kept = {*found[-keep:], max(found,", "kept"),
    fault("start_through_bfloat16", "a checkpoint to start from is rounded to bfloat16", CHECKPOINT,
          "                place[...] = part\n",
          "                place[...] = part\n            place.view(np.uint32)[...] &= np.uint32(0xFFFF0000)\n", "instruct"),
    # Commands: generation
    fault("penalty_of_new_tokens_alone", "the repetition penalty passes over the prompt", SAMPLING,
          "before = self.prompt + self.new if", "before = self.new if", "commands"),
    fault("one_more_than_top_k", "top-k keeps a token more", SAMPLING,
          "min(top_k or SORTED_TOKENS, len(logits))", "min(top_k + 1 if top_k else SORTED_TOKENS, len(logits))", "commands"),
    fault("min_p_of_the_sum", "min-p is a share of all, not of the likeliest", SAMPLING,
          "(p[:keep] >= min_p * p[0])", "(p[:keep] >= min_p * p.sum())", "commands"),
    fault("logits_times_temperature", "logits are multiplied with the temperature", SAMPLING,
          "- logits.max()) / temperature)", "- logits.max()) * temperature)", "commands"),
    fault("a_token_too_many", "a continuation gets a token more than asked", SAMPLING,
          "        elif len(self.new) >= self.sampling.max_tokens:\n", "        elif len(self.new) > self.sampling.max_tokens:\n", "commands"),
    fault("first_token_unseen", "of prompts together, the shorter ones lose their first token", MODEL,
          "(slots - positions).astype(np.int32)", "(slots - positions + 1).astype(np.int32)", "commands"),
    fault("latest_slot_not_moved", "a sequence that moves in the cache leaves its latest key behind", GENERATE,
          "self.model.move_row(row, len(live), end)", "self.model.move_row(row, len(live), end - 1)", "commands"),
    fault("stop_text_is_shown", "a stop string is part of the text", STREAMING,
          "return text[: min(found)[1]]", "return text[: min(found)[0]]", "commands"),
    # Commands: evaluation
    fault("bytes_a_token_early", "bytes of a scored text are those of the tokens read, not predicted", SCORES,
          "ids[place.start + 1 : place.stop + 1])", "ids[place.start : place.stop])", "commands"),
    fault("error_without_correction", "the standard error of a loss lacks W / (W - 1)", SCORES,
          "math.sqrt(w / (w - 1) * float(", "math.sqrt(float(", "commands"),
    fault("choices_by_the_question_too", "choices by their bytes count the text as it is asked", CHOICES,
          "len(c.encode()) for c in item.choices]", "len(c.encode()) + 1 for c in item.choices]", "commands"),
    fault("context_is_scored", "the last token of a context is scored with the continuation", CHOICES,
          "Window(ids, len(ids) - 1 - len(continuation))", "Window(ids, max(0, len(ids) - 2 - len(continuation)))", "commands"),
    # Commands: export and merge
    fault("exported_by_cutting", "weights that are exported as bfloat16 are cut, not rounded", TENSORS,
          "            out = part.astype(dtype, copy=False)\n",
          "            out = part.astype(dtype, copy=False)\n"
          "        if dtype == BF16 and part.dtype == np.float32:\n"
          "            out = (part.view(np.uint32) >> 16).astype(np.uint16).view(BF16)\n", "commands"),
    fault("theta_of_llama", "a GGUF file has the usual base of rotary frequencies", GGUF,
          "writer.add_rope_freq_base(cfg.rope_theta)", "writer.add_rope_freq_base(10000.0)", "commands"),
    fault("yarn_amplitude_twice", "a GGUF file has the amplitude that llama.cpp multiplies itself", GGUF_SCALING,
          "s.amplitude / magnitude(s.factor)", "s.amplitude", "commands"),
    fault("whole_modules_not_merged", "a merge leaves out what was trained whole", PEFT,
          "            view[...] = adapter.saved[hf]\n        if hf in adapter.deltas", "            view[...] = view\n        if hf in adapter.deltas", "commands"),
    # Figures of a report
    fault("other_side_of_the_entropy", "a report says that a loss lies below the entropy where it lies above", SECTIONS,
          '"Below token frequencies" if gain >= 0', '"Below token frequencies" if gain <= 0', "plain"),
    fault("training_loss_of_all_steps", "a report averages training losses from the first step on", SECTIONS,
          'part = train[np.searchsorted(x, since, "right") :', "part = train[0:", "plain"),
)
# fmt: on
