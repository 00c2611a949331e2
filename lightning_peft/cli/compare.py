"""``lightning-peft compare``: train several methods under equal conditions, and recommend one."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.cli import LightningCLI
from rich.console import Console

import lightning_peft as lp
from lightning_peft.cli.retention import add_retention_options, retention_maker
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.pretrained import InputError
from lightning_peft.trainer.packages import lightning_classes

if TYPE_CHECKING:
    from lightning_peft.compare.run import Built, Metric
    from lightning_peft.compare.study import Plan, Study, Unit

__all__ = ["compare"]

EXAMPLE = """examples:
  lightning-peft compare -c base.yaml --methods LoRA,DoRA,BitFit,PrefixTuning --output runs/compare
  lightning-peft compare -c base.yaml --methods auto --metric val/acc --keep 0.95
  lightning-peft compare -c base.yaml --methods methods.yaml --seeds 3 --fractions 0.01,0.1,1

Other arguments are those of fit, such as --trainer.accelerator=gpu. The same command continues an interrupted
comparison, and several processes may run it at the same time."""

#: callbacks of the base configuration that would make runs unequal or leave files
_LEFT_OUT = ("callbacks.Checkpoint", "callbacks.EarlyStopping", "callbacks.ProgressBar", "callbacks.ModelSummary")


def compare(args: Sequence[str], cli_class: type[LightningCLI]) -> None:
    """Run the command.

    Args:
        args: the command-line arguments after ``compare``.
        cli_class: builds the Trainer, the module and the data from arguments of ``fit``.

    Raises:
        StateError: if Optuna is not installed.
        InputError: if an argument is not valid, or ``--output`` holds another comparison.
    """
    options, fit_flags = _parser().parse_known_args(args)
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError as error:
        raise StateError("compare needs optuna: pip install 'lightning_peft[compare]'") from error
    from lightning_peft.compare import report
    from lightning_peft.compare.candidates import Candidate, fitting, parse_candidates
    from lightning_peft.compare.recommend import Budget, recommend, summarise
    from lightning_peft.compare.run import Runner
    from lightning_peft.compare.store import Store
    from lightning_peft.compare.study import Study

    base = [*(word for file in options.config for word in ("-c", file)), *fit_flags]
    common = {"trainable": options.trainable.split(",")} if options.trainable else {}
    _fill(options)
    candidates, named = parse_candidates(options.methods, common, fixed_rank=options.trials < 4)
    if options.keep is not None and all(c.method != "FullFineTuning" for c in candidates):
        candidates.append(Candidate("FullFineTuning", "FullFineTuning"))
    metric, store = _metric(options), Store(Path(options.output), _settings(options, base))
    build = _Builder(cli_class, base, Path(options.output).name)
    build.check()
    runner = Runner(build, options.lr_flag or build.rate_flag(), metric, retention_maker(options), options.scales)
    if options.retry_failed:
        store.forget_failures()
    with store.claim("base", wait=True):
        facts: Any = store.get("base")
        if facts is None:
            built, value, steps = runner.base()
            fits = fitting(candidates, built.module, options.methods.strip() == "auto")
            facts = {"metric": value, "steps": steps, "fits": fits}
            store.put("base", facts)
    if not named:
        candidates = [c for c in candidates if c.label in facts["fits"]]
    if options.halving and options.max_params is not None:  # methods over the budget would take the places of others
        candidates = [c for c in candidates if facts["fits"].get(c.label, 0) <= options.max_params]
    plan = _plan(options, candidates, facts["steps"])
    study = Study(plan, runner, store)
    console = Console(file=sys.stdout)  # also while the output of runs is hidden
    _work(study, console)
    results, budget = study.results(), Budget(options.max_params, options.max_minutes, options.keep)
    length = facts["steps"] / plan.steps
    recommendations = {
        fraction: recommend(
            summarise([r for r in results if r.fraction == fraction], metric.lower),
            budget,
            metric.lower,
            facts["metric"],
            length,
        )
        for fraction in plan.fractions
    }
    findings = report.Findings(
        title=f"Methods compared on {', '.join(Path(file).name for file in options.config) or 'the task'}",
        metric=metric.final,
        lower=metric.lower,
        results=results,
        failures=study.failures(),
        recommendations=recommendations,
        base=facts["metric"],
        base_command=["lightning-peft", "fit", *base],
        setting=report.setting(plan),
        minutes=study.minutes(),
        parts=study.parts(),
        search_metric=metric.search,
        distance=vars(options)["retention.distance"],
    )
    with store.claim("report", wait=True):
        report.write(findings, store.folder)
    _print(findings, console, store.folder)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-peft compare",
        description="Train several methods on one task under equal conditions, and recommend one.",
        epilog=EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config", action="append", default=[], help="a configuration of fit, without a method")
    add("--methods", default="auto", help="names, 'auto' (one of each family), 'all', or a YAML file; default: auto")
    add("--output", default="runs/compare", help="folder of the results; default: %(default)s")
    add("--metric", default="val/loss", help="a metric that the module logs in validation; default: %(default)s")
    add("--mode", choices=["min", "max"], help="default: min for a loss or an error, else max")
    add("--test", action="store_true", help="measure finished runs on the test split; searches never see it")
    add("--search-metric", help="the metric that searches optimise; default: --metric")
    add("--steps", type=int, help="optimizer steps of each run; default: as many as the configuration has")
    add(
        "--search-steps",
        type=int,
        help="optimizer steps of each trial of a search; default: a quarter of --steps; with --halving an eighth, "
        "at least 10",
    )
    add("--trials", type=int, help="trials for each method; 0 for no search; default: 6, with --halving 3")
    add(
        "--halving",
        action="store_true",
        help="stop the worse half of the methods after their searches, and all but the finalists after a quarter of "
        "the steps",
    )
    add("--seeds", type=int, default=2, help="number of seeds with which the finalists run; default: %(default)s")
    add("--finalists", type=int, help="number of the best methods that run with every seed; default: 5, --halving: 2")
    add("--fractions", type=_numbers, default=(1.0,), help="fractions of the training data, such as 0.01,0.1,1")
    add("--trainable", help="modules that train in full with every method, such as classifier")
    add("--lr-flag", help="the argument of fit that sets the learning rate, such as --lr-flag=--model.rate")
    add_retention_options(parser)
    add(
        "--scales",
        type=_numbers,
        default=(0.25, 0.5, 0.75),
        help="with retention data, evaluate each method again at these factors of lp.scale; default: 0.25,0.5,0.75",
    )
    add(
        "--max-params",
        type=lambda text: int(float(text)),
        help="largest number of trainable parameters of the recommended method",
    )
    add("--max-minutes", type=float, help="longest full training of the recommended method, in minutes")
    add(
        "--keep",
        type=float,
        help="recommend the smallest method that keeps this fraction of full fine-tuning's quality, such as 0.95",
    )
    add("--retry-failed", action="store_true", help="retry methods that failed before")
    return parser


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def _fill(options: Namespace) -> None:
    """Set the defaults that depend on other arguments.

    Raises:
        InputError: arguments contradict each other.
    """
    limits = {"--keep": options.keep, "--max-minutes": options.max_minutes}
    for name in (name for name, value in limits.items() if options.halving and value is not None):
        raise InputError(
            f"{name} asks for a small or fast method that is good enough, but --halving trains only the best methods "
            f"in full: leave out --halving or {name}"
        )
    trials, finalists = (3, 2) if options.halving else (6, 5)
    options.trials = trials if options.trials is None else options.trials
    options.finalists = max(1, finalists if options.finalists is None else options.finalists)


def _metric(options: Namespace) -> Metric:
    from lightning_peft.compare.run import Metric, minimised

    search = options.search_metric or options.metric
    lower = options.mode == "min" if options.mode else minimised(options.metric)
    search_lower = lower if search == options.metric else minimised(search)
    return Metric(options.metric, lower, options.test, search, search_lower)


def _settings(options: Namespace, base: Sequence[str]) -> dict[str, Any]:
    """The settings that all runs have in common."""
    files = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in options.config}
    names: tuple[str, ...] = ("metric", "mode", "test", "search_metric", "steps", "search_steps", "trials")
    names += ("lr_flag", "halving")
    names += tuple(name for name in vars(options) if name.startswith("retention."))
    return {"configuration": files, "arguments": list(base), **{name: getattr(options, name) for name in names}}


def _plan(options: Namespace, candidates: Sequence[Any], steps: int) -> Plan:
    from lightning_peft.compare.study import Plan

    if not candidates:
        raise InputError(f"--methods {options.methods}: no method fits this model; lightning-peft inspect says why")
    if bad := [f for f in options.fractions if not 0 < f <= 1]:
        raise InputError(f"--fractions {bad}: a fraction is above 0 and at most 1")
    steps = options.steps or steps
    short = min(steps, max(10, steps // 8)) if options.halving else max(1, steps // 4)
    return Plan(
        candidates,
        steps=steps,
        search_steps=options.search_steps or short,
        trials=options.trials,
        seeds=range(max(1, options.seeds)),
        finalists=options.finalists,
        fractions=options.fractions,
        halving=options.halving,
    )


def _work(study: Study, console: Console) -> None:
    """Run the searches and the trainings of the study, with a progress bar and a line for each that ends."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    plan = study.plan
    per_fraction = 2 * len(plan.candidates) + (len(plan.seeds) - 1) * min(plan.finalists, len(plan.candidates))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=per_fraction * len(plan.fractions))

        def tell(unit: Unit, what: str) -> None:
            if what == "start":
                progress.update(task, description=str(unit))
                return
            progress.update(task, completed=study.done())
            console.print(f"{unit}: {what}" if what != "done" else study.describe(unit), highlight=False)

        study.run(tell)


def _print(findings: Any, console: Console, folder: Path) -> None:
    from lightning_peft.compare import report

    for fraction in findings.recommendations:
        console.print(report.table(findings, fraction))
    for failure in findings.failures:
        console.print(f"failed: {failure.label}: {failure.reason}", style="red", highlight=False)
    console.print(f"{folder / 'report.md'}, {folder / 'results.csv'}", highlight=False)
    for fraction in findings.recommendations:
        if len(findings.recommendations) > 1:
            console.print(f"With {fraction:g} of the data:", highlight=False)
        for line in report.advice(findings, fraction):
            console.print(line, highlight=False, soft_wrap=True, markup=False)


class _Builder:
    """Builds runs as ``lightning-peft fit`` does; a :class:`lightning_peft.compare.run.Builder`.

    Args:
        cli_class: the command line.
        base: the arguments of ``fit`` that all runs have in common.
        group: the name of the comparison, under which W&B groups its runs.
    """

    def __init__(self, cli_class: type[LightningCLI], base: Sequence[str], group: str) -> None:
        self._base, self._group = [*base], group
        self._class = _run_class(cli_class)

    def __call__(
        self,
        flags: Sequence[str],
        callbacks: Sequence[L.Callback],
        trainer: Mapping[str, Any],
        name: str | None = None,
    ) -> Built:
        from lightning_peft.compare.run import Built

        run: Any = self._run(flags, callbacks=callbacks, options=trainer, name=name, group=self._group)
        return Built(run.trainer, run.model, run.datamodule)

    def _run(self, flags: Sequence[str], **settings: Any) -> Any:
        made: Any = type("Run", (self._class,), settings)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return made(args=["fit", *self._base, *flags])
        except SystemExit as error:  # how jsonargparse reports an argument
            lines = [line.removeprefix("error: ").strip() for line in said.getvalue().splitlines() if line.strip()]
            raise InputError(lines[-1] if lines else f"fit does not accept {' '.join(flags)}") from error

    @functools.cached_property
    def config(self) -> Any:
        """The parsed base configuration."""
        run: Any = self._run([], only_config=True)
        return run.config["fit"]

    def check(self) -> None:
        """Refuse a configuration that has a method.

        Raises:
            InputError: if it has a method.
        """
        for callback in self.config["trainer"].get("callbacks") or []:
            name = str(callback.class_path).rpartition(".")[2]
            kind = getattr(lp, name, None)
            if isinstance(kind, type) and issubclass(kind, lp.PEFTMethod):
                raise InputError(
                    f"the configuration already has a method ({name}), but compare adds the methods itself: remove it "
                    "from trainer.callbacks"
                )

    def rate_flag(self) -> str:
        """The argument that sets the learning rate.

        Raises:
            InputError: if neither the optimizer of the configuration nor the module has a learning rate.
        """
        config = self.config
        if config.get("optimizer"):
            return "--optimizer.lr"
        arguments = config["model"].get("init_args") or {}
        for name in ("lr", "learning_rate"):
            if name in arguments:
                return f"--model.{name}"
        raise InputError(
            f"{config['model'].class_path} has no argument lr or learning_rate: add --lr-flag with the argument of "
            "fit that sets its learning rate, such as --lr-flag=--model.rate, or an optimizer to the configuration"
        )


def _run_class(cli_class: type[LightningCLI]) -> type:
    """A command line that builds a run for a comparison, and does not start it."""

    class Run(cli_class):  # type: ignore[misc, valid-type]
        callbacks: Sequence[L.Callback] = ()
        options: Mapping[str, Any] = {}
        name: str | None = None
        group = ""
        only_config = False

        def before_instantiate_classes(self) -> None:
            self.save_config_callback = None

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"fit": LightningCLI.subcommands()["fit"]}

        def _add_subcommands(self, parser: Any, **kwargs: Any) -> None:
            LightningCLI._add_subcommands(self, parser, **kwargs)

        def instantiate_classes(self) -> None:
            if not self.only_config:
                super().instantiate_classes()

        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            config = self._get(self.config_init, "trainer")
            own = [c for c in config.get("callbacks") or [] if not isinstance(c, _classes(_LEFT_OUT))]
            options = {**kwargs, **self.options, "callbacks": [*own, *self.callbacks]}
            loggers: list[Any] = _as_list(config.get("logger"))
            wandb: list[Any] = [g for g in loggers if isinstance(g, _classes(("loggers.WandbLogger",)))]
            for logger in wandb if self.name is not None else ():
                logger._wandb_init.update(group=self.group, name=self.name)
                options["logger"] = wandb
            return super().instantiate_trainer(**options)

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    return Run


def _classes(names: Sequence[str]) -> tuple[type, ...]:
    return tuple(kind for name in names for kind in lightning_classes(name))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
