"""Hold the third list of faults of tools/mutants.py: what is newest and least covered, written from the source alone.

Kernels of bfloat16, adapters of every kind, mixtures, preferences, packing, accumulation, resuming, figures of logs, and what
commands write and generate. Read beside no gate and no other list. The job is the one that can show the fault.
"""

# ruff: noqa: E501

from __future__ import annotations

from mutant_faults import Mutant, fault

ATTENTION16, LOW, BLOCKED, TILES, ORDER, CPU, KERNELS = (
    f"apr/backends/cpu/{name}.py"
    for name in ("attention", "low", "blocked", "tiles", "order", "ops", "kernels")
)
ADAPTERS, DORA, DROPOUT, INT8, LORA, MICRO, MODEL, OPTIM, PAIRS, SCHEDULE, BLOCK, DOCUMENTS = (
    f"apr/model/{name}.py"
    for name in (
        "adapters", "dora", "lora_dropout", "eight_bits", "lora", "micro_gradients", "transformer", "optim", "preferences",
        "schedule", "block", "documents",
    )
)  # fmt: skip
BY_SOURCE, EVALUATE, LOOP, PROGRESS, REFERENCES, SETTINGS, SAMPLE = (
    f"apr/training/{name}.py"
    for name in ("by_source", "evaluate", "loop", "progress", "references", "settings", "sample")
)
BATCHES, MIXTURE, TURNS, WRITER, ENCODE = (
    f"apr/data/{name}.py" for name in ("batches", "mixture", "turns", "shard_writer", "encode")
)
PACK, RENDER, PAIRING = (f"apr/data/conversations/{name}.py" for name in ("pack", "render", "pairs"))
STATE, GGUF, PEFT, PEFT_WRITE = (
    f"apr/checkpoints/{name}.py" for name in ("state", "gguf", "peft", "peft_write")
)
SAMPLING, STREAMING, GENERATE = (f"apr/inference/{name}.py" for name in ("sampling", "streaming", "generate"))
UNITS, TOKENIZER, SCORES = "apr/common/units.py", "apr/tokenizer/tokenizer.py", "apr/evaluation/loss.py"

# fmt: off
THIRD: tuple[Mutant, ...] = (
    # bfloat16 on the CPU
    fault("tail_columns_without_bias", "in bfloat16, columns behind the last whole block of a product get no bias", BLOCKED,
          "        if bias != 0:\n            more", "        if bias != 0 and width == EDGE:\n            more", "bf16"),
    fault("bias_rounded_twice", "in bfloat16 a bias is added to what is rounded already", CPU,
          "        p.multiply(y, p.rows(x), p.columns(w), x.shape[1], b)\n        return\n",
          "        p.multiply(y, p.rows(x), p.columns(w), x.shape[1])\n"
          "        if b is not None:\n            y += b\n        return\n", "bf16"),
    fault("vectors_never_rounded_again", "in bfloat16, norms and biases that compute stay what they were at the start", CPU,
          "    apart = w.ctypes.data != master.ctypes.data\n",
          "    apart = w.ctypes.data != master.ctypes.data and decay > 0\n", "bf16"),
    fault("weights_rounded_every_other_step", "in bfloat16, weights that compute are those of the step before, every other step", CPU,
          "    apart = w.ctypes.data != master.ctypes.data\n",
          "    apart = w.ctypes.data != master.ctypes.data and step % 2 == 1\n", "bf16"),
    fault("weights_truncated", "in bfloat16, weights that compute are cut, not rounded", CPU,
          "factor[0], *numbers))\n",
          "factor[0], *numbers))\n    if apart:\n"
          "        w.view(np.uint16)[...] = (master.view(np.uint32) >> 16).astype(np.uint16)\n", "bf16"),
    fault("products_through_bfloat16", "in bfloat16, gradients of matrices are rounded before they are added", CPU,
          "            p.multiply(dw, p.transposed(dy), p.terms(x), len(x), adds=adds)\n",
          "            low = np.empty(dw.shape, BF16)\n            p.multiply(low, p.transposed(dy), p.terms(x), len(x))\n"
          "            dw[...] = dw + low if adds else low\n", "bf16"),
    fault("again_z_loss_gradient_halved", "in bfloat16, the gradient of the z-loss lacks its 2", LOW,
          "(1 + 2 * z_loss * lse)", "(1 + z_loss * lse)", "odd"),
    fault("keys_before_the_chunk", "in bfloat16, keys more than a chunk of queries behind get no gradient", ATTENTION16,
          "for j in range(_first_block(doc_start, b, chunk, past, window), sb):",
          "for j in range(max(_first_block(doc_start, b, chunk, past, window), chunk // EDGE), sb):", "odd"),
    fault("dk_of_the_odd_tail", "in bfloat16, gradients of keys behind the last 16 elements of a head are not written", ATTENTION16,
          "        for e in range(16, width):\n            own[e] = two[e - 16] * scale",
          "        for e in range(16, width // EDGE * EDGE):\n            own[e] = two[e - 16] * scale", "odd"),
    fault("odd_term_lost", "in bfloat16, the last of an odd number of terms counts as 0 in gradients of matrices", ORDER,
          "n0, n1 = n if 2 * p < height else 0, n if 2 * p + 1 < height else 0",
          "n0, n1 = n if 2 * p < height - height % 2 else 0, n if 2 * p + 1 < height else 0", "bf16"),
    fault("borders_or_a_window", "in bfloat16, a window forgets where the document begins", ATTENTION16,
          "    return max(first, np.int64(doc_start[b, i])) if doc_start.size > 0 else first",
          "    return max(first, np.int64(doc_start[b, i])) if doc_start.size > 0 and window == 0 else first", "windowed"),
    fault("dot_over_whole_blocks", "in bfloat16, backward of attention sums dy y over 16 elements of each head", ATTENTION16,
          "row_block(y, results, of_y, y.strides[1], rows, width)",
          "row_block(y, results, of_y, y.strides[1], rows, width // 16 * 16)", "odd"),
    # Dropout of adapters
    fault("mask_of_step_one", "dropout has the same mask in every step", DROPOUT,
          "np.array([(number, self.step) for", "np.array([(number, 1) for", "dropout"),
    fault("mask_by_place_in_micro_batch", "sequences of all micro-batches get the masks of the first one", LOOP,
          "draws = Draws.of(*drawn, n * self.micro, len(part[0]))", "draws = Draws.of(*drawn, 0, len(part[0]))", "dropout"),
    fault("mask_of_steps_of_the_process", "a run that goes on begins again with the masks of step 1", LOOP,
          "graph, drawn = self.s.graph and recorded, (self.s.seed, step)",
          "graph, drawn = self.s.graph and recorded, (self.s.seed, self._steps_here + 1)", "resumed-dropout"),
    fault("dropout_backward_unmasked", "what goes through adapters to their input is not masked", DROPOUT,
          "                self._drop(given, through, pair)\n                self.be.add(dx, dx, given)",
          "                self.be.dropout(*(z.reshape(*self._shape, -1) for z in (given, through)),\n"
          "                    self.counters[: self._shape[0]], self._seed, 0, 0.0, pair.scale / (1 - self.p))\n"
          "                self.be.add(dx, dx, given)", "dropout"),
    fault("dropout_backward_unscaled", "what goes through adapters to their input lacks 1 / (1 - p)", DROPOUT,
          "                self._drop(given, through, pair)\n                self.be.add(dx, dx, given)",
          "                self.be.dropout(*(z.reshape(*self._shape, -1) for z in (given, through)),\n"
          "                    self.counters[: self._shape[0]], self._seed,\n"
          "                    self._number[pair.base.layer, pair.base.param.name], self.p, pair.scale * (1 - self.p))\n"
          "                self.be.add(dx, dx, given)", "dropout"),
    fault("dropout_while_evaluating", "evaluations drop too", EVALUATE,
          "    model.forward(ids)\n",
          "    from ..model.lora_dropout import Draws\n\n    model.forward(ids, draws=Draws.of(0, 0, 0, len(ids)))\n", "dropout"),
    fault("dropout_scale_lost", "what is kept is not divided by 1 - p", CPU,
          "least_kept(p), factor / (1 - p))", "least_kept(p), factor)", "dropout"),
    fault("wrong_gradient_mask", "gradients of A are made of the mask of the matrix before", DROPOUT,
          "        self._drop(given, x, pair)\n        self._sum(",
          "        number = max(0, self._number[pair.base.layer, pair.base.param.name] - 1)\n"
          "        self.be.dropout(given.reshape(*self._shape, -1), x.reshape(*self._shape, -1),\n"
          "            self.counters[: self._shape[0]], self._seed, number, self.p, pair.scale)\n        self._sum(", "dropout"),
    # DoRA
    fault("dora_norms_of_the_wrong_rows", "norms of DoRA learn from the first of joined matrices", DORA,
          "be.linear_fwd(z, x, self.unit(pair, first), None)", "be.linear_fwd(z, x, self.unit(pair, 0), None)", "dora"),
    fault("dora_begins_with_means", "norms of DoRA begin as root mean squares of rows", LORA,
          "np.square(read(p.base.hf), dtype=np.float64).sum(1))", "np.square(read(p.base.hf), dtype=np.float64).mean(1))", "dora"),
    fault("dora_a_without_share", "the gradient of A lacks m / |v|", DORA,
          '        self._scale(factor, b, share, "")', "        be.copy(factor, b)", "dora"),
    fault("dora_b_without_share", "the gradient of B lacks m / |v|", DORA,
          "        self._scale(scaled, sums, share)\n        be.add(db, db, scaled)", "        be.add(db, db, sums)", "dora"),
    fault("dora_norms_stand_still", "norms that divide are those of the start", DORA,
          "            self.be.head_rmsnorm_fwd(_heads(unit), rstd, _heads(v), ones, EPS)",
          "            if pair.base in self.__dict__.setdefault('_made', set()):\n"
          "                self._scale(unit, v, rstd, '')\n            else:\n                self._made.add(pair.base)\n"
          "                self.be.head_rmsnorm_fwd(_heads(unit), rstd, _heads(v), ones, EPS)", "dora"),
    # LoRA+, rslora, patterns
    fault("a_moves_faster", "LoRA+ moves A faster, not B", LORA,
          'found = [p.b for p in self.pairs if p.base.param.name != "embed"]',
          'found = [p.a for p in self.pairs if p.base.param.name != "embed"]', "adapters"),
    fault("faster_to_the_end", "LoRA+ moves what is trained whole faster too", OPTIM,
          "            yield slice(at, part.stop), 1.0", "            yield slice(at, part.stop), self.lora_plus", "adapters"),
    fault("rate_of_b_in_the_log", "the log divides by the ratio of LoRA+", OPTIM,
          '{"lr_b": lr * self.lora_plus}', '{"lr_b": lr / self.lora_plus}', "adapters"),
    fault("root_of_the_common_rank", "rslora takes the root of --lora-rank, not of the matrix's own", LORA,
          "return alpha / (math.sqrt(rank) if self.rslora else rank)",
          "return alpha / (math.sqrt(self.rank) if self.rslora else rank)", "adapters"),
    fault("embedding_gradient_without_scale", "the gradient of B of an embedding lacks s", ADAPTERS,
          "        be.gemm(du, dy, a, s, 0.0, False, True)", "        be.gemm(du, dy, a, 1.0, 0.0, False, True)", "adapters"),
    fault("tied_head_without_adapter", "a head that is an adapted embedding is computed without the adapter", ADAPTERS,
          '        if pair is None or (name == "head" and self.drops):\n            return w\n',
          '        if pair is None or name == "head":\n            return w\n', "adapters"),
    fault("whole_modules_a_step_late", "what is trained whole computes as it was a step before", ADAPTERS,
          "        for _, slot in self.layout.saved:\n            self.be.copy(cut(self.factors, slot), cut(self.w, slot))",
          "        if self.base_sha256 and not getattr(self, '_begun', False):\n            self.be.copy(self.factors, self.w)\n"
          "            self._begun = True", "adapters"),
    fault("whole_norms_decay", "norms that are trained whole decay", LORA,
          "        self.decayed = n\n        for s in whole:\n            if not s.param.decay:\n                n = self._add_saved(s, n)\n",
          "        for s in whole:\n            if not s.param.decay:\n                n = self._add_saved(s, n)\n        self.decayed = n\n",
          "adapters"),
    fault("alpha_of_the_run_in_the_adapter", "the folder of an adapter has alpha without its fraction", PEFT_WRITE,
          "alpha = int(c.alpha) if c.alpha == int(c.alpha) else c.alpha", "alpha = int(c.alpha)", "adapters"),
    # A base of 8-bit integers
    fault("one_factor_for_a_matrix", "rows of 8-bit integers share the factor of the largest row", INT8,
          "    row = np.abs(wide).max(1) / np.float32(MAX_INT8)",
          "    row = np.full(len(wide), np.abs(wide).max() / np.float32(MAX_INT8), np.float32)", "int8"),
    fault("integers_cut", "8-bit integers are cut, not rounded", INT8,
          "q: np.ndarray = np.rint(wide", "q: np.ndarray = np.trunc(wide", "int8"),
    fault("factors_of_other_rows", "factors of rows overlap between matrices", ADAPTERS,
          "        start += slot.shape[0]", "        start += slot.shape[0] - 1", "int8"),
    # Mixtures
    fault("weights_of_a_mixture_ignored", "sources take turns alike", MIXTURE,
          "exact = [share * places for share in shares]", "exact = [places / len(shares) for _ in shares]", "mixture"),
    fault("half_of_a_source_again", "the second half of a source's windows is never drawn", BATCHES,
          "            indices[number == p] = permutation(place[number == p])",
          "            indices[number == p] = permutation(place[number == p] % (n - n // 2 if k else n))", "mixture"),
    fault("sources_without_the_seed", "the order of later sources does not depend on the seed", BATCHES,
          'permutation = Permutation(n, self.seed, f"{p} of source {k}" if k else int(p))',
          'permutation = Permutation(n, 0 if k else self.seed, f"{p} of source {k}" if k else int(p))', "mixture"),
    fault("a_source_begins_a_window_late", "sources begin at their second window", TURNS,
          "return source, period * np.array(self.counts)[source] + self._within[at]",
          "return source, period * np.array(self.counts)[source] + self._within[at] + (source > 0)", "mixture"),
    fault("losses_of_the_batch_before", "losses of sources are those of the rows of the batch before", LOOP,
          "self.by_source.begin(step - self.progress.step - 2)", "self.by_source.begin(step - self.progress.step - 3)", "mixture"),
    fault("mean_of_means_of_sources", "the validation loss of a source is a mean of means", BY_SOURCE,
          'out[f"val_loss/{name}"] = sum(losses) / sum(counts)',
          'out[f"val_loss/{name}"] = float(np.mean(means))', "mixed-chats"),
    fault("turns_from_the_start_after_a_stop", "a run that goes on has equal turns", BATCHES,
          '        self._read = state["pass"] * self.windows.count + state["position"]\n        self._ahead.clear()',
          '        self._read = state["pass"] * self.windows.count + state["position"]\n'
          "        self.turns = Turns([1] * len(self.sources))\n        self._ahead.clear()", "resumed-mixture"),
    fault("counts_of_sources_from_zero", "tokens of sources are counted from the start of the process", BY_SOURCE,
          "            before = self.batches.targets_by_source(ago=1)", "            before = [0] * len(self.names)", "resumed-mixture"),
    # Preferences
    fault("reference_of_the_weights_at_hand", "a run that goes on compares with the weights that it goes on from", REFERENCES,
          "    if model.preferences is None or use_reference(model.preferences, run, train, val):\n        return\n    if not may_compute:",
          "    if model.preferences is None or (may_compute and use_reference(model.preferences, run, train, val)):\n        return\n"
          "    if run.read_config().get(RECORD) is None and not may_compute:", "resumed-dpo"),
    fault("smoothing_of_the_other_sign", "label smoothing makes pairs surer", PAIRS,
          "return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x), e * sigmoid(x) - (1 - e) * sigmoid(-x)",
          "return -(1 + e) * log_sigmoid(x) + e * log_sigmoid(-x), -e * sigmoid(x) - (1 + e) * sigmoid(-x)", "dpo"),
    fault("lengths_of_the_longer_answer", "simpo divides both answers by the longer one's tokens", PAIRS,
          "            yield pair, found[0], found[1]",
          "            longer = max(a.tokens for a in found)\n            found = [a._replace(tokens=longer) for a in found]\n"
          "            yield pair, found[0], found[1]", "simpo"),
    fault("last_token_of_the_other_answer", "the last token of an answer is weighted with its neighbour's weight", PAIRS,
          "                weights.append((slice(end, place.stop), -scale * slope))\n                end = place.stop",
          "                weights.append((slice(end, place.stop - 1), -scale * slope))\n                end = place.stop - 1", "dpo"),
    fault("pairs_of_the_first_micro_batch", "the loss of pairs is divided by those of the first micro-batch", LOOP,
          "model, counted = self.model, terms(self.model.preferences, ids, targets)",
          "model, counted = self.model, terms(self.model.preferences, *(\n"
          "            x[: self.micro] if self.model.preferences else x for x in (ids, targets)))", "dpo"),
    fault("ties_are_right", "pairs that compare as equal count as ordered rightly", PAIRS,
          "self.right += loss.chosen > loss.rejected", "self.right += loss.chosen >= loss.rejected", "dpo"),
    fault("margins_without_beta", "the margin in the log lacks beta", PAIRS,
          '"margin": beta * (loss.chosen - loss.rejected)', '"margin": loss.chosen - loss.rejected', "dpo"),
    fault("prompt_counts_in_answers", "the token before an answer counts as its first", PAIRING,
          "                    labels = e.trained * np.uint8(label)",
          "                    labels = (e.trained | np.append(e.trained[1:], False)) * np.uint8(label)", "dpo"),
    fault("rejected_reference_twice", "the reference of the chosen answer stands for both", PAIRS,
          "                found.append(Answer(logp, int(kept.sum()), reference))",
          "                found.append(Answer(logp, int(kept.sum()), found[0].reference if found else reference))", "dpo"),
    # Packing, labels and borders
    fault("border_for_one_token", "only the first token behind a border does not see over it", DOCUMENTS,
          "    return np.maximum.accumulate(starts, axis=1)", "    return starts", "masked"),
    fault("labels_a_token_early", "labels of packed examples stand a token early", PACK,
          "                    x[here], y[here] = ids[there], trained[there]",
          "                    x[here], y[here] = ids[there], np.append(trained[there][1:], 0)", "instruct"),
    fault("longest_example_of_a_row_cut", "an example that fills its row loses its last token", PACK,
          "    if e.ids.size <= room:\n        return e\n",
          "    if e.ids.size < room - 40:\n        return e\n    e = EncodedExample(e.ids[:-1], e.trained[:-1], e.byte_runs[:-1])\n"
          "    if e.ids.size <= room:\n        return e if e.trained.any() else None\n", "instruct"),
    # Accumulation, clipping, schedule, AdamW
    fault("last_micro_batch_heavier", "a smaller last micro-batch is scaled as if it were a whole one", LOOP,
          "            model.micro_step(*part, 1 / counted, graph, begins=n == 0, draws=draws)",
          "            scale = self.micro / len(part[0]) / counted\n"
          "            model.micro_step(*part, scale, graph, begins=n == 0, draws=draws)", "uneven"),
    fault("mean_over_positions", "the loss is divided by all positions, masked or not", LOOP,
          "            model.micro_step(*part, 1 / counted, graph, begins=n == 0, draws=draws)",
          "            model.micro_step(*part, 1 / targets.size, graph, begins=n == 0, draws=draws)", "uneven"),
    fault("mean_of_micro_batches", "each micro-batch weighs the same, whatever it has to train", LOOP,
          "            model.micro_step(*part, 1 / counted, graph, begins=n == 0, draws=draws)",
          "            parts_of = -(-len(ids) // self.micro)\n"
          "            scale = 1 / trained_targets(part[1]) / parts_of\n"
          "            model.micro_step(*part, scale, graph, begins=n == 0, draws=draws)", "uneven"),
    fault("first_layer_of_the_last_micro_batch", "the first layer learns from the last micro-batch alone", MODEL,
          "                self._micro.fold(i, begins)", "                self._micro.fold(i, begins or i == 0)", "bf16"),
    fault("norm_of_decayed_parameters", "norms and biases do not count in the norm that is clipped", OPTIM,
          "(self.norms.add_gradients if self.norms else be.add_sum_sq)(self.sum_sq, self.g)",
          "(self.norms.add_gradients if self.norms else be.add_sum_sq)(self.sum_sq, self.g[: self.decayed])", "plain"),
    fault("clipped_by_the_step_before", "gradients are clipped by the norm of the step before", OPTIM,
          "        be.clip_factor(self.factor, self.sum_sq, self.grad_clip or math.inf)\n",
          "        was = getattr(self, '_was', None)\n        be.clip_factor(self.factor, self.sum_sq if was is None else was, self.grad_clip or math.inf)\n"
          "        self._was = self.sum_sq.copy()\n", "qknorm"),
    fault("clipped_after_the_moments", "moments take the gradient as it is, the update is clipped", KERNELS,
          "            d = gp[i] * factor\n", "            d = gp[i]\n", "qknorm"),
    fault("warm_up_a_step_longer", "warm-up divides by a step more", SCHEDULE,
          "return self.lr * step / self.warmup_steps", "return self.lr * step / (self.warmup_steps + 1)"),
    fault("floor_of_a_tenth", "the learning rate falls to a tenth of the peak where a hundredth is documented", SETTINGS,
          "lr_min=0.01 * lr if s.lr_min is None else s.lr_min,", "lr_min=0.1 * lr if s.lr_min is None else s.lr_min,"),
    fault("bias_correction_a_step_late", "bias correction counts a step more", OPTIM,
          "            decay,\n            self.steps,\n", "            decay,\n            self.steps + 1,\n"),
    fault("epsilon_inside_the_root", "epsilon of AdamW stands inside the root", KERNELS,
          "(np.sqrt(vi * bias2) + eps)", "np.sqrt(vi * bias2 + eps)", "qknorm"),
    fault("norms_and_biases_decay", "norms and biases decay too", OPTIM,
          "zip(parts, (self.weight_decay, 0.0), strict=True)", "zip(parts, (self.weight_decay, self.weight_decay), strict=True)"),
    fault("decay_by_the_square_of_the_rate", "weight decay is multiplied with the learning rate twice", CPU,
          "bias1, bias2, eps, lr * decay\n", "bias1, bias2, eps, lr * lr * decay\n"),
    fault("betas_exchanged", "the two betas of AdamW change places", CPU,
          "lr, 1 - beta1, 1 - beta2, bias1", "lr, 1 - beta2, 1 - beta1, bias1"),
    fault("decay_before_clipping_of_embeddings", "the embedding does not decay", OPTIM,
          "        parts = slice(0, self.decayed), slice(self.decayed, None)",
          "        parts = slice(0, self.decayed * 3 // 4), slice(self.decayed * 3 // 4, None)"),
    # Evaluation
    fault("last_windows_not_evaluated", "a last batch that is not whole is not evaluated", BATCHES,
          "    for start in range(0, stop, batch_size):\n", "    for start in range(0, stop - stop % batch_size or stop, batch_size):\n", "odd-evaluation"),
    fault("again_mean_of_means", "the validation loss is the mean of the means of micro-batches", EVALUATE,
          "    return Loss(before / counted, tokens, error", "    return Loss(float(np.mean(means)), tokens, error", "uneven"),
    fault("error_of_the_mean_too_large", "the standard error is the standard deviation", EVALUATE,
          "float(np.std(means, ddof=1)) / math.sqrt(len(means)) if", "float(np.std(means, ddof=1)) if"),
    # Data: order, borders of passes, resuming, encoding
    fault("passes_forgotten", "a run that goes on forgets how many passes it had made", BATCHES,
          '        self._read = state["pass"] * self.windows.count + state["position"]\n', '        self._read = state["position"]\n',
          "resumed-passes"),
    fault("a_batch_skipped_behind_the_first", "reading ahead leaves out the second batch", BATCHES,
          "            first = self._read + len(self._ahead) * self.batch_size\n",
          "            first = self._read + (len(self._ahead) + 1) * self.batch_size\n"),
    fault("next_pass_begins_at_its_second_window", "the border of two passes loses a window", BATCHES,
          "        number, place = np.divmod(positions, n)\n",
          "        number, place = np.divmod(positions + positions // n, n)\n", "passes"),
    fault("text_becomes_special_tokens", "special tokens that stand in a text become themselves", TOKENIZER,
          "            rows = self._engine.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)",
          "            self._engine.encode_special_tokens = False\n"
          "            rows = self._engine.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)", "marked"),
    fault("characters_for_bytes", "a document's bytes are counted in characters", "apr/data/documents.py",
          "        return len(self.data)\n", "        return len(self.text)\n"),
    # States
    fault("moments_exchanged", "a state has the second moments under the name of the first", STATE,
          'flat in sorted(opt.state.items())}',
          'flat in zip(sorted(opt.state), [x for _, x in sorted(opt.state.items(), reverse=True)], strict=True)}', "resumed"),
    fault("again_moments_in_bfloat16", "a state has moments with the precision of bfloat16", STATE,
          '        flats = {prefix: copy(prefix, flat) for prefix, flat in self.buffers().items()}\n',
          '        flats = {prefix: copy(prefix, flat) for prefix, flat in self.buffers().items()}\n'
          '        for prefix, flat in flats.items():\n            if prefix:\n'
          '                flat.view(np.uint32)[...] &= np.uint32(0xFFFF0000)\n'),
    fault("second_moments_not_loaded", "second moments begin at zero after a stop", STATE,
          "                opt.be.from_host(flat, host if self.shard is None else self.shard.take(host))",
          "                if not prefix.endswith('v.'):\n"
          "                    opt.be.from_host(flat, host if self.shard is None else self.shard.take(host))", "resumed"),
    fault("losses_of_the_epoch_forgotten", "a run that goes on forgets the losses of its epoch", PROGRESS,
          "            return cls(**saved)\n", "            return cls(**{**saved, 'epoch_losses': []})\n", "resumed-passes"),
    fault("master_from_rounded_weights", "a state holds the rounded weights, not those that are updated", STATE,
          '        return {"": opt.master} | {', '        return {"": opt.w.astype(np.float32)} | {', "bf16"),
    # Figures of the log
    fault("perplexity_of_bits", "perplexity is 2 to the power of nats", UNITS,
          "    return math.exp(min(nats_per_token, 700))", "    return 2 ** min(nats_per_token, 700)"),
    fault("rate_of_the_next_step", "the log has the learning rate of the next step", LOOP,
          "line = self._measure(lr, tokens, counted", "line = self._measure(self.schedule(step + 1), tokens, counted"),
    fault("loss_of_the_last_micro_batch", "the loss of a step is that of its last micro-batch", LOOP,
          "            if n == 0:\n                model.be.fill(model.total, 0)\n",
          "            model.be.fill(model.total, 0)\n            if n == 0:\n"),
    fault("norm_of_weights_before", "the norm of the weights is that before the step", OPTIM,
          "        square = float(self.be.to_host(self.square)[0]) if square is None else square\n        return",
          "        square = float(self.be.to_host(self.square)[0]) if square is None else square\n"
          "        square, self._square_before = getattr(self, '_square_before', square), square\n        return"),
    # Commands: generation, export, merge, evaluation
    fault("cached_tokens_a_position_late", "tokens behind a prompt are turned by the angle of the next position", BLOCK,
          "        cos, sin = (table[at.past : at.past + t] for table in self.tables)",
          "        past = at.past + (at.past > 0)\n        cos, sin = (table[past : past + t] for table in self.tables)", "commands"),
    fault("penalty_makes_likelier", "the repetition penalty divides logits below 0 too", SAMPLING,
          "out[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)", "out[seen] = logits[seen] / penalty",
          "commands"),
    fault("temperature_zero_draws", "temperature 0 draws as 1 does", SAMPLING,
          "    if temperature == 0:\n        return int(logits.argmax())\n", "    temperature = temperature or 1.0\n", "commands"),
    fault("top_p_a_token_short", "top-p leaves out the token that reaches it", SAMPLING,
          "keep = min(int(np.searchsorted(cumulative, top_p)) + 1, count) if top_p < 1 else count",
          "keep = max(1, min(int(np.searchsorted(cumulative, top_p)), count)) if top_p < 1 else count", "commands"),
    fault("stop_across_tokens", "a stop string that comes in pieces is not found", STREAMING,
          "        keep = max((_overlap(text, s) for s in self._stops), default=0)\n", "        keep = 0\n", "commands"),
    fault("heads_of_keys_by_those_of_queries", "GGUF reorders keys as if they had as many heads as queries", GGUF,
          '"wk": cfg.num_kv_heads, "bk"', '"wk": cfg.num_heads, "bk"', "commands"),
    fault("divisors_upside_down", "GGUF has the factors of frequencies, not their divisors", GGUF,
          "    return (plain / scaled).astype(np.float32)", "    return (scaled / plain).astype(np.float32)", "commands"),
    fault("merge_without_scale", "merging takes the scale of adapters as 1", PEFT,
          "total: np.ndarray = w.astype(np.float64) + (self.scale * b) @ a", "total: np.ndarray = w.astype(np.float64) + b @ a", "commands"),
    fault("overlap_scored_twice", "windows that overlap score what the one before has scored", SCORES,
          "    return begin, min(begin + seq, length - 1), seq - stride if k else 0",
          "    return begin, min(begin + seq, length - 1), (seq - stride) // 2 if k else 0", "commands"),
    fault("sample_without_the_prompt", "a sample is drawn after the prompt's first token alone", SAMPLE,
          "            ids,\n            tokens,\n            TEMPERATURE,", "            ids[:1],\n            tokens,\n            TEMPERATURE,", "sampled"),
)
# fmt: on
