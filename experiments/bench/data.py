"""The loader's speed on this machine, against a PyTorch DataLoader that does what peers do.

    python experiments/bench/data.py [--clips=48] [--rounds=5] [--work=runs/bench_data]

At paper scale: clips of 24 frames and 96 flow fields, 224x224. Ours: `stf_jax.pipeline.batches`,
from records to bytes on the device, where the rest is done. Theirs: a `DataLoader` with 2 workers
that decodes the source video with PyAV up to the last frame it needs, reads u and v of every field
from JPEG files of their own with OpenCV, and makes normalised float tensors of them. Two kinds:
  usual  frames to 340x256, flow stored at 340x256; the same corner of both, at one of four scales,
         to 224x224; flips: the recipe of the temporal segment networks and its descendants
  lean   frames straight to 224x224, flow stored at 224x224; nothing cut or flipped
Both sides draw their frames alike. Each has a process of its own and a fresh pass every time; the
two are timed in turn, from the first batch to the last. Needs `make install EXTRAS=bench` and
STF_DATA, which holds `ucf101_8`; without that it generates the demo's videos and says so.

Writes experiments/results/bench_data.csv; a case that is there already is replaced, others stay.
  case          what is timed; 'stage' rows are one clip's processor time, on one core, theirs
                those of the lean peer
  ours, theirs  medians; their spreads are half the ranges
  rounds        passes of each side; stages are of 12 clips
  ratio         ours / theirs, the median over pairs (of passes, one after the other; of clips):
                of clips/s above 1 is faster, of ms below 1
"""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

# Cards are not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.table import write_rows  # noqa: E402
from stf_jax import host  # noqa: E402

_CLIPS = flags.DEFINE_integer("clips", 48, "Videos of the set, and clips of a pass.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Passes of each side.")
_WORK = flags.DEFINE_string("work", "runs/bench_data", "Where records and flow files are kept.")
_OUT = flags.DEFINE_string("out", "experiments/results/bench_data.csv", "The table.")

BATCH, SIZE, FRAMES, FIELDS, WORKERS = 4, 224, 24, 4, 2
STAGED = 12  # clips whose stages are timed
PASSES = 3  # over the set, in one pass of ours: it is that much quicker
_USUAL, _SCALES = (256, 340), (1.0, 0.875, 0.75, 0.66)
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- the clips --------------------------------------------------------------------------------


def _settings(root: Path, name: str) -> Any:
    from configs import ucf101
    from stf_jax.run import Settings

    config = ucf101.get_config()
    config.data.update(name=name, root=str(root))
    # The loader does not care which algorithm made the flow; this one is there in a minute.
    config.records.update(root=str(Path(_WORK.value) / "records"), flow_algorithm="dis")
    config.batch_size = BATCH
    return Settings.of(config)


def prepare_clips() -> tuple[Any, Any, Any, str]:
    """Settings, index and records of the clips, and where they come from."""
    from stf_jax.datasets import load_index
    from stf_jax.records import prepare_records

    real = Path(os.environ.get("STF_DATA", "")) / "ucf101_8"
    if "STF_DATA" in os.environ and real.is_dir():
        settings, source = _settings(real, "ucf101"), "ucf101_8"
    else:
        print("STF_DATA/ucf101_8 is not there: timing generated videos of 96x96 px", flush=True)
        settings, source = _settings(Path(_WORK.value) / "demo", "demo"), "generated videos"
    index = load_index(settings.config.data)
    train = [entry for entry in index.entries if entry.subset == "train"]
    count = min(_CLIPS.value, len(train)) // BATCH * BATCH
    chosen = tuple(train[i * len(train) // count] for i in range(count))
    index = dataclasses.replace(index, entries=chosen)
    return settings, index, prepare_records(index, settings.records), source


def write_flow_files(records: Any, folder: Path, shape: tuple[int, int]) -> None:
    """Every stored field as two grey JPEG files, as peers keep them: `<record>/<u|v>_<k>.jpg`."""
    import cv2
    import tensorflow as tf

    for row in records.rows.values():
        place = folder / str(row.record)
        if not row.usable or (place / "done").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        fields = records.parse(tf.constant(records.read(row.record)))["flow"].numpy()
        for k, data in enumerate(fields):
            both: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
            for name, field in zip("uv", np.split(both, 2), strict=True):
                field = cv2.resize(field, shape[::-1], interpolation=cv2.INTER_LINEAR)
                quality = [cv2.IMWRITE_JPEG_QUALITY, records.settings.jpeg_quality]
                cv2.imwrite(str(place / f"{name}_{k}.jpg"), field, quality)
        (place / "done").touch()


def peer_videos(index: Any, records: Any, shape: tuple[int, int]) -> list["PeerVideo"]:
    """The clips as peers have them, with flow files of a shape."""
    folder = Path(_WORK.value) / f"flow_{records.folder.name}_{shape[0]}x{shape[1]}"
    write_flow_files(records, folder, shape)
    return [
        PeerVideo(str(index.path(entry)), row.num_frames, str(folder / str(row.record)))
        for entry in index.entries
        if (row := records.rows[entry.video_id]).usable
    ]


# --- theirs -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PeerVideo:
    """A video as peers have it: the file, its decoded frames, the folder of its flow files."""

    path: str
    num_frames: int
    flow: str


def peer_frames(num_frames: int, chance: np.random.Generator) -> np.ndarray:
    """The frames of a training clip, drawn as ours are: one stride of 2 to 10 that fits."""
    largest = max(1, (num_frames - 1) // (FRAMES - 1))
    stride = int(chance.integers(min(2, largest), min(10, largest) + 1))
    start = int(chance.integers(0, max(0, num_frames - 1 - (FRAMES - 1) * stride) + 1))
    return np.minimum(start + stride * np.arange(FRAMES), num_frames - 1)


def read_video(path: str, wanted: np.ndarray) -> list[np.ndarray]:
    """Decodes a video up to the last frame wanted, with PyAV."""
    import av

    needed, pictures = set(wanted.tolist()), {}
    with av.open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in needed:
                pictures[number] = frame.to_ndarray(format="rgb24")
            if number == wanted[-1]:
                break
    last = max(pictures)
    return [pictures[min(int(number), last)] for number in wanted]


def read_flow_files(folder: str, wanted: np.ndarray, num_frames: int) -> list[np.ndarray]:
    """The window of flow around each frame, u and v of each field, from their files."""
    import cv2

    window = wanted[:, None] + np.arange(-FIELDS // 2, FIELDS // 2)[None]
    window = np.clip(window, 0, num_frames - 2)
    names = [f"{folder}/{name}_{k}.jpg" for k in window.ravel() for name in "uv"]
    fields: list[Any] = [cv2.imread(name, cv2.IMREAD_GRAYSCALE) for name in names]
    return fields


def peer_transforms(
    frames: list[np.ndarray], fields: list[np.ndarray], usual: bool, chance: np.random.Generator
) -> tuple[Any, Any]:
    """Float tensors of a clip, `t 3 h w` and `t 2L h w`."""
    import cv2
    import torch

    shape = _USUAL if usual else (SIZE, SIZE)
    frames = [cv2.resize(frame, shape[::-1], interpolation=cv2.INTER_LINEAR) for frame in frames]
    if usual:
        side = round(min(shape) * chance.choice(_SCALES))
        top, left = (int(chance.choice([0, room, room // 2])) for room in np.subtract(shape, side))
        frames, fields = (
            [cv2.resize(x[top : top + side, left : left + side], (SIZE, SIZE)) for x in pictures]
            for pictures in (frames, fields)
        )
    rgb, flow = np.stack(frames), np.stack(fields)
    flow = flow.reshape(FRAMES, 2 * FIELDS, *flow.shape[1:])
    if usual and chance.random() < 0.5:
        rgb, flow = rgb[:, :, ::-1], flow[..., ::-1].copy()
        flow[:, 0::2] = 255 - flow[:, 0::2]
    colours = torch.from_numpy(np.ascontiguousarray(rgb.transpose(0, 3, 1, 2))).float()
    mean, deviation = (torch.tensor(x).view(1, 3, 1, 1) for x in (_MEAN, _DEVIATION))
    motion = torch.from_numpy(np.ascontiguousarray(flow)).float()
    return colours.div_(255).sub_(mean).div_(deviation), motion.sub_(128).div_(128)


class PeerClips:
    """The map-style data set of the DataLoader."""

    def __init__(self, videos: Sequence[PeerVideo], usual: bool) -> None:
        self._videos, self._usual = videos, usual

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, number: int) -> tuple[Any, Any, int]:
        video = self._videos[number]
        chance = np.random.default_rng(number)
        wanted = peer_frames(video.num_frames, chance)
        frames = read_video(video.path, wanted)
        fields = read_flow_files(video.flow, wanted, video.num_frames)
        return *peer_transforms(frames, fields, self._usual, chance), number


def _theirs(videos: Sequence[PeerVideo], usual: bool) -> Callable[[], Iterator[Any]]:
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)  # inherited by the workers, which share the cores
    loader: Any = torch.utils.data.DataLoader(
        PeerClips(videos, usual),
        batch_size=BATCH,
        shuffle=True,
        num_workers=WORKERS,
        drop_last=True,
    )
    return lambda: iter(loader)


# --- ours -------------------------------------------------------------------------------------


def _ours(folder: Path, settings: Any, entries: Any, whole: bool) -> Callable[[], Iterator[Any]]:
    import jax

    from stf_jax.inputs import network_input
    from stf_jax.parallel import divided_ahead
    from stf_jax.pipeline import batches, steps_per_epoch
    from stf_jax.records import open_records

    records = open_records(folder, settings.records)
    made = jax.jit(lambda batch: network_input(batch, settings.inputs, settings.augment))

    def read() -> Iterator[Any]:
        steps = PASSES * steps_per_epoch(len(entries), BATCH)
        stream = batches(
            records, entries, settings.sampling, batch_size=BATCH, train=True, stop_step=steps
        )
        for _, batch in divided_ahead(stream, settings.mesh):
            yield jax.block_until_ready(made(batch) if whole else batch)

    return read


# --- timing -----------------------------------------------------------------------------------


def _work(pipe: Connection, make: Callable[..., Callable[[], Iterator[Any]]], args: Any) -> None:
    """A process of one side: clips per second of a pass, whenever it is told to."""
    read = make(*args)
    for _ in read():
        pass  # a pass that does not count: compiles, and fills the page cache
    pipe.send("ready")
    while pipe.recv() == "run":
        stream = read()
        next(stream)
        began = time.perf_counter()
        count = sum(BATCH for _ in stream)
        pipe.send(count / (time.perf_counter() - began))


def time_in_turn(ours: Any, theirs: Any, rounds: int) -> dict[str, list[float]]:
    """Clips per second of both sides, a pass each in turn."""
    context = get_context("spawn")
    pipes, processes = {}, []
    for name, arguments in {"ours": ours, "theirs": theirs}.items():
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=_work, args=(end, *arguments)))
        processes[-1].start()
        assert pipes[name].recv() == "ready"
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        for name in pipes if number % 2 == 0 else reversed(pipes):
            pipes[name].send("run")
            rates[name].append(pipes[name].recv())
    for name, process in zip(pipes, processes, strict=True):
        pipes[name].send("end")
        process.join()
    return rates


def _milliseconds(run: Callable[[], Any]) -> float:
    """Processor time of a call, of all its threads; the first call is not counted."""
    run()
    began = time.process_time()
    run()
    return 1e3 * (time.process_time() - began)


Stages = dict[str, tuple[int, Callable[[], Any]]]  # clips at a time, and the work


def _each(stages_of: Callable[[Any], Stages], items: Sequence[Any]) -> dict[str, list[float]]:
    """Milliseconds that each stage takes for each item."""
    took: dict[str, list[float]] = {}
    for item in items:
        for name, (clips, run) in stages_of(item).items():
            took.setdefault(name, []).append(_milliseconds(run) / clips)
    return took


def our_stages(settings: Any, records: Any, count: int) -> dict[str, list[float]]:
    """Milliseconds of each stage of each of some clips."""
    import jax
    import tensorflow as tf

    from stf_jax import pipeline
    from stf_jax.inputs import Batch, network_input
    from stf_jax.parallel import divide

    graph: dict[str, Any] = {"autograph": False, "reduce_retracing": True}
    parse = tf.function(records.parse, **graph)
    picture = tf.TensorSpec([SIZE, SIZE, 3], tf.uint8)

    @tf.function(**graph)
    def colours(frames: Any) -> Any:
        return tf.map_fn(lambda data: pipeline._jpeg(data, 3), frames, fn_output_signature=picture)

    @tf.function(**graph)
    def fields(flow: Any, windows: Any) -> Any:
        stacks = pipeline._stored_fields(flow, windows, None, SIZE)
        return tf.reshape(stacks, [FRAMES, 2 * FIELDS, SIZE, SIZE])

    made = jax.jit(lambda batch: network_input(batch, settings.inputs, settings.augment))

    def stages(row: Any) -> Stages:
        serialised = records.read(row.record)
        example = parse(tf.constant(serialised))
        chance = np.random.default_rng(row.record)
        wanted = tf.constant(peer_frames(row.num_frames, chance), "int32")
        windows = pipeline.flow_indices(wanted, tf.constant(row.num_frames), settings.sampling)
        shown = tf.gather(example["frames"], wanted)
        clip = colours(shown), fields(example["flow"], windows)
        clips = tf.data.Dataset.from_tensors(clip).repeat(BATCH).batch(BATCH)
        rgb, flow = (x.numpy() for x in next(iter(clips)))
        numbers, seeds = np.zeros(BATCH, np.int32), np.zeros((BATCH, 2), np.uint32)
        arrays: Any = (rgb, flow, numbers, numbers == 0, numbers, seeds)
        batch = Batch(*arrays)
        divided = divide(batch, settings.mesh)
        return {
            "read": (1, lambda: records.read(row.record)),
            "parse": (1, lambda: parse(tf.constant(serialised))),
            "decode frames": (1, lambda: colours(shown)),
            "decode flow": (1, lambda: fields(example["flow"], windows)),
            "batch": (BATCH, lambda: next(iter(clips))),
            "copy to the device": (BATCH, lambda: divide(batch, settings.mesh)),
            "transform": (BATCH, lambda: jax.block_until_ready(made(divided))),
        }

    return _each(stages, [row for row in records.rows.values() if row.usable][:count])


def their_stages(videos: Sequence[PeerVideo], usual: bool) -> dict[str, list[float]]:
    """Milliseconds of what the workers do with each of some clips."""

    def stages(video: PeerVideo) -> Stages:
        chance = np.random.default_rng(video.num_frames)
        wanted = peer_frames(video.num_frames, chance)
        frames = read_video(video.path, wanted)
        fields = read_flow_files(video.flow, wanted, video.num_frames)
        return {
            "decode frames": (1, lambda: read_video(video.path, wanted)),
            "decode flow": (1, lambda: read_flow_files(video.flow, wanted, video.num_frames)),
            "transform": (1, lambda: peer_transforms(frames, fields, usual, chance)),
        }

    return _each(stages, videos)


def _row(case: str, unit: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """A line of the table; either side may be empty."""
    row: dict[str, Any] = {"case": case, "ours": "", "theirs": "", "ratio": "", "unit": unit}
    for name, values in (("ours", ours), ("theirs", theirs)):
        row[name] = round(statistics.median(values), 2) if values else ""
        spread = (max(values) - min(values)) / 2 if values else 0.0
        row[f"{name}_spread"] = round(spread, 2) if values else ""
    if ours and theirs:
        paired = [a / b for a, b in zip(ours, theirs, strict=True)]
        row["ratio"] = round(statistics.median(paired), 3)
    return row


def _origin() -> dict[str, Any]:
    from stf_jax.main import environment

    facts = environment()
    return {
        "rounds": _ROUNDS.value,
        "commit": facts["commit"],
        "machine": facts["machine"],
    }


def main(argv: Sequence[str]) -> None:
    """Prepares the clips, times every case and writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit("error: PyTorch is missing: make install EXTRAS=bench")
    import cv2

    cv2.setNumThreads(1)
    settings, index, records, source = prepare_clips()
    origin = _origin()
    where = "" if source == "ucf101_8" else f" ({source})"
    entries = [entry for entry in index.entries if records.rows[entry.video_id].usable]
    ours = records.folder, settings, entries
    usual, lean = (peer_videos(index, records, shape) for shape in (_USUAL, (SIZE, SIZE)))
    for case, videos, whole in (
        ("usual peer", usual, False),
        ("lean peer", lean, False),
        ("lean peer, our transform on this CPU too", lean, True),
    ):
        sides = (_ours, (*ours, whole)), (_theirs, (videos, videos is usual))
        row = _row(f"loader: {case}{where}", "clips/s", **time_in_turn(*sides, _ROUNDS.value))
        print(row, flush=True)
        write_rows(Path(_OUT.value), [row | origin])
    theirs = their_stages(lean[:STAGED], usual=False)
    for name, values in our_stages(settings, records, STAGED).items():
        row = _row(f"loader stage: {name}{where}", "ms/clip", values, theirs.get(name, []))
        print(row, flush=True)
        write_rows(Path(_OUT.value), [row | origin])


if __name__ == "__main__":
    host.use_huge_pages()  # as `stf_jax.main` gives itself; they help both sides
    app.run(main)
