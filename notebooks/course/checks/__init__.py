"""Instant answers for the exercises of the course: one module a notebook.

A check prints one line: ✅ right, ⏳ nothing was filled in yet, or ❌ with the question that was
put to the answer, what was expected, what came and by how much it is off. The check of a
notebook's main exercise takes what to use in place of a wrong answer, and returns one of the two:
``train_round = checks.train_round(my_round, otherwise=ours.train_round)``.
"""

from course.checks.aggregation import aggregate, clip_update, server_step
from course.checks.app import command_line, own_app, results_folder
from course.checks.client import handle_train, node_generator, remember_lowest
from course.checks.contest import contest_main
from course.checks.data import answered_in_time, effective_classes, images_needed, megabytes, shards
from course.checks.deployment import good_for_host, long_enough, three_nodes
from course.checks.loop import cosine_rate, flattering_nodes, momentum_step, six_steps
from course.checks.masks import pair_masks, take_masks_off
from course.checks.messages import label_histogram, message_to_train, record_bytes, reply_to_train
from course.checks.no_more_rounds import async_loop
from course.checks.one_more_record import scaffold_round
from course.checks.one_round import ideal_round, train_round
from course.checks.query import query_stage, volunteers, yes_rate
from course.checks.send_less import cheapest_bytes, compress
from course.checks.tracking import paired_difference, price_of_a_target
from course.checks.training import convolution_parameters, local_training, mean_of_batches
from course.checks.what_one_reply_says import private_mean
from course.verdict import show_messages

__all__ = [
    "aggregate",
    "answered_in_time",
    "async_loop",
    "cheapest_bytes",
    "clip_update",
    "command_line",
    "compress",
    "contest_main",
    "convolution_parameters",
    "cosine_rate",
    "effective_classes",
    "flattering_nodes",
    "good_for_host",
    "handle_train",
    "ideal_round",
    "images_needed",
    "label_histogram",
    "local_training",
    "long_enough",
    "mean_of_batches",
    "megabytes",
    "message_to_train",
    "momentum_step",
    "node_generator",
    "own_app",
    "pair_masks",
    "paired_difference",
    "price_of_a_target",
    "private_mean",
    "query_stage",
    "record_bytes",
    "remember_lowest",
    "reply_to_train",
    "results_folder",
    "scaffold_round",
    "server_step",
    "shards",
    "show_messages",
    "six_steps",
    "take_masks_off",
    "three_nodes",
    "train_round",
    "volunteers",
    "yes_rate",
]
