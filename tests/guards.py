"""Which line of defence each test stands for: the guards, and how to take one away.

A guard is the code that keeps a known trap shut (a row of the pitfalls or feasibility tables). `make guards`
takes the guards away one by one and sees the named test fail; a test that still passes proves nothing.

To add one, append a line to `GUARDS`:

    Guard("11", "lorafocal.objectives.focal:focalpo", lambda original: naive, "tests/test_x.py::test_y"),

- rows: the rows it belongs to, separated by spaces; the test carries the same rows in its `row` marker.
- target: `module:attribute`, the attribute may be dotted (`Class.method`).
- replacement: gets the original, returns what stands in its place: what a careless author would have written.
- test: a pytest node id, without parameters if any failing case will do.
"""

# ruff: noqa: E501 - one guard a line

from __future__ import annotations

import contextlib
import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import (
    careless,
    careless_asking,
    careless_during,
    careless_generation,
    careless_judging,
    careless_losses,
    careless_references,
    careless_release,
    careless_tokens,
)

ENVIRONMENT_KEY = "LORAFOCAL_TEST_GUARD_OFF"

# The rows this project answers for so far. P0: wrong results, silently.
P0_ROWS = (
    "F1 F2 F3 F6 F11 F12 F13 F18 1 2 3 4 6 11 12 13 14 15 19 20 21 23 24 25 27 36 39 41 43 45 47 53 54 55 56 64 26 28 31 33 9 35"
).split()
OTHER_ROWS = "F4 F5 F7 F8 50 F9 F14 F15 46 F19 7 8 10 22 32 51 52 57 63 5 16 17 18 38 F17 29 30 61 S2 S5 S9 S11 S17 42 44 S13 60 62 48 49 59 F16 34 37 40 S14 58 F10 S8".split()


@dataclass(frozen=True, slots=True)
class Guard:
    rows: str
    target: str
    replacement: Callable[[Any], Any]
    test: str

    @property
    def name(self) -> str:
        """What `--guard-off` takes: the rows and the attribute, for example `11:focalpo`."""
        return f"{self.rows.replace(' ', '+')}:{self.target.partition(':')[2]}"


def _repeating_pairs(sampler: Any) -> Iterator[list[int]]:
    """As accelerate evens ragged batches out: what is missing is taken from the start again."""
    for start in range(0, sampler.num_pairs, sampler.pairs_per_step):
        step = [n % sampler.num_pairs for n in range(start, start + sampler.pairs_per_step)]
        yield step[sampler.rank :: sampler.world]


# fmt: off
GUARDS: list[Guard] = [
    # order of pairs, steps of several packs, several processes
    Guard("F1", "lorafocal.sampler:StepSampler.__iter__", lambda _: _repeating_pairs, "tests/test_sampler.py::test_over_all_ranks_every_pair_of_an_epoch_is_seen_exactly_once"),
    Guard("55", "lorafocal.trainer:check_same_order", lambda _: lambda *a: None, "tests/test_going_on.py::test_another_order_of_pairs_is_refused[seed]"),
    Guard("F2", "lorafocal.callbacks:SetEpoch.on_epoch_begin", lambda _: lambda *a, **k: None, "tests/test_packs_of_a_step.py::test_every_epoch_trains_each_pair_once_in_another_order"),
    Guard("F3", "accelerate.state:GradientState._set_sync_gradients", lambda _: lambda *a: None, "tests/test_packs_of_a_step.py::test_engines_are_told_of_the_last_backward_and_the_optimiser_steps_once"),
    Guard("F3", "torch.nn.parallel:DistributedDataParallel.no_sync", lambda _: lambda *a: contextlib.nullcontext(), "tests/engine/test_data_parallel.py::test_gradients_are_exchanged_once_and_the_optimiser_steps_once_a_step"),
    Guard("13 49", "lorafocal.engines.whole:hold_masters", lambda _: lambda *a: None, "tests/test_full_parameter.py::test_a_step_of_1e_7_moves_the_masters_of_a_bf16_model"),
    Guard("14", "lorafocal.comparison:Comparison._settle_noise", lambda _: lambda *a: None, "tests/objectives/test_in_training.py::test_both_passes_of_a_step_meet_the_same_dropout_and_steps_another"),
    Guard("F4", "lorafocal.comparison:no_share", lambda _: lambda inputs: None, "tests/objectives/test_in_training.py::test_a_filler_calls_the_models_as_often_as_a_pack_does"),
    Guard("15", "lorafocal.comparison:Comparison.step", lambda _: careless.sums_of_a_pack_alone, "tests/objectives/test_in_training.py::test_gradients_of_packs_are_those_of_one_pack_by_autograd"),
    Guard("49", "lorafocal.model.master:needs_masters", lambda _: lambda *a: False, "tests/test_full_parameter.py::test_weights_that_a_bf16_model_keeps_in_fp32_are_not_rounded_without_a_word"),
    Guard("58", "lorafocal.manifest:NO_DEVIATION", lambda original: original | {"data.revision"}, "tests/test_recipes.py::test_another_commit_than_the_recipes_is_a_deviation_and_one_that_it_leaves_open_is_none"),
    Guard("13 49", "lorafocal.engines.fsdp:needs_masters", lambda _: lambda *a: False, "tests/engine/test_fsdp.py::test_a_step_of_1e_7_moves_the_masters_of_a_bf16_model"),
    Guard("F10", "lorafocal.engines.fsdp:Sharded.rest", lambda _: lambda self: None, "tests/engine/test_fsdp.py::test_weights_and_states_come_back_also_after_an_evaluation_and_the_run_with_them"),
    Guard("F4", "lorafocal.trainer:FocalPOTrainer._in_step", careless.packs_as_they_come, "tests/engine/test_data_parallel.py::test_ranks_run_as_many_packs_as_each_other"),
    Guard("F8", "lorafocal.launch:check_launch", lambda _: lambda: None, "tests/test_launch.py::test_launches_that_silently_train_alone_are_refused_with_the_command_that_works"),
    Guard("F8", "lorafocal.run:check_same", lambda _: lambda given: None, "tests/engine/test_given_apart.py::test_another_learning_rate_or_base_on_one_of_them_is_refused_on_both_before_training"),
    Guard("57", "lorafocal.assembly:set_seed", lambda _: lambda seed: None, "tests/test_run.py::test_a_run_of_the_same_config_gives_the_same_adapter"),
    # what is trained, and whether it learns
    Guard("2 3", "lorafocal.model.adapters:check_trainable", lambda _: lambda model: {n: p for n, p in model.named_parameters() if "lora_" in n}, "tests/test_trainer.py::test_a_frozen_adapter_is_refused"),
    Guard("2", "lorafocal.health:HealthCheck.on_optimizer_step", lambda _: lambda *a, **k: None, "tests/test_run.py::test_a_rate_that_moves_nothing_stops_the_run"),
    Guard("12", "lorafocal.health:HealthCheck._stop", lambda _: lambda *a: None, "tests/test_trainer.py::test_a_non_finite_loss_stops_the_run_names_the_pair_and_overwrites_nothing"),
    # saving and resuming
    Guard("55", "lorafocal.sampler:shuffled", lambda _: lambda pairs, seed, epoch: random.sample(range(pairs), pairs), "tests/test_killed_runs.py::test_killed_at_every_point_and_resumed_it_ends_with_the_same_bits[early]"),
    Guard("47", "lorafocal.tensor_files:check_saved", lambda _: lambda *a, **k: None, "tests/test_checkpoint.py::test_a_bad_adapter_is_refused"),
    Guard("53", "lorafocal.tensor_files:check_keys", lambda _: lambda *a: None, "tests/test_checkpoint.py::test_tensors_are_strict_both_ways_and_nothing_is_half_loaded"),
    Guard("54", "lorafocal.optimizers:states_of_bitsandbytes", lambda _: lambda optimizer: None, "tests/test_checkpoint.py::test_interrupted_equals_uninterrupted_bit_for_bit"),
    Guard("54", "lorafocal.checkpoint:_check_made", lambda _: lambda *a: None, "tests/test_checkpoint.py::test_a_step_count_that_is_missing_is_not_taken_for_zero"),
    Guard("54", "lorafocal.optimizers:kind_of", lambda _: lambda optimizer: type(optimizer).__name__, "tests/test_checkpoint.py::test_an_optimizer_of_other_bits_is_another_optimizer"),
    Guard("32", "lorafocal.optimizers:separate_rates", lambda _: careless.rates_of_peft, "tests/test_optimizers.py::test_what_is_neither_a_nor_b_keeps_the_plain_rate_and_groups_their_settings"),
    Guard("32", "lorafocal.optimizers:check_given", lambda _: lambda *a: None, "tests/test_optimizers.py::test_an_optimizer_of_the_callers_own_would_ignore_the_ratio"),
    Guard("54", "lorafocal.engines.whole:Whole.restore", lambda _: lambda *a: None, "tests/test_checkpoint.py::test_interrupted_equals_uninterrupted_bit_for_bit"),
    Guard("55 F9", "lorafocal.publish:published", lambda _: contextlib.contextmanager(lambda target, **_: (target.mkdir(exist_ok=True), (yield target))), "tests/test_publish.py::test_killed_at_every_file_operation_leaves_the_old_or_the_new"),
    Guard("F9", "lorafocal.publish:why_incomplete", lambda _: lambda *a, **k: None, "tests/test_checkpoint_folders.py::test_a_damaged_checkpoint_is_passed_over_with_the_reason"),
    Guard("56", "lorafocal.shard_files:save_file", lambda _: lambda tensors, path: __import__("torch").save(tensors, path), "tests/test_checkpoint.py::test_interrupted_equals_uninterrupted_bit_for_bit"),
    Guard("51", "lorafocal.model.save:public_name", lambda _: lambda base: base, "tests/test_run.py::test_no_path_of_this_machine_is_written_but_those_of_the_config"),
    # configs
    Guard("F18", "lorafocal.yaml12:parse_yaml", lambda _: lambda text, **_: __import__("yaml").safe_load(text), "tests/test_yaml12.py::test_floats_without_a_point_are_numbers"),
    Guard("F6", "lorafocal.training_fields:forced_values", lambda _: dict, "tests/test_training_fields.py::test_the_filter_that_hides_nan_is_off"),
    Guard("F6 12", "lorafocal.training_fields:forced_values", lambda original: lambda: {k: v for k, v in original().items() if k != "logging_nan_inf_filter"}, "tests/test_arguments.py::test_the_filter_that_hides_nan_is_off_and_cannot_be_turned_on"),
    Guard("12", "lorafocal.training_fields:field_problem", lambda _: lambda *a: None, "tests/test_training_fields.py::test_half_precision_is_refused_with_the_reason"),
    Guard("14", "lorafocal.bounds:check_dropout", lambda _: lambda *a, **k: None, "tests/test_config.py::test_dropout_needs_permission"),
    Guard("32", "lorafocal.schema.training:_training_problems", lambda _: lambda *a: (), "tests/test_config.py::test_unknown_keys_are_answered_with_the_nearest"),
    # the reference and the adapter
    Guard("1", "lorafocal.reference:check_identity", lambda _: lambda *a: None, "tests/test_trainer.py::test_an_adapter_away_from_its_start_is_refused_with_both_remedies"),
    Guard("1 55", "lorafocal.reference:check_same_reference", lambda _: lambda *a: None, "tests/test_references_in_training.py::test_resuming_with_another_start_is_refused"),
    Guard("F17", "lorafocal.model.adapters:AdapterSwitch.to", lambda _: careless.switched_by_peft, "tests/test_reference.py::test_a_call_of_the_reference_leaves_what_is_trained_and_what_is_active_alone"),
    Guard("3 F17", "lorafocal.model.adapters:add_frozen_copy", careless.copy_that_is_the_adapter_itself, "tests/test_references_in_training.py::test_the_copy_is_never_trained_and_the_policy_is"),
    Guard("14 1", "lorafocal.policy:evaluating", lambda _: careless.as_it_is, "tests/test_references_in_training.py::test_dropout_that_is_allowed_is_the_policys_alone"),
    Guard("7 22", "lorafocal.model.load:check_same_tokens", lambda _: lambda *a: None, "tests/test_assembly.py::test_a_reference_that_reads_token_ids_otherwise_is_refused"),
    Guard("7", "lorafocal.reference:check_ref_model", lambda _: lambda *a: None, "tests/test_trainer.py::test_one_model_is_loaded_and_a_second_one_that_would_be_ignored_is_refused"),
    Guard("8", "lorafocal.model.save:save_adapter", lambda _: careless.every_adapter_saved, "tests/test_references_in_training.py::test_only_the_policys_adapter_is_saved"),
    Guard("3", "lorafocal.trainer:check_trainable", lambda _: careless.whatever_the_adapter_holds, "tests/test_trainer.py::test_a_base_that_would_train_is_refused_and_a_run_leaves_it_alone"),
    Guard("4", "lorafocal.model.adapters:attach_lora", lambda _: careless.stacked_adapter, "tests/test_trainer.py::test_stacking_a_second_adapter_is_refused_with_both_ways_out"),
    Guard("6", "lorafocal.model.adapters:features", lambda _: lambda config: frozenset({"lora"}), "tests/test_trainer.py::test_an_adapter_that_changes_more_than_it_can_switch_off_is_refused"),
    Guard("10", "lorafocal.model.adapters:resolve_targets", lambda _: lambda model, targets: targets, "tests/model/test_adapters.py::test_wrong_targets_are_answered_with_the_nearest"),
    Guard("45 21", "lorafocal.model.adapters:resolve_targets", lambda _: lambda model, targets: targets, "tests/model/test_adapters.py::test_an_adapter_on_the_output_head_is_refused"),
    Guard("13", "lorafocal.model.adapters:widen_adapters", lambda _: careless.bf16_adapters, "tests/test_trainer.py::test_adapters_and_moments_are_fp32_on_a_bf16_base_and_small_steps_move_every_entry"),
    Guard("13 3", "lorafocal.model.adapters:widen_adapters", lambda _: careless.bf16_adapters, "tests/model/test_variants.py::test_everything_trained_is_fp32_on_a_bf16_base_and_nothing_else_is_trained"),
    Guard("6 13", "lorafocal.model.trained_modules:compute_as_base", lambda _: lambda model: None, "tests/model/test_variants.py::test_a_trained_module_computes_in_the_dtype_of_the_base"),
    Guard("6 13", "lorafocal.model.dora:reset_magnitudes", lambda _: lambda model: None, "tests/model/test_variants.py::test_doras_factor_is_exactly_one_at_the_start"),
    Guard("6 1", "lorafocal.model.dora:exact_dora", lambda _: lambda model: None, "tests/model/test_variants.py::test_on_off_and_copy_are_one_model_on_a_quantised_base"),
    Guard("32", "lorafocal.model.adapters:check_ranks", lambda _: lambda *a: None, "tests/model/test_variant_names.py::test_a_pattern_of_no_adapted_layer_is_refused_with_the_nearest"),
    Guard("32", "lorafocal.model.trained_modules:resolve_modules", lambda _: lambda model, names: names, "tests/model/test_variant_names.py::test_a_module_to_save_that_no_module_is_named_is_refused_with_the_nearest"),
    Guard("45", "lorafocal.model.trained_modules:is_tied", lambda _: lambda model: False, "tests/model/test_variant_names.py::test_a_part_of_tied_embeddings_is_refused_with_the_way_out"),
    Guard("46", "lorafocal.model.trained_modules:resolve_tokens", lambda _: lambda model, tokens: tokens, "tests/model/test_variant_names.py::test_a_token_that_the_base_has_no_row_for_is_refused"),
    Guard("14", "lorafocal.model.noise:switch_noise_off", lambda _: lambda model: 0, "tests/test_trainer.py::test_dropout_is_switched_off_everywhere"),
    Guard("39", "lorafocal.health:HealthCheck.check_gradients", lambda _: lambda *a, **k: None, "tests/test_trainer.py::test_missing_gradients_stop_the_first_step"),
    # numbers
    Guard("11", "lorafocal.objectives.focal:p_gamma", lambda _: careless.naive_factor, "tests/objectives/test_focal.py::test_value_and_gradient_stay_finite_and_accurate_at_extreme_margins"),
    Guard("11", "lorafocal.objectives.pairwise:widen", lambda _: lambda logps: logps, "tests/objectives/test_focal.py::test_the_objective_computes_in_fp32_whatever_the_dtype_of_the_log_probs"),
    Guard("64", "lorafocal.objectives.focal:p_gamma", lambda _: careless.detached_factor, "tests/objectives/test_focal.py::test_the_gradient_is_the_closed_form_of_the_papers_equation_6"),
    Guard("11", "lorafocal.objectives.focal:eq3", lambda _: careless.naive_eq3, "tests/objectives/test_factor.py::test_eq3_is_finite_and_exact_at_every_margin"),
    Guard("11", "lorafocal.objectives.f_dpo:_falling", lambda _: careless_losses.cut_exponential, "tests/objectives/test_oracles_of_pairs.py::test_a_steep_divergence_keeps_its_order_past_the_range_of_floats"),
    Guard("11", "lorafocal.objectives.discopop:discopop", lambda _: careless_losses.discopop_as_printed, "tests/objectives/test_oracles_of_pairs.py::test_float32_stays_finite_at_log_ratios_of_ten_thousand[discopop-0.05-0.05]"),
    Guard("11", "lorafocal.objectives.todo:ternary", lambda _: careless_losses.ternary_as_printed, "tests/objectives/test_oracles_of_pairs.py::test_float32_stays_finite_at_log_ratios_of_ten_thousand[todo-0.5-2.0]"),
    Guard("11", "lorafocal.objectives.targets:_kl", lambda _: careless_losses.kl_by_its_shares, "tests/objectives/test_oracles_of_pairs.py::test_float32_stays_finite_at_log_ratios_of_ten_thousand[exo-0.5-0.2]"),
    Guard("64", "lorafocal.objectives.preference:PreferenceTerm.turned", lambda _: lambda term, log_odds: log_odds != log_odds, "tests/objectives/test_factor.py::test_the_guard_takes_the_gradient_of_turned_pairs_and_nothing_else"),
    Guard("64", "lorafocal.objectives.wpo:average_logps", lambda _: lambda logps, lengths: logps, "tests/objectives/test_wpo.py::test_the_loss_is_dpos_times_the_geometric_means_of_both_answers"),
    Guard("64", "lorafocal.trainer:check_first_step", lambda _: lambda *a: None, "tests/objectives/test_first_step.py::test_a_first_step_that_goes_the_wrong_way_is_refused_and_changes_nothing"),
    Guard("64", "lorafocal.objectives.focal:focalpo", lambda _: careless.focalpo_with_epsilon, "tests/objectives/test_focal.py::test_gamma_zero_is_dpo_bit_for_bit_in_value_and_gradient"),
    Guard("15", "lorafocal.objectives:mean_loss", lambda _: lambda losses, num_pairs: losses.mean(), "tests/test_trainer.py::test_the_budget_of_a_pack_changes_no_gradient_and_no_metric"),
    Guard("F13", "lorafocal.ops.logps:LogProbHead.forward", lambda _: careless.head_under_autocast, "tests/ops/test_logps.py::test_autocast_does_not_make_the_log_probs_coarse"),
    Guard("36", "lorafocal.ops.logps:token_logps", lambda _: careless.all_rows_at_once, "tests/ops/test_logps.py::test_no_tensor_of_all_rows_by_the_vocabulary_is_ever_made"),
    Guard("36", "lorafocal.ops.logps:LogProbHead.forward", lambda _: careless.every_row_through_the_head, "tests/test_policy.py::test_the_head_sees_completions_only_and_a_chunk_at_a_time"),
    Guard("36", "lorafocal.ops.divergences:compare_tokens", lambda _: careless.divergences_of_whole_tables, "tests/ops/test_divergences.py::test_three_chunks_of_logits_are_alive_at_a_time"),
    # what is measured
    Guard("16", "lorafocal.metrics:summed_over_ranks", lambda _: lambda values: values, "tests/test_evaluation_loop.py::test_two_uneven_ranks_log_the_means_and_the_table_of_all_pairs"),
    Guard("16", "lorafocal.metrics:PairMetrics.add", lambda _: careless.mean_of_means, "tests/test_metrics.py::test_accuracies_are_shares_of_pairs_however_they_are_batched"),
    Guard("16", "lorafocal.metrics:ranks_right", lambda _: lambda logps: logps.chosen >= logps.rejected, "tests/test_metrics.py::test_rankings_and_what_became_of_them_are_shares_of_whole_pairs"),
    Guard("16", "lorafocal.metrics:_over", lambda _: lambda part, whole: part / max(whole, 1.0), "tests/test_metrics.py::test_shares_of_no_pair_are_left_out_and_not_0"),
    Guard("16", "lorafocal.metrics:_correlation", lambda _: careless.correlation_of_rounding, "tests/test_metrics.py::test_a_correlation_with_what_does_not_vary_is_left_out"),
    Guard("16", "lorafocal.evaluate.during:first_verdicts", lambda _: careless_during.verdicts_of_the_first_file, "tests/evaluate/test_during.py::test_answers_that_were_judged_otherwise_are_no_beginning"),
    Guard("38", "lorafocal.metrics:PairTable.add", careless.table_that_keeps_logits, "tests/test_evaluation_loop.py::test_evaluation_keeps_scalars_only"),
    # packs: who sees whom, at which position, through which head
    Guard("19", "lorafocal.data.packing:pad_sequences", lambda _: careless.left_padded, "tests/test_policy.py::test_learned_positions_are_counted_from_the_start_of_each_sequence"),
    Guard("19", "lorafocal.data.packing:share_prefixes", careless.running_positions, "tests/test_policy.py::test_scores_and_gradients_equal_one_sequence_at_a_time_in_float64"),
    Guard("27", "lorafocal.data.packing:pad_sequences", careless.masks_from_ids, "tests/test_policy.py::test_the_pad_token_changes_no_bit_of_loss_or_gradient"),
    Guard("20", "lorafocal.ops.attention:sdpa_shared_prefix_attention", lambda _: careless.leaking_attention, "tests/test_policy.py::test_a_changed_neighbour_moves_the_others_by_exactly_nothing"),
    Guard("20", "lorafocal.ops.attention:row_block_attention", lambda _: careless.leaking_attention, "tests/test_policy.py::test_a_changed_neighbour_moves_the_others_by_exactly_nothing"),
    Guard("20", "lorafocal.probes:check_neighbours", lambda _: lambda *a: None, "tests/test_probes.py::test_a_leak_between_neighbours_is_found"),
    Guard("F12 20", "lorafocal.probes:choose_layout", lambda _: careless.unproven_layout, "tests/test_trainer.py::test_a_model_that_packs_would_get_wrong_trains_padded_or_is_refused_before_the_first_step"),
    Guard("F11", "lorafocal.model.head:logit_transform", lambda _: careless.no_transform, "tests/model/test_head.py::test_scaled_and_capped_logits_are_followed_exactly_and_the_model_is_left_as_it_was"),
    Guard("F11 21", "lorafocal.probes:check_scores", lambda _: lambda *a: None, "tests/test_probes.py::test_a_head_that_misses_the_models_transform_is_found"),
    Guard("F15", "lorafocal.ops.attention:sdpa_shared_prefix_attention", lambda original: lambda *a, softcap=None, sinks=None, **k: original(*a, **k), "tests/ops/test_attention.py::test_caps_and_sinks_equal_the_definition_in_value_and_gradient"),
    Guard("F15", "lorafocal.ops.plain_attention:softmax_attention", lambda original: lambda *a, sinks=None, **k: original(*a, **k), "tests/ops/test_attention.py::test_caps_and_sinks_are_those_of_the_models_that_have_them"),
    Guard("F15", "lorafocal.policy:own_attention", lambda _: lambda base: "sdpa", "tests/model/test_architectures.py::test_caps_and_sinks_are_not_dropped_in_either_layout_or_outside"),
    Guard("27", "lorafocal.policy:_arguments", lambda original: lambda *a: {k: v for k, v in original(*a).items() if k != "attention_mask"}, "tests/model/test_architectures.py::test_rows_are_called_with_the_mask_of_their_padding"),
    Guard("35", "lorafocal.model.fused:_turns_halves", lambda _: lambda *a: True, "tests/model/test_fused_functions.py::test_a_rotary_embedding_of_another_formula_stays_and_is_told_by_name"),
    Guard("F12", "lorafocal.policy:_check_prepared", lambda _: lambda *a: None, "tests/test_assembly.py::test_a_trainer_whose_model_was_prepared_for_another_layout_since_is_refused"),
    Guard("20", "lorafocal.probes:check_future", lambda _: lambda *a: None, "tests/test_probes.py::test_a_model_that_sees_the_future_or_the_padding_is_refused"),
    Guard("F12", "lorafocal.probes:check_packing", lambda _: lambda model: None, "tests/test_probes.py::test_models_that_packs_would_get_wrong_are_refused_by_name_and_train_padded"),
    Guard("20", "lorafocal.model.load:check_length", lambda _: lambda *a: None, "tests/model/test_load.py::test_lengths_at_which_a_pair_would_move_its_neighbours_are_refused"),
    Guard("20", "lorafocal.probes:check_causal", lambda _: lambda *a: None, "tests/test_probes.py::test_no_tolerance_hides_a_model_that_sees_the_future_by_itself"),
    Guard("28", "lorafocal.assembly:check_pairs", lambda _: lambda *a: None, "tests/test_assembly.py::test_tokenised_pairs_are_looked_at_too"),
    Guard("46", "lorafocal.model.load:check_vocabulary", lambda _: lambda *a: None, "tests/model/test_load.py::test_a_tokenizer_larger_than_the_vocabulary_is_refused"),
    Guard("21", "lorafocal.model.head:install_head", lambda _: careless.any_head, "tests/model/test_head.py::test_a_head_that_is_not_a_plain_linear_layer_is_refused"),
    # rows
    Guard("29", "lorafocal.data.forms:other_prompts", lambda _: lambda values: [], "tests/data/test_forms.py::test_what_a_form_cannot_say_is_refused_by_name"),
    Guard("29", "lorafocal.data.forms:refuse_columns", lambda _: lambda row: None, "tests/data/test_forms.py::test_what_a_form_cannot_say_is_refused_by_name"),
    Guard("30", "lorafocal.data.hygiene:drop_equal_answers", lambda _: careless.all_pairs, "tests/data/test_hygiene.py::test_planted_cases_are_counted_exactly"),
    Guard("30", "lorafocal.data.hygiene:drop_duplicates", lambda _: careless.all_pairs, "tests/data/test_hygiene.py::test_planted_cases_are_counted_exactly"),
    Guard("28", "lorafocal.data.tokens:truncate", careless.pairs_cut_alone, "tests/data/test_further_answers.py::test_one_that_cannot_be_read_drops_its_pair_and_is_counted"),
    Guard("30", "lorafocal.data.hygiene:drop_unranked", lambda _: careless.all_pairs, "tests/data/test_hygiene.py::test_an_objective_of_the_score_gap_gets_pairs_that_have_one"),
    Guard("30", "lorafocal.data.hygiene:drop_contradictions", lambda _: careless.all_pairs, "tests/data/test_hygiene.py::test_planted_cases_are_counted_exactly"),
    Guard("30", "lorafocal.data.hygiene:drop_overlap", lambda _: careless.all_pairs, "tests/data/test_hygiene.py::test_training_pairs_with_a_held_out_prompt_go"),
    Guard("30", "lorafocal.data.mixture:split_held_out", lambda _: careless.split_between_pairs, "tests/data/test_mixture.py::test_whole_prompts_are_held_out"),
    Guard("S5", "lorafocal.data.hub:REVISION", careless.any_revision, "tests/data/test_hub.py::test_a_hub_id_without_a_commit_is_refused"),
    Guard("S17", "lorafocal.data.readers:bounded_lines", lambda _: careless.whole_lines, "tests/data/test_readers.py::test_a_line_over_the_limit_is_skipped_without_being_held"),
    # tokens
    Guard("23", "lorafocal.data.encoding:encode", lambda _: careless.encode_with_special_tokens, "tests/data/test_tokens.py::test_a_conversation_is_what_its_template_writes"),
    Guard("23", "lorafocal.data.tokens:check_one_bos", lambda _: lambda *a: None, "tests/data/test_tokens.py::test_a_doubled_bos_is_refused"),
    Guard("24", "lorafocal.data.templates:one_eos", lambda _: lambda tokenizer: (), "tests/data/test_tokens.py::test_plain_text_gets_the_usual_bos_and_one_eos"),
    Guard("24", "lorafocal.data.templates:chat_texts", careless.eos_after_everything, "tests/data/test_tokens.py::test_a_conversation_is_what_its_template_writes"),
    Guard("25", "lorafocal.data.encoding:seam_holds", lambda _: lambda *a: True, "tests/data/test_tokens.py::test_a_merge_across_the_seam_leaves_the_prompt_alone_and_is_counted"),
    Guard("24", "lorafocal.data.templates:cut_after_turn", lambda _: lambda text, renderer: text.rstrip(), "tests/data/test_templates.py::test_what_follows_the_end_of_the_turn_is_not_part_of_it"),
    Guard("26", "lorafocal.data.templates:added_text", lambda _: lambda chat, answer, asked, full, renderer: full[len(asked) :], "tests/data/test_templates.py::test_a_prompt_that_is_not_kept_is_refused_with_the_option_that_keeps_it"),
    Guard("23", "lorafocal.data.packing:scored", lambda _: lambda items, turns: list(items), "tests/test_turns.py::test_every_layout_scores_the_turns_and_nothing_else"),
    Guard("26", "lorafocal.data.dialogues:extends", lambda _: lambda asked, written: True, "tests/data/test_dialogues.py::test_a_template_that_rewrites_earlier_turns_drops_the_pair_by_name"),
    Guard("28", "lorafocal.data.truncation:cut", lambda _: lambda ids, turns, length: (ids[:length], turns and turns[:length]), "tests/data/test_dialogues.py::test_a_cut_ends_in_a_turn"),
    Guard("33", "lorafocal.data.tokens:contents", lambda _: lambda side: [] if isinstance(side, str) else [side[0]["content"]], "tests/data/test_dialogues.py::test_no_message_of_a_completion_forges_a_turn"),
    Guard("25 28", "lorafocal.data.era:share_prompt", lambda _: lambda *a: True, "tests/era/test_golden_ids.py::test_ids_are_those_of_trl_0_11_4"),
    Guard("26", "lorafocal.data.era:answer_apart", lambda _: lambda prompt, alone, *a: str(alone), "tests/data/test_era.py::test_a_template_that_writes_an_answer_alone_in_another_way_is_refused"),
    Guard("28 30", "lorafocal.data.tokens:ids_fault", lambda _: lambda pair: None, "tests/data/test_truncation.py::test_answers_that_a_cut_makes_equal_are_dropped_and_said_so"),
    Guard("29", "lorafocal.data.templates:left_out", lambda _: lambda *a: None, "tests/data/test_templates.py::test_a_message_that_a_template_leaves_out_drops_the_pair"),
    Guard("31", "lorafocal.data.cache:cache_key", lambda _: careless.key_of_the_rows, "tests/data/test_cache.py::test_one_change_misses"),
    Guard("31", "lorafocal.data.steps.quantities:stamp_of", lambda _: lambda pair: "", "tests/data/steps/test_quantities.py::test_other_texts_under_the_same_id_are_noticed"),
    Guard("55", "lorafocal.data.steps.chunk:draw", lambda _: lambda seed, name: random.randbytes(8), "tests/data/steps/test_chunk.py::test_each_pair_is_in_one_chunk_and_sizes_differ_by_one"),
    Guard("55", "lorafocal.stages:_check_same_pairs", lambda _: lambda folder, manifest: (), "tests/test_stages.py::test_other_pairs_than_those_of_the_first_stage_are_refused"),
    Guard("31", "lorafocal.data.leave_out:digest", lambda _: lambda pair: "", "tests/data/test_leave_out.py::test_a_list_by_rows_is_refused_once_a_row_above_has_gone"),
    Guard("31", "lorafocal.data.cache:is_whole", lambda _: lambda *a: True, "tests/data/test_cache.py::test_a_damaged_entry_is_passed_over_and_written_again"),
    Guard("32", "lorafocal.data.template_options:check_options", lambda _: lambda *a: None, "tests/data/test_templates.py::test_an_option_that_the_template_does_not_read_is_refused_with_the_nearest"),
    Guard("32", "lorafocal.data.truncation:check_limits", lambda _: lambda *a: None, "tests/data/test_truncation.py::test_a_length_that_a_rule_would_not_look_at_is_refused"),
    Guard("33", "lorafocal.data.tokens:text_fault", lambda _: lambda *a: None, "tests/data/test_tokens.py::test_text_that_spells_control_tokens_is_dropped"),
    Guard("33", "lorafocal.data.encoding:Encoder.forges", lambda _: lambda *a: False, "tests/data/test_tokens.py::test_a_control_token_that_a_normalizer_reads_into_text_is_found"),
    # merging
    Guard("41", "lorafocal.release.rounding:rounded_change", careless_release.merged_into_four_bits, "tests/release/test_quantized.py::test_the_merged_weights_are_those_of_training_plus_the_change"),
    Guard("42", "lorafocal.model.saved:_multiply_as_trained", lambda _: lambda *a: None, "tests/release/test_merge.py::test_the_gate_holds_a_merge_against_the_weights_that_training_multiplied_by"),
    Guard("42", "lorafocal.release.onto:least_drift", lambda _: lambda tried: tried[0], "tests/release/test_onto.py::test_where_the_original_ends_nearer_it_is_taken_and_the_other_choice_fails"),
    Guard("42", "lorafocal.release.onto:bases_to_try", lambda _: lambda *a: ("original",), "tests/release/test_onto.py::test_an_adapter_that_corrects_its_base_s_rounding_is_not_merged_onto_the_original"),
    Guard("42", "lorafocal.release.skeleton:Skeleton._quantized_and_back", lambda _: lambda self, name, weight: weight.float(), "tests/release/test_quantized.py::test_the_merged_weights_are_those_of_training_plus_the_change"),
    Guard("9 S13", "lorafocal.model.continued:check_same_quantization", lambda _: lambda *a: None, "tests/model/test_continued.py::test_a_base_in_another_precision_is_refused_in_both_words"),
    Guard("9 22", "lorafocal.model.saved:_quantization", lambda _: lambda *a: None, "tests/evaluate/test_score.py::test_the_last_evaluation_of_a_run_is_the_score_of_its_adapter"),
    Guard("5", "lorafocal.model.saved:check_same_base", lambda _: lambda *a, **k: None, "tests/release/test_chain.py::test_sft_merged_then_preferences_merged"),
    Guard("43", "lorafocal.release.gate:check", lambda _: lambda report: None, "tests/release/test_merge.py::test_the_gate_stops_a_merge_that_lost_the_change"),
    Guard("45", "lorafocal.model.saved:_check_places", lambda _: lambda *a: None, "tests/release/test_merge.py::test_what_would_change_more_than_it_trained_is_refused_by_name"),
    Guard("53", "lorafocal.evaluate.suspects:exchange_adapter", lambda _: lambda *a: None, "tests/evaluate/test_suspects.py::test_margins_are_those_of_score_at_every_state"),
    Guard("53", "lorafocal.model.saved:_check_tensors", lambda _: lambda *a: None, "tests/release/test_merge.py::test_an_adapter_that_does_not_fit_is_refused_by_tensor"),
    Guard("45", "lorafocal.release.weights:check_places", lambda _: lambda *a: None, "tests/release/test_weights.py::test_a_change_of_one_of_two_tied_tensors_is_refused"),
    Guard("43", "lorafocal.release.rounding:rounded", lambda _: lambda name, weight, dtype: weight.to(dtype), "tests/release/test_weights.py::test_float16_is_exact_where_it_fits_and_refused_by_tensor_where_it_does_not"),
    Guard("43", "lorafocal.release.survival:measure_survival", careless_release.survival_of_the_norm, "tests/release/test_survival.py::test_survival_is_the_true_one"),
    Guard("53", "lorafocal.release.deltas:_low_rank", careless_release.halves_of_a_change, "tests/release/test_deltas.py::test_what_is_no_change_of_a_weight_is_refused_by_name"),
    Guard("6", "lorafocal.model.dora:row_norms", lambda _: lambda weight, *a: weight.norm(dim=1), "tests/release/test_deltas.py::test_changes_are_peft_s_own_merge"),
    # starts from weights
    Guard("6", "lorafocal.model.starts:plain_adapter", lambda _: careless.adapter_as_it_is, "tests/model/test_starts.py::test_what_is_saved_is_the_trained_policy_on_the_original_base"),
    Guard("6", "lorafocal.model.adapters:add_frozen_copy", careless.copy_that_starts_again, "tests/test_starts_in_training.py::test_a_trained_adapter_loads_with_plain_peft_on_the_original_base"),
    Guard("6", "lorafocal.compatibility:check", lambda _: lambda cell: None, "tests/test_starts_in_training.py::test_the_switched_off_adapter_is_refused_where_it_is_not_the_start"),
    Guard("S14", "lorafocal.release.push:published_files", careless_release.whatever_lies_there, "tests/release/test_push.py::test_a_folder_that_holds_a_stranger_is_refused_by_its_name_before_the_hub_is_asked"),
    Guard("S14", "lorafocal.release.push:_check_visibility", lambda _: lambda *a, **k: None, "tests/release/test_push.py::test_nobody_else_reads_it_unless_that_was_said"),
    Guard("6", "lorafocal.chat.streams:TokenStream._next_logits", careless_release.one_cache_for_all_streams, "tests/chat/test_streams.py::test_both_streams_are_the_answers_of_generate"),
    Guard("6", "lorafocal.chat.streams:in_turn", lambda _: careless_release.switched_for_the_prompt_only, "tests/chat/test_streams.py::test_both_streams_are_the_answers_of_generate"),
    # the compatibility table
    Guard("6", "lorafocal.assembly:cell_of", lambda _: careless.the_usual_cell, "tests/test_compatibility.py::test_the_trainer_refuses_in_the_tables_words"),
    Guard("6 48", "lorafocal.schema:Config._misfits", lambda _: lambda self: (), "tests/test_compatibility.py::test_configs_are_refused_in_the_tables_words"),
    Guard("40 48 49", "lorafocal.launch:engine", lambda _: lambda: "one-process", "tests/test_compatibility.py::test_engines_are_refused_at_launch"),
    # attention kernels, compiled layers
    Guard("59", "lorafocal.ops.attention_kernels:BROKEN", lambda _: (), "tests/ops/test_attention_kernels.py::test_a_broken_wheel_falls_back_with_one_line"),
    Guard("59", "lorafocal.ops.attention_kernels:check_bottom_right", lambda _: lambda *a, **k: "", "tests/ops/test_attention_kernels.py::test_a_top_left_kernel_is_passed_over_by_name"),
    Guard("F16", "lorafocal.model.compiled:roles", lambda _: lambda segments: segments, "tests/model/test_compiled.py::test_packs_of_any_composition_make_one_graph_a_bucket_and_no_breaks"),
    Guard("F16", "lorafocal.model.compiled:_check_traced", lambda _: lambda model: None, "tests/model/test_compiled.py::test_fused_functions_that_a_compiler_gets_wrong_are_refused_and_other_models_are_not_tried"),
    # what a report says of a run
    Guard("17", "lorafocal.report.words:displacement", lambda _: lambda record: None, "tests/report/test_words.py::test_chosen_answers_that_fall_more_than_a_nat_get_a_line"),
    Guard("18", "lorafocal.report.numbers:loss_gaps", lambda _: lambda lines: [(line, line["eval_loss"] - seen[-1] if (seen := [one["loss"] for one in lines[:n] if "loss" in one]) else None) for n, line in enumerate(lines) if "eval_loss" in line], "tests/report/test_numbers.py::test_the_gap_takes_the_training_loss_since_the_evaluation_before_as_a_run_says_it"),
    # quantised bases
    Guard("9", "lorafocal.model.quantized:check_loaded", lambda _: lambda model, **k: None, "tests/model/test_quantized.py::test_a_base_that_would_stay_mostly_in_float_is_refused_by_name"),
    Guard("9", "lorafocal.model.quantized:settle", lambda _: lambda model: None, "tests/model/test_quantized.py::test_gradients_after_an_evaluation_are_those_before_bit_for_bit"),
    Guard("9 20", "lorafocal.model.quantized:_settle_eight_bit", lambda _: lambda *a: None, "tests/model/test_quantized.py::test_a_user_cannot_switch_them_on"),
    Guard("44", "lorafocal.model.continued:continue_adapter", lambda _: careless.merged_into_the_base, "tests/test_quantized_training.py::test_two_stages_share_one_quantised_base_that_never_moves"),
    Guard("50", "lorafocal.model.load:local_device", lambda _: lambda: __import__("torch").device("cuda", 0), "tests/model/test_load_quantized.py::test_each_process_loads_onto_its_own_device"),
    Guard("55", "lorafocal.saving:TrainedAdapter.check_same", lambda _: lambda *a: None, "tests/test_saving.py::test_a_checkpoint_whose_tensors_would_mean_something_else_is_refused"),
    Guard("5 S13", "lorafocal.model.stored:check_as_stored", lambda _: lambda model: None, "tests/model/test_stored.py::test_a_base_with_an_adapter_merged_into_it_is_not_taken_for_the_one_it_was"),
    Guard("9 22", "lorafocal.model.saved:_dtype", lambda _: lambda run, lineage: None, "tests/model/test_continued.py::test_a_base_is_opened_in_the_dtype_of_training_whatever_it_is_stored_in"),
    Guard("60", "lorafocal.model.quantized:to_dtype", lambda _: lambda *a: None, "tests/model/test_load_quantized.py::test_a_base_stored_for_half_precision_computes_in_the_dtype_that_was_asked_for"),
    Guard("62", "lorafocal.model.quantized:library", lambda _: lambda device=None: importlib.import_module("bitsandbytes"), "tests/model/test_load_quantized.py::test_without_bitsandbytes_float_bases_load_and_quantised_ones_say_what_to_install"),
    # reference store
    Guard("35", "lorafocal.store:ReferenceStore._of_pairs", lambda _: careless.missing_is_zero, "tests/test_store.py::test_a_missing_entry_is_an_error_that_names_the_pair_and_never_a_number"),
    Guard("35", "lorafocal.store:_parts", lambda _: careless.parts_as_they_are, "tests/test_store.py::test_an_altered_part_is_refused_by_name"),
    Guard("35", "lorafocal.store:Context.sha256", lambda _: property(careless.named_by_configuration), "tests/test_store.py::test_a_store_of_another_context_is_refused_and_the_field_named"),
    Guard("35", "lorafocal.store:ReferenceStore.write", lambda _: careless.whatever_was_computed, "tests/test_caching.py::test_a_damaged_model_stores_nothing"),
    Guard("35", "lorafocal.caching:_tensor_sha256", careless.shapes_of_the_weights, "tests/test_caching.py::test_every_tensor_of_the_base_counts"),
    Guard("35", "lorafocal.caching:_have_tokens", lambda _: lambda pairs: False, "tests/objectives/test_tokens_in_training.py::test_tokens_that_are_not_the_references_stop_the_run_though_their_sums_are[swapped]"),
    Guard("35", "lorafocal.store:sequence_key", lambda _: careless_tokens.key_of_the_ids_alone, "tests/test_store.py::test_which_tokens_are_scored_is_part_of_the_key"),
    Guard("55", "lorafocal.objectives.sampo:weights", lambda _: careless_tokens.drawn_anew, "tests/objectives/test_token_weights.py::test_sampo_draws_as_many_tokens_as_the_shorter_answer_has_by_the_pairs_number_alone"),
    Guard("11", "lorafocal.objectives.dmpo:weights", lambda _: careless_tokens.discounts_as_printed, "tests/objectives/test_token_weights.py::test_dmpos_weights_fall_from_turn_to_turn_and_have_a_limit_at_discount_1"),
    Guard("35", "lorafocal.caching:spot_check", lambda _: careless.no_spot_check, "tests/test_cached_training.py::test_one_perturbed_value_stops_the_run"),
    Guard("34", "lorafocal.reference:build_reference", lambda _: careless.live_although_stored, "tests/test_cached_training.py::test_training_and_evaluation_run_no_reference_forward"),
    # a base through unsloth
    Guard("S11", "lorafocal.model.backends.unsloth:_private_folder", lambda _: lambda: "unsloth_compiled_cache", "tests/model/backends/test_unsloth.py::test_code_planted_in_the_working_directory_is_not_imported"),
    Guard("61", "lorafocal.model.backends.unsloth:left_as_found", lambda _: careless.changed_for_good, "tests/model/backends/test_unsloth.py::test_packs_are_passed_over_and_padded_rows_give_the_same_log_probs_in_fp32"),
    Guard("61", "lorafocal.model.backends.unsloth:check_rotations", lambda _: lambda *a: None, "tests/model/backends/test_unsloth.py::test_rotations_that_were_left_uninitialised_are_refused"),
    # several adapters, bases and names from strangers
    Guard("5", "lorafocal.release.combine:concatenated", careless_release.weights_on_both_factors, "tests/release/test_combine.py::test_a_negative_weight_subtracts"),
    Guard("6", "lorafocal.release.combine:LOW_RANK", lambda known: known | {"dora", "modules_to_save", "trainable_tokens"}, "tests/release/test_combine.py::test_what_is_no_sum_of_b_times_a_is_refused_by_name"),
    Guard("S13 9", "lorafocal.release.combine:_check_same_base", lambda _: lambda *a: None, "tests/release/test_combine.py::test_adapters_of_another_base_dtype_or_quantisation_are_refused_by_name"),
    Guard("41", "lorafocal.release.requantize:_measured", lambda _: lambda model, merge, form: merge.gate, "tests/release/test_requantize.py::test_the_cost_is_measured_on_the_files_as_a_stranger_loads_them"),
    Guard("51", "lorafocal.card:_public", lambda _: lambda value: True, "tests/test_card.py::test_data_and_recipe_come_from_the_manifest_without_places"),
    Guard("S13", "lorafocal.model.saved:check_same_base", lambda _: lambda *a, **k: None, "tests/release/test_merge.py::test_one_flipped_byte_in_the_base_is_refused"),
    Guard("S13", "lorafocal.release.merge:_check_downloaded", lambda _: lambda *a: None, "tests/release/test_merge.py::test_one_flipped_byte_in_a_hub_s_cache_is_refused"),
    Guard("S13", "lorafocal.model.saved:_check_same_config", lambda _: lambda *a: None, "tests/release/test_merge.py::test_a_base_that_computes_otherwise_by_its_config_is_refused"),
    Guard("S13", "lorafocal.release.merge:check_measured", lambda _: lambda *a: None, "tests/release/test_measured.py::test_another_adapter_than_was_measured_is_refused"),
    Guard("S13", "lorafocal.release.merge:check_tokenizer", lambda _: lambda *a: None, "tests/release/test_measured.py::test_another_vocabulary_or_template_is_refused_by_name"),
    Guard("S9 S2", "lorafocal.model.load:weight_names", lambda _: careless.index_at_its_word, "tests/model/test_load.py::test_an_index_that_leads_elsewhere_is_refused_before_anything_is_read"),
    Guard("S2", "lorafocal.model.load:weight_names", lambda _: careless.index_at_its_word, "tests/model/test_load.py::test_pickled_weights_are_refused_with_the_way_to_convert_them"),
    Guard("52", "lorafocal.model.load:_check_no_adapter", lambda _: lambda *a: None, "tests/model/test_load.py::test_a_base_with_an_adapter_in_its_folder_is_refused"),
    Guard("S9", "lorafocal.publish:check_name", lambda _: lambda name: name, "tests/test_publish.py::test_evil_names_are_refused"),
    Guard("S9", "lorafocal.publish:_refuse_link", lambda _: lambda path: None, "tests/test_publish.py::test_links_are_never_written_through"),
    # recipes and provenance
    Guard("58", "lorafocal.provenance:check_same_inputs", lambda _: lambda *a: [], "tests/test_provenance.py::test_another_row_is_refused_by_name_before_anything_is_written"),
    Guard("58", "lorafocal.recipes:differences", lambda _: lambda *a, **k: [], "tests/test_recipes.py::test_what_is_done_otherwise_is_listed_with_where_the_recipes_value_is_from"),
    # judging and comparing
    Guard("58", "lorafocal.evaluate.compare:_by_prompt", lambda _: lambda result, kind: {(place,): item for place, item in enumerate(result.items)}, "tests/evaluate/test_compare.py::test_right_and_wrong_are_compared_prompt_by_prompt"),
    Guard("58", "lorafocal.evaluate.by_rule:_against_targets", lambda _: lambda rule, asked, texts, targets, source: list(map(rule.holds, texts, targets.values())), "tests/evaluate/test_by_rule.py::test_answers_are_matched_with_their_targets_by_prompt"),
    Guard("58", "lorafocal.evaluate.calibration:_bin_index", lambda _: lambda confidence, bins: confidence.argsort().argsort() * bins // len(confidence), "tests/evaluate/test_calibration.py::test_bins_hold_about_equally_many_and_never_part_equal_margins"),

    # answers
    Guard("58", "lorafocal.generation.batches:_as_generator", lambda _: careless_generation.with_the_models_own_wishes, "tests/generation/test_batches.py::test_only_the_sampling_decides_and_everything_is_left_as_it_was"),
    Guard("27", "lorafocal.generation.batches:pad_left", careless_generation.padding_that_is_read, "tests/generation/test_batches.py::test_greedy_answers_are_those_of_one_prompt_at_a_time"),
    Guard("57", "lorafocal.generation.batches:uniform", careless_generation.one_stream_for_all_rows, "tests/generation/test_batches.py::test_a_drawn_answer_depends_on_seed_and_place_and_on_no_batch"),
    Guard("27", "lorafocal.generation.speech:Speech.ends", lambda _: careless_generation.ended_by_the_eos_alone, "tests/chat/test_partner.py::test_an_answer_ends_with_the_models_ids_the_eos_and_the_templates_end_of_turn"),
    Guard("58", "lorafocal.generation.journal:Journal._read", lambda _: careless_generation.a_journal_of_anything, "tests/generation/test_generate.py::test_other_settings_are_refused_by_name_and_leave_what_there_is"),
    Guard("58", "lorafocal.generation.formats:_read_provenance", lambda _: careless_generation.whatever_lies_beside, "tests/generation/test_formats.py::test_a_provenance_is_of_these_very_answers"),
    # asking servers
    Guard("58", "lorafocal.endpoints.endpoint:Endpoint.key", lambda _: careless_asking.texts_alone, "tests/endpoints/test_asking.py::test_another_model_or_another_option_is_another_question"),
    Guard("58", "lorafocal.endpoints.reply:parse_body", careless_asking.whatever_there_is, "tests/endpoints/test_asking.py::test_a_fault_that_passes_changes_nothing"),
    Guard("S8", "lorafocal.endpoints.endpoint:Endpoint.credential", lambda _: careless_asking.the_usual_key, "tests/endpoints/test_secrets.py::test_the_key_for_openai_goes_to_no_other_server"),
    Guard("S8", "lorafocal.endpoints.client:quiet_libraries", lambda _: careless_asking.talkative_libraries, "tests/endpoints/test_secrets.py::test_a_client_that_logs_its_requests_is_not_heard"),
    Guard("S8", "lorafocal.endpoints.refusals:quotable", lambda _: careless_asking.in_the_servers_words, "tests/endpoints/test_secrets.py::test_neither_key_nor_prompt_is_in_any_file_log_or_message"),
    Guard("58", "lorafocal.evaluate.alpaca_judging:_known", lambda known: lambda preference: known(preference) or 1.5, "tests/evaluate/test_alpaca.py::test_a_verdict_that_cannot_be_read_is_counted_and_not_guessed"),
    Guard("58", "lorafocal.evaluate.alpaca_judging:signature", lambda _: lambda annotator, judge: annotator, "tests/evaluate/test_alpaca.py::test_annotations_give_the_same_numbers_alone"),
    Guard("58", "lorafocal.evaluate.alpaca_judging:_check_marks", lambda _: lambda pairs: None, "tests/evaluate/test_alpaca.py::test_answers_that_cannot_be_compared_are_refused_before_anything_is_sent"),
    Guard("58", "lorafocal.evaluate.alpaca_rows:place_rows", lambda _: lambda rows, order, file: dict(enumerate(map(dict, rows))), "tests/evaluate/test_alpaca_rates.py::test_the_order_of_the_rows_does_not_matter_where_a_reference_tells_the_positions"),
    # verdicts of a judge
    Guard("58", "lorafocal.evaluate.arena_verdicts:label_in", lambda _: careless_judging.last_label, "tests/evaluate/test_arena.py::test_one_label_is_a_verdict_two_are_none_and_no_label_is_asked_for"),
    Guard("58", "lorafocal.evaluate.arena_verdicts:Verdicts.battles", lambda _: property(careless_judging.missing_is_a_tie), "tests/evaluate/test_arena.py::test_known_verdicts_have_the_known_win_rate"),
    Guard("58", "lorafocal.evaluate.arena_verdicts:Verdicts.wins", lambda _: property(careless_judging.always_second), "tests/evaluate/test_arena.py::test_known_verdicts_have_the_known_win_rate"),
    # beside the paper, and side by side
    Guard("58", "lorafocal.report.paper:reasons", lambda _: lambda *a: (), "tests/report/test_paper.py::test_a_number_of_another_judge_never_stands_there_unmarked"),
    Guard("58", "lorafocal.report.paper:_own_mean", lambda mean: lambda cells: mean([cell for cell in cells if cell.score]), "tests/report/test_paper.py::test_an_average_is_of_all_six_or_is_not"),
    Guard("58", "lorafocal.report.paper:_fits", lambda _: lambda result, held: result.benchmark not in held, "tests/report/test_paper.py::test_a_row_is_one_model_judged_once"),
    Guard("58", "lorafocal.report.answers:_verdicts", lambda _: careless_judging.in_their_order, "tests/report/test_answers.py::test_a_verdict_is_what_the_item_says_and_none_where_it_says_none"),
    Guard("S2", "lorafocal.report.explain_page:_span", lambda _: lambda place, token, full: f"<span>{token.text}</span>", "tests/report/test_explain.py::test_the_page_holds_nothing_of_the_data_but_text"),
    Guard("S2", "lorafocal.report.explain_text:printable", lambda _: lambda text: text, "tests/report/test_explain.py::test_nothing_in_the_data_reaches_the_terminal_as_a_command"),
    Guard("S2", "lorafocal.report.answers_page:escape", lambda _: lambda text: text, "tests/report/test_answers.py::test_texts_are_texts_and_no_script_but_the_pages_own_can_run"),
    Guard("58", "lorafocal.evaluate.reward_model:_padding", lambda _: careless_judging.padding_of_the_tokenizer, "tests/evaluate/test_reward.py::test_an_end_of_turn_is_not_taken_for_padding"),
    Guard("58", "lorafocal.evaluate.harness:_whole_answers", lambda _: careless_judging.lengths_of_the_model, "tests/evaluate/test_leaderboard.py::test_answers_are_as_long_as_the_task_says_whatever_the_model_s_own_config_says"),
    Guard("58", "lorafocal.evaluate.fingerprint:check_same_tokens", lambda _: lambda *a: None, "tests/evaluate/test_fingerprint.py::test_tokens_of_another_tokenizer_are_refused"),
    Guard("1", "lorafocal.model.moving:averaged", lambda _: careless_references.factors_averaged_apart, "tests/model/test_moving.py::test_the_reference_is_the_recursion_in_delta_w"),
    Guard("55 1", "lorafocal.saving:restore_reference", lambda _: lambda *a: None, "tests/test_adapter_references.py::test_stopped_and_resumed_a_moving_reference_is_where_it_was"),
    Guard("S13", "lorafocal.model.beside:check_made_for", lambda _: lambda *a: None, "tests/model/test_beside.py::test_an_adapter_that_does_not_fit_is_refused_by_name"),
]
# fmt: on


def switch_off(name: str) -> None:
    """Replace the guard's target, also under the names other modules of the package have imported it by."""
    [guard] = [guard for guard in GUARDS if guard.name == name]
    module_name, _, path = guard.target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, attribute)
    replacement = guard.replacement(original)
    setattr(owner, attribute, replacement)
    if callable(original):  # constants such as True are shared by identity with everything else
        for loaded, module in list(sys.modules.items()):
            if loaded.partition(".")[0] == "lorafocal":
                for key in [key for key, value in vars(module).items() if value is original]:
                    setattr(module, key, replacement)


def switch_off_here_and_in_children(name: str) -> None:
    """`switch_off`, here and in every Python process started from here (guard_site/sitecustomize.py)."""
    tests = Path(__file__).resolve().parent
    search_path = [str(tests / "guard_site"), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
    os.environ[ENVIRONMENT_KEY] = name
    switch_off(name)
