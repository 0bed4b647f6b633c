"""Hold a fifth list of faults for tools/mutants.py: rare branches, readers of data, defaults, what is cached, figures, ranks.

Written as the others were, without a look at what checks a run: readings of config.json, windows, shapes of conversations, files
of many kinds, stale caches, settings that follow from others, adapters that are gone on with, states and checkpoints beside the
newest, several ranks, evaluations and generation in ways that no list used, and figures of plans. Closed before any was planted.
"""

# ruff: noqa: E501

from __future__ import annotations

from mutant_faults import (
    BATCHES,
    BLOCK,
    EVALUATE,
    LOOP,
    OPTIM,
    RENDER,
    RUNDIR,
    SCALING,
    Mutant,
    fault,
)
from mutant_fourth import CHOICES, GENERATE, GGUF, PAIRING, PAIRS, PROGRESS, SAMPLING, SCORES

FAMILY, SMOLLM3, OLMO2 = (f"apr/model/families/{x}.py" for x in ("family", "smollm3", "olmo2"))
HF_CONFIG, COST, SETTINGS = "apr/model/hf_config.py", "apr/model/cost.py", "apr/training/settings.py"
JSONL, RECORDS, PARQUET = "apr/data/jsonl.py", "apr/data/json_records.py", "apr/data/parquet.py"
TEXT, FIND, PREPARE = "apr/data/text.py", "apr/data/find.py", "apr/data/prepare.py"
SHAPES = "apr/data/conversations/shapes.py"
PREPARE_CHATS = "apr/data/conversations/prepare.py"
TRAINING, TEMPLATES = "apr/tokenizer/training.py", "apr/tokenizer/chat_template.py"
PEFT, INPUTS = "apr/checkpoints/peft.py", "apr/training/inputs.py"
SPLIT, SHARD, INT8 = "apr/training/split.py", "apr/ranks/shard.py", "apr/inference/int8.py"
LANGUAGE, EVAL, TASKS = "apr/inference/language_model.py", "apr/cli/eval.py", "apr/evaluation/tasks.py"
SUMMARY, PLAN, CHARTS = "apr/training/summary.py", "apr/cli/plan.py", "apr/report/charts.py"
EXPORTING, TASK_SCORES = "apr/checkpoints/exporting.py", "apr/training/tasks.py"

# fmt: off
FIFTH: tuple[Mutant, ...] = (
    # Families: readings of config.json, and branches that few models take
    fault("window_a_layer_late", "sliding windows begin a layer behind max_window_layers", FAMILY,
          "FULL if i < first else SLIDING", "FULL if i <= first else SLIDING", "upper"),
    fault("rope_left_out_a_layer_late", "the layers without rotary embedding are counted from 0", SMOLLM3,
          "int((i + 1) % every != 0)", "int(i % every != 0)", "interval"),
    fault("scales_of_yarn_upside_down", "the amplitude of YaRN divides by mscale", SCALING,
          "magnitude(self.factor, self.mscale) / magnitude(self.factor, self.mscale_all_dim)",
          "magnitude(self.factor, self.mscale_all_dim) / magnitude(self.factor, self.mscale)", "mscale"),
    fault("epsilon_of_the_other_families", "OLMo 2 without rms_norm_eps has the default of the others", OLMO2,
          'defaults=DEFAULTS | {"rms_norm_eps": 1e-5}', "defaults=DEFAULTS", "defaults-olmo2"),
    fault("theta_of_parameters_not_read", "rope_theta inside rope_parameters gives way to the default", HF_CONFIG,
          'elif "rope_theta" not in keys.d and "rope_theta" not in rope and keys.get("rope_theta") is not None:',
          'elif "rope_theta" not in keys.d and keys.get("rope_theta") is not None:', "parameters"),
    Mutant("one_norm_behind_both_branches", "OLMo 2's MLP has the norm that stands behind attention", (
        (BLOCK, "self.post_norm(a.mlp_out, a.post_rstd2, w.mlp_post_norm)", "self.post_norm(a.mlp_out, a.post_rstd2, w.attn_post_norm)"),
        (BLOCK, "self._post_norm_bwd(g.mlp_post_norm, a.mlp_out, a.post_rstd2, w.mlp_post_norm)",
         "self._post_norm_bwd(g.attn_post_norm, a.mlp_out, a.post_rstd2, w.attn_post_norm)")), "olmo2"),
    # Defaults, and settings that follow from others
    fault("decay_of_a_hundredth", "weight decay is 0.01 by default", OPTIM,
          '"AdamW decay of matrices; norms and biases have none", 0.1,', '"AdamW decay of matrices; norms and biases have none", 0.01,'),
    fault("warm_up_of_a_fifth", "warm-up takes up to a fifth of all steps", SETTINGS,
          "s.num_steps // 10)", "s.num_steps // 5)", "unsaid"),
    fault("rate_of_adapters_for_none", "adapters learn at the rate of whole weights by default", SETTINGS,
          'usual = (LORA_LR if _has_adapters(s) else defaults["lr"])', 'usual = defaults["lr"]', "unsaid-lora"),
    fault("epochs_rounded_down", "the steps of --epochs are rounded down", SETTINGS,
          "math.ceil(epochs * windows / batch_size - 1e-9)", "math.floor(epochs * windows / batch_size)", "epochs"),
    fault("patience_an_evaluation_short", "early stop comes an evaluation too early", LOOP,
          "p.evals_without_best > s.patience", "p.evals_without_best >= s.patience", "patience"),
    fault("least_epochs_count_the_first", "--min-epochs counts the evaluation before step 1", LOOP,
          "if len(p.val_losses) - 1 < s.min_epochs:", "if len(p.val_losses) < s.min_epochs:", "target"),
    fault("last_batch_of_a_pass_lost", "a run that stops at the end of the data leaves out its last batch", BATCHES,
          'if self.on_exhausted == "stop" and self._read + self.batch_size > n:',
          'if self.on_exhausted == "stop" and self._read + self.batch_size >= n:', "stopping"),
    # Files of text
    fault("last_line_without_an_end_lost", "the last line of a JSON Lines file is lost where nothing ends it", JSONL,
          '    if size:\n        yield None if size > MAX_RECORD_BYTES else b"".join(parts)\n', "", "files"),
    fault("lines_across_blocks_lose_their_beginning", "a line that lies across two blocks of a file loses what is in the first", JSONL,
          "            parts, size = others[-1:], len(others[-1])\n", "            parts, size = [], len(others[-1])\n", "files"),
    fault("first_row_group_alone", "of a Parquet file the first group of rows is read", PARQUET,
          "for group in range(file.num_row_groups):", "for group in range(min(1, file.num_row_groups)):", "files"),
    fault("last_element_of_an_array_lost", "the last record of a JSON array is lost", RECORDS,
          'if depth == 1 and part in (b",", b"]"):', 'if depth == 1 and part == b",":', "files"),
    fault("byte_order_marks_are_text", "a byte order mark becomes text", TEXT,
          "        start = mark_length(head)\n        document = _Growing(source, source.name, start)\n",
          "        start = 0\n        document = _Growing(source, source.name, start)\n", "files"),
    fault("names_in_capitals_left_out", "files whose suffix is in capitals are left out", FIND,
          "stem, suffix = os.path.splitext(name.lower())", "stem, suffix = os.path.splitext(name)", "files"),
    fault("separators_inside_lines", "a separator divides inside a line too", TEXT,
          "if (not at or lines[at - 1] == 10) and (line_end or end == len(lines)):", "if line_end or end == len(lines):",
          "commands:separated"),
    fault("last_piece_lost", "the last piece of a text that is cut is lost", TEXT,
          "            paragraph, size, decided = [], 0, not ended\n    yield piece.finish()\n",
          "            paragraph, size, decided = [], 0, not ended\n    if not number:\n        yield piece.finish()\n", "commands:pieces"),
    # Stale caches
    fault("cache_without_the_split", "a prepared corpus is used again for another --val-fraction", PREPARE,
          'f"{made_by} {val_fraction!r} {shard_tokens}"', 'f"{made_by} {shard_tokens}"', "cached"),
    fault("cache_without_the_template", "prepared conversations are used again for another chat template", PREPARE_CHATS,
          "[tokenizer.sha256, tokenizer.eos_token, rendering],", "[tokenizer.sha256, tokenizer.eos_token, bool(rendering)],", "cached-chats"),
    # Windows, held out and drawn
    fault("held_out_windows_a_window_early", "windows held out of one folder begin with the last one to train on", BATCHES,
          "        val.first += train.count\n", "        val.first += train.count - 1\n", "dataset"),
    # Conversations
    fault("inputs_of_alpaca_lost", "the input of an instruction is left out", SHAPES,
          '    more = text_of(record, "input") if record.get("input") else ""\n', '    more = ""\n', "shapes"),
    fault("flags_of_messages_ignored", "messages that say training: false are trained on", SHAPES,
          "return message, not (says_no or any(turn[key] is FLAGS[key] for key in flags))", "return message, not says_no", "shapes"),
    fault("history_lost", "earlier turns of a pair are left out", SHAPES,
          '[*earlier(record), *turns], "messages")', 'turns, "messages")', "shapes"),
    fault("tools_not_shown", "the template is not handed the tools", RENDER,
          'more = {**example.more, "tools": list(example.tools)} if example.tools else example.more', "more = example.more", "shapes"),
    fault("parts_on_lines_of_their_own", "parts of a content are joined by line ends", SHAPES,
          '    return "".join(out)\n\n\ndef _calls', '    return "\\n".join(out)\n\n\ndef _calls', "shapes"),
    fault("answers_are_stripped", "answers of pairs lose the white space around them", SHAPES,
          "{\"role\": \"assistant\", \"content\": response}]\n    if any", "{\"role\": \"assistant\", \"content\": response.strip()}]\n    if any", "shapes"),
    fault("prompts_cut_by_one_too_few", "pairs that are too long are cut by a token too few", PAIRING,
          "over = chosen.ids.size + rejected.ids.size + 1 - (m.seq_length + 1)",
          "over = chosen.ids.size + rejected.ids.size - (m.seq_length + 1)", "dpo-short"),
    # Losses of pairs
    fault("smoothing_of_dpo_alone", "simpo is not smoothed", PAIRS,
          "k.beta * (c.mean - r.mean) - k.gamma, k.smoothing)", "k.beta * (c.mean - r.mean) - k.gamma, 0.0)", "simpo-smoothed"),
    fault("tally_goes_on", "figures of an evaluation of pairs count the pairs of the step before", EVALUATE,
          "    tally_anew(preferences)\n    means", "    means", "dpo"),
    # Tokenizers and templates
    fault("frequency_not_passed", "the least frequency of a pair does not reach the trainer", TRAINING,
          "        min_frequency=min_frequency,\n        show_progress", "        min_frequency=2,\n        show_progress", "commands:tokenizer"),
    fault("not_normalized", "a tokenizer is trained without its normalization", TRAINING,
          "    if normalizer:\n", "    if normalizer and not normalization:\n", "commands:tokenizer"),
    fault("special_tokens_in_messages", "special tokens that a message spells out become tokens", TEMPLATES,
          '{**m, "content": special.sub(quote, m["content"])} if isinstance(m.get("content"), str) else m', "m", "commands:chat"),
    # Adapters and 8 bits
    fault("adapters_begin_without_b", "adapters that are gone on with have a B of zeros", PEFT,
          "for s, x in ((p.a, delta.a), (p.b, delta.b)):", "for s, x in ((p.a, delta.a),):", "lora-init"),
    fault("alpha_of_the_default", "adapters that are gone on with have twice their rank as alpha", PEFT,
          "return LoraConfig(ranks.pop(), alpha, targets, **kinds)", "return LoraConfig(r := ranks.pop(), 2.0 * r, targets, **kinds)", "lora-init"),
    fault("biases_of_8_bits_lost", "products of few rows of 8-bit integers have no bias", INT8,
          "kernels.linear_few_int8(y, x, w.q, w.scale, b is not None)", "kernels.linear_few_int8(y, x, w.q, w.scale, False)", "commands:int8"),
    # States, checkpoints and what they carry
    fault("template_not_carried", "checkpoints lose the chat template that they were tuned with", INPUTS,
          "    return kept | ({HF_FILES: texts} if texts else {})\n", "    return kept\n", "instruct"),
    fault("newest_checkpoint_removed", "a run that goes on removes the checkpoint that it goes on from", RUNDIR,
          "if epoch_of(c) > epoch):", "if epoch_of(c) >= epoch):", "resumed"),
    fault("rungs_of_the_wrong_steps", "of older states those that are kept for replay are removed", RUNDIR,
          "            if apart and step_of(old) % apart == 0:\n", "            if apart and step_of(old) % apart:\n", "ladder"),
    fault("seconds_of_evaluations_lost", "the seconds of a run leave out its evaluations", LOOP,
          "        p.seconds += (seconds := time.perf_counter() - start)\n", "        seconds = time.perf_counter() - start\n"),
    fault("seconds_begin_again", "a run that goes on forgets the seconds before", PROGRESS,
          "            return cls(**saved)\n", "            return cls(**{**saved, 'seconds': 0.0})\n", "resumed"),
    # Several ranks
    fault("first_round_twice", "the loss of several ranks adds each rank's first micro-batch again and again", SPLIT,
          "total += shared[n % count][0][n // count]", "total += shared[n % count][0][0]", "ranks"),
    fault("gradients_of_idle_ranks", "gradients of ranks without a micro-batch are added as they were", SHARD,
          "[p[:real] for p in pieces[:micro_batches]]", "[p[:real] for p in pieces]", "ranks"),
    fault("masks_by_rank", "dropout draws by the rank, not by the place in the step", SPLIT,
          "own = draws(n * count + rank)", "own = draws(rank)", "ranks-dropout"),
    # Generation
    fault("seed_of_the_first_prompt", "prompts together are drawn with one seed", LANGUAGE,
          "seed=one.seed + i)", "seed=one.seed)", "commands:together"),
    fault("cache_of_an_earlier_prompt", "a prompt takes what the cache held before another was read over it", GENERATE,
          "            self._seen = self._seen[:known]\n", "", "commands:chat"),
    fault("ids_without_a_token", "ids that no token has may be drawn", SAMPLING,
          "left = penalised if among is None else penalised[among]", "among, left = None, penalised", "commands:undrawable"),
    # Evaluation
    fault("first_windows_of_shards", "an evaluation of so many tokens takes the first windows", SCORES,
          "i = number * every // take", "i = number", "commands:shards"),
    fault("masks_not_passed_to_eval", "apr eval --mask-documents masks nothing", EVAL,
          "            end = shards.border_id\n            if end is None:\n", "            if shards.border_id is None:\n", "commands:masked-shards"),
    fault("chance_of_the_mean_number", "chance is one over the mean number of choices", CHOICES,
          "float(np.mean([1 / len(i.choices) for i in items]))", "float(1 / np.mean([len(i.choices) for i in items]))", "commands:choices"),
    fault("error_of_an_accuracy_by_n", "the standard error of an accuracy divides by n", CHOICES,
          "math.sqrt(p * (1 - p) / (n - 1)) if n > 1", "math.sqrt(p * (1 - p) / n) if n > 1", "commands:choices"),
    fault("positions_scored_a_token_early", "losses by position stand a position early", SCORES,
          'rows.append({"first": first + 1, "last": last, ', 'rows.append({"first": first, "last": last - 1, ', "commands:eval"),
    fault("limit_of_tasks_ignored", "--eval-tasks-limit is ignored", TASKS,
          "items, before = choices.read_items(task.source)[:limit], prefix_ids", "items, before = choices.read_items(task.source), prefix_ids", "tasks"),
    fault("tasks_of_the_frozen_weights", "tasks score the weights without their adapters", TASK_SCORES,
          "self.model.adapters or self.model.w", "self.model.w", "tasks-lora"),
    # Export
    fault("norms_as_matrices", "norms and biases of a GGUF file have the type of matrices", GGUF,
          "    if array.ndim < 2:\n", "    if array.ndim < 1:\n", "commands:half"),
    fault("more_positions_than_the_window", "a GGUF file without windows reads all positions", GGUF,
          "        positions = min(positions, cfg.sliding_window)\n", "        pass\n", "commands:windowed"),
    fault("dtype_of_the_checkpoint", "an exported folder names the dtype that the checkpoint had", EXPORTING,
          '            "torch_dtype": name,\n', '            "torch_dtype": commonest_dtype(tensors),\n', "commands:rounded"),
    # Figures of reports, results and plans
    fault("best_is_the_last", "the result of a run that had ended names its last loss as its best", SUMMARY,
          '"best_val_loss": min(m["val_loss"] for m in evaluations),', '"best_val_loss": evaluations[-1]["val_loss"],', "commands:ended"),
    fault("means_a_width_early", "moving means of a chart stand at the first of their steps", CHARTS,
          "return x[width - 1 :], (total", "return x[: len(x) - width + 1], (total", "long"),
    fault("gigabytes_called_gibibytes", "apr plan shows gigabytes as GiB", PLAN,
          'f"{nbytes / 2**30:9.3f} GiB"', 'f"{nbytes / 1e9:9.3f} GiB"', "commands:plan-words"),
    fault("flops_of_every_key", "FLOPs count scores of keys that no query sees", COST,
          "return (w * (w + 1) / 2 + (seq - w) * w) / seq", "return float(w)", "commands:plan"),
    fault("copies_without_the_weights", "the memory of copies leaves out the weights", COST,
          "copies = (1 + len(optimizer.moments)) * trained.size", "copies = len(optimizer.moments) * trained.size", "commands:plan"),
)
# fmt: on
