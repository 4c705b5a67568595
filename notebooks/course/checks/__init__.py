"""Instant answers for the exercises of the course: one module a notebook.

A check prints one line: ✅ right, ⏳ nothing was filled in yet, or ❌ with the question that was
put to the answer, what was expected, what came and by how much it is off. The check of a
notebook's main exercise takes what to use in place of a wrong answer, and returns one of the two:
``main = checks.one_round(my_main, otherwise=fedlib_main)``.
"""

from course.checks.aggregation import aggregate, clip_update, server_step
from course.checks.app import command_line, results_folder, run_config_text
from course.checks.client import handle_train, node_generator, remember_lowest
from course.checks.data import answered_in_time, effective_classes, images_needed, megabytes, shards
from course.checks.deployment import good_for_host, long_enough, supernode_command
from course.checks.loop import cosine_rate, flattering_nodes, momentum_step
from course.checks.messages import label_histogram, record_bytes
from course.checks.one_round import ideal_round, who_is_missing
from course.checks.query import collect_in_time, volunteers, yes_rate
from course.checks.tracking import paired_difference, price_of_a_target
from course.checks.training import convolution_parameters, gradient_steps, mean_of_batches
from course.verdict import show_messages

__all__ = [
    "aggregate",
    "answered_in_time",
    "clip_update",
    "collect_in_time",
    "command_line",
    "convolution_parameters",
    "cosine_rate",
    "effective_classes",
    "flattering_nodes",
    "good_for_host",
    "gradient_steps",
    "handle_train",
    "ideal_round",
    "images_needed",
    "label_histogram",
    "long_enough",
    "mean_of_batches",
    "megabytes",
    "momentum_step",
    "node_generator",
    "paired_difference",
    "price_of_a_target",
    "record_bytes",
    "remember_lowest",
    "results_folder",
    "run_config_text",
    "server_step",
    "shards",
    "show_messages",
    "supernode_command",
    "volunteers",
    "who_is_missing",
    "yes_rate",
]
