"""The run directory: whole at every moment, and what is refused when a run shall go on."""

import hashlib
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
import torch

import fedlib
from apps import OTHER, make_config, read_rounds
from fedlib import Config, Round, RunDirectory, Stage, load_results, run_directory, state_hash
from fedlib.config import kebab
from fedlib.run_directory import write_atomically

README = Path(__file__).parents[1] / "fedlib" / "README.md"
STATE = {"weight": torch.ones(200, 3), "bias": torch.zeros(3)}


def state_of(server_round: int) -> dict[str, torch.Tensor]:
    return {name: tensor + server_round for name, tensor in STATE.items()}


def save(directory: RunDirectory, server_round: int, accuracy: float | None = 0.5) -> None:
    state = state_of(server_round)
    record = Round(server_round, 0.1, centralized_accuracy=accuracy, model_sha256=state_hash(state))
    record.train = Stage(num_sent=1, num_received=1)
    directory.save_round(record, state, {"velocity": state["bias"]})


def reopen(config: Config, dataset: str = "any", num_partitions: int = 4) -> RunDirectory:
    return RunDirectory.open(config, dataset, num_partitions, STATE)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(Path("any"), tmp_path / "outputs", learning_rate_schedule="cosine")


@pytest.fixture
def stopped(config: Config, tmp_path: Path) -> Config:
    """The config that goes on with a run that stopped after round 2."""
    directory = reopen(config)
    for server_round in (1, 2):
        save(directory, server_round)
    directory.close()
    path = directory.path.rename(tmp_path / "stopped")
    shutil.rmtree(config.output_dir)
    return replace(config, resume_from=str(path))


# --- a new run ---------------------------------------------------------------------------------


def test_a_new_directory_is_named_for_date_and_time_and_never_shared(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Stopped":
            return cls(2030, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run_directory, "datetime", Stopped)
    names = [str(reopen(config).path.relative_to(config.output_dir)) for _ in range(3)]
    assert names == [f"2030-01-02/03-04-05{end}" for end in ("", "-2", "-3")]


def test_an_output_directory_that_leads_nowhere_is_refused_at_once(
    config: Config, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "an unmounted disk")
    with pytest.raises(fedlib.RunDirectoryError, match="expected a folder that can be written"):
        reopen(replace(config, output_dir=str(link)))


def test_it_holds_what_is_documented(config: Config) -> None:
    directory = reopen(config)
    assert load_results(directory.path)["rounds"] == []
    assert directory.best_accuracy == -1
    for server_round, accuracy in enumerate((0.4, None, 0.7, 0.6), 1):
        save(directory, server_round, accuracy)
    assert directory.best_accuracy == 0.7
    assert (directory.path / ".lock").exists()
    directory.save_checkpoint(3, 0.7, state_of(3))
    directory.close()
    names = {path.name for path in directory.path.iterdir()}
    assert names == {"run_config.json", "results.json", "latest.pt", "checkpoints"}
    assert all(name in (run_directory.__doc__ or "") for name in (*names, ".lock"))

    given = json.loads((directory.path / "run_config.json").read_text(encoding="utf-8"))
    assert Config.from_run_config(given) == config
    results = load_results(directory.path)
    assert results["schema_version"] == 1
    assert (results["dataset"], results["num_partitions"]) == ("any", 4)
    assert results["config"] == config.to_run_config()
    assert {"python", "fedlib", "flwr", "torch"} <= set(results["versions"])
    section = README.read_text(encoding="utf-8").split("## results.json")[1].split("```")[1]
    assert set(results) == set(re.findall(r"^(\w+)", section, re.MULTILINE)) - {"text"}
    for field in (*fields(Round), *fields(Stage)):
        name = re.sub("^.*_(loss|accuracy_std|loss_std)$", r"_\1", field.name)
        assert re.search(rf"{name}\b", section), field.name

    latest = torch.load(directory.path / "latest.pt", weights_only=True)
    assert latest["server_round"] == 4
    assert state_hash(latest["model"]) == results["rounds"][-1]["model_sha256"]
    [checkpoint] = (directory.path / "checkpoints").iterdir()
    assert checkpoint.name == "round-003-accuracy-0.7000.pt"
    assert state_hash(torch.load(checkpoint, weights_only=True)) == state_hash(state_of(3))


def test_results_never_hold_a_number_that_json_does_not_know(config: Config) -> None:
    directory = reopen(config)
    with pytest.raises(ValueError, match="JSON"):
        directory.save_round(Round(1, math.nan), {})
    assert read_rounds(directory.path) == []


@pytest.mark.parametrize("size", [0, 1, 2, 50])
def test_mean_and_std_equal_numpys_and_do_not_depend_on_the_order(size: int) -> None:
    values = np.random.default_rng(size).lognormal(0, 5, size).tolist()
    found = fedlib.mean_and_std(values)
    assert found == fedlib.mean_and_std(np.random.default_rng(1).permutation(values).tolist())
    expected = (np.mean(values), np.std(values)) if size else (None, None)
    assert found == (pytest.approx(expected, rel=1e-9) if size else expected)


# --- a file is written whole or not at all -----------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("enforce failed\n at x")])
def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, error: Exception) -> None:
    def half(path: Path) -> None:
        path.write_text("ne", encoding="utf-8")
        raise error

    target = tmp_path / "new folder" / "file.txt"
    write_atomically(target, lambda path: path.write_text("old", encoding="utf-8"))
    with pytest.raises(fedlib.RunDirectoryError, match="expected a writable folder") as caught:
        write_atomically(target, half)
    assert "\n" not in str(caught.value) and str(target) in str(caught.value)
    assert target.read_text(encoding="utf-8") == "old"
    with target.open(encoding="utf-8") as reader:  # who has the old file open, keeps it
        write_atomically(target, lambda path: path.write_text("new", encoding="utf-8"))
        assert reader.read() == "old"
    assert target.read_text(encoding="utf-8") == "new"
    assert list(target.parent.iterdir()) == [target]


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow beyond 1,000 bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_full_disk_is_said_and_tried_again_and_an_error_at_the_end(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = reopen(config)
    save(directory, 1)
    assert "⚠️" not in capsys.readouterr().out
    with full_disk():
        save(directory, 2)
        directory.save_checkpoint(2, 0.5, state_of(2))
        log = capsys.readouterr().out
        assert "results.json: expected a writable folder with free space" in log
        assert "accuracy-0.5000.pt: expected a writable folder" in log
        with pytest.raises(fedlib.RunDirectoryError, match="free space"):
            directory.close()
        assert [record["server_round"] for record in read_rounds(directory.path)] == [1]
        assert not list(directory.path.rglob("*.partial*"))
    save(directory, 3)  # there is space again: nothing is lost
    directory.close()
    assert [record["server_round"] for record in read_rounds(directory.path)] == [1, 2, 3]
    assert torch.load(directory.path / "latest.pt", weights_only=True)["server_round"] == 3
    assert [file.name[:9] for file in directory.path.glob("checkpoints/*")] == ["round-002"]


# --- going on ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_wandb": True, "output_dir": "elsewhere"},
        {"server_device": "cuda:0"},
        {"dataset": "another/path"},  # what it came to is compared instead
    ],
)
def test_what_does_not_decide_the_rounds_may_change(
    stopped: Config, changes: dict[str, Any]
) -> None:
    path = Path(stopped.resume_from)
    before = load_results(path)
    directory = reopen(replace(stopped, **changes))
    assert directory.path == path and directory.latest is not None
    assert directory.latest.server_round == 2
    assert state_hash(directory.latest.model) == state_hash(state_of(2))
    assert torch.equal(directory.latest.memory["velocity"], state_of(2)["bias"])
    config = replace(stopped, **changes).to_run_config()
    assert load_results(path) == before | {"config": config}
    assert json.loads((path / "run_config.json").read_text(encoding="utf-8")) == config


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file of a stopped run: ``change`` gets its content, and returns another or None."""
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        other = change(content)
        torch.save(content if other is None else other, path)
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        other = change(content)
        text = other if isinstance(other, str) else json.dumps(content if other is None else other)
        path.write_text(text, encoding="utf-8")


def test_a_run_of_an_older_fedlib_can_go_on(stopped: Config) -> None:
    path = Path(stopped.resume_from)
    rewrite(path / "results.json", lambda results: results["config"].pop("augmentation") and None)
    rewrite(path / "latest.pt", lambda latest: latest.pop("memory") and None)
    directory = reopen(stopped)
    assert directory.latest is not None and directory.latest.memory == {}
    directory.close()
    rewrite(path / "results.json", lambda results: results["config"].pop("augmentation") and None)
    expect_refused(replace(stopped, augmentation=False), "augmentation: it had True, now False")


def test_only_one_process_at_a_time_writes_to_a_directory(stopped: Config) -> None:
    path = Path(stopped.resume_from)
    command = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1])"
    command += "; lock.acquire(); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", command, path / ".lock"], stdin=PIPE, stdout=PIPE
    ) as other:
        assert other.stdout and other.stdout.readline() == b"1\n"
        expect_refused(stopped, "got one at which another process is at work")
        other.kill()
    with closing(reopen(stopped)):  # a lock ends with its process, however that ends
        expect_refused(stopped, "another process is at work")
    assert not (path / ".lock").exists()
    first = reopen(stopped)
    first.close()
    with closing(reopen(stopped)):
        first.close()  # a second time: the lock is somebody else's now
        expect_refused(stopped, "another process is at work")


def test_what_lies_in_the_way_in_a_stopped_run_is_left_there(stopped: Config) -> None:
    folder = Path(stopped.resume_from, "somebody's.partial-files")
    folder.mkdir()
    reopen(stopped).close()
    assert folder.is_dir()


def test_a_round_that_results_are_ahead_by_is_dropped(stopped: Config) -> None:
    path = Path(stopped.resume_from)
    ahead = asdict(Round(3, 0.1, centralized_accuracy=0.99))
    rewrite(path / "results.json", lambda results: results["rounds"].append(ahead))
    directory = reopen(stopped)
    assert [record["server_round"] for record in read_rounds(path)] == [1, 2]
    assert directory.best_accuracy == 0.5


def expect_refused(config: Config, *words: str, **about: Any) -> None:
    """It is refused in one line, and not a byte changes."""

    def digests() -> dict[Path, str]:
        files = [file for file in path.rglob("*") if file.is_file()]
        return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    path = Path(config.resume_from)
    before = digests()
    with pytest.raises(fedlib.RunDirectoryError) as caught:
        reopen(config, **about)
    for word in (str(path), *words):
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    assert digests() == before
    assert not Path(config.output_dir).exists()


DAMAGED: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "half": ("results.json", lambda results: json.dumps(results)[:500]),
    "a list": ("results.json", lambda results: []),
    **{
        f"no {key}": ("results.json", lambda results, key=key: results.pop(key) and None)
        for key in ("schema_version", "config", "rounds")
    },
    "a gap": ("results.json", lambda results: results["rounds"][1].update(server_round=3)),
    "a bare first round": ("results.json", lambda results: results["rounds"].__setitem__(0, {})),
    **{
        f"a round with {key} {value!r}": (
            "results.json",
            lambda results, key=key, value=value: results["rounds"][0].update({key: value}),
        )
        for key in ("centralized_accuracy", "learning_rate", "train", "server_round")
        for value in (math.nan, "0.5", [1], {"num_received": "1"})
    },
    "a number too large": (
        "results.json",
        lambda results: json.dumps(results).replace(": 0.1", ": 1e999", 1),
    ),
    "a round without a key": ("results.json", lambda r: r["rounds"][0].pop("train_loss") and None),
    "no model": ("latest.pt", lambda latest: latest.pop("model") and None),
    "another shape": ("latest.pt", lambda latest: latest["model"].update(bias=torch.ones(4))),
    "NaN": ("latest.pt", lambda latest: latest["model"]["bias"].fill_(math.nan) is None),
    "another weight": ("latest.pt", lambda latest: latest["model"].update(bias=torch.ones(3))),
    "a round in words": ("latest.pt", lambda latest: latest.update(server_round="two")),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_and_left_alone(
    stopped: Config, name: str, damage: Callable[[dict[str, Any]], Any]
) -> None:
    rewrite(Path(stopped.resume_from) / name, damage)
    expect_refused(stopped, "expected results.json and latest.pt of a stopped run")


class Bomb:
    """What unpickling it does, a damaged or foreign file could do."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("boom"),)


@pytest.mark.parametrize("name", ["results.json", "latest.pt"])
def test_a_file_that_is_cut_missing_foreign_or_malicious_is_refused(
    stopped: Config, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path(stopped.resume_from) / name
    whole = file.read_bytes()
    for content in (b"", whole[:10], whole[:-500], b"\xff\xfe\x00" * 50, pickle.dumps(Bomb())):
        file.write_bytes(content)
        expect_refused(stopped)
    torch.save({"server_round": 2, "model": Bomb()}, file)
    expect_refused(stopped)
    assert not Path("boom").exists()
    file.unlink()
    expect_refused(stopped, name)
    expect_refused(replace(stopped, resume_from=str(tmp_path / "nowhere")), "nowhere")
    assert not (tmp_path / "nowhere").exists()


CHANGES = [(name, values[0]) for name, values in OTHER.items()]
CHANGES += [("query_max_delay", 0.5), ("num_server_rounds", 9)]  # the schedule is the cosine


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_a_changed_setting_is_refused_and_both_values_are_named(
    stopped: Config, name: str, value: Any
) -> None:
    old = getattr(stopped, name)
    expect_refused(
        replace(stopped, **{name: value}), f"{kebab(name)}: it had {old!r}, now {value!r}"
    )


def test_several_changes_another_data_set_and_other_nodes_are_refused_together(
    stopped: Config,
) -> None:
    changed = replace(stopped, seed=1, momentum=0.1)
    words = ("seed: it had 42", "momentum", "data set: it had 'any', now 'other'", "had 4, now 5")
    expect_refused(changed, *words, dataset="other", num_partitions=5)
