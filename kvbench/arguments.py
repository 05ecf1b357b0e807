"""The words of every command: what its help says, what shell completion offers, what a mistake is told; no torch.

`kvbench NAME ...` and `python -m kvbench.MODULE ...` read the same parser. Errors of all of them are one line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from kvbench import catalogue
from kvbench.errors import ConfigError, nearest

CODE_METRICS = {"difflib": "code_sim", "levenshtein": "code_sim_levenshtein"}
EXPORT_FORMATS = ("longbench", "zeroscrolls", "kvpress", "model-index", "eval-results")
LISTED = ("methods", "tasks", "models", "arms", "engines", "experiments")
SHELLS = ("bash", "zsh", "fish")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours: one line, with the nearest right word."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` in place of printing the usage."""
        raise ConfigError(f"{message}: see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:  # [] stands for no word at all
        if action.choices is not None and value not in action.choices and value != []:
            known = [str(choice) for choice in action.choices]
            name = action.metavar or "/".join(action.option_strings) or action.dest
            said = nearest(str(value), known) or f" choose from {', '.join(known)}"
            raise ConfigError(f"{value!r} is no {str(name).lower()} of {self.prog}:{said}")


def _ls(add: Callable[..., Any]) -> None:
    add("what", nargs="*", choices=LISTED, metavar="WHAT", help=f"{', '.join(LISTED)}; default: the first three")


def _check(add: Callable[..., Any]) -> None:
    target = add("target", metavar="METHOD", help="a method name (h2o), module:Class, or file.py:Class")
    target.completer = lambda prefix, **_: list(catalogue.methods())
    add("options", nargs="*", metavar="option=value", help="options of the method")
    add("--json", action="store_true", help="print the report as one JSON document")


def _score(add: Callable[..., Any]) -> None:
    add("folder", type=Path, metavar="DIR", help="folder of <dataset>.jsonl files")
    add("--e", action="store_true", help="LongBench-E: one score per length bucket")
    code_help = "similarity of code lines; default difflib, which the official requirements give"
    add("--code-metric", choices=tuple(CODE_METRICS), default="difflib", help=code_help)
    add("--write", action="store_true", help="write DIR/result.json in the official layout")


def _fetch(add: Callable[..., Any]) -> None:
    from kvbench.metrics.ruler import TASKS as RULER_TASKS  # late: only here do they matter
    from kvbench.metrics.zeroscrolls import TASKS

    names = ["longbench", "zeroscrolls", "gsm8k", "ruler"]
    names += [*(f"zeroscrolls/{task}" for task in TASKS), *(f"ruler/{task}" for task in RULER_TASKS)]

    def name_or_setting(word: str) -> str:
        if "=" not in word and word not in names:
            raise ConfigError(
                f"{word!r} is no data to fetch:{nearest(word, names) or ' there are ' + ', '.join(names)}"
            )
        return word

    help_line = f"{', '.join(names)}; for ruler also NAME=VALUE"
    words = add("names", nargs="+", type=name_or_setting, metavar="NAME", help=help_line)
    words.completer = lambda prefix, **_: names


def _export(add: Callable[..., Any]) -> None:
    add("format", choices=EXPORT_FORMATS, help="for the official scorer, the leaderboard, or a model card")
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    add("--out", type=Path, default=Path("export"), metavar="DIR", help="default: export")
    add("--mix-environments", action="store_true", help="export answers of several environments too")


def _report(add: Callable[..., Any]) -> None:
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, e.g. runs/*")
    add("--output", type=Path, help="file to write; default: RUN/report.html, or report.html for many")
    add("--mix-environments", action="store_true", help="let answers of several stand side by side")
    gate_help = "score of the full cache below which RULER's columns rank no methods; default: as output.gate"
    add("--gate", type=float, default=None, metavar="SCORE", help=gate_help)


def _tables(add: Callable[..., Any]) -> None:
    add("--experiment", nargs="*", default=[], choices=sorted(catalogue.files("experiment")), metavar="EXPERIMENT",
        help="names in configs/experiment; default: all")  # fmt: skip
    models = add("--model", nargs="*", default=[], help="models that replace the experiments' own")
    models.completer = lambda prefix, **_: list(catalogue.files("model"))
    add("--limit", type=int, default=None, help="at most so many samples of each task")
    add("--data", default=None, help="folder with <dataset>.jsonl files (data.root)")
    add("--official", default=None, help="folder with the official LongBench files (data.official)")
    add("--prompt-tokens", type=int, default=None, help="cut LongBench and ZeroSCROLLS prompts to this")
    add("--override", nargs="*", default=[], help="further settings, e.g. model.max_prompt_tokens=2000")
    add("--results", type=Path, default=Path("results"), help="where tables/ and figures/ go")
    add("--rebuild", action="store_true", help="run nothing, write tables and figures from the records")


def _progress(add: Callable[..., Any]) -> None:
    add("run", type=Path, nargs="*", default=[Path("runs")], metavar="RUN", help="run folders, or folders of them")
    add("--once", action="store_true", help="one look, then JSON as the last line")
    add("--every", type=float, default=2.0, metavar="SECONDS", help="between looks")


def _completion(add: Callable[..., Any]) -> None:
    add("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def _run(add: Callable[..., Any]) -> None:
    add("settings", nargs="*", metavar="key=value")


class Command(NamedTuple):
    """A command: the module whose `main` runs it, a line about it, and what adds its words to a parser."""

    module: str
    about: str
    add: Callable[[Callable[..., Any]], None]
    own_words: bool = False  # whether its module reads the words itself, as Hydra or the harness does


COMMANDS = {
    "run": Command("cli", "compare methods on a task (the same as python -m kvbench)", _run, own_words=True),
    "ls": Command("ls", "list methods, tasks, models: one line each", _ls),
    "check": Command("check", "check that a method keeps the contract of a policy", _check),
    "score": Command("score", "score LongBench prediction files as the official script does", _score),
    "fetch": Command("fetch", "fetch benchmark data ahead of a run", _fetch),
    "export": Command("export", "write a run's predictions for official tools, or a model card", _export),
    "report": Command("report", "write one self-contained page about runs", _report),
    "tables": Command("paper", "run what the paper's tables lack, and write them", _tables),
    "progress": Command("progress", "watch runs from their folders", _progress),
    "lm-eval": Command("lm_eval", "lm-evaluation-harness's tasks with a compressed cache", lambda add: None, True),
    "completion": Command("ls", 'shell completion: eval "$(kvbench completion bash)"', _completion),
}


def parser(name: str) -> Parser:
    """The parser of a command."""
    command = COMMANDS[name]
    made = Parser(prog=f"kvbench {name}", description=f"{command.about[0].upper()}{command.about[1:]}.")
    command.add(made.add_argument)
    return made


def overview(complete_setting: Callable[..., list[str]] | None = None) -> Parser:
    """The parser of all commands, for the help and for completion: of the settings of a run by `complete_setting`."""
    made = Parser(prog="kvbench", description="Compare KV-cache compression methods: one prefill, exact budgets.")
    made.add_argument("--version", action="store_true", help="print the version and stop")
    commands = made.add_subparsers(metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        command.add((added := commands.add_parser(name, help=command.about)).add_argument)
        if name == "run":
            added._actions[-1].completer = complete_setting  # type: ignore[attr-defined]  # argcomplete's own
    made.epilog = "kvbench COMMAND --help says more; key=value words alone are those of run."
    return made


def parse(name: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the words of a command, those of the process if none are given."""
    return parser(name).parse_args(arguments)
