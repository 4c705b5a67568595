"""The two halves of TRAIN, as notebook 03 asks for them: a message, and the reply to it."""

from collections.abc import Callable

from flwr.app import Error, Message

from fedlib.client_app import REFUSED, seconds_left
from fedlib.errors import TooLateError, one_line
from fedlib.messages import TRAIN, TrainReply, TrainRequest, decode, encode
from fedlib.model import State
from fedlib.training import Weighted

Train = Callable[[State, int, str, float], tuple[State, int, Weighted]]
"""From a state, a round, a data set's name and a learning rate: state, examples and loss."""


def train_message(
    state: State,
    server_round: int,
    dataset: str,
    learning_rate: float,
    node_id: int,
    ttl_s: float,
) -> Message:
    """Return the message that asks a node to train."""
    content = encode(TrainRequest(state, server_round, dataset, learning_rate))
    return Message(content, dst_node_id=node_id, message_type=TRAIN, ttl=ttl_s)


def train_reply(message: Message, train: Train) -> Message:
    """Return the reply to a message that asks to train; an error of one line if that fails."""
    try:
        if seconds_left(message) <= 0:
            raise TooLateError("the message had expired when its turn came")
        asked = decode(TrainRequest, message.content)
        state, num_examples, loss = train(
            asked.model, asked.server_round, asked.dataset, asked.learning_rate
        )
        reply = TrainReply(state, num_examples, loss.sum, loss.weight)
        return Message(encode(reply), reply_to=message)
    except Exception as error:
        return Message(Error(REFUSED, one_line(error)), reply_to=message)
