"""The command line: parse, pick a preset, call. Torch is loaded only by what needs it.

Exit codes: 0 done; 2 bad arguments, config or data, before anything is written; 1 the run failed;
143 stopped by SIGTERM or SIGHUP with a checkpoint on disk.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from dseqjepa import ending
from dseqjepa.arguments import (
    as_options,
    check_positions,
    flag,
    resume_of,
    row_and_column,
    split_settings,
)
from dseqjepa.ending import fail
from dseqjepa.errors import InputError, Stopped, did_you_mean
from dseqjepa.kernels import keep_few

if TYPE_CHECKING:
    from dseqjepa.config import Config


def examples(*lines: str) -> str:
    """What stands below a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  dseqjepa {line}" for line in lines)


app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Pre-train image encoders on pictures without labels, evaluate them, and use them "
    "elsewhere.\n\nSettings are words of the form section.key=value; `dseqjepa settings` says what "
    "each means.",
    epilog=examples(
        "pretrain vitn8_64 data=my_pictures out=runs/mine optim.minutes=30",
        "evaluate knn runs/mine data=my_pictures",
        "embed runs/mine my_pictures out=mine.parquet",
    ),
)


def _presets() -> list[str]:
    from dseqjepa.presets import preset_names

    return list(preset_names())


def _tasks() -> list[str]:
    from dseqjepa.tasks.config import TASKS

    return list(TASKS)


def _sections() -> list[str]:
    from dseqjepa.describe import section_names

    return section_names()


Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings, as below or as `dseqjepa settings` lists them."
    ),
]
Preset = Annotated[
    str,
    typer.Argument(
        metavar="PRESET|FILE.yaml",
        help="A recipe that `dseqjepa presets` lists, or the config.yaml of a run.",
        autocompletion=_presets,
    ),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Show the resolved config and do nothing.")
]

TASK_HELP = (
    "knn, linear, attentive, dense, lowshot, clevr, finetune, detection, segmentation, discovery"
)
RUN_KEYS = ("out", "resume", "overwrite", "init_from", "allow_changed")


def main() -> None:
    """Run a command; an error that the user can mend is one line and an exit code."""
    keep_few()
    ending.run(_called, sys.argv[1:] or ["--help"])


def _called(words: list[str], **how: Any) -> Any:
    program = typer.main.get_command(app)
    options = as_options(program, words)
    check_positions(program, options)
    return app(options, **how)


def _version(wanted: bool) -> bool:
    if wanted:
        from dseqjepa import __version__

        print(f"dseqjepa {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@app.command(
    epilog=examples(
        "pretrain vitn8_64 data=my_pictures out=runs/mine optim.minutes=30",
        "pretrain ijepa_vitn8_64 data=my_pictures out=runs/ijepa optim.minutes=30 resume=true",
        "pretrain vitn8_64 data=my_pictures out=runs/next init_from=runs/mine optim.minutes=30",
    )
)
def pretrain(
    preset: Preset,
    settings: Settings = None,
    print_config: PrintConfig = False,
) -> None:
    """Pre-train an encoder on a folder of images.

    out=DIR holds the run: config, log, metrics and checkpoints. resume=true resumes it, resume=auto
    starts it if there is no checkpoint, and init_from=RUN starts a new run from the weights of
    another. overwrite=true replaces a run, and allow_changed=data or config lets one resume with
    other images or settings.
    """
    run, config = _own_and_config(preset, settings, RUN_KEYS, print_config)
    if "out" not in run:
        raise InputError("out=DIR is missing: name the folder in which the run is kept")

    from dseqjepa.tasks.online import online_probe
    from dseqjepa.train.pretrain import open_training_source
    from dseqjepa.train.pretrain import pretrain as train
    from dseqjepa.train.runtime import connect, place, spread
    from dseqjepa.viz.regions import training_picture

    resume, overwrite = resume_of(run), flag(run, "overwrite")
    devices = config.runtime.devices
    if devices > 1 and place().world == 1:
        sys.exit(spread(devices, sys.argv[1:], config.runtime.timeout_s + 5))
    runtime = connect(config)
    source = runtime.ranks.together(lambda: open_training_source(config))

    try:
        train(
            config,
            Path(run["out"]).expanduser(),
            resume=resume,
            overwrite=overwrite,
            init_from=Path(run["init_from"]).expanduser() if "init_from" in run else None,
            allow_changed=run["allow_changed"].split(",") if "allow_changed" in run else (),
            source=source,
            probe=online_probe(config, source),
            picture=training_picture(source, config.data.image_size, config.runtime.seed),
            runtime=runtime,
            preset=preset,
        )
    except Stopped:
        runtime.ranks.close()
        raise
    except KeyboardInterrupt:
        fail("interrupted; resume=true continues from the last checkpoint", 130)
    runtime.ranks.close()


def _own_and_config(
    preset: str, settings: list[str] | None, own: tuple[str, ...], print_config: bool
) -> tuple[dict[str, str], Config]:
    """A command's own settings, and the config; if that is to be printed, the command ends."""
    from dseqjepa.presets import load_config

    mine, overrides = split_settings(settings or [], own)
    config = load_config(preset, overrides)
    if print_config:
        print(config.to_yaml(), end="")
        raise typer.Exit
    return mine, config


@app.command("verify-resume", epilog=examples("verify-resume ijepa_vitn8_64 data=my_pictures"))
def verify_resume(
    preset: Preset,
    settings: Settings = None,
    print_config: PrintConfig = False,
) -> None:
    """Check that a resumed run equals the uninterrupted run.

    A few steps are trained in one process, and the same steps in two, the second resuming from the
    first's checkpoint. Every tensor and every metric is compared; the exit code is 1 if any
    differs. steps=N sets the number of steps.
    """
    own, config = _own_and_config(preset, settings, ("steps",), print_config)
    from dseqjepa.train.verify import STEPS, compare_resumed

    steps = own.get("steps", str(STEPS))
    if not steps.isdecimal() or int(steps) < 2:
        raise InputError(f"steps must be a number from 2 on, found {steps!r}")
    print(f"{steps} steps at once, and {int(steps) // 2} + {-(-int(steps) // 2)} in two processes")
    rows = compare_resumed(config, int(steps))
    for row in rows:
        print(row)
    if not all(row.same for row in rows):
        fail(
            "the run that was cut differs from the one that was not (a GPU adds in no fixed order "
            "unless runtime.deterministic=true)",
            1,
        )
    print("exact: a stopped run resumes as if it had not been stopped")


@app.command(
    epilog=examples("preflight vitn8_64 data=my_pictures --out regions.png --json preflight.json")
)
def preflight(
    preset: Preset,
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.png", help="Draw the regions of some images."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all findings to a JSON file."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option("--on", help="Compute for another device: a100, h100, h200 or l40s."),
    ] = None,
    devices: Annotated[int, typer.Option(help="The number of devices.", min=1)] = 1,
    print_config: PrintConfig = False,
) -> None:
    """Estimate the cost of a run before it starts.

    A few steps are timed on this machine, and up to 500 images are checked for broken files,
    identical images and images that are too small. Only the files named by options are written.
    --on h100 --devices 64 works out what it would cost there, on ImageNet-1k, without data.
    """
    run, config = _own_and_config(preset, settings, ("init_from",), print_config)
    out, json_file = (file.expanduser() if file is not None else None for file in (out, json_file))
    if on is None and devices != 1:
        raise InputError("--devices is for --on; on this machine, set runtime.devices")
    if on is not None:
        if out is not None or "init_from" in run:
            raise InputError("--on needs neither images nor weights: leave out --out and init_from")
        for key in (setting.partition("=")[0] for setting in settings or []):
            if key in ("data", "data.source", "data.size", "optim.minutes"):
                raise InputError(f"--on computes epochs of ImageNet-1k: leave out {key}")
        from dseqjepa.forecast import preflight_on

        preflight_on(config, on, devices, report=json_file)
        return
    from dseqjepa.preflight import preflight as look

    init_from = Path(run["init_from"]).expanduser() if "init_from" in run else None
    look(config, init_from=init_from, out=out, report=json_file)


@app.command(
    epilog=examples(
        "evaluate knn runs/mine data=my_pictures",
        "evaluate linear runs/mine data=my_pictures preset=quick",
        "evaluate lowshot runs/mine data=my_pictures fraction=0.2",
        "evaluate knn timm:test_vit data=my_pictures out=results/timm.json",
    )
)
def evaluate(
    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help=f"One of {TASK_HELP}.", autocompletion=_tasks),
    ],
    backbone: Annotated[
        str,
        typer.Argument(
            metavar="BACKBONE",
            help="A run, a checkpoint, a weights file or folder, hf:FOLDER, timm:NAME, "
            "random:PRESET or pixels.",
        ),
    ],
    settings: Settings = None,
    print_config: PrintConfig = False,
) -> None:
    """Evaluate an encoder on labelled images.

    The full protocol is the default; preset=quick is a small version. The result is a table and a
    JSON file in the run's folder, or out=FILE.json. Trained classifiers are saved next to it for
    `dseqjepa predict`. `dseqjepa settings TASK` explains the settings of a task.
    """
    from dseqjepa.tasks.config import TASKS

    if task not in TASKS:
        raise InputError(f"unknown task {task!r}{did_you_mean(task, TASKS)}")
    own, overrides = split_settings(settings or [], ("data", "out", "resume", "overwrite"))
    config = TASKS[task].from_settings(overrides)
    if print_config:
        values = config.model_dump(mode="json")
        print(yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=1000), end="")
        return
    from dseqjepa.tasks.run import run_task

    out = Path(own["out"]).expanduser() if "out" in own else None
    resume = own.get("resume", "").lower() == "auto" or flag(own, "resume", " or auto")
    overwrite = flag(own, "overwrite")
    run_task(
        task,
        backbone,
        config,
        data=own.get("data"),
        out=out,
        resume=resume,
        overwrite=overwrite,
        draw=_picture_of(task),
    )


def _picture_of(task: str) -> Any:
    """What draws a result; None where there is nothing to draw, or nothing to draw with."""
    try:
        from dseqjepa.viz.results import draw_result
    except InputError as error:
        print(f"without a picture: {error}")
        return None
    return partial(draw_result, task)


@app.command(epilog=examples("results runs results", "results runs results --out table.md"))
def results(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Runs, or folders with results.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the table as .md, .csv or .json."),
    ] = None,
) -> None:
    """Tabulate the results of evaluations.

    There is one column per protocol and data set, and one row per recipe; runs that differ only in
    their seed are summarized by mean and 95 % interval.
    """
    from dseqjepa.tasks.table import collect, write_table

    table = collect([folder.expanduser() for folder in folders])
    print(table.markdown(), end="")
    if out is not None:
        write_table(table, out.expanduser())
        print(f"written: {out}")


@app.command("import", epilog=examples("import ijepa.pth.tar out=runs/imported"))
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|FOLDER",
            help="A weights file of a plain ViT, or a folder that transformers or timm wrote.",
        ),
    ],
    settings: Settings = None,
) -> None:
    """Import an encoder from another project.

    Only tensors are read, no code is run, and the features are compared with those of the other
    library. The result can be evaluated, shown, and used by init_from. heads=N, image_size=[H,W],
    mean=[R,G,B] and std=[R,G,B] state what shapes cannot tell.
    """
    run, overrides = split_settings(settings or [], ("out", "overwrite"))
    if "out" not in run:
        raise InputError("out=DIR is missing: name the folder in which the encoder is kept")
    from dseqjepa.commands import ImportConfig
    from dseqjepa.train.foreign import facts_of, import_encoder

    config = import_encoder(
        file.expanduser(),
        Path(run["out"]).expanduser(),
        ImportConfig.from_settings(overrides),
        overwrite=flag(run, "overwrite"),
        tell=print,
    )
    print(f"imported to {run['out']}: {facts_of(config)}")


@app.command(epilog=examples("export runs/mine --to hf --out mine-hf"))
def export(
    encoder: Annotated[
        str,
        typer.Argument(
            metavar="ENCODER", help="A run, a checkpoint, a weights file or random:PRESET."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="One of hf, timm, onnx and torch.",
            autocompletion=lambda: ["hf", "timm", "onnx", "torch"],
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or an empty folder.")],
    settings: Settings = None,
) -> None:
    """Export an encoder to another library.

    That library loads the folder in its own process, and must compute the same features on training
    images (data=PATH selects others) before the folder appears. weights=context selects the context
    encoder, and image_size=[H,W] the size that positions are stored for.
    """
    own, overrides = split_settings(settings or [], ("data",))
    from dseqjepa.commands import ExportConfig
    from dseqjepa.export.write import export_encoder

    config = ExportConfig.from_settings(overrides)
    export_encoder(encoder, to, out.expanduser(), config, data=own.get("data"), tell=print)
    print(f"written: {out}")


@app.command(
    epilog=examples(
        "embed runs/mine my_pictures out=mine.parquet",
        "embed runs/mine my_pictures out=looks.csv --neighbours 5 --duplicates --outliers "
        "--clusters 2 --map pca",
    )
)
def embed(
    encoder: Annotated[
        str,
        typer.Argument(
            metavar="ENCODER",
            help="A run, a checkpoint, a weights file or folder, hf:FOLDER, timm:NAME or pixels.",
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGES]... out=FILE [KEY=VALUE]...",
            help="Files, folders, lists of paths (.txt); data=PATH in their place.",
        ),
    ] = None,
    neighbours: Annotated[
        int, typer.Option(metavar="K", help="Find the K most similar images of each.")
    ] = 0,
    duplicates: Annotated[
        bool,
        typer.Option("--duplicates", help="Find near-duplicates; threshold=COSINE sets the limit."),
    ] = False,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Score how far each image is from its 10 nearest.")
    ] = False,
    clusters: Annotated[int, typer.Option(metavar="K", help="Sort images into K clusters.")] = 0,
    map: Annotated[str, typer.Option(metavar="pca|umap", help="Add two coordinates to plot.")] = "",
) -> None:
    """Write the features of images as a table.

    out=FILE ends in .parquet, .npy (with a .csv next to it) or .csv. features=last|last4|cls|block7
    and per=image|patch select the features. Options add columns, and a page next to the table. The
    same command resumes where it was stopped.
    """
    images, run, overrides = _images_and_settings(words, ("data", "out", "overwrite"))
    if "out" not in run:
        raise InputError("out=FILE is missing: name the table, such as out=features.parquet")
    from dseqjepa.commands import EmbedConfig
    from dseqjepa.embeddings.findings import Asked
    from dseqjepa.embeddings.run import RESUMES, embed_images

    try:
        written = embed_images(
            encoder,
            EmbedConfig.from_settings(overrides),
            Path(run["out"]).expanduser(),
            images=images,
            data=run.get("data"),
            overwrite=flag(run, "overwrite"),
            asked=Asked(neighbours, duplicates, outliers, clusters, map),
        )
    except KeyboardInterrupt:
        fail(f"interrupted; {RESUMES}", 130)
    for path in written:
        print(f"written: {path}")


def _images_and_settings(
    words: list[str] | None, own: tuple[str, ...]
) -> tuple[list[str], dict[str, str], list[str]]:
    """Of a command that takes both: the images, its own settings, and those of its config."""
    images: list[str] = []
    settings: list[str] = []
    for word in words or []:
        is_setting = re.match(r"[a-z_]+=", word) and not Path(word).exists()
        (settings if is_setting else images).append(word)
    return images, *split_settings(settings, own)


@app.command(
    epilog=examples(
        "predict runs/mine/evaluations/linear-head.safetensors my_pictures",
        "predict runs/mine/evaluations/linear-head.safetensors my_pictures out=classes.csv top=2",
    )
)
def predict(
    head: Annotated[
        Path, typer.Argument(metavar="HEAD", help="A classifier saved by an evaluation.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGES]... [KEY=VALUE]...",
            help="Files, folders, lists of paths (.txt); data=PATH in their place.",
        ),
    ] = None,
) -> None:
    """Classify images with a trained classifier.

    `dseqjepa evaluate` saves the classifier (linear, lowshot, attentive). out=FILE ends in .csv or
    .parquet; without it, one line per image is printed. top=K gives the K most probable classes,
    and encoder=PATH locates the encoder if it was moved.
    """
    images, run, overrides = _images_and_settings(words, ("data", "out", "overwrite", "encoder"))
    from dseqjepa.commands import PredictConfig
    from dseqjepa.embeddings.predict import predict_images

    predict_images(
        head.expanduser(),
        PredictConfig.from_settings(overrides),
        Path(run["out"]).expanduser() if "out" in run else None,
        images=images,
        data=run.get("data"),
        encoder=run.get("encoder"),
        overwrite=flag(run, "overwrite"),
        tell=print,
    )
    if "out" in run:
        print(f"written: {run['out']}")


@app.command(
    epilog=examples(
        "show runs/mine my_pictures --out pictures",
        "show runs/mine my_pictures --only clusters,pca,similarity --patch 3,4 --out pictures",
        "show runs/mine --only curves --beside runs/ijepa --out pictures",
    )
)
def show(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run or a checkpoint.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder for the pictures.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="[IMAGES]...", help="Image files, folders, or what data= takes."),
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            help="Draw these pictures: sheets, regions, clusters, pca, similarity, neighbours, "
            "scatter, curves, several with commas between, or all."
        ),
    ] = "sheets,regions",
    beside: Annotated[
        Path | None, typer.Option(help="Draw a second run or checkpoint beside it.")
    ] = None,
    patch: Annotated[
        str | None,
        typer.Option(metavar="ROW,COL", help="Draw the similarity to this patch, from 0,0."),
    ] = None,
    clusters: Annotated[int, typer.Option(help="The number of clusters.")] = 4,
    checkpoints: Annotated[int, typer.Option(help="Draw at most this many checkpoints.")] = 5,
    data: Annotated[
        str | None,
        typer.Option(help="Find neighbours, and scatter, in this data set, not in the run's own."),
    ] = None,
    sample: Annotated[int, typer.Option(help="The maximum number of images from --data.")] = 2000,
    limit: Annotated[int, typer.Option(help="The maximum number of images from a folder.")] = 8,
    ending: Annotated[str, typer.Option("--format", help="Write png, pdf or svg.")] = "png",
) -> None:
    """Draw what an encoder sees in images.

    Saliency, regions, clusters, neighbours and more are written to --out, and so are the curves of
    a run.
    """
    from dseqjepa.viz.show import PICTURES, Request
    from dseqjepa.viz.show import show as draw

    request = Request(
        checkpoint=checkpoint.expanduser(),
        images=tuple(images or ()),
        out=out.expanduser(),
        only=tuple(PICTURES) if only == "all" else tuple(dict.fromkeys(only.split(","))),
        beside=beside.expanduser() if beside is not None else None,
        patch=row_and_column(patch) if patch is not None else None,
        clusters=clusters,
        checkpoints=checkpoints,
        data=data,
        limit=limit,
        sample=sample,
        ending=ending,
    )
    for path in draw(request):
        print(path)


@app.command(
    epilog=examples(
        "report runs/mine --out mine.html", "report runs/mine runs/ijepa --out report.html"
    )
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The folders of runs.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page to write.")],
    images: Annotated[int, typer.Option(help="The number of images shown per run.")] = 6,
) -> None:
    """Write an HTML report on one or several runs."""
    from dseqjepa.report.page import write_report

    written = write_report([run.expanduser() for run in runs], out.expanduser(), images=images)
    print(f"written: {written}")


STUDY_KEYS = (
    "out", "jobs", "scale", "data", "seeds", "retry", "cell", "allow_changed",
)  # fmt: skip


@app.command(
    epilog=examples(
        "study plan studies.yaml optim.epochs=8",
        "study studies.yaml out=studies/order jobs=2 optim.epochs=8",
        "study table5 out=studies/table5 jobs=20 --slurm",
    )
)
def study(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[plan] NAME|FILE.yaml [KEY=VALUE]...",
            help="A built-in study or a file, after `plan` for its cost alone; then settings.",
        ),
    ],
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Write a job array instead of running.")
    ] = False,
    print_config: PrintConfig = False,
) -> None:
    """Test claims about methods over several seeds.

    Every variant, seed and evaluation is an ordinary run, and the claims are frozen before anything
    runs. The same command resumes a study, also from several machines that share its folder; `study
    plan NAME` estimates the cost. section.key=value changes the recipe of all variants.
    scale=laptop, gpu or paper; data=PATH,PATH; retry=failed or unhealthy; allow_changed=code or
    machine; cell=NUMBER runs a single cell.
    """
    is_plan = words[0] == "plan"
    name, *settings = words[1:] if is_plan and words[1:] else words
    settings = [re.sub(r"^data\.source=", "data=", word) for word in settings]
    own, overrides = split_settings(settings, STUDY_KEYS)
    from dseqjepa.studies.builtin import declared

    found = declared(
        name,
        overrides,
        scale=own.get("scale"),
        data=own.get("data"),
        seeds=own.get("seeds"),
    )
    if print_config:
        print(found.to_yaml(), end="")
        return
    if is_plan and slurm:
        raise InputError("plan only estimates the cost: leave out --slurm")
    idle = {"retry", "cell"} if slurm else set()
    idle |= {"out", "retry", "cell", "allow_changed"} if is_plan else set()
    if unused := sorted(idle & own.keys()):
        what = "plan" if is_plan else "--slurm"
        raise InputError(f"{unused[0]} has no effect with {what}: leave it out")
    jobs = own.get("jobs", "1")
    if not jobs.isdecimal() or int(jobs) < 1:
        raise InputError(f"jobs must be a whole number of at least 1, found {jobs!r}")
    from dseqjepa.studies.run import plan_study, run_study, write_slurm

    if is_plan:
        plan_study(found, int(jobs))
        return
    if "out" not in own:
        raise InputError("out=DIR is missing: name the folder in which the study is kept")
    out = Path(own["out"]).expanduser()
    changed = own["allow_changed"].split(",") if "allow_changed" in own else []
    if slurm:
        print(f"written: {write_slurm(found, out, int(jobs), changed)}")
        return
    stopped_by = run_study(
        found,
        out,
        jobs=int(jobs),
        only=own.get("cell", ""),
        retry=own["retry"].split(",") if "retry" in own else (),
        allow_changed=changed,
    )
    if stopped_by:
        sys.exit(128 + stopped_by)


@app.command(epilog=examples("demo --out demo"))
def demo(
    settings: Settings = None,
    out: Annotated[Path, typer.Option("--out", help="A folder for the files of the demo.")] = Path(
        "demo"
    ),
    print_config: PrintConfig = False,
) -> None:
    """Train on the rendered scenes and show what was learnt.

    It takes 4 minutes on two idle CPU cores with bfloat16 instructions, or half an hour on two busy
    ones without, and needs no network.
    """
    from dseqjepa.presets import load_config

    config = load_config("dseq_vitt_demo", settings or [])
    if print_config:
        print(config.to_yaml(), end="")
        return
    from dseqjepa.demo import run_demo

    run_demo(config, out.expanduser())


scenes = typer.Typer(
    rich_markup_mode=None,
    help="Write the rendered scenes as files.",
    epilog=examples("scenes export imagenet mini/imagenet"),
)
app.add_typer(scenes, name="scenes")


shards = typer.Typer(
    rich_markup_mode=None,
    help="Keep images in tar files, for large data sets.",
    epilog=examples("shards pack my_pictures my_shards", "shards index my_shards"),
)
app.add_typer(shards, name="shards")


@shards.command("pack", epilog=examples("shards pack my_pictures my_shards"))
def pack_shards(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Any folder of images.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or an empty folder.")],
    size: Annotated[int, typer.Option(help="The most megabytes per tar file.", min=1)] = 500,
    is_shuffled: Annotated[
        bool,
        typer.Option("--shuffled", help="Write them in random order, for a small data.window."),
    ] = False,
) -> None:
    """Copy image files into tar files and index them.

    Files are copied byte for byte, in order and with their classes, in WebDataset's layout.
    data=shards:OUT reads them, and a run on them equals the run on the folder, unless --shuffled.
    """
    from dseqjepa.data.shards.pack import pack

    paths = pack(
        folder.expanduser(),
        out.expanduser(),
        size=size * 10**6,
        seed=0 if is_shuffled else None,
        tell=print,
    )
    print(f"written: {len(paths)} tar files; data=shards:{out} reads them")


@shards.command("index", epilog=examples("shards index my_shards"))
def index_shards(
    place: Annotated[
        str, typer.Argument(metavar="FOLDER|URL", help="Where tar files or image files are.")
    ],
    workers: Annotated[int, typer.Option(help="The number of tar files read at once.", min=1)] = 1,
) -> None:
    """Index existing tar files, once.

    Each file is read from beginning to end. The same command resumes where it was stopped. A URL is
    a folder, or PATTERN-{000..146}.tar where its server lists none. A folder of image files gets a
    list, so that a run need not inspect every file when it starts.
    """
    from dseqjepa.data.images import list_images
    from dseqjepa.data.shards.index import write_index
    from dseqjepa.files import visible

    folder = Path(place).expanduser()
    if folder.is_dir() and not visible(folder.glob("*.tar*")):
        print(f"{list_images(folder)} images listed; data={place} looks at none of them to start")
        return
    index = write_index(place, workers=workers, tell=print)
    print(
        f"{len(index.records_N)} images in {len(index.shards)} tar files, "
        f"{len(index.classes) or 'no'} classes; data=shards:{place} reads them"
    )


@shards.command("push", epilog=examples("shards push bucket_shards s3://pictures/mine"))
def push_shards(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Tar files with their index.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="A place such as s3://bucket/name.")],
) -> None:
    """Upload shards.

    Tar files that are already there, with the same images, are skipped; the index is copied last.
    """
    from dseqjepa.data.shards.push import push

    print(f"copied: {push(folder.expanduser(), url, tell=print)} files; data=shards:{url}")


@scenes.command(
    "export",
    epilog=examples(
        "scenes export imagenet mini/imagenet",
        "scenes export coco mini/coco count=60 val_count=20 seed=1",
    ),
)
def export_scenes(
    format: Annotated[
        str, typer.Argument(metavar="FORMAT", help="The name of a format: imagenet, coco, ...")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or an empty folder.")],
    settings: Settings = None,
    print_config: PrintConfig = False,
) -> None:
    """Write scenes in the format of a benchmark.

    size=64 count=200 val_count=50 seed=0 set the image size, the numbers of training and test
    images, and the seed. data=FORMAT:DIR reads them.
    """
    from dseqjepa.commands import MiniatureConfig

    config = MiniatureConfig.from_settings(settings or [])
    if print_config:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
        return
    from dseqjepa.data.miniatures.export import export

    export(format, folder.expanduser(), **config.model_dump())
    print(f"written: {config.count} + {config.val_count} scenes; data={format}:{folder} reads them")


@app.command(epilog=examples("settings method.regions"))
def settings(
    section: Annotated[
        str | None,
        typer.Argument(
            metavar="[SECTION|KEY]",
            help="A section or setting, such as data, method.regions, knn or optim.minutes; "
            "default: all.",
            autocompletion=_sections,
        ),
    ] = None,
) -> None:
    """Explain settings, with type, range and default.

    Sections are those of a config (data, model, method, optim, ...), an evaluation (knn, linear,
    ...), or embed, predict, scenes, import or export.
    """
    from dseqjepa.describe import describe_settings

    for line in describe_settings(section):
        print(line)


@app.command(epilog=examples("presets", "presets ijepa_vitb16_in1k"))
def presets(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="The preset to describe.", autocompletion=_presets),
    ] = None,
    print_config: PrintConfig = False,
) -> None:
    """List the presets, or describe one."""
    from dseqjepa.presets import describe, preset, preset_names

    if name is None:
        width = max(map(len, preset_names()))
        for key, line in preset_names().items():
            print(f"{key:{width}}  {line}")
    elif print_config:
        print(preset(name).to_yaml(), end="")
    else:
        print(describe(name))
