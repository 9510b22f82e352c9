"""What training shows while it goes: figures of steps and epochs, pictures, traces.

    metrics.jsonl             one row per stage, epoch and subset
    steps.jsonl               one row per logged step
    tensorboard/<stage>/      the same as TensorBoard's events, with pictures and traces

What a stage does again after a kill is taken out of all three before it is written again.
"""

import functools
import io
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np
import optax
from jaxtyping import Array, Float32, UInt8

from stf_jax import prepare, progress
from stf_jax.charts import literal_texts
from stf_jax.flow import flow_to_colour
from stf_jax.index import ClipEntry
from stf_jax.inputs import Batch
from stf_jax.metrics import Figures

# Steps of a start that are not traced: the first is compiled, the second fills queues.
_NOT_TRACED = 2
# Of the clips that are drawn: how many, frames of each, and px that each frame is high at least.
_CLIPS, _FRAMES, _HEIGHT = 3, 8, 96
# Above this many classes the confusion matrix has no room for figures in its cells.
_MAX_FIGURES = 20


@flax.struct.dataclass
class StepRecord:
    """What a training step tells beside the new state; scalars on the device, float32.

    Attributes:
      loss: mean loss of the batch, before the update.
      clips: clips in the batch; rows that only fill it up do not count.
      gradient_norms: Euclidean norm of the gradient of each sub-network, before clipping.
      update_norms: of what the step adds to its parameters.
    """

    # As in `metrics.Sums`, leaves may stand for arrays.
    loss: Any
    clips: Any
    gradient_norms: Any
    update_norms: Any


def norms_of_parts(tree: Mapping[str, Any]) -> dict[str, Array]:
    """The Euclidean norm of all numbers of each sub-network: of each top-level name of a tree."""
    return {name: optax.tree.norm(part) for name, part in tree.items()}


# --- rows ------------------------------------------------------------------------------------


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a JSONL file."""
    with open(path, "a", encoding="utf-8") as log:
        log.write("".join(f"{json.dumps(row)}\n" for row in rows))


def forget_rows(path: Path, stage: str, step: int) -> None:
    """Takes out what a stage wrote after a step: it will be done, and written, again."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append((line, json.loads(line)))
        except ValueError:
            continue  # half a line, torn by a kill
    kept = [line for line, row in rows if row["stage"] != stage or row["step"] <= step]
    prepare.write_aside(path, "".join(f"{line}\n" for line in kept).encode())


class Events:
    """Writes TensorBoard's event files in a thread of its own.

    Neither the import of TensorBoard nor drawing keeps the training waiting. A folder that cannot
    be written to is told once and does not end a run: all figures are in the JSONL files too.
    """

    def __init__(self, folder: Path, first_step: int):
        """Begins a file; readers drop what earlier files hold from `first_step` on."""
        self._folder = folder
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._file: Any = None
        self._failed = False
        self._numbers = self._do(self._open, first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers by their tags, such as 'loss/train'."""
        self._numbers = self._do(self._write_scalars, step, time.time(), dict(values))

    def picture(self, step: int, tag: str, draw: Callable[[], UInt8[np.ndarray, "h w 3"]]) -> None:
        """Adds a picture, drawn later by `draw`, which must not look at anything that changes."""
        self._do(self._write_picture, step, time.time(), tag, draw)

    def wait(self) -> None:
        """Returns when all numbers are in the file; pictures may still be drawn."""
        self._numbers.result()

    def close(self) -> None:
        """Writes what is left and ends the thread."""
        self._worker.shutdown()
        if self._file is not None:
            self._file.close()

    def _do(self, work: Callable[..., None], *arguments: Any) -> Future[None]:
        return self._worker.submit(self._unless_failed, work, *arguments)

    def _unless_failed(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            work(*arguments)
        except Exception as error:  # whatever it is, it must neither end a run nor be silent
            self._failed = True
            progress.say(
                f"{self._folder}: TensorBoard's events are not written any more "
                f"({type(error).__name__}: {error}). Training goes on, and the next start tries "
                "again; the figures are in steps.jsonl and metrics.jsonl."
            )

    def _open(self, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files in the order of their names: it must not depend on a clock that
        # was set back between two starts.
        stamps = [p.name.split(".")[3] for p in self._folder.glob("events.out.tfevents.*")]
        stamp = max(time.time_ns(), *(int(s) + 1 for s in stamps if s.isdigit()), 0)
        name = f"events.out.tfevents.{stamp:019d}.{socket.gethostname()}"
        # Without a buffer: a kill takes nothing away that was written.
        self._file = open(self._folder / name, "xb", buffering=0)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=first_step, session_log=start))

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self._file).write(event.SerializeToString())

    def _write_scalars(self, step: int, now: float, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        rows = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(wall_time=now, step=step, summary=Summary(value=rows)))

    def _write_picture(
        self, step: int, now: float, tag: str, draw: Callable[[], np.ndarray]
    ) -> None:
        from PIL import Image
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        pixels, png = draw(), io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        image = Summary.Image(
            height=pixels.shape[0],
            width=pixels.shape[1],
            colorspace=3,
            encoded_image_string=png.getvalue(),
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._write(Event(wall_time=now, step=step, summary=summary))


class Monitor:
    """Tells what one stage does, in rows and events; in the first process only."""

    def __init__(self, workdir: Path, stage: str, *, step: int, every: int):
        """Forgets what the stage will do again.

        Args:
          workdir: the run's folder.
          stage: its name.
          step: steps done.
          every: every so many steps one is logged.
        """
        self._stage, self._every = stage, every
        self._epochs, self._steps = workdir / "metrics.jsonl", workdir / "steps.jsonl"
        self._writes = jax.process_index() == 0
        self._clips, self._waiting = 0, 0.0
        self._since: float | None = None
        if self._writes:
            # With no step saved nothing stands, not even what was told before the first one.
            last = step or -1
            for path in (self._epochs, self._steps):
                forget_rows(path, stage, last)
            self._events = Events(workdir / "tensorboard" / stage, last + 1)

    def begin_epoch(self) -> None:
        """Rates are measured anew: neither validation nor the compilation of a step slow them."""
        self._since = None

    def step(
        self,
        record: StepRecord,
        *,
        step: int,
        epoch: int,
        top1: float,
        learning_rate: float,
        waiting_seconds: float,
    ) -> None:
        """Takes in a step; writes it down if it is its turn.

        Args:
          record: what the step told. Its norms may be on the device: reading them there takes time,
            and is done only for what is written.
          step: steps done, this one included.
          epoch: its epoch, from 1.
          top1: training accuracy of the epoch so far.
          learning_rate: of this step.
          waiting_seconds: for clips, over the whole stage so far.
        """
        self._clips += int(record.clips)
        if self._writes and step % self._every == 0:
            known = jax.device_get(record)
            row = {
                "stage": self._stage,
                "kind": "step",
                "epoch": epoch,
                "step": step,
                "loss": float(known.loss),
                "top1": top1,
                "learning_rate": learning_rate,
                "gradient_norm": {k: float(v) for k, v in known.gradient_norms.items()},
                "update_norm": {k: float(v) for k, v in known.update_norms.items()},
                **self._rates(waiting_seconds),
                "memory_mb": memory_mb(),
            }
            append_rows(self._steps, [row])
            self._events.scalars(step, _tagged(row))
        if self._since is None or step % self._every == 0:
            self._since, self._clips = time.monotonic(), 0
            self._waiting = waiting_seconds

    def _rates(self, waiting_seconds: float) -> dict[str, float | None]:
        """Since the last logged step, or since the first one of the epoch: None at that one."""
        if self._since is None:
            return {"clips_per_second": None, "waiting_share": None}
        seconds = time.monotonic() - self._since
        return {
            "clips_per_second": self._clips / seconds,
            "waiting_share": (waiting_seconds - self._waiting) / seconds,
        }

    def sample_clips(self, batch: Batch, entries: Sequence[ClipEntry], flow_bound: float) -> None:
        """Draws the first clips of a stage: frames above, flow in colours below.

        Args:
          batch: as the network gets it, divided among devices, with its flow.
          entries: what `Batch.entry` points into.
          flow_bound: speed of the full colour, px per frame.
        """
        if not self._writes:
            return
        # The rows of one device: of a batch that processes share no one has all.
        rgb, fields, mask, numbers = (
            np.array(rows.addressable_data(0))[:_CLIPS]
            for rows in (batch.rgb, batch.flow, batch.mask, batch.entry)
        )
        centre = fields.shape[2] // 4 * 2
        flow = fields[:, :, centre : centre + 2].transpose(0, 1, 3, 4, 2)
        for row in np.flatnonzero(mask):
            draw = functools.partial(clip_picture, rgb[row], flow[row], flow_bound)
            self._events.picture(0, f"clips/{row + 1}: {entries[numbers[row]].video_id}", draw)

    def epoch(
        self,
        rows: Sequence[Mapping[str, Any]],
        figures: Figures | None,
        class_names: Sequence[str],
    ) -> None:
        """Writes an epoch down.

        Args:
          rows: one per subset: see `train._Loop._row`.
          figures: of the validation; None without.
          class_names: the names behind its confusion matrix.
        """
        if not self._writes:
            return
        append_rows(self._epochs, rows)
        step = rows[0]["step"]
        told = {f"epoch {k}/{row['kind']}": row[k] for row in rows for k in ("loss", "top1")}
        self._events.scalars(step, told)
        if figures is not None:
            matrix = np.array(figures.confusion)
            draw = functools.partial(confusion_picture, matrix, class_names)
            self._events.picture(step, "confusion matrix", draw)

    def wait(self) -> None:
        """To be called before a save: figures of what will not be done again are on disk then."""
        if self._writes:
            self._events.wait()

    def close(self) -> None:
        """Writes what is left."""
        if self._writes:
            self._events.close()


def _tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step's row by TensorBoard's tags: before the slash, a section."""
    tags = {
        "step/loss": row["loss"],
        "step/top1 of the epoch so far": row["top1"],
        "step/learning rate": row["learning_rate"],
        "speed/clips per second": row["clips_per_second"],
        "speed/share of time waiting for clips": row["waiting_share"],
        "speed/peak memory in MiB": row["memory_mb"],
        **{f"gradient norm/{name}": norm for name, norm in row["gradient_norm"].items()},
        **{f"update norm/{name}": norm for name, norm in row["update_norm"].items()},
    }
    return {tag: value for tag, value in tags.items() if value is not None}


def memory_mb() -> int:
    """The most memory in use so far, MiB: on the fullest device, or of the process on a CPU."""
    told = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in told if stats and "peak_bytes_in_use" in stats]
    return round(max(peaks) / 2**20) if peaks else progress.peak_memory_mb()


# --- pictures --------------------------------------------------------------------------------


def clip_picture(
    frames: UInt8[np.ndarray, "t h w 3"], flow: UInt8[np.ndarray, "t h w 2"], bound: float
) -> UInt8[np.ndarray, "hh ww 3"]:
    """Frames of a clip in a row, below each the flow that starts at it in Middlebury's colours.

    Args:
      frames: the clip; at most 8 frames at equal distances are drawn.
      flow: quantised u and v.
      bound: largest speed that can be stored, drawn in full colour, px per frame.
    """
    shown = np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)
    larger = -(-_HEIGHT // frames.shape[1])
    columns = []
    for number in shown:
        pair = [frames[number], flow_to_colour(_motion(flow[number], bound), bound)]
        pair = [picture.repeat(larger, 0).repeat(larger, 1) for picture in pair]
        columns.append(np.concatenate([np.pad(p, ((2, 2), (2, 2), (0, 0))) for p in pair]))
    return np.concatenate(columns, axis=1)


def _motion(quantised: UInt8[np.ndarray, "h w 2"], bound: float) -> Float32[np.ndarray, "h w 2"]:
    """Px per frame, with both levels beside zero as no motion and the last as the bound."""
    levels = quantised - 127.5
    return ((levels - 0.5 * np.sign(levels)) / 127 * bound).astype(np.float32)


def confusion_picture(
    confusion: np.ndarray, class_names: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws a confusion matrix: a row per true class, in shares of its videos.

    Args:
      confusion: int `k k`, videos of class i taken for class j.
      class_names: in the order of the matrix.
    """
    with literal_texts():
        return _confusion_picture(confusion, class_names)


def _confusion_picture(confusion: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(class_names)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    few = count <= _MAX_FIGURES
    side = 3.5 + (0.45 if few else 0.13) * count
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9 if few else 6
    axes.set_xticks(range(count), class_names, rotation=90, fontsize=size)
    axes.set_yticks(range(count), class_names, fontsize=size)
    axes.set_xlabel("taken for")
    axes.set_ylabel("true class")
    right, total = int(confusion.trace()), int(confusion.sum())
    axes.set_title(f"{right} of {total} videos right", fontsize=10)
    if few:
        for i, j in zip(*np.nonzero(confusion), strict=True):
            ink = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(confusion[i, j]), ha="center", va="center", color=ink, fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# --- traces ----------------------------------------------------------------------------------


class Profiler:
    """Traces some training steps of a start, after the ones that compile and warm up."""

    def __init__(self, steps: int):
        """Asks for a number of steps; 0 traces nothing."""
        self._steps = steps
        self._seen = self._traced = 0
        self._folder: Path | None = None

    @contextmanager
    def step(self, folder: Path, number: int) -> Iterator[None]:
        """To be put around a training step.

        Args:
          folder: where a trace that begins here goes, in `plugins/profile/<time>`.
          number: of the step.
        """
        if not self._steps or jax.process_index():
            yield
            return
        if self._seen >= _NOT_TRACED and not self._traced:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of every function hides all else
            jax.profiler.start_trace(folder, profiler_options=options)
            self._folder = folder
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        self._seen += 1
        self._traced += self._folder is not None
        if self._traced == self._steps:
            self.close()

    def close(self) -> None:
        """Ends a trace under way, also where the steps of an epoch were fewer; says where it is."""
        if self._folder is None:
            return
        jax.profiler.stop_trace()
        traces = sorted(self._folder.glob("plugins/profile/*/*.trace.json.gz"))
        progress.say(
            f"trace of {self._traced} steps: {traces[-1]}. Open it at https://ui.perfetto.dev, or "
            f"`pip install xprof` and `tensorboard --logdir={self._folder}`, tab Profile."
        )
        self._folder = None

    def conclude(self) -> None:
        """Says so if there was nothing to trace."""
        if self._steps and not self._traced:
            progress.say(
                f"--profile: nothing was traced: this start did {self._seen} training steps, and "
                f"the first {_NOT_TRACED} of a start are left out"
            )
