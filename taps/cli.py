"""The `taps` command: the embedded target; answers to train on; specialists, made, measured and exported."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from taps.arguments import count
from taps.models.embedded import EMBEDDED, EmbeddedTargetError, embedded_target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="taps", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="fetch the embedded target, and build the CPU kernel")
    prepare.set_defaults(run=_prepare)
    _add_train(commands.add_parser("train", help="train a specialist from prompts"))
    _add_answer(commands.add_parser("answer", help="record the target's answers to prompts, to train on later"))
    _add_average(commands.add_parser("average", help="average two specialists' weights"))
    _add_export(commands.add_parser("export", help="write a specialist for other EAGLE engines"))
    _add_eval(commands.add_parser("eval", help="acceptance length of specialists on a benchmark"))
    _add_bench(
        commands.add_parser("bench", help="speed of specialists against plain decoding, in this process")
    )
    _add_bench_steps(
        commands.add_parser("bench steps", help="milliseconds per step of the engine, each beside its floor")
    )
    _add_report(commands.add_parser("report", help="tables and plots from result files"))
    args = parser.parse_args(_commands_joined(sys.argv[1:] if arguments is None else arguments))
    try:
        args.run(args)
    except (EmbeddedTargetError, ValueError, OSError) as error:
        print(f"taps: {error}", file=sys.stderr)
        return 1
    return 0


def _commands_joined(arguments: Sequence[str]) -> list[str]:
    """`bench steps` is one command: below `bench` argparse would ask for the options of both."""
    return ["bench steps", *arguments[2:]] if [*arguments[:2]] == ["bench", "steps"] else [*arguments]


def _prepare(_: argparse.Namespace) -> None:
    print(embedded_target())
    from taps.models.kernel_operations import describe_kernel

    print(describe_kernel())


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--domain", required=True, help="the specialist's name")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", help="prompts: a file or hub dataset, or a mixture: a.jsonl:35000+b.json:35000"
    )
    source.add_argument("--answers", nargs="+", type=_answers, help="recorded answers: DIR, or DIR:TOKENS")
    parser.add_argument("--out", type=Path, help="where the head goes (default: specialists/DOMAIN)")
    parser.add_argument(
        "--work", type=Path, default=Path(".work"), help="for answers and state (default: %(default)s)"
    )
    _add_answering(parser)
    parser.add_argument(
        "--preset", choices=("embedded", "adapt", "paper"), default="embedded",
        help="embedded: EAGLE-2 for a small target on few cores; adapt: HASS from a head given with --init; "
        "paper: as TAPS trained its heads (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--method", choices=("eagle-2", "hass"), help="default: the preset's")
    parser.add_argument("--epochs", type=count, help="default: the preset's")
    parser.add_argument("--learning-rate", type=float, help="default: the preset's")
    parser.add_argument("--batch-size", type=count, help="conversations per process (default: the preset's)")
    parser.add_argument("--accumulation", type=count, help="batches per update (default: the preset's)")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="default: the preset's")
    parser.add_argument("--feature-noise", type=float, help="width of uniform noise (default: the preset's)")
    parser.add_argument(
        "--learn-prompts", action=argparse.BooleanOptionalAction,
        help="learn from the prompts' positions too (default: the preset's)",
    )  # fmt: skip
    parser.add_argument("--num-passes", type=count, help="drafting steps HASS aligns (default: the preset's)")
    parser.add_argument("--init", help="a head to start from: a directory or Hugging Face id")
    parser.add_argument(
        "--draft-vocab",
        type=count,
        help="so many, the most frequent, it drafts from (default: the preset's)",
    )
    parser.set_defaults(run=_train)


def _add_answer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="prompts, as for `taps train`")
    parser.add_argument("--out", required=True, type=Path, help="where the answers go")
    _add_answering(parser)
    parser.set_defaults(run=_answer)


def _add_answering(parser: argparse.ArgumentParser) -> None:
    """What `train` and `answer` share: how the target answers prompts."""
    parser.add_argument("--target", default=EMBEDDED, help="path or Hugging Face id (default: %(default)s)")
    parser.add_argument("--answer-tokens", type=count, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=count, default=320, help="per answer (default: %(default)s)")
    parser.add_argument(
        "--max-prompt-tokens",
        type=count,
        default=512,
        help="longer prompts are left out (default: %(default)s)",
    )
    parser.add_argument(
        "--temperatures", type=_temperature, nargs="+", help="taken in turn by the answers (default: 0 0 1)"
    )
    parser.add_argument(
        "--answers-per-prompt",
        type=count,
        default=8,
        help="at most, for few prompts (default: %(default)s)",
    )
    parser.add_argument("--sessions", type=count, default=96, help="answered at once (default: %(default)s)")
    parser.add_argument(
        "--speculate", nargs="+", default=[], metavar="HEAD",
        help="heads to generate answers with: faster where there is compute to spare, the same text",
    )  # fmt: skip
    parser.add_argument(
        "--no-features", dest="keep_features", action="store_false",
        help="keep token ids only and compute features in training: less disk, more compute",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of answers and training (default: 0)")
    parser.add_argument("--threads", type=count, help="torch threads")


def _share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return share


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature, a number of 0 or more")
    return value


def _answers(text: str) -> tuple[Path, int | None]:
    name, colon, tokens = text.rpartition(":")
    return (Path(name), int(tokens)) if colon and tokens.isdecimal() else (Path(text), None)


def _add_average(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heads", nargs=2, type=Path, help="two specialist directories")
    parser.add_argument("--weight", type=_share, default=0.5, help="λ, of the first (default: %(default)s)")
    parser.add_argument("--target", default=EMBEDDED, help="path or Hugging Face id (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path)
    parser.set_defaults(run=_average)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("head", type=Path, help="a specialist's directory")
    parser.add_argument("--target", default=EMBEDDED, help="path or Hugging Face id (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path)
    parser.set_defaults(run=_export)


def _add_measuring(parser: argparse.ArgumentParser, questions: int, trees: str) -> None:
    """What `eval` and `bench` share: which heads on which questions, and the trees' defaults."""
    parser.add_argument("--benchmark", required=True, help="its name in the result")
    parser.add_argument(
        "--data", help="questions, JSON or JSON lines (default: the benchmark of that name on the hub)"
    )
    parser.add_argument("--heads", required=True, nargs="+", type=Path, help="specialists, alone and combined")
    parser.add_argument("--alone", default=[], nargs="+", type=Path, help="further heads, not combined")
    parser.add_argument("--out", required=True, type=Path, help="the result file, JSON")
    parser.add_argument("--target", default=EMBEDDED, help="path or Hugging Face id (default: %(default)s)")
    parser.add_argument("--new-tokens", type=count, default=128, help="per turn (default: %(default)s)")
    parser.add_argument("--temperature", type=_temperature, default=0.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--questions", type=count, default=questions, help="default: %(default)s")
    for name in ("num-nodes", "depth", "top-k"):
        parser.add_argument(f"--{name}", type=count, help=f"of every tree (default: {trees})")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_measuring(parser, questions=80, trees="the paper's")
    parser.add_argument(
        "--work", type=Path, default=Path(".work/eval"), help="for answers (default: %(default)s)"
    )
    parser.set_defaults(run=_eval)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "`taps bench steps` measures the engine's single steps instead."
    _add_measuring(parser, questions=10, trees="what is served")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="say of every step of `adaptive` who was asked, what was kept and why",
    )
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> None:
    from taps.evaluation.live import LivePlan, measure
    from taps.provenance import refuse_unwritable, write_result

    refuse_unwritable(args.out)
    plan = LivePlan(**_named(LivePlan, args))
    data = args.data or args.benchmark
    write_result(measure(args.target, args.heads, args.alone, data, plan, args.explain), args.out)


def _add_bench_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default=EMBEDDED, help="path or Hugging Face id (default: %(default)s)")
    parser.add_argument(
        "--head", "--heads", nargs="+", type=Path, default=[Path("specialists/math")],
        help="specialists that draft (default: specialists/math)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16", help="default: %(default)s"
    )
    parser.add_argument("--threads", type=count, help="torch threads of the target (default: torch's choice)")
    parser.add_argument("--repeats", type=count, default=15, help="of every step (default: %(default)s)")
    parser.add_argument(
        "--contexts", nargs="+", type=count, metavar="POSITIONS",
        help="verify every number of sessions and rows at each of these lengths "
        "(default: all at 200, 1 x 8 at 1500, 16 x 1 at 600)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="a result file, JSON")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_bench_steps)


def _bench_steps(args: argparse.Namespace) -> None:
    import json

    from taps.evaluation.steps import StepsPlan, measure, steps_table
    from taps.provenance import refuse_unwritable, write_result

    if args.out is not None:
        refuse_unwritable(args.out)
    result = measure(args.target, args.head, StepsPlan(**_named(StepsPlan, args)))
    if args.out is not None:
        write_result(result, args.out)
    print(json.dumps(result, indent=1) if args.json else steps_table(result))


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("docs/results/study"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs/study"), help="default: %(default)s")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    from taps.evaluation.report import write_report

    write_report(args.results, args.out)
    print(f"wrote {args.out / 'README.md'}")


def _eval(args: argparse.Namespace) -> None:
    from taps.evaluation.recorded import EvaluationPlan
    from taps.evaluation.runner import evaluate
    from taps.provenance import refuse_unwritable, write_result

    refuse_unwritable(args.out)
    plan = EvaluationPlan(**_named(EvaluationPlan, args))
    run = f"{args.benchmark}-{args.new_tokens}-t{args.temperature:g}-s{args.seed}"
    data = args.data or args.benchmark
    write_result(evaluate(args.target, args.heads, args.alone, data, args.work / run, plan), args.out)


def _export(args: argparse.Namespace) -> None:
    import torch

    from taps.models.checkpoints import export_head
    from taps.models.embedded import target_path

    export_head(args.head, target_path(args.target), args.out, torch.bfloat16)
    print(f"saved {args.out}, which drafts from the whole vocabulary")


def _average(args: argparse.Namespace) -> None:
    from taps.models.embedded import target_path
    from taps.training.averaging import average_checkpoints

    one, other = args.heads
    average_checkpoints(one, other, args.weight, target_path(args.target), args.out)
    print(f"saved {args.out}")


def _answer(args: argparse.Namespace) -> None:
    # Heavy imports wait until they are needed: `taps --help` answers at once.
    import torch

    from taps.recording.answers import AnswerRecipe
    from taps.recording.recorder import answer_sources

    if args.threads:
        torch.set_num_threads(args.threads)
    answer_sources(args.data, args.target, args.out, AnswerRecipe(**_named(AnswerRecipe, args)), args.speculate)


def _train(args: argparse.Namespace) -> None:
    import torch

    from taps.recording.answers import AnswerRecipe, Answers
    from taps.recording.recorder import answer_sources
    from taps.training.specialist import SpecialistPlan, refuse_unfit_start, train_specialist
    from taps.training.trainer import TrainRecipe, recipe_of

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.preset == "adapt" and args.init is None:
        raise ValueError("the preset adapt starts from a head: name one with --init")
    training = recipe_of(args.preset, **_named(TrainRecipe, args))
    plan = SpecialistPlan(
        args.domain,
        args.target,
        out=args.out or Path("specialists") / args.domain,
        state=args.work / "train" / f"{args.domain}-{training.method}",
        training=training,
        init=args.init,
    )
    refuse_unfit_start(plan)
    if args.data is not None:
        recipe = AnswerRecipe(**_named(AnswerRecipe, args))
        work = args.work / "answers" / args.domain
        answers = answer_sources(args.data, args.target, work, recipe, args.speculate)
        names = " + ".join(Path(part.strip()).name for part in args.data.split("+"))
        provenance = {"prompts": names, "answering": asdict(recipe)}
    else:
        answers = [Answers(*part) for part in args.answers]
        provenance = {"prompts": " + ".join(part.directory.name for part in answers)}
    train_specialist(plan, answers, provenance)


def _named(kind: type[Any], args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that are fields of a dataclass."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return {f.name: given[f.name] for f in fields(kind) if f.name in given}


if __name__ == "__main__":
    sys.exit(main())
