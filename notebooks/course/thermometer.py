"""The smallest app of notebook 11, as the course would write it."""

PYPROJECT = """
[project]
name = "thermometer"
version = "1.0.0"
description = "How many nodes are warm?"
license = "Apache-2.0"
dependencies = ["flwr[simulation]>=1.42"]

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
warm-above = 23.5
min-nodes = 10
"""

SERVER_APP = """
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < context.run_config["min-nodes"]:
        time.sleep(0.1)
    question = ConfigRecord({"warm-above": context.run_config["warm-above"]})
    messages = [Message(RecordDict({"question": question}), n, "query", ttl=30) for n in nodes]
    replies = grid.send_and_receive(messages, timeout=30)
    answers = [r.content["answer"]["warm"] for r in replies if not r.has_error()]
    print(f"{sum(answers)} of {len(answers)} nodes are warm")
"""

CLIENT_APP = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message, context):
    temperature = 20 + context.node_config["partition-id"]
    warm = temperature > message.content["question"]["warm-above"]
    return Message(RecordDict({"answer": ConfigRecord({"warm": warm})}), reply_to=message)
"""


def thermometer() -> dict[str, str]:
    """Return the app's files, by name."""
    return {"pyproject.toml": PYPROJECT, "server_app.py": SERVER_APP, "client_app.py": CLIENT_APP}
