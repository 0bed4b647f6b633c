"""Hold the faults of tools/mutants.py: errors of kinds that happen, in places that no check was written for.

They were written without a look at the checks. A fault is an edit of the source whose old text stands there once; a test
fails when it does not, or when the edited file is no Python. The job is the one that can show it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault: edits (path, old text, new text), the job that can show it, the tests of its area."""

    name: str
    what: str
    edits: tuple[tuple[str, str, str], ...]
    job: str = "plain"
    tests: tuple[str, ...] = ()


def fault(name: str, what: str, path: str, old: str, new: str, job: str = "plain", *tests: str) -> Mutant:
    """Make a fault of one edit."""
    return Mutant(name, what, ((path, old, new),), job, tests)


OPTIM, SCHEDULE, LOOP = "apr/model/optim.py", "apr/model/schedule.py", "apr/training/loop.py"
BATCHES, EVALUATE, RUNDIR = "apr/data/batches.py", "apr/training/evaluate.py", "apr/training/rundir.py"
MODEL, BLOCK, ROPE = "apr/model/transformer.py", "apr/model/block.py", "apr/model/rope.py"
SCALING = "apr/model/rope_scaling.py"
LORA, PARAMS, STATE = "apr/model/lora.py", "apr/model/params.py", "apr/checkpoints/state.py"
ADAPTERS = "apr/model/adapters.py"
ENCODE, PACK, RENDER = (
    "apr/data/encode.py",
    "apr/data/conversations/pack.py",
    "apr/data/conversations/render.py",
)
CPU, REFERENCE, UNITS = "apr/backends/cpu/ops.py", "apr/backends/reference.py", "apr/common/units.py"
T_MODEL, T_TRAIN, T_DATA = "tests/model", "tests/training", "tests/data"

# fmt: off
FAULTS: tuple[Mutant, ...] = (
    # Settings that do not arrive
    fault("beta2_not_passed", "beta2 of the settings never reaches AdamW", OPTIM,
          "for f in fields(kind) if f.kw_only}", "for f in fields(kind) if f.kw_only and f.name != 'beta2'}", "qknorm", T_TRAIN),
    fault("decay_not_passed", "weight decay of the settings never reaches AdamW", OPTIM,
          "for f in fields(kind) if f.kw_only}", "for f in fields(kind) if f.kw_only and f.name != 'weight_decay'}", "qknorm",
          T_TRAIN),
    fault("clip_never", "gradients are never clipped", OPTIM, "self.grad_clip or math.inf)", "math.inf)", "qknorm", T_MODEL),
    fault("schedule_twice_as_long", "the schedule is made for twice the steps", LOOP,
          "s.lr_min, s.warmup_steps, s.num_steps)", "s.lr_min, s.warmup_steps, 2 * s.num_steps)", "plain", T_TRAIN),
    fault("warmup_not_passed", "the schedule warms up for one step", LOOP,
          "s.lr_min, s.warmup_steps, s.num_steps)", "s.lr_min, 1, s.num_steps)", "plain", T_TRAIN),
    fault("data_seed_ignored", "the order of the data has a seed of its own", LOOP,
          "Batches(inputs.train, s.batch_size, s.seed,", "Batches(inputs.train, s.batch_size, 42,", "masked", T_TRAIN),
    fault("init_seed_ignored", "initial weights have a seed of their own", LOOP,
          "model.layout.init(host, self.s.seed, self.s.initializer_range)",
          "model.layout.init(host, 42, self.s.initializer_range)", "masked", T_TRAIN),
    fault("z_loss_not_passed", "the model is built without the z-loss", LOOP, "z_loss=s.z_loss,", "z_loss=0.0,", "masked",
          T_TRAIN),
    fault("masks_not_passed", "the model is built without the borders of documents", LOOP,
          "document_end=inputs.document_end,", "document_end=None,", "masked", T_TRAIN),
    fault("always_shuffled", "--no-shuffle is ignored", LOOP, "s.shuffle, s.on_exhausted,", "True, s.on_exhausted,", "window",
          T_TRAIN),
    fault("all_windows_evaluated", "--val-batches is ignored", LOOP, "most = s.val_batches and s.val_batches * s.batch_size",
          "most = None", "plain", T_TRAIN),
    # Schedule and optimizer
    fault("warmup_begins_at_zero", "the first step has a learning rate of 0", SCHEDULE,
          "return self.lr * step / self.warmup_steps", "return self.lr * (step - 1) / self.warmup_steps", "plain", T_TRAIN),
    fault("decay_to_zero", "the schedule ends at 0, not at lr_min", SCHEDULE,
          "return self.lr_min + (self.lr - self.lr_min) * remaining", "return self.lr * remaining", "plain", T_TRAIN),
    fault("wsd_decays_from_the_start", "wsd is a line from the end of the warm-up", SCHEDULE,
          "start = max(start, self.num_steps - round(WSD_DECAY_SHARE * self.num_steps))", "start = max(start, 0)", "masked",
          T_TRAIN),
    fault("everything_decays", "norms and biases take weight decay too", OPTIM, "layout.decayed, faster=layout.faster,",
          "layout.size, faster=layout.faster,", "plain", T_MODEL),
    fault("a_bias_decays", "the table says that the bias of q decays", PARAMS, 'Param("bq", "H*D", "zeros", False,',
          'Param("bq", "H*D", "zeros", True,', "plain", T_MODEL),
    fault("half_of_gradients_cleared", "gradients of norms and biases are not cleared after a step", OPTIM,
          "            be.fill(self.g, 0)", "            be.fill(self.g[: self.decayed], 0)",
          "plain", T_MODEL),
    fault("clip_formula_in_both", "clipping divides by the norm plus 1, on all sides", REFERENCE,
          "max_norm / (np.sqrt(sum_sq) + 1e-6)", "max_norm / (np.sqrt(sum_sq) + 1.0)", "qknorm", T_MODEL),
    fault("second_moment_a_step_ahead", "v is corrected for one step more", CPU, "1 / (1 - beta2**step)",
          "1 / (1 - beta2 ** (step + 1))", "plain", "tests/backends"),
    fault("decay_without_rate", "decay is not multiplied with the learning rate", CPU, "bias1, bias2, eps, lr * decay\n",
          "bias1, bias2, eps, decay\n", "plain", "tests/backends"),
    # The step
    fault("mean_of_each_part", "each micro-batch is a mean of its own: gradients twice too large", LOOP,
          "*part, 1 / counted, graph", "*part, 1 / trained_targets(part[1]), graph", "plain",
          T_TRAIN),
    fault("scaled_by_positions", "the loss is scaled by positions, not by answers' tokens", LOOP,
          "*part, 1 / counted, graph", "*part, 1 / targets.size, graph", "instruct", T_TRAIN),
    fault("last_part_counts", "gradients are cleared before each micro-batch", LOOP,
          "begins=n == 0", "begins=True", "plain", T_TRAIN),
    fault("gradients_pile_up", "the gradients of a step begin with those of the step before", LOOP,
          "begins=n == 0", "begins=False", "plain", T_TRAIN),
    fault("first_part_twice", "the first micro-batch is computed in the place of every other", LOOP,
          "[*enumerate(parts)][which]:",
          "[(n, (ids[: self.micro], targets[: self.micro])) for n in range(-(-len(ids) // self.micro))][which]:",
          "plain", T_TRAIN),
    fault("one_sequence_lost", "the last sequence of a micro-batch has the targets of the first", EVALUATE,
          "yield ids[i : i + size], targets[i : i + size]",
          "yield ids[i : i + size], np.concatenate([targets[i : i + size - 1], targets[i : i + 1]])", "plain", T_TRAIN),
    # The log
    fault("loss_by_positions", "the loss in the log is divided by positions", LOOP,
          "loss, norm = total / n,", "loss, norm = total / positions,", "instruct",
          T_TRAIN),
    fault("clipped_norm_logged", "the gradient norm in the log is the clipped one", LOOP, "self.opt.grad_norm(square)\n",
          "min(self.opt.grad_norm(square), 0.5)\n", "qknorm", T_TRAIN),
    fault("norm_of_matrices", "the weight norm in the log leaves out norms and biases", CPU,
          "    square += kernels.joined(", "    square += bool(decay) * kernels.joined(", "plain", T_TRAIN),
    fault("tokens_are_positions", "tokens seen counts positions without a loss too", LOOP, "p.tokens_seen += tokens",
          "p.tokens_seen += positions", "instruct", T_TRAIN),
    fault("speed_of_positions", "tokens/s counts positions without a loss too", LOOP, "tokens_per_sec=tokens / wall",
          "tokens_per_sec=positions / wall", "instruct", T_TRAIN),
    fault("bits_of_another_log", "bits per byte are computed with log 10", UNITS, "/ math.log(2) *", "/ math.log(10) *", "plain",
          T_TRAIN),
    # Evaluation
    fault("validated_on_training", "the validation loss is that of training windows", LOOP,
          "evaluate(self.model, self.inputs.val,", "evaluate(self.model, self.inputs.train,", "plain", T_TRAIN),
    fault("mean_of_means", "the validation loss is a mean of means of micro-batches", EVALUATE, "Loss(before / counted,",
          "Loss(float(np.mean(means)),", "instruct", T_TRAIN),
    fault("first_windows_evaluated", "validation windows are the first ones, not spread evenly", BATCHES,
          "yield places * windows.count // stop", "yield places", "plain", T_DATA),
    # Data
    fault("windows_overlap", "windows begin at half the stride: tokens are predicted twice", BATCHES,
          "np.array(shards.strides(seq_length))", "np.array(shards.strides(seq_length)) // 2", "plain",
          T_DATA),
    fault("mask_one_early", "the mask of answers is read one token early", BATCHES,
          "mask = self._cut(self.shards.masks, which, starts)[:, 1:]",
          "mask = self._cut(self.shards.masks, which, starts)[:, :-1]", "instruct", T_DATA),
    fault("a_token_of_each_piece_lost", "the last token of each piece of a text is dropped", ENCODE, "out.append(ids)\n",
          "out.append(ids[:-1])\n", "plain", T_DATA),
    fault("text_in_lower_case", "text is encoded in lower case", ENCODE, '[p.text or "" for p in texts]',
          '[(p.text or "").lower() for p in texts]', "plain", T_DATA),
    fault("copies_are_kept", "copies of a document are trained on", ENCODE, "if not self.seen.add(item.sha256):",
          "if self.seen.add(item.sha256) and False:", "plain", T_DATA),
    fault("prompt_is_trained", "the loss counts the prompt too", RENDER, "trained, byte_runs = np.zeros(ids.size, bool)",
          "trained, byte_runs = np.ones(ids.size, bool)", "instruct", T_DATA),
    fault("token_behind_the_answer", "the token behind an answer is trained", RENDER, "covers = (start < b) & (end > a)",
          "covers = (start <= b) & (end > a)", "instruct", T_DATA),
    fault("first_token_of_answer_lost", "the first token of an answer is not trained", RENDER,
          "covers = (start < b) & (end > a)", "covers = (start < b) & (start > a)", "instruct", T_DATA),
    fault("no_separator", "examples of a row follow each other without a separator", PACK,
          "costs = np.minimum(sizes + (ids[ends - 1] != m.separator), room)", "costs = np.minimum(sizes, room)", "instruct",
          T_DATA),
    # The model, the same on all sides
    fault("rope_of_another_width", "frequencies of the rotary embedding are those of a head two wider", ROPE,
          "/ c.head_dim)\n    if", "/ (c.head_dim + 2))\n    if", "plain", T_MODEL),
    fault("rope_begins_again", "positions begin again at 24", ROPE, "np.outer(np.arange(positions), freq)",
          "np.outer(np.arange(positions) % 24, freq)", "plain", T_MODEL),
    fault("llama3_without_ramp", "frequencies between the bounds of llama3 are not interpolated", SCALING,
          "keep = np.clip(keep, 0, 1)", "keep = np.where(keep > 0.5, 1.0, 0.0)", "masked", T_MODEL),
    fault("mlp_reads_the_first_norm", "the MLP reads what attention read", BLOCK, 'self._linear(a.gu, a.norm2, "wgu")',
          'self._linear(a.gu, a.norm1, "wgu")', "plain", T_MODEL),
    fault("gradient_by_the_first_norm", "the gradient of gate and up is taken at what attention read", BLOCK,
          'self._linear_bwd(s.dnorm, g, dgu, a.norm2, "wgu")',
          'self._linear_bwd(s.dnorm, g, dgu, a.norm1, "wgu")', "plain", T_MODEL),
    fault("embedding_by_the_branch", "the embedding gets the gradient of the first branch, not of the stream", MODEL,
          "be.embedding_bwd(d.embed, s.dres, s.ids)", "be.embedding_bwd(d.embed, s.dnorm, s.ids)", "plain", T_MODEL),
    fault("values_are_keys", "attention's values are the keys", BLOCK, "v = self._heads(a.qkv)[2]", "v = self._heads(a.qkv)[1]",
          "plain", T_MODEL),
    fault("qk_norm_eps_fixed", "the norms of q and k have an epsilon of 1e-5", BLOCK,
          "be.head_rmsnorm_fwd(y, rstd, x, weight, self.c.rms_norm_eps)", "be.head_rmsnorm_fwd(y, rstd, x, weight, 1e-5)",
          "qknorm", T_MODEL),
    fault("a_block_not_recomputed", "of two blocks none is computed again in backward", MODEL,
          "if i + 1 < c.num_layers and self.recompute:", "if self.recompute and i + 2 < c.num_layers:", "masked", T_MODEL),
    fault("rope_not_undone", "backward turns gradients of q and k the wrong way", BLOCK,
          "else s.dqkv, START, -1)", "else s.dqkv, START, +1)", "plain", T_MODEL),
    # Initial weights
    fault("residual_std_not_scaled", "matrices into the residual stream have the spread of the others", PARAMS,
          "out_std = std / np.sqrt(2 * self.cfg.num_layers)", "out_std = std", "plain", T_MODEL),
    fault("one_random_stream", "all matrices begin with the same random numbers", PARAMS,
          "rng = np.random.Generator(np.random.PCG64([seed, number]))", "rng = np.random.Generator(np.random.PCG64([seed, 0]))",
          "plain", T_MODEL),
    fault("rows_repeat", "the second half of every matrix repeats the first", PARAMS,
          "view *= view.dtype.type(std if", "view[s.size // 2 : s.size // 2 * 2] = view[: s.size // 2]\n"
          "                view *= view.dtype.type(std if", "plain", T_MODEL),
    # Adapters
    fault("adapter_scale_lost", "the gradient of B lacks the scale", ADAPTERS,
          "be.adapted_bwd_b(du, db, dy, u, b, s)", "be.adapted_bwd_b(du, db, dy, u, b, 1.0)", "lora", T_MODEL),
    fault("adapter_of_a_layer_unused", "adapters of layer 1 are trained and not added", ADAPTERS,
          "self.be.adapted(to, w, b, a, scale)",
          "self.be.adapted(to, w, b, a, 0.0 if layer == 1 else scale)", "lora", T_MODEL),
    fault("adapter_of_last_part", "the gradient of A is that of the last micro-batch", ADAPTERS,
          "be.gemm(da, du, x, s, 1.0, True, False)", "be.gemm(da, du, x, s, 0.0, True, False)", "lora", T_MODEL),
    fault("adapter_start_too_wide", "A begins with the bound of its rank, not of its inputs", LORA,
          "bound = 1 / math.sqrt(s.shape[1])", "bound = 1 / math.sqrt(s.shape[0])", "lora", T_MODEL),
    fault("a_target_left_out", "values get no adapter though they are a target", LORA,
          "if s.param.name not in adapted:",
          'if s.param.name not in adapted or s.param.name == "wv":', "lora", T_MODEL),
    # Saving and resuming
    fault("saved_in_bfloat16", "checkpoints are rounded to bfloat16", RUNDIR, "write_apr(path, meta, tensors, dtype)",
          'write_apr(path, meta, tensors, "bfloat16")', "plain", T_TRAIN),
    fault("saved_to_five_digits", "weights are rounded to five digits when they are saved", RUNDIR,
          "write_apr(path, meta, tensors, dtype)",
          "write_apr(path, meta, {k: x.round(5) for k, x in tensors.items()}, dtype)", "plain", T_TRAIN),
    fault("m_saved_as_v", "a state holds the first moment twice", STATE,
          'f"{OPTIMIZER}{name}.": flat for name, flat in', 'f"{OPTIMIZER}{name}.": opt.state["m"] for name, flat in', "plain",
          T_TRAIN),
    fault("step_count_lost", "a resumed optimizer counts steps from 0", STATE, "opt.steps = step\n", "opt.steps = 0\n", "resumed",
          T_TRAIN),
    fault("rate_begins_again", "a resumed run begins the schedule again", LOOP, "lr = self.schedule(step)",
          "lr = self.schedule(self._steps_here + 1)", "resumed", T_TRAIN),
    fault("data_begins_again", "a resumed run reads the data from the beginning", LOOP, "self.batches.restore(p.data)",
          "self.batches.rewind()", "resumed", T_TRAIN),
    fault("a_batch_skipped", "a resumed run leaves out a batch", BATCHES,
          'self._read = state["pass"] * self.windows.count + state["position"]',
          'self._read = state["pass"] * self.windows.count + state["position"] + self.batch_size', "resumed", T_TRAIN),
    fault("moments_of_floats_lost", "second moments below 1e-8 are lost in a state", STATE, "view[...] = saved\n",
          "view[...] = np.where(np.abs(saved) < 1e-8, 0, saved)\n", "resumed", T_TRAIN),
)
# fmt: on
