"""ClientApps that more than one test file needs."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp


class Recording(ClientApp):
    """Passes every message on and keeps the replies, delivered or not."""

    def __init__(self, inner: ClientApp) -> None:
        super().__init__()
        self.inner = inner
        self.replies: list[Message] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.replies.append(self.inner(message, context))
        return self.replies[-1]
