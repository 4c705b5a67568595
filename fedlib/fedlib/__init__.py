"""fedlib: federated learning on Flower's Message API, in a package that one reads in an hour.

Everything public is here: ``from fedlib import CNN``. README.md says in which order to read.
"""

from fedlib.aggregation import FedAvg, server_step
from fedlib.client_app import make_client_app
from fedlib.config import Config
from fedlib.data import Dataset, Partition, Split, find_source, load_partition
from fedlib.data import load_test, open_dataset, partition_indices
from fedlib.errors import ConfigError, DataError, FedlibError, ReplyError
from fedlib.errors import RunDirectoryError, TooLateError
from fedlib.local_grid import LocalGrid, enter_local_run
from fedlib.model import CNN, State, check_state, clone_state, make_model, state_hash
from fedlib.nodes import Nodes
from fedlib.randomness import SERVER, Stream, numpy_generator, torch_generator
from fedlib.run_directory import Round, RunDirectory, Stage, load_results, mean_and_std
from fedlib.schedule import SCHEDULES, learning_rate
from fedlib.server_app import make_server_app, run, run_round
from fedlib.simulation import BACKEND, simulate
from fedlib.training import Evaluation, Weighted, augment, crop_and_flip, evaluate, train
