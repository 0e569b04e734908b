"""What the verbs do, a function each.

The files in scripts/ have the same bodies with their imports at the top; a test holds them equal.
"""

from hf_power.cli.arguments import (
    AnnealArguments,
    CardArguments,
    CoordCheckArguments,
    DoctorArguments,
    EvaluateArguments,
    ExitCode,
    ExportArguments,
    FitArguments,
    ForecastArguments,
    NewArguments,
    PlanArguments,
    PublishArguments,
    ReportArguments,
    SweepArguments,
    VerifyArguments,
    ending,
    is_first_process,
    print_push,
    run_text,
)
from hf_power.cli.average import AverageArguments
from hf_power.cli.schedule import ScheduleArguments, schedule_text
from hf_power.data.text import DataArguments
from hf_power.settings.settings import Settings


def pretrain(settings: Settings) -> int:
    """Train a model from scratch: pretrain SETTINGS.yaml [--key value ...]."""
    from hf_power.pretrain.run import pretrain

    # The run takes the push out of its arguments, so that the Trainer does not push as well.
    pushes = settings.training.push_to_hub
    run = pretrain(settings)
    if not is_first_process():
        return ExitCode.DONE
    folder = settings.training.output_dir or ""
    print(run_text(run))
    print(ending(f"hf-power evaluate {folder}", folder))
    return print_push(folder) if pushes else ExitCode.DONE


def anneal(arguments: AnnealArguments) -> int:
    """Finish a model from any trunk checkpoint: anneal --from RUN/checkpoint-N --tokens 10%."""
    from hf_power.pretrain.anneal import anneal

    run = anneal(
        arguments.checkpoint,
        arguments.tokens,
        arguments.output_dir,
        decay_shape=arguments.decay_shape,
        repo=arguments.repo,
        dataset=arguments.dataset,
        resume_from_checkpoint=arguments.resume_from_checkpoint,
    )
    if not is_first_process():
        return ExitCode.DONE
    folder = arguments.folder(run.name)
    print(run_text(run))
    print(ending(f"hf-power evaluate {folder}", folder))
    return print_push(folder) if arguments.repo else ExitCode.DONE


def average(arguments: AverageArguments) -> int:
    """Finish a model without training, as the mean of a trunk's last checkpoints: average RUN [--kind decay] [--last 20%]."""
    from hf_power.pretrain.average import average, evaluate_average

    folder = average(
        arguments.run,
        arguments.kind,
        arguments.last,
        arguments.output_dir,
        decay_shape=arguments.decay_shape,
    )
    run = evaluate_average(folder, arguments.dataset)
    if run is not None and run.average is not None:
        print(f"{run_text(run)}; {run.average.kind} average of {len(run.average.tokens)} checkpoints")
    print(ending(f"hf-power evaluate {folder}", folder))
    return ExitCode.DONE


def doctor(arguments: DoctorArguments) -> int:
    """What is intact in a run, and what can be resumed: doctor RUN [--json]."""
    import dataclasses
    import json
    from pathlib import Path

    from hf_power.checkpoints.seal import examine, examined_text

    result = examine(Path(arguments.run))
    print(json.dumps(dataclasses.asdict(result), indent=2) if arguments.json else examined_text(result))
    return ExitCode.DONE if result.resume else ExitCode.FAILED


def schedule(arguments: ScheduleArguments) -> int:
    """See a learning rate before the run: schedule --peak_lr 1e-3 --tokens_per_step 8192 --steps 10000 --versus cosine."""
    from hf_power.plots.figures import check_picture, save
    from hf_power.plots.schedule import plot_rates

    planned = arguments.planned()
    if arguments.picture:
        check_picture(arguments.picture)
    print(schedule_text(arguments, planned))
    if arguments.picture:
        print(ending(None, save(plot_rates(planned, arguments.versus), arguments.picture)))
    return ExitCode.DONE


def coord_check(arguments: CoordCheckArguments) -> int:
    """Is muP right for this model? coord-check [SETTINGS.yaml | config.json] [--widths 64 128 256 512] [--controls]."""
    from hf_power.cli.checked import checked_model, measured_controls
    from hf_power.coordinates import coord_check
    from hf_power.mup.controls import BASELINE, CONTROLS
    from hf_power.plots.coordinates import plot_coord_check
    from hf_power.plots.figures import check_picture, save

    if arguments.picture:
        check_picture(arguments.picture)
    config, chosen = checked_model(arguments)
    result = coord_check(config, control=arguments.control, verbose=True, **chosen)
    print(result.table())
    if arguments.picture:
        is_wrong = arguments.control is not None  # Then it is no model to be held against a wrong one.
        wrong = None if is_wrong else coord_check(config, control="standard", **chosen | {"steps": 1})
        save(plot_coord_check(result, wrong=wrong), arguments.picture)
        print(ending(None, arguments.picture))
    passed = result.passed
    if arguments.controls:
        for name, check in measured_controls(config, chosen):
            print(f"control {name} ({CONTROLS[name].text}): {check.verdict}", flush=True)
            passed = passed and (name == BASELINE or not check.passed)
    return ExitCode.DONE if passed else ExitCode.FAILED


def new(arguments: NewArguments) -> int:
    """Settings to begin with: new my_run --from llama | Qwen/Qwen3-0.6B | path/to/config.json."""
    from pathlib import Path

    from hf_power.settings.new import new_run

    for path in new_run(Path(arguments.folder), arguments.source):
        print(f"wrote: {path}")
    folder = arguments.folder
    print(f"next: hf-power sweep {folder}/sweep.yaml --output_dir {folder}/sweep --dry_run")
    return ExitCode.DONE


def sweep(arguments: SweepArguments) -> int:
    """Train a grid of small models: sweep GRID.yaml --output_dir runs/sweep [--dry_run]."""
    from hf_power.records.rows import ROWS_FILE
    from hf_power.sweep.cost import cost_text, estimate, estimate_text
    from hf_power.sweep.grid import load_grid
    from hf_power.sweep.run import aim_text, rows_text, run_sweep

    grid, aim = load_grid(arguments.grid), arguments.aim()
    if arguments.dry_run:
        print(estimate_text(estimate(grid, arguments.output_dir, arguments.workers)))
        print(ending(f"hf-power sweep {arguments.grid} --output_dir {arguments.output_dir}"))
        return ExitCode.DONE
    print(cost_text(grid, aim), flush=True)
    rows = run_sweep(grid, arguments.output_dir, workers=arguments.workers, aim=aim)
    print(rows_text(rows) if aim is None else f"{aim_text(grid, rows, aim)}\n{rows_text(rows)}")
    print(ending(f"hf-power fit {arguments.output_dir}", f"{arguments.output_dir}/{ROWS_FILE}"))
    return ExitCode.DONE


def fit(arguments: FitArguments) -> int:
    """Fit the law to a sweep: fit runs/sweep; or to another tool's: fit runs.csv --columns learning_rate=lr ..."""
    from pathlib import Path

    from hf_power.fit.report import fit_sweep

    text = fit_sweep(
        Path(arguments.sweep),
        Path(arguments.output_dir) if arguments.output_dir else None,
        schedule=arguments.schedule,
        batch_exponent=arguments.exponent(),
        critical_batch=arguments.most(),
        size=arguments.exponent_of(),
        elsewhere=arguments.elsewhere(),
        published=arguments.compare,
    )
    print(text)
    return ExitCode.DONE


def plan(arguments: PlanArguments) -> int:
    """What the big run will do: plan RECIPE.json --tokens 1T --tokens_per_step 4M --parameters 3.5B."""
    from hf_power.plan.report import plan_run

    text = plan_run(
        arguments.recipe,
        tokens=arguments.tokens,
        tokens_per_step=arguments.tokens_per_step,
        target=arguments.target,
        parameters=arguments.parameters,
        block_size=arguments.block_size,
        devices=arguments.devices,
        flops_per_device=arguments.flops_per_device,
        utilisation=arguments.utilisation,
        output_dir=arguments.output_dir,
    )
    print(text)
    return ExitCode.DONE


def forecast(arguments: ForecastArguments) -> int:
    """Other schedules, from a few loss curves: forecast --curves A.csv B.csv --times 2 [--schedules C.csv]."""
    from pathlib import Path

    from hf_power.fit.curve_report import forecast_curves

    text = forecast_curves(
        [Path(path) for path in arguments.curves],
        schedules=[Path(path) for path in arguments.schedules],
        times=arguments.times,
        branches=arguments.branches,
        tail_steps=arguments.tail_steps,
        tail_shape=arguments.tail_shape,
        output_dir=arguments.output_dir,
    )
    print(text)
    return ExitCode.DONE


def verify(arguments: VerifyArguments, settings: Settings) -> int:
    """Before a big run: verify SETTINGS.yaml --recipe recipe.json --tokens 8M --output_dir runs/verify."""
    from hf_power.verify.check import verify
    from hf_power.verify.page import page_text

    page = verify(settings, seeds=arguments.seeds, tolerance=arguments.tolerance)
    print(page_text(page))
    folder, recipe = settings.training.output_dir or "", settings.run.recipe or ""
    print(ending(page.next_command(settings.file or "RUN.yaml", recipe, folder), f"{folder}/verify.md"))
    return ExitCode.DONE if page.passed else ExitCode.FAILED


def evaluate(arguments: EvaluateArguments, data: DataArguments) -> int:
    """Measure any checkpoint on held-out text, or on lm-evaluation-harness tasks: evaluate RUN [--tasks paper]."""
    from hf_power.evaluate.heldout import evaluate_model, evaluation_text, scores_text, written_to
    from hf_power.evaluate.tasks import NAMED_TASKS, Tasks, run_tasks
    from hf_power.settings.sections import parse_tokens

    if arguments.tasks is None:
        made = evaluate_model(
            arguments.model,
            data,
            batch_size=arguments.batch_size,
            max_tokens=None if arguments.max_tokens is None else parse_tokens(arguments.max_tokens, "--max_tokens"),
            dtype=arguments.dtype,
            output=arguments.output,
        )
        text = evaluation_text(made)
    else:
        names = arguments.tasks if arguments.tasks in NAMED_TASKS else arguments.tasks.split(",")
        scores = run_tasks(
            arguments.model,
            Tasks(names, arguments.tasks_dir, arguments.num_fewshot, arguments.limit),
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            output=arguments.output,
        )
        text = scores_text(scores)
    if is_first_process():
        print(text)
        print(ending(f"hf-power card {arguments.model}", written_to(arguments.model, arguments.output)))
    return ExitCode.DONE


def export(arguments: ExportArguments) -> int:
    """A muP model as a plain Llama or Mixtral: export RUN --to llama; --to granite goes back."""
    from hf_power.export.export import export_model, export_text

    folder = arguments.folder()
    record = export_model(arguments.model, folder, arguments.to, dtype=arguments.dtype, like=arguments.like)
    print(export_text(record))
    print(ending(f"hf-power evaluate {folder}", folder))
    return ExitCode.DONE


def card(arguments: CardArguments) -> int:
    """Write the model card of a run: card RUN --license apache-2.0."""
    from hf_power.publish.card import write_card

    path = write_card(arguments.run, license=arguments.license, repo_id=arguments.repo)
    print(ending(f"hf-power publish {arguments.run} --repo {arguments.repo or 'user/name'}", path))
    return ExitCode.DONE


def report(arguments: ReportArguments) -> int:
    """One page of all results below a folder, for a reviewer to read and sign: report runs/."""
    from hf_power.verify.evidence import write_evidence

    print(ending(None, write_evidence(arguments.folder, arguments.output)))
    return ExitCode.DONE


def publish(arguments: PublishArguments) -> int:
    """Push a run to the Hub, or complete a push, and see that it arrived: publish RUN --repo user/name."""
    from hf_power.publish.push import publish

    publish(
        arguments.run,
        arguments.repo,
        checkpoints=arguments.checkpoints,
        license=arguments.license,
        private=arguments.private,
        overwrite=arguments.overwrite,
    )
    return print_push(arguments.run)
