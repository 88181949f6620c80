"""`taps serve`: what a configuration promises, and what is said while it comes up."""

from __future__ import annotations

import os
import signal
import socket
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import serving
from cluster.cli import main
from cluster.serving import Expected, watch
from deployments.config import locate, shipped
from tests.endpoint import Behaviour, endpoint

PROJECT = Path(__file__).resolve().parent.parent
CONFIG: dict[str, Any] = yaml.safe_load((PROJECT / "serve_config.yaml").read_text())


def test_what_the_shipped_configuration_promises() -> None:
    assert Expected.of(CONFIG) == Expected(
        "http://127.0.0.1:8000",
        "SmolLM2-135M-Instruct",
        "embedded",
        frozenset({"math", "chat", "code", "ngram"}),
    )
    assert shipped("serve_config.yaml") == PROJECT / "serve_config.yaml"


def test_what_is_shipped_is_found_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("deployments.config._PROJECT", tmp_path / "nowhere")
    monkeypatch.setattr("deployments.config.sys.prefix", str(tmp_path))
    assert locate("specialists/math") == "specialists/math"
    folder = tmp_path / "share" / "taps" / "specialists" / "math"
    folder.mkdir(parents=True)
    assert locate("specialists/math") == str(folder)


def test_all_that_the_configuration_names_is_packaged() -> None:
    files = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    heads = [app["args"]["head"] for app in CONFIG["applications"] if "head" in app["args"]]
    assert len(heads) == 3
    for head in heads:
        assert files[f"share/taps/{head}"] == [f"{head}/*"]
        assert (PROJECT / head / "config.json").is_file()
    assert "serve_config.yaml" in files["share/taps"]


def test_it_says_what_comes_up() -> None:
    told: list[str] = []
    with endpoint(lambda _: Behaviour()) as served:
        expected = Expected(served.url, "small", "embedded", frozenset({"math", "chat"}))
        assert watch(expected, lambda: True, told.append, 0.0)
    assert told == ["the target is loaded, and HTTP is open", "drafter chat is up", "drafter math is up"]


def test_a_drafter_that_does_not_come_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_SPECIALISTS_S", 0.0)
    told: list[str] = []
    with endpoint(lambda _: Behaviour()) as served:
        expected = Expected(served.url, "small", "embedded", frozenset({"math", "medical"}))
        assert watch(expected, lambda: True, told.append, 0.0)
    assert told[-1] == "not up, and not waited for any longer: medical"


def test_a_cluster_that_ends_is_noticed() -> None:
    turns = iter([True, True, False])
    expected = Expected("http://127.0.0.1:1", "small", "embedded", frozenset())
    assert not watch(expected, lambda: next(turns), pytest.fail, 0.0)


@pytest.mark.parametrize("text", ["", "applications: []", "[1, 2]", "a: b: c", "applications: [{name: x}]"])
def test_what_is_no_configuration_is_said(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert main(["serve", str(path)]) == 1
    assert "is no configuration of a cluster" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "missing.yaml")]) == 1


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a configuration whose cluster is this script of the shell."""

    def start(script: str) -> Path:
        program = tmp_path / "serve"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(serving, "embedded_target", lambda: tmp_path)
        monkeypatch.setattr(serving, "private_directory", lambda _: str(tmp_path))
        monkeypatch.setattr(serving, "_command", lambda path: [str(program), "run", str(path)])
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(CONFIG | {"http_options": {"port": 1}}))
        return path

    return start


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Handlers by signal: what is sent here is sent by the test."""
    handlers: dict[int, Any] = {}
    monkeypatch.setattr("signal.signal", handlers.__setitem__)
    return handlers


def test_a_cluster_is_stopped_with_its_answers_finished_and_then_at_once(
    started: Callable[[str], Path], signals: dict[int, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    """The first signal is taken in silence by a cluster that finishes its answers."""
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    path = started(f"trap '' INT; trap 'exit 143' TERM; echo > {begun}; while true; do sleep 0.05; done")

    def stop(*_: object) -> bool:
        begun.read_text()  # waits for the script to write
        signals[signal.SIGINT]()
        signals[signal.SIGINT]()
        return False

    monkeypatch.setattr(serving, "watch", stop)
    assert main(["serve", str(path)]) == 0
    shown = capsys.readouterr()
    assert "stopping, once answers are finished" in shown.out
    assert "ending at once" in shown.out
    assert not shown.err


def test_a_cluster_that_fails_shows_the_end_of_its_log(
    started: Callable[[str], Path], signals: dict[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(started("echo no such thing; exit 3"))]) == 1
    shown = capsys.readouterr()
    assert "starting Ray" in shown.out
    assert "no such thing" in shown.err


def test_a_port_that_is_taken_is_said_before_anything_is_started(
    started: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        path = started("exit 3")
        path.write_text(yaml.safe_dump(CONFIG | {"http_options": {"port": port}}))
        assert main(["serve", str(path)]) == 1
    assert f"127.0.0.1:{port} already: stop it" in capsys.readouterr().err


def test_a_cluster_started_in_the_background_of_a_shell_can_be_interrupted(
    started: Callable[[str], Path],
) -> None:
    """Such jobs ignore SIGINT, and so would what they start, which `taps serve` stops by it."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # Where it is ignored the script goes on to its end, which is a success.
        assert main(["serve", str(started("kill -INT $$; exit 0"))]) == 1
    finally:
        for number, handler in before:
            signal.signal(number, handler)
