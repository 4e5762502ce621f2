"""The command line: parse, pick a preset, call. Torch is loaded only by what needs it.

Exit codes: 0 done; 2 bad arguments, config or data, before anything is written; 1 the run failed;
143 stopped by SIGTERM or SIGHUP with a checkpoint on disk.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from dseqjepa import ending
from dseqjepa.arguments import as_options, flag, resume_of, row_and_column, split_settings
from dseqjepa.ending import fail
from dseqjepa.errors import InputError, did_you_mean
from dseqjepa.kernels import keep_few

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Self-supervised image pre-training by ordered latent prediction.",
)

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="data=PATH out=DIR section.key=value ..."),
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Show the config, do nothing.")]

TASK_HELP = (
    "knn, linear, attentive, dense, lowshot, clevr, finetune, detection, segmentation, discovery"
)
RUN_KEYS = ("out", "resume", "overwrite", "init_from", "allow_changed")


def main() -> None:
    """Run a command; an error that the user can mend is one line and an exit code."""
    keep_few()
    words = sys.argv[1:] or ["--help"]
    ending.run(app, as_options(typer.main.get_command(app), words))


@app.command()
def pretrain(
    preset: Annotated[str, typer.Argument(metavar="PRESET|FILE.yaml")],
    settings: Settings = None,
    print_config: PrintConfig = False,
) -> None:
    """Pre-train an encoder: dseqjepa pretrain vitt8_64 data=my_pictures out=runs/mine"""
    from dseqjepa.presets import load_config

    run, overrides = split_settings(settings or [], RUN_KEYS)
    config = load_config(preset, overrides)
    if print_config:
        print(config.to_yaml(), end="")
        return
    if "out" not in run:
        raise InputError("out=DIR is missing: name the folder in which the run is kept")

    from dseqjepa.tasks.online import online_probe
    from dseqjepa.train.pretrain import open_training_source
    from dseqjepa.train.pretrain import pretrain as train
    from dseqjepa.train.runtime import Stopped, connect, place, spread
    from dseqjepa.viz.regions import training_picture

    devices = config.runtime.devices
    if devices > 1 and place().world == 1:
        sys.exit(spread(devices, sys.argv[1:], config.runtime.timeout_s + 5))
    runtime = connect(config)
    source = runtime.ranks.together(lambda: open_training_source(config))

    try:
        train(
            config,
            Path(run["out"]).expanduser(),
            resume=resume_of(run),
            overwrite=flag(run, "overwrite"),
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
        sys.exit(143)
    except KeyboardInterrupt:
        fail("interrupted; resume=true goes on from the last checkpoint", 130)
    runtime.ranks.close()


@app.command("verify-resume")
def verify_resume(
    preset: Annotated[str, typer.Argument(metavar="PRESET|FILE.yaml")],
    settings: Settings = None,
    print_config: PrintConfig = False,
) -> None:
    """Prove on this machine that a run goes on exactly: dseqjepa verify-resume vitt8_64 data=DIR

    Trains a few steps at once, and as many in two processes of which the second goes on from the
    first's checkpoint; compares every tensor and every metric. Exit code 1 where they differ.
    steps=N says how many.
    """
    from dseqjepa.presets import load_config

    own, overrides = split_settings(settings or [], ("steps",))
    config = load_config(preset, overrides)
    if print_config:
        print(config.to_yaml(), end="")
        return
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
    print("exact: a run that was stopped goes on as if it had not been")


@app.command()
def preflight(
    preset: Annotated[str, typer.Argument(metavar="PRESET|FILE.yaml")],
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.png", help="Draw some images' regions.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all that is found there.")
    ] = None,
    on: Annotated[
        str | None, typer.Option("--on", help="A device that is not here: a100, h100, h200, l40s.")
    ] = None,
    devices: Annotated[int, typer.Option(help="--on: how many of them.", min=1)] = 1,
    print_config: PrintConfig = False,
) -> None:
    """What a run will cost here, before it starts: dseqjepa preflight vitt8_64 data=my_pictures

    --on h100 --devices 64 works out what it would cost there, on ImageNet-1k, without data.
    """
    from dseqjepa.presets import load_config

    run, overrides = split_settings(settings or [], ("init_from",))
    config = load_config(preset, overrides)
    if print_config:
        print(config.to_yaml(), end="")
        return
    if on is not None:
        from dseqjepa.forecast import preflight_on

        preflight_on(config, on, devices, report=json_file)
        return
    from dseqjepa.preflight import preflight as look

    init_from = Path(run["init_from"]).expanduser() if "init_from" in run else None
    look(config, init_from=init_from, out=out, report=json_file)


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(metavar="TASK", help=TASK_HELP)],
    backbone: Annotated[
        str,
        typer.Argument(
            metavar="BACKBONE",
            help="A run, a checkpoint, a weights file, timm:NAME, random:PRESET or pixels.",
        ),
    ],
    settings: Settings = None,
    print_config: PrintConfig = False,
) -> None:
    """Evaluate an encoder: dseqjepa evaluate knn runs/mine data=my_pictures

    preset=quick is the small version of a protocol; out=FILE.json says where the result goes.
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
    from dseqjepa.train.runtime import Stopped

    out = Path(own["out"]).expanduser() if "out" in own else None
    resume = own.get("resume", "").lower() == "auto" or flag(own, "resume", " or auto")
    overwrite = flag(own, "overwrite")
    try:
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
    except Stopped:
        sys.exit(143)


def _picture_of(task: str) -> Any:
    """What draws a result; None where there is nothing to draw, or nothing to draw with."""
    try:
        from dseqjepa.viz.results import draw_result
    except InputError as error:
        print(f"without a picture: {error}")
        return None
    return partial(draw_result, task)


@app.command()
def results(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Runs, or folders that hold results.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write .md, .csv or .json.")
    ] = None,
) -> None:
    """Put the results of evaluations side by side: dseqjepa results runs --out table.md

    One column a protocol, data included, and one line a recipe; runs that differ in nothing but
    their seed are one number, with mean and 95 % interval.
    """
    from dseqjepa.tasks.table import collect, write_table

    table = collect([folder.expanduser() for folder in folders])
    print(table.markdown(), end="")
    if out is not None:
        write_table(table, out.expanduser())
        print(f"written: {out}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="I-JEPA's .pth.tar, a ViT's .pth")],
    settings: Settings = None,
) -> None:
    """Bring in an encoder of another project: dseqjepa import IN1K-vit.h.14.pth.tar out=runs/h14

    Only tensors are read, nothing in the file is run. The result can be evaluated and shown, and
    init_from starts a run from it. heads=N, image_size=[H,W], mean=[R,G,B] and std=[R,G,B] say what
    shapes do not.
    """
    run, overrides = split_settings(settings or [], ("out", "overwrite"))
    if "out" not in run:
        raise InputError("out=DIR is missing: name the folder in which the encoder is kept")
    from dseqjepa.train.foreign import ImportConfig, described, import_encoder

    config = import_encoder(
        file.expanduser(),
        Path(run["out"]).expanduser(),
        ImportConfig.from_settings(overrides),
        overwrite=flag(run, "overwrite"),
        tell=print,
    )
    print(f"imported to {run['out']}: {described(config)}")


@app.command()
def export(
    encoder: Annotated[
        str, typer.Argument(metavar="ENCODER", help="A run, a checkpoint or a weights file.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="hf, timm, onnx or torch.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or an empty folder.")],
    settings: Settings = None,
) -> None:
    """Hand an encoder to another library: dseqjepa export runs/mine --to hf --out mine-hf

    The folder is loaded by that library in a process of its own, and compared with the encoder on
    images of the training (data=PATH names others), before it is handed over. weights=context and
    image_size=[H,W] say which encoder, and the size that its positions are stored for.
    """
    own, overrides = split_settings(settings or [], ("data",))
    from dseqjepa.export.write import ExportConfig, export_encoder

    config = ExportConfig.from_settings(overrides)
    export_encoder(encoder, to, out.expanduser(), config, data=own.get("data"), tell=print)
    print(f"written: {out}")


@app.command()
def embed(
    encoder: Annotated[
        str,
        typer.Argument(
            metavar="ENCODER", help="A run, a checkpoint, a weights file, timm:NAME or pixels."
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
        int, typer.Option(metavar="K", help="Find the K most alike images of each.")
    ] = 0,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Find near-duplicates; threshold=COSINE.")
    ] = False,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Score how far an image is from all others.")
    ] = False,
    clusters: Annotated[int, typer.Option(metavar="K", help="Sort images into K clusters.")] = 0,
    map: Annotated[str, typer.Option(metavar="pca|umap", help="Place images on a plane.")] = "",
) -> None:
    """Write features as a table: dseqjepa embed runs/mine my_pictures out=mine.parquet

    out=FILE ends in .parquet, .npy (with a .csv beside it) or .csv. features=last|last4|cls|block7
    and per=image|patch say which. What is asked for by options stands in further columns, and in
    a page beside the table. The same command goes on where it was stopped.
    """
    is_setting = re.compile(r"[a-z_]+=")
    run, overrides = split_settings(
        [word for word in words or [] if is_setting.match(word)], ("data", "out", "overwrite")
    )
    if "out" not in run:
        raise InputError("out=FILE is missing: name the table, such as out=features.parquet")
    from dseqjepa.embeddings.findings import Asked
    from dseqjepa.embeddings.run import EmbedConfig, embed_images

    written = embed_images(
        encoder,
        EmbedConfig.from_settings(overrides),
        Path(run["out"]).expanduser(),
        images=[word for word in words or [] if not is_setting.match(word)],
        data=run.get("data"),
        overwrite=flag(run, "overwrite"),
        asked=Asked(neighbours, duplicates, outliers, clusters, map),
    )
    for path in written:
        print(f"written: {path}")


@app.command()
def show(
    checkpoint: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the pictures.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="[IMAGES]...", help="Image files, folders, or what data= takes."),
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            help="Which pictures, with commas: sheets, regions, clusters, pca, similarity, "
            "neighbours, scatter, curves; or all."
        ),
    ] = "sheets,regions",
    beside: Annotated[
        Path | None, typer.Option(help="A second run or checkpoint to compare with.")
    ] = None,
    patch: Annotated[
        str | None, typer.Option(metavar="ROW,COL", help="similarity: to which patch, from 0,0.")
    ] = None,
    clusters: Annotated[int, typer.Option(help="clusters: how many.")] = 4,
    checkpoints: Annotated[
        int, typer.Option(help="clusters, pca, similarity: the most checkpoints of the run.")
    ] = 5,
    data: Annotated[
        str | None,
        typer.Option(help="neighbours, scatter: the data set; the run's own if not given."),
    ] = None,
    sample: Annotated[int, typer.Option(help="The most images of --data.")] = 2000,
    limit: Annotated[int, typer.Option(help="The most images of a folder in IMAGES.")] = 8,
    ending: Annotated[str, typer.Option("--format", help="png, pdf or svg.")] = "png",
) -> None:
    """Draw what an encoder sees: dseqjepa show runs/mine my_pictures --out pictures"""
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


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page to write.")],
    images: Annotated[int, typer.Option(help="Images in each run's region lens.")] = 6,
) -> None:
    """Show in one HTML file what runs learnt: dseqjepa report runs/mine --out mine.html"""
    from dseqjepa.report.page import write_report

    written = write_report([run.expanduser() for run in runs], out.expanduser(), images=images)
    print(f"written: {written}")


@app.command()
def demo(
    settings: Settings = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the demo's files.")] = Path("demo"),
    print_config: PrintConfig = False,
) -> None:
    """Train on the embedded scenes for some minutes and show what was learnt. No network, CPU."""
    from dseqjepa.presets import load_config

    config = load_config("dseq_vitt_demo", settings or [])
    if print_config:
        print(config.to_yaml(), end="")
        return
    from dseqjepa.demo import run_demo

    run_demo(config, out)


scenes = typer.Typer(rich_markup_mode=None, help="The embedded scenes as files.")
app.add_typer(scenes, name="scenes")


shards = typer.Typer(rich_markup_mode=None, help="Images in tar files, for large data sets.")
app.add_typer(shards, name="shards")


@shards.command("pack")
def pack_shards(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Any folder of images.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or an empty folder.")],
    size: Annotated[int, typer.Option(help="Megabytes of a tar file.", min=1)] = 500,
    is_shuffled: Annotated[
        bool, typer.Option("--shuffled", help="In a random order, for a small data.window.")
    ] = False,
) -> None:
    """Copy image files into tar files and index them: dseqjepa shards pack pictures shards

    Byte for byte, in their order, with their classes, as WebDataset has it. data=shards:OUT reads
    them, and a run on them is the run on the folder, unless --shuffled.
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


@shards.command("index")
def index_shards(
    place: Annotated[
        str, typer.Argument(metavar="FOLDER|URL", help="Where tar files lie, or files of images.")
    ],
    workers: Annotated[int, typer.Option(help="Tar files read at once.", min=1)] = 1,
) -> None:
    """Index tar files that others wrote, once: dseqjepa shards index webdataset/train

    Each is read from beginning to end. What a command that was stopped has read is kept. A URL is
    a folder, or PATTERN-{000..146}.tar where its server lists none. A folder of image files gets a
    list of them, with which a start looks at no file.
    """
    from dseqjepa.data.images import list_images
    from dseqjepa.data.shards.index import write_index

    folder = Path(place).expanduser()
    if folder.is_dir() and not any(folder.glob("*.tar*")):
        print(f"{list_images(folder)} images listed; data={place} looks at none of them to start")
        return
    index = write_index(place, workers=workers, tell=print)
    print(
        f"{len(index.records_N)} images in {len(index.shards)} tar files, "
        f"{len(index.classes) or 'no'} classes; data=shards:{place} reads them"
    )


@shards.command("push")
def push_shards(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Tar files with their index.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="Such as s3://bucket/name.")],
) -> None:
    """Copy shards to where machines can fetch them: dseqjepa shards push my_shards s3://mine/all

    Tar files that lie there already, by name and size, are not copied again; the index comes last.
    """
    from dseqjepa.data.shards.push import push

    print(f"copied: {push(folder.expanduser(), url, tell=print)} files; data=shards:{url}")


@scenes.command("export")
def export_scenes(
    format: Annotated[str, typer.Argument(metavar="FORMAT", help="imagenet, coco, clevr, ...")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or an empty folder.")],
    settings: Settings = None,
    print_config: PrintConfig = False,
) -> None:
    """Write scenes in a benchmark's own format: dseqjepa scenes export coco mini/coco

    size=64 count=200 val_count=50 seed=0 say how large and how many. data=FORMAT:DIR reads them.
    """
    from dseqjepa.config import MiniatureConfig

    config = MiniatureConfig.from_settings(settings or [])
    if print_config:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
        return
    from dseqjepa.data.miniatures.export import export

    export(format, folder.expanduser(), **config.model_dump())
    print(f"written: {config.count} + {config.val_count} scenes; data={format}:{folder} reads them")


@app.command()
def settings(
    section: Annotated[
        str | None,
        typer.Argument(
            metavar="[SECTION]", help="data, method.regions, knn, ...; all if left out."
        ),
    ] = None,
) -> None:
    """Say what each setting means, its type, range and default: dseqjepa settings method.regions

    Sections are those of a config (`pretrain`), or the names of evaluations (`evaluate`).
    """
    from dseqjepa.describe import describe_settings

    for line in describe_settings(section):
        print(line)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    print_config: PrintConfig = False,
) -> None:
    """List the presets, or say what one is."""
    from dseqjepa.presets import describe, preset, preset_names

    if name is None:
        width = max(map(len, preset_names()))
        for key, line in preset_names().items():
            print(f"{key:{width}}  {line}")
    elif print_config:
        print(preset(name).to_yaml(), end="")
    else:
        print(describe(name))
