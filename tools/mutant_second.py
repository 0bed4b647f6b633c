"""Hold a second list of faults for tools/mutants.py: kinds that other trainers had, by their issue threads.

Padding that is the end of text, schedulers that count micro-batches, labels that are shifted twice, samplers that never
reshuffle, moments in bfloat16, norms over a part of the parameters, alphas that are not saved, and others. The list was
closed before any of it was planted; the first fault changed nothing at its first place and was moved.
"""

from __future__ import annotations

from mutant_faults import (
    BATCHES,
    BLOCK,
    ENCODE,
    LOOP,
    LORA,
    MODEL,
    OPTIM,
    REFERENCE,
    RENDER,
    ROPE,
    SCALING,
    T_DATA,
    T_MODEL,
    T_TRAIN,
    Mutant,
    fault,
)

KERNELS, PEFT, CONFIG = (
    "apr/backends/cpu/kernels.py",
    "apr/checkpoints/peft_write.py",
    "apr/model/hf_config.py",
)

# fmt: off
SECOND: tuple[Mutant, ...] = (
    # Data and labels
    fault("ends_of_answers_ignored", "the token that ends an answer is ignored, as padding is", RENDER,
          "        self._check_round_trip(ids, text, name)\n",
          "        trained &= ids != self.tokenizer.eos_id\n        self._check_round_trip(ids, text, name)\n", "instruct",
          T_DATA),
    fault("ends_of_documents_ignored", "the token that ends a document is ignored, as padding is", BATCHES,
          "ids, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])",
          "ids = np.ascontiguousarray(rows[:, :-1])\n"
          "        targets = np.where(rows[:, 1:] == self.shards.border_id, np.int32(IGNORED), rows[:, 1:])", "plain", T_DATA),
    fault("labels_shifted_twice", "targets are the tokens after the next", BATCHES, "np.ascontiguousarray(rows[:, 1:])",
          "np.ascontiguousarray(np.roll(rows, -1, axis=1)[:, 1:])", "plain", T_DATA),
    fault("a_token_between_windows_lost", "windows do not share a token: the first of each is never predicted", BATCHES,
          "np.array(shards.strides(seq_length))", "np.array(shards.strides(seq_length)) + 1", "plain",
          T_DATA),
    fault("windows_drawn_with_replacement", "each window is drawn by itself, so some come twice and others never", BATCHES,
          "indices[number == p] = permutation(place[number == p])",
          "indices[number == p] = permutation(mix(place[number == p].astype(np.uint64)).astype(np.int64) % n)",
          "plain", T_DATA),
    fault("last_batch_of_a_pass_dropped", "the last windows of a pass are left out, as an incomplete batch", BATCHES,
          "        self.windows = windows\n",
          "        self.windows = copy(windows)\n        self.windows.count -= 1 + (windows.count - 1) % batch_size\n", "plain",
          T_DATA),
    fault("passes_in_one_order", "every pass has the order of the first", BATCHES,
          "if k else int(p))", "if k else 0)", "instruct",
          T_DATA),
    fault("long_documents_cut", "documents are cut after 4,000 characters", ENCODE, 'text, first = next(texts, ""), True',
          'text, first = next(texts, "")[:4000], True', "plain", T_DATA),
    fault("system_prompt_dropped", "the system's message is left out of conversations", RENDER,
          "messages = list(example.messages)", 'messages = [m for m in example.messages if m["role"] != "system"]', "instruct",
          T_DATA),
    fault("end_of_text_twice", "two tokens end each document", "apr/data/shard_writer.py",
          "self._put(np.array([m.eos_token_id], dtype=np.uint32), last=True)",
          "self._put(np.array([m.eos_token_id], dtype=np.uint32))\n"
          "            self._put(np.array([m.eos_token_id], dtype=np.uint32), last=True)", "plain", T_DATA),
    fault("the_end_belongs_to_the_next", "attention stops before the end of a document, not behind it", "apr/model/documents.py",
          "starts[:, 1:] = np.where(ids[:, :-1] == end, np.arange(1, ids.shape[1]), 0)",
          "starts[:, 1:] = np.where(ids[:, 1:] == end, np.arange(1, ids.shape[1]), 0)", "masked", T_MODEL),
    # Schedule and optimizer
    fault("schedule_counts_micro_batches", "the schedule goes on with every micro-batch", LOOP, "lr = self.schedule(step)",
          "lr = self.schedule(min(self.s.num_steps, step * (self.s.batch_size // self.micro)))", "plain", T_TRAIN),
    fault("decay_through_the_moments", "weight decay is added to the gradient", KERNELS, "d = gp[i] * factor\n",
          "d = gp[i] * factor + shrink / rate * wp[i]\n", "plain", "tests/backends"),
    fault("eps_inside_the_root", "eps of AdamW is added before the root is taken", KERNELS,
          "/ (np.sqrt(vi * bias2) + eps) +", "/ np.sqrt(vi * bias2 + eps) +", "qknorm", "tests/backends"),
    fault("moments_in_bfloat16", "the second moment is kept in bfloat16", OPTIM,
          "            self.steps,\n        )\n",
          "            self.steps,\n        )\n"
          '        self.state["v"][part].view(np.uint32)[...] &= np.uint32(0xFFFF0000)\n', "plain", T_MODEL),
    fault("norm_of_the_matrices_alone", "clipping leaves vectors out of the norm", OPTIM,
          "be.add_sum_sq)(self.sum_sq, self.g)", "be.add_sum_sq)(self.sum_sq, self.g[: self.decayed])", "qknorm", T_MODEL),
    # The model
    fault("angles_in_float16", "angles of the rotary embedding are rounded to float16", ROPE,
          "angle = np.outer(np.arange(positions), freq)",
          "angle = np.outer(np.arange(positions), freq).astype(np.float16).astype(np.float64)", "plain", T_MODEL),
    fault("scaling_from_8192", "positions before scaling are taken for 8,192", SCALING,
          "turns = self.original_max_position_embeddings * freq", "turns = 8192 * freq", "masked", T_MODEL),
    fault("last_norm_has_its_own_eps", "the last norm has an epsilon of 1e-6", MODEL,
          "be.add_rmsnorm_fwd(s.res, s.final_norm, s.rstd, res, delta, p.final_norm, c.rms_norm_eps)",
          "be.add_rmsnorm_fwd(s.res, s.final_norm, s.rstd, res, delta, p.final_norm, 1e-6)", "masked", T_MODEL),
    Mutant("window_one_short", "a query sees one key fewer than its window", (
        (BLOCK, "q, k, v, doc_start, layer.window)", "q, k, v, doc_start, layer.window and layer.window - 1)"),
        (BLOCK, "q, k, v, s.doc_start, layer.window)", "q, k, v, s.doc_start, layer.window and layer.window - 1)"),
    ), "window", (T_MODEL,)),
    fault("tied_embedding_by_the_head_alone", "a tied embedding gets the gradient of the head alone", MODEL,
          "if d.embed is not None:", "if d.embed is not None and not c.tie_word_embeddings:", "plain", T_MODEL),
    Mutant("z_loss_gradient_halved", "the gradient of the z-loss lacks its factor of 2, on all sides", (
        (REFERENCE, "* (1 + 2 * logits.dtype.type(z_loss) * lse)", "* (1 + logits.dtype.type(z_loss) * lse)"),
        (KERNELS, "scale * (1 + 2 * z_loss * lse)", "scale * (1 + z_loss * lse)"),
    ), "masked", (T_MODEL,)),
    fault("theta_of_the_default", "config.json names the usual theta", CONFIG, '"rope_theta": cfg.rope_theta,',
          '"rope_theta": 10000.0,', "plain", T_MODEL),
    # The log
    fault("bytes_of_the_training_text", "bits per byte are computed with the bytes of the training text", LOOP,
          "p, shards = self.progress, self.inputs.val.shards", "p, shards = self.progress, self.inputs.train.shards", "plain",
          T_TRAIN),
    # Adapters
    fault("alpha_not_saved", "the adapter's file names its rank as alpha", PEFT, '"lora_alpha": alpha,', '"lora_alpha": c.rank,',
          "lora", T_MODEL),
    fault("adapter_saved_in_bfloat16", "adapters are rounded to bfloat16 when they are saved", PEFT,
          'write_safetensors(folder / WEIGHTS, tensors, "float32")', 'write_safetensors(folder / WEIGHTS, tensors, "bfloat16")',
          "lora", T_MODEL),
    fault("both_adapters_random", "B begins at random too", LORA, 'if s.param.init == "uniform":', "if s.param.init:", "lora",
          T_MODEL),
    # Resuming
    fault("tokens_counted_anew", "a resumed run counts its tokens from 0", LOOP,
          "self.run.state)\n        self.resumed", "self.run.state)\n        p.tokens_seen = 0\n        self.resumed",
          "resumed", T_TRAIN),
    fault("best_loss_forgotten", "a resumed run forgets its best loss", LOOP,
          "self.run.state)\n        self.resumed", "self.run.state)\n        p.best_val = math.inf\n        self.resumed",
          "resumed", T_TRAIN),
)
# fmt: on
