"""Notebook 02: the model and its local training."""

from course.verdict import Answer, check, expect


@check
def convolution_parameters(answer: Answer) -> None:
    """Parameters of a convolution with a square kernel and biases."""
    hint = "What does one output channel look at, and what does it add at the end?"
    expect("conv1: 1 channel to 16, kernel 5", answer(1, 16, 5), 416, hint)
    expect("3 channels to 8, kernel 3", answer(3, 8, 3), 224, hint)


@check
def gradient_steps(answer: Answer) -> None:
    """How many steps of SGD a client takes in a round."""
    expect("64 images, batches of 32, 1 epoch", answer(64, 32, 1), 2)
    expect("70 images, batches of 32, 1 epoch", answer(70, 32, 1), 3, "And what is left over?")
    hint = "Does a batch reach into the next epoch?"
    expect("70 images, batches of 32, 2 epochs", answer(70, 32, 2), 6, hint)


@check
def mean_of_batches(answer: Answer) -> None:
    """The mean loss of all examples, from sums and counts."""
    hint = "How much does each example count?"
    expect("batches (6.0, 3) and (4.0, 1)", answer([(6.0, 3), (4.0, 1)]), 2.5, hint)
    expect("one batch (3.0, 2)", answer([(3.0, 2)]), 1.5, hint)
