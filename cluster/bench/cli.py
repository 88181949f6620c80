"""The command: arguments in, tables and one JSON document out. Knows argparse, files and standard output."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cluster.bench import tables
from cluster.bench.experiment import Plan
from cluster.bench.report import BEGIN, END, Plots, load_documents, section, write_page, write_section
from cluster.bench.session import Wanted, measure
from cluster.bench.settings import STRATEGY_NAMES, Setting, plain_url
from cluster.bench.streams import Json
from cluster.bench.workloads import MIXTURE, SHIPPED, load_workloads
from taps.arguments import count
from taps.provenance import refuse_unwritable, write_result

_EPILOG = f"""\
A running server (`make serve`) is asked the same questions in every setting: plain decoding (`off`), every
strategy and the peers, as closed loops of so many streams, one setting after the other, in another order each
time. Ratios are taken between what was measured side by side; medians over rounds, or over questions where
one stream asks, with 95 % bootstrap intervals. Every request has a `cache_salt` of its own, so that nothing is
found in a cache; what that would save is measured apart (--no-reuse leaves it out).

A request refused with 503 or 429 is sent again and its time goes on; every other failure is reported, counts
with its time and without its tokens, and is left out of ratios. Ctrl-C and SIGTERM end it and keep what was
done.
The last line of the output is one JSON document.

  python -m cluster.bench --quick                    a few minutes; this is `make bench`
  python -m cluster.bench --out result.json          everything, hours
  python -m cluster.bench --peer vllm=http://127.0.0.1:8100 --strategies off,merged --streams 1,16
  python -m cluster.bench --data gsm8k=gsm8k.jsonl --setting 'four={{"strategy": "merged", "num_nodes": 4}}'
  python -m cluster.bench report result.json --readme README.md --out docs/performance

Workloads that are shipped: {", ".join(SHIPPED)}; `{MIXTURE}` asks one of each in turn.
"""
_FULL = {
    "streams": (1, 2, 4, 8, 16),
    "temperatures": (0.0, 1.0),
    "rounds": 5,
    "questions": 16,
    "max_tokens": 128,
}
_QUICK = {"streams": (1, 8), "temperatures": (0.0,), "rounds": 2, "questions": 4, "max_tokens": 64}
_QUICK_STRATEGIES = ("off", "merged", "adaptive")
T = TypeVar("T")


def main(arguments: Sequence[str]) -> int | str:
    """What the process exits with."""
    is_report = [*arguments[:1]] == ["report"]
    args = _report_parser().parse_args(arguments[1:]) if is_report else parser().parse_args(arguments)
    try:
        return _report(args) if is_report else _measure(args)
    except (ValueError, OSError) as error:  # bad data, no server, no place for the result
        return f"cluster.bench: {error}"
    except (KeyboardInterrupt, asyncio.CancelledError):
        return "cluster.bench: interrupted before anything was measured"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m cluster.bench", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Speed of a running server over HTTP, beside plain decoding and other servers.",
        epilog=_EPILOG,
    )  # fmt: skip
    add = made.add_argument

    def named(flag: str, what: str, kind: Callable[[str], Any], meaning: str) -> None:
        """An option that may be given for several names."""
        add(flag, type=_named(kind), action="append", default=[], metavar=f"NAME={what}", help=meaning)

    add("--url", default="http://127.0.0.1:8000", help="our server (default: %(default)s)")
    add("--quick", action="store_true", help="less of everything that is not named: minutes")
    add("--strategies", type=_names, help=f"default: {','.join(STRATEGY_NAMES)}, those that the server knows")
    named("--setting", "JSON", _object, "another way to ask our server: the `taps` of its requests")
    named("--peer", "URL", plain_url, "another OpenAI endpoint")
    named(
        "--peer-body", "JSON", _object,
        'more fields of a peer\'s requests; null leaves one out: {"cache_salt": null}',
    )  # fmt: skip
    named("--peer-key", "VARIABLE", _variable, "the environment variable that holds a peer's API key")
    add(
        "--workloads",
        type=_names,
        default=(),
        help=f"default: {', '.join((*SHIPPED, MIXTURE))}, and those of --data; quick no {MIXTURE}",
    )
    named(
        "--data", "PATH", str,
        "a workload of your own or in place of a shipped one: questions as for `taps eval`",
    )  # fmt: skip
    add("--streams", type=_list(count), help="how many ask at once (default: 1,2,4,8,16; quick 1,8)")
    add("--temperatures", type=_list(_temperature), help="default: 0,1; quick 0")
    add("--rounds", type=count, help="default: 5; quick 2")
    add("--questions", type=count, help="a round, and no fewer than two a stream (default: 16; quick 4)")
    add("--max-tokens", type=count, help="of an answer (default: 128; quick 64)")
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=600.0, help="seconds of silence that end a stream (default: 600)")
    add("--reuse", action=argparse.BooleanOptionalAction, default=True, help="measure prefixes found again")
    add("--out", type=Path, help="where the document goes, too")
    return made


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m cluster.bench report", description="Tables and plots of what was measured."
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT", help="what --out wrote, or an output"
    )
    parser.add_argument("--out", type=Path, help="where a page with every table goes, and the plots")
    parser.add_argument("--readme", type=Path, help=f"whose lines between {BEGIN} and {END} are replaced")
    return parser


def _report(args: argparse.Namespace) -> int:
    """Write what is asked for, or else print the section. Raises `ValueError` and `OSError`."""
    documents = load_documents(args.results)
    plots: Plots = {}
    if args.out:
        plots = write_page(documents, args.out)
        print(f"{args.out / 'README.md'} and {sum(map(len, plots.values()))} plots written")
    if args.readme:
        write_section(documents, args.readme, args.out, plots)
        print(f"{args.readme}: the section is replaced")
    if not (args.out or args.readme):
        print("\n".join(section(document) for document in documents.values()))
    return 0


def plan_of(args: argparse.Namespace) -> Plan:
    """What is not named is as the full benchmark has it, or the quick one."""
    chosen: dict[str, Any] = {
        name: default if getattr(args, name) is None else getattr(args, name)
        for name, default in (_QUICK if args.quick else _FULL).items()
    }
    return Plan(seed=args.seed, **chosen)


def _measure(args: argparse.Namespace) -> int | str:
    """Measure, print and write. Raises `ValueError` and `OSError`."""
    if args.out:
        refuse_unwritable(args.out)
    plan = plan_of(args)
    data = dict(args.data)
    quick = dict.fromkeys((*SHIPPED, *data)) if args.quick else ()  # without the mixture
    workloads = load_workloads(args.workloads or tuple(quick), data, plan.questions_wanted)
    strategies = args.strategies or (_QUICK_STRATEGIES if args.quick else STRATEGY_NAMES)
    wanted = Wanted(
        plain_url(args.url), strategies, dict(args.setting), _peers(args), plan, args.reuse, args.timeout
    )
    document = asyncio.run(measure(wanted, workloads))
    print("\n" + printed(document))
    if args.out:
        write_result(document, args.out)
    print(json.dumps(document))
    lost = {row["setting"] for row in document["rows"] if row["failed"] == row["requests"]}
    return f"cluster.bench: some cells have no answer at all from {', '.join(sorted(lost))}" if lost else 0


def _peers(args: argparse.Namespace) -> tuple[Setting, ...]:
    """Raises `ValueError` of a body or a key for no peer."""
    urls, bodies, keys = dict(args.peer), dict(args.peer_body), dict(args.peer_key)
    if strangers := [name for name in (*bodies, *keys) if name not in urls]:
        raise ValueError(f"there is no peer {strangers[0]!r}; name its URL with --peer {strangers[0]}=URL")
    headers = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
    return tuple(
        Setting(name, url, "peer", bodies.get(name, {}), headers.get(name, {})) for name, url in urls.items()
    )


def printed(document: Json) -> str:
    """What a reader wants to see at the end of a run."""
    parts = []
    for temperature, streams in tables.places(document):
        for workload in document["workloads"]:
            if found := tables.cell_table(document, temperature, streams, workload):
                parts.append(f"{workload}, {tables.place_name((temperature, streams))}\n{found}")
            if found := tables.server_table(document, temperature, streams, workload):
                parts.append(found)
    return "\n".join([*parts, section(document)])


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _list(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    def parse(text: str) -> tuple[T, ...]:
        return tuple(dict.fromkeys(kind(part) for part in text.split(",")))

    return parse


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature; give a number from 0 to 2")
    return value


def _named(kind: Callable[[str], T]) -> Callable[[str], tuple[str, T]]:
    def parse(text: str) -> tuple[str, T]:
        name, _, rest = text.partition("=")
        if not name or not rest:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=...")
        try:
            return name, kind(rest)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _object(text: str) -> Json:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is not a JSON object")
    return value


def _variable(name: str) -> str:
    if not (key := os.environ.get(name)):
        raise ValueError(f"the environment variable {name} is not set; put the API key into it")
    return key
