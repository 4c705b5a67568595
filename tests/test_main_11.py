"""The app of notebook 11: right ones that look otherwise, and wrong ones that hear why."""

import textwrap

import pytest

from course import checks
from course.thermometer import thermometer

PYPROJECT, SERVER, CLIENT = "pyproject.toml", "server_app.py", "client_app.py"

ONE_MODULE = """
from time import sleep
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server, client = ServerApp(), ClientApp()

@server.main()
def poll(grid, context):
    nodes = []
    while len(nodes) < int(context.run_config["min-nodes"]):
        sleep(1)
        nodes = [*grid.get_node_ids()]
    waiting, yes, no = set(), 0, 0
    for node_id in nodes:
        message = Message(RecordDict(), dst_node_id=node_id, message_type="query.warm", ttl=30)
        waiting |= set(grid.push_messages([message]))
    for _ in range(300):
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            if reply.has_content():
                warm = reply.content["warm"]["yes"]
                yes, no = yes + warm, no + 1 - warm
        if not waiting:
            break
        sleep(0.1)
    print("Result:", yes, "of", yes + no, "nodes are warm")

@client.query("warm")
def answer(message, context):
    warm = context.run_config["warm-above"] < context.node_config["partition-id"] + 20.0
    return Message(RecordDict({"warm": MetricRecord({"yes": int(warm)})}), reply_to=message)
"""


def changed(file: str, old: str, new: str) -> dict[str, str]:
    files = thermometer()
    assert old in files[file]
    return files | {file: files[file].replace(old, new)}


def verdict(files: object, capsys: pytest.CaptureFixture[str]) -> str:
    checks.own_app(lambda: files)
    return capsys.readouterr().out.splitlines()[0]


def in_one_module() -> dict[str, str]:
    text = thermometer()[PYPROJECT].replace("server_app:app", "warm.apps:server")
    text = text.replace("client_app:app", "warm.apps:client")
    return {PYPROJECT: text, "warm/__init__.py": "", "warm/apps.py": ONE_MODULE}


def with_a_third_module() -> dict[str, str]:
    files = changed(CLIENT, "20 + ", "START + ")
    text = files[CLIENT].replace("from flwr.app", "from common import START\nfrom flwr.app")
    return files | {CLIENT: text, "common.py": "START = 20\n"}


def as_train() -> dict[str, str]:
    files = changed(CLIENT, "@app.query()", "@app.train()")
    return files | {SERVER: files[SERVER].replace('"query"', '"train"')}


@pytest.mark.parametrize(
    "files",
    [
        in_one_module(),
        with_a_third_module(),
        as_train(),
        {name: textwrap.dedent(text) for name, text in reversed(thermometer().items())},
        changed(SERVER, ", timeout=30", ""),
        changed(CLIENT, "    temperature =", '    print("asked")\n    temperature ='),
        changed(PYPROJECT, 'publisher = "me"', 'publisher = "somebody-else"'),
    ],
)
def test_a_right_app_may_look_otherwise(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(files, capsys).endswith("right.")


@pytest.mark.parametrize(
    "file, old, new, words",
    [
        (PYPROJECT, "server_app:app", "server_app.py:app", "without .py?"),
        (PYPROJECT, "server_app:app", "fedlib.server_app:app", "expected 'there'"),
        (PYPROJECT, "server_app:app", "server_app:server", "What is called server"),
        (PYPROJECT, '"server_app:app"', '"client_app:app"', "got 'ClientApp'"),
        (PYPROJECT, '"server_app:app"', '"server_app"', "got 'no colon'"),
        (PYPROJECT, '"server_app:app"', "server_app:app", "Are its texts quoted?"),
        (PYPROJECT, "warm-above", "warm_above", "which an underscore?"),
        (PYPROJECT, "warm-above = 23.5", "warm-above = 25.0", "Which defaults?"),
        (PYPROJECT, "flwr[simulation]>=1.42", "numpy", "server_app.py needs flwr"),
        (PYPROJECT, "tool.flwr.app.config", "tool.flwr.config", "the table's name right?"),
        (PYPROJECT, 'publisher = "me"', 'publisher = ""', "the keys in [tool.flwr.app]"),
        (SERVER, "import time", "import time, numpy", "needs numpy"),
        (SERVER, "import time", "import times", "needs times"),
        (SERVER, "def main", "    def main", "Where do its lines begin?"),
        (SERVER, "@app.main()", "", "What does Flower call?"),
        (SERVER, '["warm-above"]', '["warm_above"]', "KeyError: 'warm_above'"),
        (SERVER, 'context.run_config["min-nodes"]', "10", "What ends its waiting?"),
        (SERVER, "grid.get_node_ids()", "[]", "What ends its waiting?"),
        (SERVER, ", timeout=30", ", timeout=50", "How long may send_and_receive wait?"),
        (SERVER, ", ttl=30", "", "Which second clock"),
        (SERVER, ", timeout=30", ", timeout=0.5", "How long may it wait"),
        (SERVER, ", ttl=30", ", ttl=0.5", "how long is a message valid?"),
        (
            SERVER,
            "in nodes]",
            'in nodes[: context.run_config["min-nodes"]]]',
            "how many does it ask?",
        ),
        (SERVER, "time.sleep(0.1)", "pass", "expected 'a rest'"),
        (SERVER, "print(f", 'print("I asked them.")\n    print(f', "how many lines it prints"),
        (
            CLIENT,
            '"warm": warm',
            '"warm": warm, "who": context.node_config["partition-id"]',
            "beside the yes or no?",
        ),
        (SERVER, " if not r.has_error()", "", "a reply with an error have"),
        (SERVER, "{len(answers)}", "{len(messages)}", "counted behind 'of'?"),
        (SERVER, "print(", "return (", "print its line?"),
        (SERVER, "print(", "...\n    print(", "three dots"),
        (CLIENT, "> message", ">= message", "Is it warmer than that?"),
        (CLIENT, 'message.content["question"]["warm-above"]', "23.5", "comes the limit"),
        (CLIENT, '["warm-above"]', '["limit"]', "A node said: KeyError: 'limit'"),
        (CLIENT, "@app.query()", "@app.train()", "A node said: ValueError: No query function"),
        (CLIENT, '"warm": warm', '"warm": warm, "t": temperature', "Who compares?"),
    ],
)
def test_a_wrong_app_hears_why(
    file: str, old: str, new: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = verdict(changed(file, old, new), capsys)
    assert line.startswith("❌") and words in line


def test_what_is_no_app_at_all_hears_so(capsys: pytest.CaptureFixture[str]) -> None:
    for files, words in (
        ([], "expected a dictionary, got list"),
        ({"server_app.py": "x = 1"}, "'pyproject.toml'"),
        (thermometer() | {SERVER: b"x = 1"}, "expected 'str', got 'bytes'"),
    ):
        assert words in verdict(files, capsys)
    assert verdict(dict.fromkeys(thermometer(), "\n...\n"), capsys).startswith("⏳")


def test_nothing_of_the_app_stays_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    """Else a second try would run the first one's modules."""
    import sys

    before = {*sys.modules}, [*sys.path]
    for degrees, word in ((21, "right"), (20, "right")):
        files = changed(CLIENT, "20 + ", f"{degrees} + ")
        right = verdict(files, capsys).endswith(word + ".")
        assert right == (degrees == 20)
    assert not {"server_app", "client_app"} & ({*sys.modules} - before[0])
    assert sys.path == before[1]


COMMAND = (
    "flwr run fedlib --stream"
    " --federation-config 'num-supernodes=20 client-resources-num-cpus=1'"
    " --run-config 'num-server-rounds=3 seed=7'"
)


@pytest.mark.parametrize(
    "old, new",
    [
        ("", ""),
        ("fedlib", "./fedlib/"),
        ("cpus=1", "cpus=1.0"),
        ("--run-config ", "-c "),
        ("--run-config ", "--run-config="),
        ("rounds=3 seed=7", "rounds=3  seed=7 "),
        ("'", '"'),
    ],
)
def test_a_right_command_may_look_otherwise(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checks.command_line(lambda: COMMAND.replace(old, new))
    assert capsys.readouterr().out.endswith("right.\n")


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("rounds=3", "rounds = 3", "a space beside its '='"),
        ("seed=7", "seed= 7", "a space beside its '='"),
        ("rounds=3 ", "rounds=3, ", "between two pairs"),
        ("'num-server-rounds=3 seed=7'", "\"'num-server-rounds=3 seed=7'\"", "Whose are these?"),
        ("'num-server-rounds=3 seed=7'", "\"num-server-rounds=3 seed='7'\"", "Is it a number then"),
        ("'num-server-rounds=3 seed=7'", "num-server-rounds=3 seed=7", "as one word?"),
        ("seed=7'", "seed=7", "Has every quote its partner?"),
        ("num-server-rounds", "num_server_rounds", "with hyphens?"),
        ("seed=7", "seed=7 num-supernodes=20", "for the engine, which for the app?"),
        ("seed=7'", "' --run-config 'seed=7'", "One word, several pairs?"),
        ("--stream", "", "Does it follow the log?"),
        ("fedlib", "../fedlib", "which folder?"),
    ],
)
def test_a_wrong_command_hears_why(
    old: str, new: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checks.command_line(lambda: COMMAND.replace(old, new))
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("❌") and words in line
