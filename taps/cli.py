"""The `taps` command: prepare the embedded target, train a specialist."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from taps.models.embedded import EMBEDDED, EmbeddedTargetError, embedded_target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="taps", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="fetch and convert the embedded target")
    prepare.set_defaults(run=lambda _: print(embedded_target()))
    _add_train(commands.add_parser("train", help="train a specialist from prompts"))
    _add_eval(commands.add_parser("eval", help="acceptance length of specialists on a benchmark"))
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (EmbeddedTargetError, ValueError, OSError) as error:
        print(f"taps: {error}", file=sys.stderr)
        return 1
    return 0


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--domain", required=True, help="the specialist's name")
    parser.add_argument("--data", required=True, type=Path, help="prompts, a `messages` JSONL file")
    parser.add_argument("--out", type=Path, help="where the head goes (default: specialists/DOMAIN)")
    parser.add_argument("--work", type=Path, help="where answers are kept (default: .work/answers/DOMAIN)")
    parser.add_argument("--target", default=EMBEDDED, help="path or Hugging Face id (default: %(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=320, help="per answer (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--draft-vocab", type=int, default=8192, help="tokens it drafts from (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.set_defaults(run=_train)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--benchmark", required=True, help="its name in the result")
    parser.add_argument("--data", required=True, type=Path, help="questions, FastChat's JSONL format")
    parser.add_argument("--heads", required=True, nargs="+", type=Path, help="specialist directories")
    parser.add_argument("--out", required=True, type=Path, help="the result file, JSON")
    parser.add_argument("--work", type=Path, help="where answers are kept (default: .work/eval/BENCHMARK)")
    parser.add_argument("--target", default=EMBEDDED, help="path or Hugging Face id (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=80, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=128, help="per turn (default: %(default)s)")
    parser.add_argument("--num-nodes", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--depth", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=10, help="default: %(default)s")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> None:
    from taps.evaluation.runner import EvaluationPlan, evaluate, write_result

    named = {field.name for field in fields(EvaluationPlan)} & vars(args).keys()
    plan = EvaluationPlan(**{name: getattr(args, name) for name in named})
    work = args.work or Path(".work/eval") / args.benchmark
    write_result(evaluate(args.target, args.heads, args.data, work, plan), args.out)


def _train(args: argparse.Namespace) -> None:
    # Heavy imports wait until they are needed: `taps --help` answers at once.
    import torch

    from taps.training.dataset import AnswerRecipe
    from taps.training.specialist import train_specialist
    from taps.training.trainer import TrainRecipe

    if args.threads:
        torch.set_num_threads(args.threads)
    named = {field.name for field in fields(AnswerRecipe)} & vars(args).keys()
    answers = AnswerRecipe(**{name: getattr(args, name) for name in named})
    train_specialist(
        args.domain,
        args.data,
        out=args.out or Path("specialists") / args.domain,
        work=args.work or Path(".work/answers") / args.domain,
        target=args.target,
        answers=answers,
        training=TrainRecipe(epochs=args.epochs),
        draft_vocab_size=args.draft_vocab,
    )


if __name__ == "__main__":
    sys.exit(main())
