"""`python -m cluster.bench`: from addresses to a table and one JSON document, and from that to a report."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.bench import cli
from cluster.bench.report import BEGIN, END
from cluster.bench.streams import Json
from tests.endpoint import Behaviour, Endpoint, endpoint

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--workloads", "math,chat", "--streams", "1,2", "--temperatures", "0", "--rounds", "2",
         "--questions", "2", "--max-tokens", "4"]  # fmt: skip
GAPS_S = {"off": 0.006, "merged": 0.003, "single": 0.004}


def ours(body: Json) -> Behaviour:
    """A server of ours that does not know `adaptive` yet."""
    strategy = body["taps"].get("strategy")
    if strategy == "adaptive":
        return Behaviour(status=400, message="unknown strategy 'adaptive'")
    counts = {"num_spec_steps": 4, "mean_acceptance_length": 2.0, "num_draft_tokens": 8}
    metrics = {"speculative_decoding": counts, "step_ms": {"verify": 11.5}}
    return Behaviour(gap_s=GAPS_S.get(strategy, 0.005), metrics=metrics)


def later(body: Json) -> Behaviour:
    """One that does."""
    return Behaviour(gap_s=0.002) if body["taps"]["strategy"] == "adaptive" else ours(body)


def bench(capsys: pytest.CaptureFixture[str], *arguments: str, complaint: int | str = 0) -> tuple[Json, str]:
    """The document, and what is printed before it. Args: complaint: what the process would exit with."""
    assert cli.main(arguments) == complaint
    before, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    document: Json = json.loads(last)
    return document, before


def refused(*arguments: str) -> str:
    said = cli.main(arguments)
    assert isinstance(said, str)
    assert "\n" not in said
    return said


def ratio(document: Json, measure: str, setting: str, to: str, streams: int) -> Any:
    (found,) = [
        row
        for row in document["ratios"]
        if (row["measure"], row["setting"], row["to"], row["streams"]) == (measure, setting, to, streams)
    ]
    return found


def test_the_last_line_is_the_document_which_says_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    with endpoint(ours) as server:
        document, before = bench(capsys, "--url", f"{server.url}/v1/", *SMALL, "--out", str(out))
    assert json.loads(out.read_text()) == document
    assert list(document["settings"]) == [
        "off",
        "single-math",
        "single-chat",
        "confidence",
        "entropy",
        "merged",
    ]
    assert document["settings"]["single-chat"]["body"]["taps"] == {"strategy": "single", "drafters": ["chat"]}
    assert document["left_out"] == {"adaptive": "HTTP 400: unknown strategy 'adaptive'"}
    assert "adaptive is left out: HTTP 400: unknown strategy" in before
    assert document["made_with"]["cores"]
    assert document["plan"]["rounds_done"] == 2
    assert document["server"] == {"url": server.url, "model": "small", "status": "ok",
                                  "drafters": ["math", "chat"], "numerics": "n1"}  # fmt: skip
    assert len(document["rows"]) == 6 * 2 * 2
    row = document["rows"][0]
    assert (row["acceptance_length"]["median"], row["nodes_per_pass"]["median"]) == (2, 2)
    assert row["server"] == {"step_ms.verify": 11.5}
    assert row["failed"] == 0
    assert "math, T = 0, 2 streams\n| setting" in before
    assert "step_ms.verify" in before


def test_a_faster_strategy_is_shown_as_faster_and_adaptive_beside_the_best_fixed_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with endpoint(later) as server:
        document, before = bench(capsys, "--url", server.url, *SMALL, "--strategies", "off,merged,adaptive")
    for streams in (1, 2):
        found = ratio(document, "tokens_per_second", "adaptive", "off", streams)
        assert set(found["workloads"]) == {"math", "chat"}
        assert found["geometric_mean"]["interval_95"][0] > 1
        assert (
            ratio(document, "tokens_per_second", "adaptive", "best fixed", streams)["geometric_mean"]["value"]
            > 0
        )
    assert "÷ the fixed strategy that turned out best" in before


def test_a_peer_is_asked_by_its_url_with_its_body_and_key_and_needs_no_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sesame")
    with endpoint(ours) as server, endpoint(lambda _: Behaviour(usage=False), "vllm") as peer:
        document, before = bench(
            capsys, "--url", server.url, *SMALL, "--strategies", "off", "--peer", f"vllm={peer.url}/v1",
            "--peer-body", 'vllm={"cache_salt": null, "top_k": 5}', "--peer-key", "vllm=SOME_KEY",
        )  # fmt: skip
    for measure in ("tokens_per_second", "ttft_ms_median", "ttft_ms_p95", "inter_token_ms_p99"):
        assert ratio(document, measure, "off", "vllm", 2)["geometric_mean"]["value"] > 0
    assert all(body["top_k"] == 5 and "cache_salt" not in body and "taps" not in body for body in peer.asked)
    assert all(b"authorization: bearer sesame" in head.lower() for head in peer.headers)
    assert "sesame" not in json.dumps(document)
    assert "uncounted: vllm, math" in before


def test_another_way_to_ask_is_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(ours) as server:
        document, _ = bench(
            capsys, "--url", server.url, *SMALL, "--strategies", "off",
            "--setting", 'four={"strategy": "merged", "num_nodes": 4}', "--setting", "own={}",
        )  # fmt: skip
    assert [s["kind"] for s in document["settings"].values()] == ["plain", "fixed", "default"]
    assert {"strategy": "merged", "num_nodes": 4} in [body["taps"] for body in server.asked]


def test_what_fails_in_the_middle_is_reported_and_compared_with_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cut(body: Json) -> Behaviour:
        is_measured = body["taps"]["strategy"] == "merged" and body["max_tokens"] == 4
        return Behaviour(cut=True) if is_measured else ours(body)

    with endpoint(cut) as server:
        document, before = bench(
            capsys,
            "--url",
            server.url,
            *SMALL,
            "--strategies",
            "off,merged",
            "--no-reuse",
            complaint="cluster.bench: some cells have no answer at all from merged",
        )
    rows = [row for row in document["rows"] if row["setting"] == "merged"]
    assert all(row["failed"] == row["requests"] > 0 for row in rows)
    assert not [row for row in document["ratios"] if row["setting"] == "merged"]
    assert "failed: 4 of 4 requests of merged, math, T = 0, 1 stream: 4 times " in before


def test_reuse_is_measured_apart_with_the_salt_of_what_was_cached(capsys: pytest.CaptureFixture[str]) -> None:
    kept: set[str] = set()

    def caching(body: Json) -> Behaviour:
        is_warm = body["cache_salt"] in kept
        kept.add(body["cache_salt"])
        return Behaviour(wait_s=0.005 if is_warm else 0.05, cached_tokens=8 if is_warm else 0)

    with endpoint(caching) as server:
        document, before = bench(capsys, "--url", server.url, *SMALL, "--strategies", "off,merged")
    assert [(row["setting"], row["kind"]) for row in document["reuse"]] == [
        ("off", "second_turn"), ("off", "repeated_prefix"),
    ]  # fmt: skip
    for row in document["reuse"]:
        assert row["cold_over_warm"]["value"] > 1.5
        assert (row["cached_tokens_cold"], row["cached_tokens_warm"], row["failed"]) == (0, 8, 0)
    assert not any(row["cached_tokens"] for row in document["rows"])
    assert "Prefixes found again" in before


def test_no_server_is_one_line_that_says_what_to_do() -> None:
    with endpoint(ours) as server:
        pass
    assert refused("--url", server.url, *SMALL).endswith("run `make serve` first, or name another with --url")


def test_a_server_whose_specialists_are_not_up_yet_is_not_measured_as_if_it_drafted() -> None:
    with endpoint(ours) as server:
        server.drafters = []
        assert "no specialist is up" in refused("--url", server.url, *SMALL)
        assert server.asked == []


def test_a_server_of_another_make_is_not_asked_as_if_it_were_ours() -> None:
    with endpoint(ours, "vllm") as server:
        assert "is not one of ours" in refused("--url", server.url)
        assert server.asked == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "nonsense"], "is not a URL"),
        (["--strategies", "merged"], "one setting has to be plain decoding"),
        (["--setting", 'off={"strategy": "off"}'], "two settings are called off"),
        (["--workloads", "poems"], "there is no workload 'poems'"),
        (["--data", "math=nowhere.jsonl"], "nowhere.jsonl is neither a file nor"),
        (["--peer-body", "x={}"], "there is no peer 'x'; name its URL with --peer x=URL"),
        (["--peer", "x=http://127.0.0.1:9"], "no server for x at http://127.0.0.1:9"),
        (["--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(options: Sequence[str], said: str) -> None:
    with endpoint(ours) as server:
        assert said in refused("--url", server.url, *SMALL, *options)
        assert all(body["max_tokens"] == 1 for body in server.asked)


def test_a_peer_that_refuses_our_requests_is_told_of_with_its_reason() -> None:
    refusal = Behaviour(status=400, message="cache_salt is unknown")
    with endpoint(ours) as server, endpoint(lambda _: refusal, "x") as peer:
        said = refused("--url", server.url, *SMALL, "--peer", f"x={peer.url}")
    assert said.endswith("does not answer: HTTP 400: cache_salt is unknown")


@pytest.mark.parametrize(
    "options",
    [
        ["--streams", "0"], ["--streams", "1,x"], ["--rounds", "0"], ["--temperatures", "3"],
        ["--temperatures", "x"],
        ["--peer", "no-name"], ["--peer", "x=ftp://here"], ["--setting", "x=[1]"], ["--setting", "x={"],
        ["--peer-key", "x=NO_SUCH_VARIABLE_HERE"], ["--max-tokens", "-1"],
    ],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_refused(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(options)
    assert f"argument {options[0]}" in capsys.readouterr().err


def test_quick_is_small_and_gives_way_to_what_is_named() -> None:
    plan = cli.plan_of(cli.parser().parse_args(["--quick", "--rounds", "7"]))
    assert (plan.streams, plan.temperatures, plan.rounds, plan.questions) == ((1, 8), (0.0,), 7, 4)
    full = cli.plan_of(cli.parser().parse_args([]))
    assert (full.streams, full.temperatures) == ((1, 2, 4, 8, 16), (0.0, 1.0))


@pytest.fixture
def result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A measured document with a peer."""
    out = tmp_path / "result.json"
    with endpoint(later) as server, endpoint(lambda _: Behaviour(), "vllm") as peer:
        bench(capsys, "--url", server.url, *SMALL, "--peer", f"vllm={peer.url}", "--out", str(out))
    return out


def test_the_report_replaces_what_stands_between_the_marks_and_nothing_else(
    result: Path, tmp_path: Path
) -> None:
    readme, out = tmp_path / "README.md", tmp_path / "docs" / "performance"
    readme.write_text(f"# A\n\n{BEGIN}\nancient\n{END}\n\nafter\n")
    arguments = ["report", str(result), "--readme", str(readme), "--out", str(out)]
    assert cli.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith(f"# A\n\n{BEGIN}\nClosed loops")
    assert ": small on " in text
    assert text.endswith(f"{END}\n\nafter\n")
    assert "ancient" not in text
    assert "| adaptive " in text
    assert "| adaptive ÷ peer " in text
    assert "| vllm: time to first token, 95th percentile " in text
    plots = sorted(path.name for path in out.glob("*.svg"))
    assert plots == ["result-between-chunks-t0.svg", "result-first-token-t0.svg", "result-speed-t0.svg"]
    assert [name for name in plots if f"(docs/performance/{name})" in text] == ["result-speed-t0.svg"]
    page = (out / "README.md").read_text()
    assert "### chat, T = 0, 2 streams" in page
    assert all(f"]({name})" in page for name in plots)
    drawn = [path.read_bytes() for path in sorted(out.iterdir())]
    assert cli.main(arguments) == 0
    assert readme.read_text() == text
    assert [path.read_bytes() for path in sorted(out.iterdir())] == drawn


def test_the_output_of_a_run_is_reported_on_like_its_result(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.txt"
    log.write_text(f"1 of 2\n\n{json.dumps(json.loads(result.read_text()))}\n")
    sections = []
    for path in (result, log):
        assert cli.main(["report", str(path)]) == 0
        sections.append(capsys.readouterr().out)
    assert sections[0] == sections[1] != ""


@pytest.mark.parametrize("text", ["", "[]", '{"benchmark": "another"}', "nonsense"])
def test_another_file_is_not_reported_on(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    assert "is not a result of `python -m cluster.bench`" in refused("report", str(tmp_path / "other.json"))


def test_a_readme_without_marks_is_left_as_it_is(result: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n{END}\n{BEGIN}\n")
    assert "put them where the section should be" in refused("report", str(result), "--readme", str(readme))
    assert readme.read_text() == f"# A\n{END}\n{BEGIN}\n"


def started(server: Endpoint, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.bench", "--url", server.url, *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_run_with_the_document_of_what_was_done(number: signal.Signals) -> None:
    with endpoint(ours) as server:
        process = started(server, *SMALL, "--rounds", "500")
        assert process.stdout is not None
        while not process.stdout.readline().startswith("3 of "):
            assert process.poll() is None
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    document = json.loads(out.rstrip("\n").rsplit("\n", 1)[1])
    assert document["plan"]["rounds_done"] < 500
    assert document["rows"]
    assert document["reuse"] == []


def test_no_server_ends_the_process_with_one_line_and_no_traceback() -> None:
    with endpoint(ours) as server:
        pass
    process = started(server)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("cluster.bench: no server at http")
    assert err.count("\n") == 1
