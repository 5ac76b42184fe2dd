"""The `rftcore` command: one message and an exit status for what a user can mend, a traceback for a bug."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from rftcore import __version__
from rftcore.commands import bench_options, lora_options, plan_options, sample_options
from rftcore.errors import Interrupted, RunError, UsageError, nearest
from rftcore.prompts import PromptsError
from rftcore.rewards import RewardSpecError
from rftcore.training import recipes
from rftcore.training.algorithm_configs import ALGORITHMS
from rftcore.training.config import RunConfig
from rftcore.training.parsing import add_options, build, parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 (the run failed), 2 (usage), 128 + signal (stopped)."""
    # A console script has its own folder on the path, not the one it is called from, where the user's reward is.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        status = _run(_parse(sys.argv[1:] if arguments is None else list(arguments)))
        sys.stdout.flush()
        return status
    except (UsageError, PromptsError, RewardSpecError) as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except Interrupted as error:
        return _fail(error, 128 + error.signal_number)
    except BrokenPipeError:
        # Who reads has enough, as in `rftcore configs ls | head`; Python would flush, and complain, once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _fail("interrupted at once; nothing was saved now, complete checkpoints stay", 130)


def _fail(message: object, status: int) -> int:
    print(f"rftcore: error: {message}", file=sys.stderr)
    return status


def _parser(arguments: Sequence[str] | None = None) -> ArgumentParser:
    """With the options of those algorithms alone that the arguments name, or of all: each takes 15 ms."""
    parser = _subparser("Reward fine-tuning of diffusion models.", prog="rftcore", version=__version__)
    commands = parser.add_subcommands(required=True, dest="command")

    train = _subparser("Fine-tune a pipeline on a reward.")
    commands.add_subcommand("train", train, help="fine-tune a pipeline on a reward")
    _add_algorithms(train, arguments)

    configs = _subparser("The recipes that ship with rftcore.")
    commands.add_subcommand("configs", configs, help="list or copy the shipped recipes")
    actions = configs.add_subcommands(required=True, dest="action")
    actions.add_subcommand("ls", _subparser("List the recipes."), help="list them")
    copy = _subparser("Copy a recipe, to edit it and give its path to --config.")
    copy.add_argument("name", type=str, help="the recipe")
    copy.add_argument("target", type=str, nargs="?", help="file or folder; default: here")
    actions.add_subcommand("cp", copy, help="copy one")

    commands.add_subcommand(
        "info",
        _subparser("What was built, and which backend serves each op here."),
        help="what was built, and which backend serves each op here",
    )

    commands.add_subcommand(
        "rewards",
        _subparser("The rewards that ship: gradient, unit, range, what each loads, licence, options."),
        help="list the shipped rewards",
    )

    check = _subparser("One training step and one evaluation of a run, measured; writes nothing.")
    commands.add_subcommand("check", check, help="measure a run's memory and seconds before it is started")
    _add_algorithms(check, arguments)

    plan = _subparser(plan_options.PlanOptions.__doc__)
    plan_options.add_options(plan)
    commands.add_subcommand("plan", plan, help="predict a chain's memory and FLOPs, on any machine, without weights")

    bench = _subparser(bench_options.BenchOptions.__doc__)
    bench_options.add_options(bench)
    commands.add_subcommand("bench", bench, help="time and count ours beside stock diffusers and torch.compile")

    sample = _subparser(sample_options.SampleOptions.__doc__)
    sample_options.add_options(sample)
    commands.add_subcommand("sample", sample, help="sample images from prompts")

    lora = _subparser("LoRA files: mix, scale, describe, convert and compare them.")
    commands.add_subcommand("lora", lora, help="mix, scale, describe, convert or compare LoRA files")
    lora_options.add_options(lora, _subparser)
    return parser


def _add_algorithms(command: ArgumentParser, arguments: Sequence[str] | None) -> None:
    """A subcommand for each algorithm, with the options of its run."""
    algorithms = command.add_subcommands(required=True, dest="algorithm")
    for name, kind in ALGORITHMS.items():
        algorithm = _subparser(kind.__doc__)
        if arguments is None or name in arguments:
            add_options(algorithm, kind)
        algorithms.add_subcommand(name, algorithm, help=kind.__doc__)


def _subparser(description: str | None, **settings: Any) -> ArgumentParser:
    return ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False, **settings)


def _parse(arguments: list[str]) -> Namespace:
    parser = _parser(arguments)
    try:
        return parsed(parser, arguments)
    except UsageError as error:
        raise UsageError(_with_nearest(str(error), parser, arguments)) from error


def _with_nearest(message: str, parser: ArgumentParser, arguments: list[str]) -> str:
    """Adds the right flag to jsonargparse's complaint about a wrong one."""
    if "ecognized arguments" not in message:
        return message
    known = _flags_of(parser, arguments)
    words = [word.split("=")[0] for word in arguments if word.startswith("-")]
    hints = [f"{word}: {nearest(word, known)}" for word in words if word not in known]
    return "unknown flag " + "; ".join(hints) if hints else message


def _flags_of(parser: ArgumentParser, arguments: list[str]) -> set[str]:
    """The flags of the subcommand that the arguments reached."""
    for word in arguments:
        for action in parser._actions:
            if isinstance(action.choices, dict) and word in action.choices:
                parser = action.choices[word]
                break
    return {flag for action in parser._actions for flag in action.option_strings}


def _quieten_libraries() -> None:
    """Leaves the terminal to the run: no shard-loading bars, no advice on torchvision, no deprecations."""
    import warnings

    import diffusers
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _run(namespace: Namespace) -> int:
    if namespace.command == "info":
        from rftcore.build import format_info

        print(format_info())
    elif namespace.command == "rewards":
        _quieten_libraries()
        from rftcore.commands.rewards import describe as describe_rewards

        print(describe_rewards())
    elif namespace.command == "configs" and namespace.configs.action == "ls":
        for name in recipes.names():
            print(f"{name:<26} {recipes.description(name)}")
    elif namespace.command == "configs":
        print(f"wrote {recipes.copy(namespace.configs.cp.name, namespace.configs.cp.target)}")
    elif namespace.command == "plan":
        planned = plan_options.PlanOptions(**namespace.plan.as_dict())
        planned.validate()
        _quieten_libraries()
        from rftcore.commands.plan import describe, predict

        print(describe(planned, predict(planned)))
    elif namespace.command == "bench":
        compared = bench_options.BenchOptions(**namespace.bench.as_dict())
        compared.validate()
        _quieten_libraries()
        from rftcore.commands.bench import run as run_bench

        print(run_bench(compared))
    elif namespace.command == "sample":
        sampled = sample_options.SampleOptions(**namespace.sample.as_dict())
        sampled.validate()
        _quieten_libraries()
        from rftcore.commands.sample import sample

        print(f"written to {sample(sampled)}")
    elif namespace.command == "lora":
        _quieten_libraries()
        from rftcore.commands.lora import run

        action = namespace.lora.action
        print(run(action, namespace.lora[action].as_dict()))
    elif namespace.command == "check":
        config = _run_config(namespace.check)
        _quieten_libraries()
        from rftcore.training.check import check

        check(config)
    else:
        config = _run_config(namespace.train)
        # Only now is torch worth its seconds: the request is known to be sound.
        _quieten_libraries()
        from rftcore.training.trainer import Trainer

        Trainer(config).train()
    return 0


def _run_config(namespace: Namespace) -> RunConfig:
    """The config that the options after `train` or `check` describe."""
    algorithm = namespace.algorithm
    values = namespace[algorithm].as_dict()
    return build(ALGORITHMS[algorithm], {key: value for key, value in values.items() if key != "config"})
